//! Two clones that share a cache: each builds, lints and runs its own program.

use std::path::Path;
use std::process::Command;

const MANIFEST: &str = "[package]\nname = \"glmddp\"\nversion = \"0.1.0\"\nedition = \"2024\"\nrust-version = \"1.90\"\n";

/// A clone with this project's choice of folders and a program of one line, older than anything that is built here.
fn clone(folder: &Path, program: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, text) in [
        ("Cargo.toml", MANIFEST.to_owned()),
        ("src/main.rs", program.to_owned()),
        ("scripts/folders.sh", std::fs::read_to_string(root.join("scripts/folders.sh")).unwrap()),
    ] {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_500_000_000);
        std::fs::File::options().append(true).open(&path).unwrap().set_modified(old).unwrap();
    }
}

/// Runs a line of shell in a clone as scripts do behind `source scripts/setup.sh`: whether it ended well, and its output.
fn run(clone: &Path, cache: &Path, line: &str) -> (bool, String) {
    let mut bash = Command::new("bash");
    bash.args(["-c", &format!("root=$PWD && source scripts/folders.sh && {line}")]).current_dir(clone).env("GLMDDP_CACHE_DIR", cache);
    for name in ["CARGO_TARGET_DIR", "CARGO_BUILD_BUILD_DIR", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET_DIR"] {
        bash.env_remove(name);
    }
    let out = bash.output().unwrap();
    (out.status.success(), [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat())
}

#[test]
fn two_clones_that_share_a_cache_build_and_lint_their_own_program() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, cache] = ["one", "two", "cache"].map(|name| dir.path().join(name));
    clone(&one, "fn main() { println!(\"one\"); }\n");
    clone(&two, "fn main() { let unused = 2; println!(\"two\"); }\n");
    let build = "cargo build --quiet --offline && \"$CARGO_TARGET_DIR/debug/glmddp\"";
    let lint = "cargo clippy --quiet --offline -- -D warnings --cfg \"$clone\"";
    // In turn, and once more when both were built.
    for _ in 0..2 {
        for (clone, says, is_clean) in [(&one, "one", true), (&two, "two", false)] {
            let (is_built, said) = run(clone, &cache, build);
            assert!(is_built && said.contains(says), "{says}: {said}");
            let (is_good, said) = run(clone, &cache, lint);
            assert_eq!((is_good, said.contains("unused")), (is_clean, !is_clean), "{says}: {said}");
        }
    }
    // What is compiled is in one folder for both.
    assert!(cache.join("build/debug").is_dir(), "{:?}", std::fs::read_dir(&cache).unwrap().collect::<Vec<_>>());
}
