//! What the checked stand-in must find in a kernel, and that it finds nothing where nothing is.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::libraries::{again, build, inside, is_inside, text, this_test};
use crate::raw::Raw;

const FAULTS: [&str; 18] = [
    "good",
    "warp_with_sync",
    "read_behind_the_end",
    "write_before_the_start",
    "shared_behind_the_end",
    "read_of_nothing",
    "read_of_nothing_shared",
    "read_before_the_barrier",
    "write_after_others_read",
    "two_write_one",
    "warp_without_sync",
    "blocks_share",
    "barrier_of_some",
    "shuffle_of_some",
    "load_between_bounds",
    "copy_without_wait",
    "copy_read_too_early",
    "copy_without_barrier",
];

/// The checked stand-in with the kernels of `faults.cu`.
pub fn libraries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| built("standin-faults-checked", true))
}

/// As [`libraries`], not checked.
pub fn plain_libraries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| built("standin-faults", false))
}

fn built(name: &str, is_checked: bool) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (to, sources) = (folder.join(name), folder.join(format!("{name}-sources")));
    if !is_inside() {
        std::fs::create_dir_all(&sources).unwrap();
        for file in ["tests/standin/faults.cu", "src/kernels/device.cuh"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
            std::fs::copy(&path, sources.join(path.file_name().unwrap())).unwrap();
        }
        build(&to, is_checked, &sources).unwrap_or_else(|error| panic!("{error}"));
    }
    to
}

/// What the stand-in says, a line each.
pub fn said(output: &str) -> String {
    let lines: Vec<&str> = output.lines().filter_map(|line| line.strip_prefix("stand-in driver: ")).collect();
    if lines.is_empty() { "nothing".to_owned() } else { lines.join("; ") }
}

/// Names the kernel that a process of its own starts.
const KERNEL: &str = "GLMDDP_TEST_KERNEL";

#[test]
fn every_fault_of_a_kernel_is_named() {
    if is_inside() {
        let kernel = std::env::var(KERNEL).unwrap();
        let raw = Raw::new();
        let (x, y) = (raw.alloc(raw.a), raw.alloc(raw.a));
        raw.up(x, &[1; 128], raw.a).unwrap();
        let blocks = if kernel == "blocks_share" { 2 } else { 1 };
        raw.launch_as(&kernel, [x, y], blocks, 64, 256, raw.a).unwrap();
        _ = raw.end();
        return;
    }
    let test = this_test!();
    let of = |kernel: &str| {
        let output = again(test, libraries(), &[(KERNEL, kernel), ("GLMDDP_STANDIN_SEED", "0")]);
        assert!(output.status.success(), "{}", text(&output));
        said(&text(&output))
    };
    let all: Vec<String> = FAULTS.iter().map(|kernel| format!("{kernel}: {}", of(kernel))).collect();
    insta::assert_snapshot!(all.join("\n"));
}

#[test]
fn launch_that_a_gpu_would_refuse_is_refused() {
    inside(this_test!(), libraries(), || {
        let raw = Raw::new();
        let (x, y) = (raw.alloc(raw.a), raw.alloc(raw.a));
        let refused = |kernel: &str, blocks: u32, threads: u32, shared_bytes: u32| {
            let error = raw.launch_as(kernel, [x, y], blocks, threads, shared_bytes, raw.a).unwrap_err();
            format!("{:?}", error.0)
        };
        let all = [
            refused("missing", 1, 64, 256),
            refused("good", 1, 128, 256),
            refused("good", 1, 48, 256),
            refused("good", 1, 64, 49 << 10),
            refused("good", 0, 64, 256),
        ];
        let expected = ["NOT_FOUND", "LAUNCH_OUT_OF_RESOURCES", "INVALID_VALUE", "INVALID_VALUE", "INVALID_VALUE"];
        assert_eq!(all, expected.map(|code| format!("CUDA_ERROR_{code}")));
    });
}
