//! A slot forward and backward on the GPU that is not there: the same bits each time, and what a CPU computes.

use candle_core::{DType, Device, Tensor};
use glmddp::data::MicroBatch;
use glmddp::digest::sha256_hex;
use glmddp::kernels::{cuda, elementwise, matmul};
use glmddp::model::{ChatGlm2, Recompute};
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::{FinetuningType, MethodPlan, PeftMethod, create};
use glmddp::rng::{KeyedRng, Stream};
use glmddp::train::backprop::{SlotPass, forward_backward};

use crate::golden::cases;
use crate::golden_batch;
use crate::libraries::{checked, in_two_orders, inside, is_inside, this_test};

/// The committed case with heads of 64.
pub fn model(dtype: DType, device: &Device) -> ChatGlm2 {
    let case = cases().into_iter().find(|case| case.name() == "case5").expect("tests/golden/case5");
    golden_batch::model(&case, dtype, device)
}

/// Rows of several lengths, whose places in the training stream are beyond 32 bits.
fn slot(model: &ChatGlm2) -> MicroBatch {
    MicroBatch { stream_positions: vec![7, 0, (1 << 33) + 5], ..rows(model, &[5, 70, 33], 0) }
}

/// Made-up rows of `lengths`, which `key` chooses.
pub fn rows(model: &ChatGlm2, lengths: &[u32], key: u64) -> MicroBatch {
    let (rng, vocabulary) = (KeyedRng::new(3, Stream::DemoData, key), model.config.padded_vocab_size as u32);
    let mut batch = MicroBatch {
        row_bounds: vec![0],
        stream_positions: (0..lengths.len() as u64).map(|row| 8 * key + row).collect(),
        sample_indices: (0..lengths.len()).collect(),
        ..MicroBatch::default()
    };
    for &len in lengths {
        let first = batch.ids.len() as u32;
        batch.ids.extend((0..len).map(|i| rng.below(u64::from(first + i), vocabulary)));
        batch.positions.extend(0..len);
        batch.targets.extend((2..len).map(|i| (first + i - 1, batch.ids[(first + i) as usize])));
        batch.row_bounds.push(batch.ids.len());
    }
    batch
}

/// Every method that a GPU computes, with dropout, no parameter of it 0.
pub fn methods(model: &ChatGlm2) -> Vec<(&'static str, Box<dyn PeftMethod>)> {
    let prefix = |projection| MethodKeys {
        pre_seq_len: Some(17),
        prefix_projection: Some(projection),
        prefix_dropout: Some(0.2),
        ..MethodKeys::default()
    };
    let lora = MethodKeys { lora_target: Some("all".to_owned()), lora_dropout: Some(0.2), ..MethodKeys::default() };
    let all = [
        ("prefix", FinetuningType::PtuningV2, prefix(false)),
        ("projected prefix", FinetuningType::PtuningV2, prefix(true)),
        ("LoRA", FinetuningType::Lora, lora),
    ];
    let made = all.into_iter().map(|(name, kind, keys)| {
        let mut method = create(&MethodPlan::resolve(kind, &keys).unwrap(), model, 5).unwrap();
        let values = KeyedRng::new(11, Stream::ParameterInit, 1).normal(method.params().layout().num_elements());
        let values = Tensor::new(values.iter().map(|x| 0.05 * x).collect::<Vec<f32>>(), &Device::Cpu).unwrap();
        method.params_mut().load_flat(&values).unwrap();
        method.refresh().unwrap();
        (name, method)
    });
    made.collect()
}

fn pass(model: &ChatGlm2, method: &dyn PeftMethod, recompute: Recompute) -> SlotPass {
    forward_backward(model, method, &slot(model), recompute).unwrap()
}

/// The parameters' gradient.
fn gradient(method: &dyn PeftMethod, pass: &SlotPass) -> Vec<f32> {
    method.param_grad(&pass.site_grad).unwrap().to_vec1().unwrap()
}

fn bits(method: &dyn PeftMethod, pass: &SlotPass) -> String {
    let values = [pass.read_nll().unwrap(), gradient(method, pass)].concat();
    sha256_hex(values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
}

#[test]
fn slot_has_the_same_bits_in_each_run_and_with_recompute() {
    let test = this_test!();
    if is_inside() {
        let device = cuda::tensor_device(0).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let model = model(dtype, &device);
            for (name, method) in methods(&model) {
                let of = |recompute| bits(&*method, &pass(&model, &*method, recompute));
                let (first, second, recomputed) = (of(Recompute::None), of(Recompute::None), of(Recompute::Block));
                assert_eq!((&first, &first), (&second, &recomputed), "{name}, {dtype:?}");
                println!("\n> {name}, {dtype:?}: {first}");
            }
        }
        return;
    }
    let [first, second] = in_two_orders(test);
    assert_eq!((first.len(), &first), (6, &second));
}

/// Dropout's masks are the CPU's: else the gradients would have nothing to do with each other.
#[test]
fn slot_in_f32_is_what_a_cpu_computes() {
    inside(this_test!(), checked(), || {
        let (on_cpu, on_gpu) = (model(DType::F32, &Device::Cpu), model(DType::F32, &cuda::tensor_device(0).unwrap()));
        for ((name, expected), (_, found)) in methods(&on_cpu).into_iter().zip(methods(&on_gpu)) {
            let (of_cpu, of_gpu) = (pass(&on_cpu, &*expected, Recompute::None), pass(&on_gpu, &*found, Recompute::None));
            for (what, a, b) in [
                ("losses", of_cpu.read_nll().unwrap(), of_gpu.read_nll().unwrap()),
                ("gradient", gradient(&*expected, &of_cpu), gradient(&*found, &of_gpu)),
            ] {
                let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let error = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut a.iter().copied());
                println!("{name}: {what} off by {error:.1e}");
                assert!(error < 2e-6, "{name}: {what} off by {error:e}");
            }
        }
    });
}

/// The driver wants a context in each thread.
#[test]
fn op_that_allocates_nothing_runs_on_a_thread_of_its_own() {
    inside(this_test!(), checked(), || {
        let device = cuda::tensor_device(0).unwrap();
        let of = |value: f32| Tensor::from_vec(vec![value; 64], (8, 8), &device).unwrap();
        let (sum, a, b) = (of(0.5), of(2.0), of(3.0));
        std::thread::scope(|scope| scope.spawn(|| matmul::tn_add_(&sum, &a, &b)).join().unwrap()).unwrap();
        std::thread::scope(|scope| scope.spawn(|| elementwise::assign_(&a, &sum)).join().unwrap()).unwrap();
        assert_eq!(a.to_vec2::<f32>().unwrap(), vec![vec![0.5 + 8.0 * 6.0; 8]; 8]);
    });
}
