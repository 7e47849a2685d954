//! The model and its tuning methods on the GPU that is not there: against the golden cases, and against the CPU.

use std::cell::Cell;

use candle_core::{DType, Device};
use glmddp::kernels::cuda;
use glmddp::model::{ChatGlm2, Recompute};

use crate::golden::{Case, Comparison, cases};
use crate::golden_batch::{Batch, check_variant, eval_hooks, model};
use crate::golden_subjects::{SUBJECTS, Subject};
use crate::libraries::{checked, inside, this_test};

/// Variants without padding, which a GPU does not compute.
const VARIANTS: [&str; 2] = ["plain", "pos_shift"];

/// Cases whose sizes the kernels take, each with its model on the GPU.
fn on_gpu(dtype: DType, body: impl Fn(&Case, &ChatGlm2)) {
    let device = cuda::tensor_device(0).unwrap();
    for case in cases() {
        let on_cpu = model(&case, DType::F32, &Device::Cpu);
        if ![64, 128].contains(&on_cpu.config.kv_channels) {
            println!("golden {:<12} NOT RUN: the kernels take heads of 64 and 128, found {}", case.name(), on_cpu.config.kv_channels);
            continue;
        }
        body(&case, &model(&case, dtype, &device));
    }
}

/// Methods that a GPU computes, by golden file.
fn subjects() -> impl Iterator<Item = &'static Subject> {
    SUBJECTS.iter().filter(|subject| subject.file.starts_with("ptuning") || subject.file.contains("lora"))
}

/// Logits, losses and gradients of the base and of all methods, in `dtype`.
fn check(dtype: DType) {
    fn compare<'c>(case: &'c Case, file: &str, dtype: DType) -> Option<Comparison<'c>> {
        match dtype {
            DType::F32 => case.compare(file),
            DType::BF16 => case.compare_in_16_bits(file, 1.0),
            // It has three bits more.
            _ => case.compare_in_16_bits(file, 0.25),
        }
    }
    let num_compared = Cell::new(0);
    on_gpu(dtype, |case, model| {
        let inputs = case.tensors("inputs").unwrap();
        let mut c = compare(case, "forward", dtype).unwrap();
        for variant in VARIANTS {
            check_variant(&mut c, model, None, &Batch::new(&inputs, variant), variant, Recompute::None, &str::to_owned);
        }
        c.finish();
        for subject in subjects() {
            for recompute in [Recompute::None, Recompute::Block] {
                let Some(mut c) = compare(case, subject.file, dtype) else {
                    println!("golden {:<12} {} NOT RUN: there is nothing to compare it with", case.name(), subject.file);
                    continue;
                };
                let method = (subject.build)(model, &c.golden, subject.file);
                for variant in subject.variants.iter().filter(|variant| VARIANTS.contains(variant)) {
                    let (hooks, batch) = (eval_hooks(&*method), Batch::new(&inputs, variant));
                    let name = |parameter: &str| (subject.gradient)(variant, parameter);
                    let found = check_variant(&mut c, model, Some((&*method, hooks)), &batch, variant, recompute, &name);
                    assert!(!found.is_empty(), "{} {variant}: no gradient was compared", subject.file);
                    num_compared.set(num_compared.get() + found.len());
                }
                c.finish();
            }
        }
    });
    assert!(num_compared.get() > 0, "no case has heads that the kernels take");
}

#[test]
fn golden_base_prefix_and_lora_in_f32() {
    inside(this_test!(), checked(), || check(DType::F32));
}

#[test]
fn golden_base_prefix_and_lora_in_bf16_are_as_near_as_pytorch() {
    inside(this_test!(), checked(), || check(DType::BF16));
}

#[test]
fn golden_base_prefix_and_lora_in_f16_are_four_times_as_near_as_pytorch_in_bf16() {
    inside(this_test!(), checked(), || check(DType::F16));
}
