//! Errors of the host, planted into the calls of a real training step: each is named by the checked stand-in, or the step's values tell.

use candle_core::{DType, Device, Tensor};
use cudarc::driver::CudaContext;
use glmddp::config::plan::LossMean;
use glmddp::dist::{Reduction, Solo};
use glmddp::kernels::host::on_host;
use glmddp::kernels::ids::Ids;
use glmddp::kernels::{cuda, embedding};
use glmddp::model::Recompute;
use glmddp::optim::AdamWConfig;
use glmddp::telemetry::PhaseTimer;
use glmddp::train::TrainError;
use glmddp::train::optimizer::Optimizer;
use glmddp::train::requests::Wish;
use glmddp::train::step::{StepSettings, Trainer, gradient_sum};

use crate::faults::said;
use crate::libraries::{again, checked, is_inside, text, this_test};
use crate::passes::{methods, model, rows};

/// What is planted, as the stand-in's `plant.h` has it.
const PLANT: &str = "GLMDDP_STANDIN_PLANT";
/// Which method's step: its place among [`methods`].
const METHOD: &str = "GLMDDP_TEST_METHOD";
/// How far a step's figures may be off those of a CPU, relative: f32 sums in another order.
const TOLERANCE: f64 = 1e-5;

const PREFIX: usize = 0;
const LORA: usize = 2;

/// An error, what it is, and in whose step it is made.
type Planted = (&'static str, usize, &'static str);

/// Of calls that are made once a slot, there are two.
const PLANTED: [Planted; 35] = [
    ("the ids of a slot are not sent", PREFIX, "leave_out:send:2"),
    ("a table of tiles is sent 4 bytes short", PREFIX, "short:send:6:4"),
    ("page-locked memory is written again before its copy has run", PREFIX, "touched:send:2"),
    ("ids are sent on another stream, without an event", PREFIX, "elsewhere:send:2"),
    ("the losses are read before they are there", PREFIX, "early:down:2"),
    ("a moment is not cleared", PREFIX, "leave_out:fill:2"),
    ("a gradient is not cleared before it is added to", PREFIX, "leave_out:fill:4"),
    ("a gradient is cleared on another stream", PREFIX, "elsewhere:fill:4"),
    ("a slot's gradient is not copied before another is added to it", PREFIX, "leave_out:copy:5"),
    ("a slot's gradient is copied on another stream", PREFIX, "elsewhere:copy:5"),
    ("memory is freed on another stream", PREFIX, "elsewhere:free:40"),
    ("a kernel is not started", PREFIX, "leave_out:launch rotary_f32:2"),
    ("the kernel of the norm is not started", PREFIX, "leave_out:launch norm_f64:1"),
    ("the second slot is not added", PREFIX, "leave_out:launch add_f32:1"),
    ("a kernel is started on another stream", PREFIX, "elsewhere:launch swiglu_fwd_f32:1"),
    ("the optimizer steps on another stream", PREFIX, "elsewhere:launch adamw_step_f32:1"),
    ("a kernel that adds is started twice", PREFIX, "twice:launch rms_norm_bwd_f32:1"),
    ("a tensor is freed before the kernel that reads it", PREFIX, "freed:launch rms_norm_fwd_f32:2:0"),
    ("the positions are those of the slot before", PREFIX, "stale:launch rotary_f32:4:8"),
    ("the ids are those of the slot before", PREFIX, "stale:launch embedding_gather:3:8"),
    ("input and output are each other's", PREFIX, "swapped:launch swiglu_fwd_f32:1"),
    ("a row too many", PREFIX, "add:launch rotary_f32:1:40:1"),
    ("an address 16 bytes further on", PREFIX, "add:launch cross_entropy_grad_f32:1:0:16"),
    ("four parameters fewer", PREFIX, "add:launch adamw_step_f32:1:48:-4"),
    ("the mean's divisor is another", PREFIX, "add:launch scale_f32:1:16:8388608"),
    ("a block too few", PREFIX, "grid:launch embedding_gather:1:-1"),
    ("a product is not computed", PREFIX, "leave_out:product TN 128 12 256:1"),
    ("a product is computed on another stream", PREFIX, "elsewhere:product TN 128 12 256:1"),
    ("a wrong leading dimension", PREFIX, "leading:product TN 512 12 128:1:4"),
    ("the bias twice", PREFIX, "biased:product TN 512 12 128:1:2"),
    ("the bias not at all", PREFIX, "biased:product TN 512 12 128:1:0"),
    ("the residual twice", PREFIX, "beta:product TN 128 12 256:1:200"),
    ("a forgotten cast", PREFIX, "halves:product TN 688 12 128:1"),
    ("a dropped scale of LoRA", LORA, "leave_out:launch scale_f32:1"),
    ("dropout's mask of another place", LORA, "add:launch dropout_f32:1:56:1"),
];

