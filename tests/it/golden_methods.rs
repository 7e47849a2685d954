//! Every tuning method against the golden cases: logits, losses, gradients and training steps.

use std::collections::BTreeSet;

use candle_core::Tensor;
use glmddp::model::{ChatGlm2, Recompute};
use glmddp::peft::lora::Lora;
use glmddp::peft::{ExportContext, PeftMethod};

use crate::golden::{Case, cases};
use crate::golden_batch::{Batch, check_variant, eval_hooks};
use crate::golden_model::model;
use crate::golden_subjects::*;
use crate::golden_train::{Steps, check_steps, micro_batch};

/// Training steps of one file; learning rate and number of steps stand in its JSON.
pub struct Training {
    pub file: &'static str,
    /// File with the parameters at the start; none: the base's.
    initial: Option<&'static str>,
    build: Build,
    /// Parameter -> its name in the file.
    golden_name: fn(&str) -> String,
}

#[rustfmt::skip]
pub const TRAININGS: &[Training] = &[
    Training { file: "train_ptuning", initial: Some("ptuning"), build: prefix, golden_name: same },
    Training { file: "train_ptuning_proj", initial: Some("ptuning_proj"), build: prefix, golden_name: same },
    Training { file: "train_prefix_tuning_proj", initial: Some("prefix_tuning_proj"), build: prefix_tuning, golden_name: same },
    Training { file: "train_prompt_tuning", initial: Some("prompt_tuning"), build: prompt_tuning, golden_name: same },
    Training { file: "train_p_tuning_lstm", initial: Some("p_tuning_lstm"), build: p_tuning, golden_name: same },
    Training { file: "train_p_tuning_mlp", initial: Some("p_tuning_mlp"), build: p_tuning, golden_name: same },
    Training { file: "train_lora_qkv", initial: Some("lora_qkv_fresh"), build: low_rank, golden_name: golden_low_rank_name },
    Training { file: "train_lora_all", initial: Some("lora_all_fresh"), build: low_rank, golden_name: golden_low_rank_name },
    Training { file: "train_rslora_qkv", initial: Some("lora_qkv_fresh"), build: low_rank, golden_name: golden_low_rank_name },
    Training { file: "train_dora_qkv", initial: Some("dora_qkv_fresh"), build: low_rank, golden_name: golden_low_rank_name },
    Training { file: "train_adapter_houlsby", initial: Some("adapter_houlsby_fresh"), build: bottlenecks, golden_name: same },
    Training { file: "train_adapter_pfeiffer", initial: Some("adapter_pfeiffer_fresh"), build: bottlenecks, golden_name: same },
    Training { file: "train_adapter_fusion", initial: Some("adapter_fusion"), build: fusion, golden_name: same },
    Training { file: "train_full", initial: None, build: full, golden_name: same },
    Training { file: "train_freeze_1", initial: None, build: freeze, golden_name: same },
    Training { file: "train_freeze_2", initial: None, build: freeze, golden_name: same },
];

fn same(parameter: &str) -> String {
    parameter.to_owned()
}

/// A clone of the model that holds what the method trains.
fn with_trained(model: &ChatGlm2, method: &dyn PeftMethod) -> ChatGlm2 {
    let mut model = model.clone();
    model.replace_weights(&method.trained_base_weights().unwrap()).unwrap();
    model
}

pub fn not_there(case: &Case, file: &str) {
    println!("golden {:<12} {file} NOT RUN: the case does not have it", case.name());
}

fn check_subjects(part: impl Fn(&str) -> bool) {
    for case in cases() {
        let (model, inputs) = (model(&case), case.tensors("inputs").unwrap());
        for subject in SUBJECTS.iter().filter(|subject| part(subject.file)) {
            for recompute in [Recompute::None, Recompute::Block] {
                let Some(mut c) = case.compare(subject.file) else {
                    not_there(&case, subject.file);
                    continue;
                };
                let method = (subject.build)(&model, &c.golden, subject.file);
                let tuned = with_trained(&model, &*method);
                let mut gradients = BTreeSet::new();
                for variant in subject.variants {
                    let offset = if *variant == "offset_pos" { c.golden["output"].dim(0).unwrap() as u32 } else { 0 };
                    let batch = Batch::with_offset(&inputs, variant, offset);
                    let name = |parameter: &str| (subject.gradient)(variant, parameter);
                    gradients.extend(check_variant(
                        &mut c,
                        &tuned,
                        Some((&*method, eval_hooks(&*method))),
                        &batch,
                        variant,
                        recompute,
                        &name,
                    ));
                }
                let missing: Vec<_> = c
                    .golden
                    .keys()
                    .filter(|n| n.contains("grad.") && !n.starts_with("dropout.") && !gradients.contains(*n))
                    .cloned()
                    .collect();
                missing.into_iter().for_each(|name| c.fault(format!("{name}: no gradient of ours")));
                c.finish();
            }
        }
    }
}

