//! candle's CUDA device, and the commands that need a GPU. `scripts/gpu_rehearsal.sh` runs all cases of the kernels there.

use candle_core::{DType, Device, Tensor};
use glmddp::kernels::check::FILES;

use crate::libraries::{inside, plain, run, text, this_test};

const GLMDDP: &str = env!("CARGO_BIN_EXE_glmddp");

#[test]
fn device_of_candle_keeps_tensors_and_gives_them_back() {
    inside(this_test!(), plain(), || {
        let device = Device::new_cuda(0).unwrap();
        let x = Tensor::new(&[1f32, 2., 3., 4., 5., 6.], &device).unwrap().reshape((2, 3)).unwrap();
        assert_eq!(x.to_vec2::<f32>().unwrap(), [[1., 2., 3.], [4., 5., 6.]]);
        assert_eq!(x.narrow(0, 1, 1).unwrap().to_vec2::<f32>().unwrap(), [[4., 5., 6.]]);
        let zeros = Tensor::zeros((4, 4), DType::BF16, &device).unwrap().to_device(&Device::Cpu).unwrap();
        assert_eq!(zeros.to_dtype(DType::F32).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        device.synchronize().unwrap();
        // A kernel of candle's own, which the stand-in does not have: the training step is to launch none.
        let error = x.exp().unwrap_err().to_string();
        assert!(error.contains("CUDA_ERROR_NOT_FOUND"), "{error}");
    });
}

#[test]
fn kernels_equal_the_cpus_code() {
    let output = run(plain(), GLMDDP, &["kernels", "check", "--repeat", "2", "--every", "30"], &[]);
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    assert!(said.starts_with("GPU 0 (stand-in, compute capability 9.0), kernels built with CUDA "), "{said}");
    assert_eq!(said.matches(" cases equal the CPU's code").count(), FILES.len(), "{said}");
}

#[test]
fn kernel_that_faults_is_named_and_the_rest_of_its_file_is_not_run() {
    let fault = [("GLMDDP_STANDIN_FAULT", "swiglu_bwd")];
    let output = run(plain(), GLMDDP, &["kernels", "check", "--repeat", "1", "--file", "swiglu"], &fault);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = text(&output);
    for part in ["CUDA_ERROR_ILLEGAL_ADDRESS", "the last kernel started was `swiglu_bwd_", "NOT RUN: "] {
        assert!(said.contains(part), "no `{part}` in:\n{said}");
    }
}

#[test]
fn memory_that_is_not_enough_is_an_error_that_names_the_buffer() {
    let output = run(plain(), GLMDDP, &["kernels", "bench", "--small"], &[("GLMDDP_STANDIN_BYTES", "100000")]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("of 65536 bytes: cuMemAllocAsync failed: CUDA_ERROR_OUT_OF_MEMORY"), "{}", text(&output));
}

#[test]
fn bench_gives_a_line_of_json_a_kernel() {
    let output = run(plain(), GLMDDP, &["kernels", "bench", "--small", "--json"], &[]);
    assert!(output.status.success(), "{}", text(&output));
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<serde_json::Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["is_rehearsal"], true);
    assert!(lines.len() > 25 && lines[1..].iter().all(|line| line["median_ms"].as_f64().unwrap() > 0.0), "{stdout}");
}

#[test]
fn check_of_no_case_fails_and_says_so() {
    let output = run(plain(), GLMDDP, &["kernels", "check", "--only", "of no case"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("warning: no case of any file has a name with `of no case`"), "{}", text(&output));
}