/// Loss, norm, moments and parameters after a step.
fn figures(which: usize, device: &Device) -> Result<Vec<Vec<f64>>, TrainError> {
    let model = model(DType::F32, device);
    let (_, mut method) = methods(&model).swap_remove(which);
    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let mut optimizer = Optimizer::replicated(config, method.params().layout().num_elements(), device)?;
    let sum = gradient_sum(&Solo, Reduction::SlotTree, 2, &*method, &optimizer)?;
    let settings = StepSettings { recompute: Recompute::None, loss_mean: LossMean::Token, max_grad_norm: None };
    let slots = [(0, rows(&model, &[3, 9], 1)), (1, rows(&model, &[11], 2))];
    let before: Vec<f32> = on_host(method.params().flat())?.to_vec1()?;
    let mut trainer = Trainer { model: &model, method: &mut *method, optimizer: &mut optimizer, sum: &sum, settings, wish: &Wish::default };
    let outcome = trainer.step(&slots, 1e-3, &PhaseTimer::default())?;
    let mut figures = vec![vec![outcome.loss], vec![outcome.grad_norm]];
    for (_, moment) in optimizer.state(optimizer.shard())? {
        figures.push(on_host(&moment)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect());
    }
    let after: Vec<f32> = on_host(method.params().flat())?.to_vec1()?;
    // How many have moved: by how much follows from the moments.
    figures.push(vec![before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64]);
    Ok(figures)
}

fn compare(which: usize) -> Result<String, TrainError> {
    let expected = figures(which, &Device::Cpu)?;
    let device = cuda::tensor_device(0)?;
    let found = figures(which, &device)?;
    // What else is queued, on any stream.
    let context = CudaContext::new(0).map_err(candle_core::Error::wrap)?;
    context.synchronize().map_err(candle_core::Error::wrap)?;
    let mut off = Vec::new();
    for ((what, a), b) in ["loss", "norm", "exp_avg", "exp_avg_sq", "moved parameters"].into_iter().zip(&expected).zip(&found) {
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut a.iter().copied());
        if error.is_nan() || error > TOLERANCE {
            off.push(what);
        }
    }
    Ok(if off.is_empty() { "as on a CPU".to_owned() } else { format!("other values than on a CPU: {}", off.join(", ")) })
}

/// Without the numbers of operations, bytes and threads, which change with each launch that is added somewhere.
fn without_numbers(text: &str) -> String {
    let words = text.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let word = |word: &str| {
        let number = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) {
            format!("N{}", &word[number.len()..])
        } else {
            word.to_owned()
        }
    };
    words.map(word).collect()
}

#[test]
fn planted_errors_of_the_host_are_found() {
    if is_inside() {
        let which = std::env::var(METHOD).unwrap().parse().unwrap();
        let found = compare(which).unwrap_or_else(|error| format!("the step fails: {error}"));
        println!("\n> {}", found.lines().next().unwrap_or_default());
        return;
    }
    let test = this_test!();
    let of = |which: usize, planted: &str| {
        let variables = [(METHOD, &*which.to_string()), (PLANT, planted), ("GLMDDP_STANDIN_SEED", "0")];
        let output = text(&again(test, checked(), &variables));
        assert!(!output.contains("nothing came of"), "{planted}: {output}");
        let driver = said(&output);
        let of_values = output.lines().find_map(|line| line.strip_prefix("> ")).map(str::to_owned);
        if driver == "nothing" {
            of_values.unwrap_or_else(|| panic!("{planted}: {output}"))
        } else {
            without_numbers(driver.split("; ").next().unwrap_or_default())
        }
    };
    assert_eq!((of(PREFIX, ""), of(LORA, "")), ("as on a CPU".to_owned(), "as on a CPU".to_owned()));
    let table: Vec<String> = PLANTED.iter().map(|(what, which, planted)| format!("{what}: {}", of(*which, planted))).collect();
    insta::assert_snapshot!("planted_errors", table.join("\n"));
    assert!(table.iter().all(|line| !line.ends_with(": as on a CPU")));
}

/// More ids than the first block of page-locked memory holds, and nobody waits: no block is written again before its copies have run.
fn send_much() -> Result<bool, TrainError> {
    let device = cuda::tensor_device(0)?;
    let of = |device: &Device| {
        let table = Tensor::arange(0f32, 64.0, &Device::Cpu)?.reshape((16, 4))?.to_device(device)?;
        let rows = (0..150u32).map(|i| embedding::gather(&table, &Ids::new(vec![i % 16, (i + 5) % 16])));
        let rows = rows.collect::<candle_core::Result<Vec<_>>>()?;
        rows.iter().map(|rows| on_host(rows)?.to_vec2::<f32>()).collect::<candle_core::Result<Vec<_>>>()
    };
    Ok(of(&device)? == of(&Device::Cpu)?)
}

#[test]
fn blocks_of_page_locked_memory_are_not_written_while_the_gpu_reads_them() {
    if is_inside() {
        println!("\n> {}", send_much().unwrap());
        return;
    }
    let test = this_test!();
    let of = |planted: &str| text(&again(test, checked(), &[(PLANT, planted), ("GLMDDP_STANDIN_SEED", "0")]));
    assert!(of("").contains("> true"));
    let output = of("leave_out:record:1");
    assert!(
        said(&output).starts_with("the host touches byte 0 of pinned memory before it waited for copy to the GPU of 8 bytes"),
        "{output}"
    );
}
