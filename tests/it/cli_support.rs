//! Runs the program as a user does.

use std::process::{Command, Output};

/// What a run of the program gave.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs `glmddp ARGS` outside of any launcher, in `dir`.
pub fn glmddp_in(dir: &std::path::Path, args: &[&str]) -> Ran {
    glmddp_under(dir, &[], args)
}

/// The same, with these environment variables.
pub fn glmddp_under(dir: &std::path::Path, variables: &[(&str, &str)], args: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_glmddp"));
    command.args(args).current_dir(dir).env_remove("RUST_BACKTRACE");
    for name in glmddp::dist::launcher::variables() {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied());
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    Ran { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
}

/// Runs `glmddp ARGS`, words with blanks between them, in `dir`.
pub fn run(dir: &std::path::Path, args: &str) -> Ran {
    glmddp_in(dir, &args.split_whitespace().collect::<Vec<_>>())
}

/// The same, of what must succeed.
pub fn ok(dir: &std::path::Path, args: &str) -> Ran {
    let ran = run(dir, args);
    assert_eq!(ran.code, 0, "{args}: {}", ran.stderr);
    ran
}

/// The same, of what must be refused with nothing printed: what is said on stderr.
pub fn refused(dir: &std::path::Path, args: &str) -> String {
    let ran = run(dir, args);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args}: {}", ran.stderr);
    ran.stderr
}

/// A folder with a tiny model in `model`, and in `data` so many rows and held-out rows.
pub fn project(rows: usize, dev_rows: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    ok(dir.path(), "init-model --preset tiny --output_dir model");
    ok(dir.path(), &format!("demo-data --output_dir data --rows {rows} --dev_rows {dev_rows}"));
    dir
}

/// The same, in a folder that has one file.
pub fn glmddp_with(name: &str, text: &str, args: &[&str]) -> Ran {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join(name), text).expect("the file is written");
    glmddp_in(dir.path(), args)
}
