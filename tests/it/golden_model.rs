//! The model, its gradients and greedy decoding against the golden cases.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use glmddp::kernels::rotary::{Angles, Precision, Table};
use glmddp::model::block::{NoObserver, Observer};
use glmddp::model::chatglm2::Keep;
use glmddp::model::hooks::{Hooks, NoHooks};
use glmddp::model::{ChatGlm2, Recompute, generate, loss};
use glmddp::peft::PeftMethod;
use glmddp::peft::export::read_peft;

use crate::golden::{Case, cases};
use crate::golden_batch::{self, Batch, check_variant, eval_hooks};
use crate::golden_methods::{TRAININGS, not_there};
use crate::golden_subjects::{SUBJECTS, lora, peft_prefix, thudm_prefix};
use crate::support;

/// Files of a case that the program has no method for yet; what is neither here nor compared is named by the coverage test.
const OTHER_METHODS: [&str; 2] = ["quant", "train_quant"];
/// Compared here and in `golden_train.rs`; those of the tables of `golden_methods.rs` come on top.
const COMPARED: [&str; 9] = [
    "forward",
    "inputs",
    "taps",
    "train_dp_mean_of_means",
    "train_dp_token_mean",
    "generate",
    "f32_vs_f64",
    "f32_vs_f64_methods",
    "torch_bf16_vs_f64",
];
const VARIANTS: [&str; 4] = ["plain", "right_mask", "left_pad", "pos_shift"];

pub fn model(case: &Case) -> ChatGlm2 {
    golden_batch::model(case, DType::F32, &Device::Cpu)
}

/// `[T, V]` of the plain variant.
pub fn plain_logits(model: &ChatGlm2, inputs: &BTreeMap<String, Tensor>) -> Tensor {
    let batch = Batch::new(inputs, "plain");
    loss::logits(model, &model.forward(batch.tokens(), &NoHooks, Keep::Nothing).unwrap().0).unwrap()
}

#[test]
fn golden_forward_of_the_base_in_four_variants() {
    for case in cases() {
        let (model, inputs) = (model(&case), case.tensors("inputs").unwrap());
        let mut c = case.compare("forward").unwrap();
        for variant in VARIANTS {
            check_variant(&mut c, &model, None, &Batch::new(&inputs, variant), variant, Recompute::None, &str::to_owned);
        }
        c.finish();
    }
}

#[test]
fn golden_prefix_with_dropout() {
    for case in cases() {
        let (model, inputs) = (model(&case), case.tensors("inputs").unwrap());
        for file in ["ptuning", "ptuning_proj"] {
            for recompute in [Recompute::None, Recompute::Block] {
                let Some(mut c) = case.compare(file) else {
                    not_there(&case, file);
                    continue;
                };
                let method = thudm_prefix(&model, &c.golden);
                let hooks = method.encoder.hooks_with_multiplier(&c.golden["dropout.multiplier"]).unwrap();
                let (batch, name) = (Batch::new(&inputs, "plain"), |p: &str| format!("dropout.grad.{p}"));
                let compared = check_variant(&mut c, &model, Some((&method, hooks)), &batch, "dropout", recompute, &name);
                assert_eq!(compared.len(), method.params().layout().iter().count());
                c.finish();
            }
        }
    }
}

#[test]
fn golden_projected_prefix_is_what_peft_saves() {
    for case in cases() {
        let Some(mut c) = case.compare("prefix_tuning_proj") else {
            println!("golden {:<12} prefix_tuning_proj NOT RUN: the case does not have it", case.name());
            continue;
        };
        let method = peft_prefix(&model(&case), &c.golden);
        c.check("output", method.table());
        c.finish();
        let dir = case.dir.join("peft_prefix_tuning_proj");
        if !dir.exists() {
            println!("golden {:<12} peft_prefix_tuning_proj NOT RUN: the case does not have it", case.name());
            continue;
        }
        let read = read_peft(&dir).unwrap();
        let off = (&read.table - method.table()).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(off < 1e-5, "{}: off by {off}", dir.display());
    }
}