fn check_trainings(part: impl Fn(&str) -> bool) {
    for case in cases() {
        let (model, inputs) = (model(&case), case.tensors("inputs").unwrap());
        let slot = |step: usize, _: usize| micro_batch(&inputs["tr_ids"].get(step).unwrap(), &inputs["tr_labels"].get(step).unwrap());
        for training in TRAININGS.iter().filter(|training| part(training.file)) {
            let (Some(json), Some(golden)) = (case.json(training.file), case.tensors(training.file)) else {
                not_there(&case, training.file);
                continue;
            };
            let Some(initial) = training.initial.map_or_else(|| Some(golden.clone()), |file| case.tensors(file)) else {
                not_there(&case, training.file);
                continue;
            };
            let (steps, lr) = (json["loss"].as_array().unwrap().len(), json["lr"][0].as_f64().unwrap());
            let method = || (training.build)(&model, &initial, training.file);
            check_steps(
                &case,
                training.file,
                &model,
                &Steps { steps, slot: &slot, method: &method, lr, golden_name: training.golden_name },
            );
        }
    }
}

fn is_prefix(file: &str) -> bool {
    ["ptuning", "prefix"].iter().any(|method| file.trim_start_matches("train_").starts_with(method))
}

fn is_soft_prompt(file: &str) -> bool {
    ["prompt_tuning", "p_tuning"].iter().any(|method| file.trim_start_matches("train_").starts_with(method))
}

#[test]
fn golden_methods_prefixes_logits_losses_and_gradients() {
    check_subjects(is_prefix);
}

#[test]
fn golden_methods_soft_prompts_logits_losses_and_gradients() {
    check_subjects(is_soft_prompt);
}

#[test]
fn golden_methods_others_logits_losses_and_gradients() {
    check_subjects(|file| !is_prefix(file) && !is_soft_prompt(file));
}

#[test]
fn golden_methods_prefixes_training_steps() {
    check_trainings(is_prefix);
}

#[test]
fn golden_methods_soft_prompts_training_steps() {
    check_trainings(is_soft_prompt);
}

#[test]
fn golden_methods_others_training_steps() {
    check_trainings(|file| !is_prefix(file) && !is_soft_prompt(file));
}

#[test]
fn golden_methods_low_rank_updates_as_peft_saves_them_read_back() {
    for case in cases() {
        let model = model(&case);
        for name in ["lora_qkv", "lora_all", "rslora_qkv", "dora_qkv"] {
            let (dir, file) = (case.dir.join(format!("peft_{name}")), format!("{name}_random"));
            let (true, Some(golden)) = (dir.exists(), case.tensors(&file)) else {
                not_there(&case, &format!("peft_{name}"));
                continue;
            };
            let read = Lora::read_peft(&dir, &model).unwrap();
            let expected = lora(&model, &golden, name);
            assert_eq!(read.sizes(), expected.sizes(), "{}", dir.display());
            let bits = |m: &Lora| m.params().flat().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&read) == bits(&expected), "{}: other values", dir.display());
            let about = serde_json::json!({});
            let context = ExportContext { model_dir: &case.dir.join("hf"), config: &model.config, dtype: None, about: &about };
            let again = tempfile::tempdir().unwrap();
            for (name, bytes) in read.export(&context).unwrap() {
                std::fs::write(again.path().join(name), bytes).unwrap();
            }
            let reread = Lora::read_peft(again.path(), &model).unwrap();
            assert!(reread.sizes() == expected.sizes() && bits(&reread) == bits(&expected), "{}: written and read again", dir.display());
            let merged = case.dir.join(format!("peft_{name}/merged_logits.safetensors"));
            if merged.exists() {
                let mut tuned = model.clone();
                tuned.replace_weights(&read.merged_base_weights(&model).unwrap().unwrap()).unwrap();
                let logits = crate::golden_model::plain_logits(&tuned, &case.tensors("inputs").unwrap());
                let expected = crate::golden::load(&merged).into_values().next().unwrap();
                let off = (logits - expected.reshape(logits_shape(&expected)).unwrap()).unwrap().abs().unwrap();
                let off = off.max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(off < 1e-4, "{}: merged logits are off by {off}", dir.display());
                println!("golden {:<12} peft_{name:<19} merged logits off by {off:.1e}", case.name());
            }
            println!(
                "golden {:<12} peft_{name:<19} {:>4} tensors equal, read, written and read again",
                case.name(),
                read.params().layout().iter().count()
            );
        }
    }
}

fn logits_shape(expected: &Tensor) -> (usize, usize) {
    let v = expected.dims()[expected.rank() - 1];
    (expected.elem_count() / v, v)
}
