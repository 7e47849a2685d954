//! The commands for kernels, on a machine or in a build without a GPU.

use std::path::Path;

use crate::cli_support::{Ran, glmddp_in};

#[test]
#[cfg(not(feature = "cuda"))]
fn kernels_without_cuda_are_refused_with_a_hint() {
    for command in ["check", "bench"] {
        let Ran { code, stderr, .. } = glmddp_in(Path::new("."), &["kernels", command]);
        assert_eq!(code, 2);
        insta::assert_snapshot!("kernels_without_cuda", stderr);
    }
}

#[test]
fn traffic_of_a_step_is_what_the_document_says() {
    let Ran { code, stdout, .. } = glmddp_in(Path::new("."), &["kernels", "traffic"]);
    assert_eq!(code, 0);
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/kernels/PERFORMANCE.md")).unwrap();
    assert!(document.contains(stdout.trim()), "src/kernels/PERFORMANCE.md is to have:\n{stdout}");
}

#[test]
fn times_stand_beside_those_of_pytorch() {
    let dir = tempfile::tempdir().unwrap();
    let bench = r#"{"gpu": "GPU 0 (made up)", "product_library": "cuBLASLt 13.1.0", "is_rehearsal": false, "copy_gb_s": 1000.0, "product_tflop_s": 100.0}
{"name": "swiglu_fwd", "work": {"bytes": 900000000}, "median_ms": 1.0, "host_was_late": false}
{"name": "attention_fwd prefix 0", "work": {"flops": 50000000000}, "median_ms": 1.0, "host_was_late": true}
"#;
    let torch = r#"{"about": {"torch": "2.11"}, "median_ms": {"swiglu_fwd": 1.5}, "host_late": ["swiglu_fwd"], "failed": {"attention": "RuntimeError: no kernel"}}"#;
    std::fs::write(dir.path().join("bench.jsonl"), bench).unwrap();
    std::fs::write(dir.path().join("torch.json"), torch).unwrap();
    let Ran { code, stdout, stderr, .. } = glmddp_in(dir.path(), &["kernels", "report", "bench.jsonl", "--torch", "torch.json"]);
    assert_eq!(code, 0, "{stderr}");
    insta::assert_snapshot!("kernels_report", stdout);
    let missing = glmddp_in(dir.path(), &["kernels", "report", "torch.json"]);
    insta::assert_snapshot!("kernels_report_of_another_file", missing.stderr);
}