#[test]
fn golden_taps_inside_the_blocks() {
    struct Taps(BTreeMap<String, Tensor>);
    impl Observer for Taps {
        fn observe(&mut self, layer: usize, name: &'static str, value: &Tensor) -> candle_core::Result<()> {
            self.0.insert(format!("{layer}.{name}"), value.copy()?);
            Ok(())
        }
    }
    for case in cases() {
        let model = model(&case);
        let batch = Batch::new(&case.tensors("inputs").unwrap(), "plain");
        let mut taps = Taps(BTreeMap::new());
        let (_, tape) = model.forward_observed(batch.tokens(), &NoHooks, Keep::All, &mut taps).unwrap();
        let c = &model.config;
        let (n, g, d) = (c.num_attention_heads, c.multi_query_group_num, c.kv_channels);
        for (layer, qkv) in tape.qkv().enumerate() {
            let part = |first: usize| {
                let part = qkv.unwrap().narrow(1, first * d, g * d).unwrap().reshape((batch.rows, batch.len, g, d)).unwrap();
                part.transpose(1, 2).unwrap().contiguous().unwrap()
            };
            taps.0.insert(format!("{layer}.k_rotated"), part(n));
            taps.0.insert(format!("{layer}.v"), part(n + g));
        }
        let Some(mut comparison) = case.compare("taps") else {
            not_there(&case, "taps");
            continue;
        };
        let names: Vec<String> = comparison.golden.keys().cloned().collect();
        for name in names {
            let key = name.trim_start_matches(|ch: char| !ch.is_ascii_digit()).to_owned();
            let Some(ours) = taps.0.get(&key) else {
                comparison.fault(format!("{name}: nothing of ours has this name"));
                continue;
            };
            let golden = comparison.golden[&name].dims().to_vec();
            comparison.check(&name, &ours.reshape(golden).unwrap());
        }
        comparison.finish();
    }
}

#[test]
fn golden_greedy_tokens_of_base_and_prefixes_with_and_without_left_padding() {
    for case in cases() {
        let model = model(&case);
        let generate = case.json("generate").unwrap();
        let mut compared = 0;
        for (name, golden) in generate.as_object().unwrap() {
            let file = name.trim_end_matches("_left_pad");
            let method: Option<Box<dyn PeftMethod>> = match file {
                "base" => None,
                _ if file.starts_with("ptuning") || file.starts_with("lora") => match case.tensors(file) {
                    Some(golden) if file.starts_with("lora") => Some(Box::new(lora(&model, &golden, file))),
                    Some(golden) => Some(Box::new(thudm_prefix(&model, &golden))),
                    None => {
                        println!("golden {:<12} generate: {name} NOT RUN: the case has no {file}", case.name());
                        continue;
                    }
                },
                _ => {
                    println!("golden {:<12} generate: {name} NOT RUN (no such method yet)", case.name());
                    continue;
                }
            };
            let ids = |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(golden[key].clone()).unwrap() };
            let masks = if golden.get("attention_mask").is_some() {
                ids("attention_mask")
            } else {
                ids("prompt").iter().map(|r| vec![1; r.len()]).collect()
            };
            for ((prompt, mask), expected) in ids("prompt").iter().zip(&masks).zip(ids("new_ids")) {
                let prompt: Vec<u32> = prompt.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id as u32).collect();
                let hooks = method.as_deref().map(eval_hooks);
                let hooks: &dyn Hooks = match &hooks {
                    Some(hooks) => &**hooks,
                    None => &NoHooks,
                };
                let decoded = generate::greedy(&model, hooks, &prompt, expected.len(), None).unwrap();
                assert_eq!(decoded.ids.iter().map(|&i| i64::from(i)).collect::<Vec<_>>(), expected, "{} {name}", case.dir.display());
                let golden_margin = golden["min_margin"].as_f64().unwrap();
                assert!(
                    decoded.margins.iter().all(|&m| f64::from(m) > golden_margin - 1e-3),
                    "{name}: margins {:?} against {golden_margin}",
                    decoded.margins
                );
                compared += 1;
            }
        }
        println!("golden {:<12} {:<24} {compared:>4} sequences equal", case.name(), "generate");
        assert!(compared > 0);
    }
}

#[test]
fn golden_rotary_table_in_three_types() {
    let mut num_files = 0;
    for root in support::golden_roots() {
        let path = root.join("rope/rope_cache.safetensors");
        if !path.exists() {
            continue;
        }
        num_files += 1;
        for (name, golden) in crate::golden::load(&path) {
            let dtype = golden.dtype();
            let (positions, pairs, _) = golden.dims3().unwrap();
            let table = |precision| {
                Table::new(
                    &(0..positions as u32).collect::<Vec<_>>(),
                    pairs * 4,
                    Angles { base: 10_000.0, position_divisor: 1.0, precision },
                )
            };
            let golden: Vec<f32> = golden.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let worst = |table: &Table| {
                let ours = (0..positions).flat_map(|t| (0..pairs).map(move |i| (t, i))).flat_map(|(t, i)| <[f32; 2]>::from(table.at(t, i)));
                ours.zip(&golden).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            let dtype = if name.contains("bfloat16") {
                DType::BF16
            } else if name.contains("float16") {
                DType::F16
            } else {
                dtype
            };
            let published = worst(&table(Precision::Published(dtype)));
            let exact = worst(&table(Precision::Exact));
            println!("golden rope {name}: published arithmetic off by {published:.1e}, exact arithmetic by {exact:.1e}");
            let allowed = if dtype == DType::F32 { 2e-7 } else { 0.0 };
            assert!(published <= allowed, "{name}: {published}");
            if dtype == DType::F32 {
                assert!(exact < 3e-5, "{name}: f32 angles below position 256 are within 3e-5 of exact ones, found {exact}");
            } else {
                assert!(exact > 0.05, "{name}: the published table is known to be off");
            }
        }
    }
    if num_files == 0 {
        panic!("no rope/rope_cache.safetensors under {:?}", support::golden_roots());
    }
}

#[test]
fn golden_files_are_compared_or_named_as_not_run() {
    for case in cases() {
        let mut not_run = BTreeSet::new();
        for entry in std::fs::read_dir(&case.dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let compared = COMPARED.iter().copied().chain(SUBJECTS.iter().map(|s| s.file)).chain(TRAININGS.iter().map(|t| t.file));
            if path.is_dir() || path.extension().is_some_and(|e| e == "md") || compared.into_iter().any(|file| file == name) {
                continue;
            }
            not_run.insert(name);
        }
        println!("golden {:<12} NOT RUN (no such method yet): {}", case.name(), not_run.iter().cloned().collect::<Vec<_>>().join(" "));
        let unknown: Vec<_> = not_run
            .iter()
            .filter(|n| {
                !OTHER_METHODS.iter().any(|m| n.trim_start_matches("train_").starts_with(m) || n.starts_with(m))
                    && !n.starts_with("f32_vs_f64")
            })
            .collect();
        assert!(unknown.is_empty(), "golden files that nobody knows: {unknown:?}");
    }
}

#[test]
fn observer_sees_the_same_bits_as_a_pass_without_one() {
    let case = &cases()[0];
    let model = model(case);
    let batch = Batch::new(&case.tensors("inputs").unwrap(), "plain");
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let plain = flat(model.forward(batch.tokens(), &NoHooks, Keep::Nothing).unwrap().0);
    assert_eq!(plain, flat(model.forward_observed(batch.tokens(), &NoHooks, Keep::All, &mut NoObserver).unwrap().0));
}
