//! The model, its gradients and greedy decoding against the golden cases.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use glmddp::kernels::attention::Rows;
use glmddp::kernels::rotary::{Angles, Precision, Table};
use glmddp::model::block::{NoObserver, Observer};
use glmddp::model::chatglm2::{Keep, Tokens};
use glmddp::model::hooks::{Hooks, NoHooks};
use glmddp::model::weights::WeightSource;
use glmddp::model::{ChatGlm2, ModelConfig, Recompute, RopeTable, generate, loss};
use glmddp::peft::export::read_peft;
use glmddp::peft::{Mode, PeftMethod, RowContext, TrainHooks};

use crate::golden::{Case, Comparison, cases};
use crate::golden_methods::{SUBJECTS, TRAININGS, exact_zero, lora, peft_prefix, thudm_prefix};
use crate::support;

/// Files of a case that the program has no method for yet; what is neither here nor compared is named by the coverage test.
const OTHER_METHODS: [&str; 2] = ["quant", "train_quant"];
/// Compared here and in `golden_train.rs`; those of the tables of `golden_methods.rs` come on top.
const COMPARED: [&str; 8] =
    ["forward", "inputs", "taps", "train_dp_mean_of_means", "train_dp_token_mean", "generate", "f32_vs_f64", "f32_vs_f64_methods"];
const VARIANTS: [&str; 4] = ["plain", "right_mask", "left_pad", "pos_shift"];

pub fn model(case: &Case) -> ChatGlm2 {
    let dir = case.dir.join("hf");
    let config = ModelConfig::load(&dir).unwrap();
    ChatGlm2::load(config, &WeightSource::open(&dir).unwrap(), RopeTable::Exact, &Device::Cpu).unwrap()
}

fn integers(t: &Tensor) -> Vec<i64> {
    t.to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// One of the four input variants.
pub struct Batch {
    ids: Vec<u32>,
    positions: Vec<u32>,
    bounds: Vec<usize>,
    keep: Option<Vec<bool>>,
    /// `[B, S]`
    labels: Vec<i64>,
    rows: usize,
    len: usize,
}

impl Batch {
    pub fn new(inputs: &BTreeMap<String, Tensor>, variant: &str) -> Self {
        Self::with_offset(inputs, variant, 0)
    }

    pub fn with_offset(inputs: &BTreeMap<String, Tensor>, variant: &str, offset: u32) -> Self {
        let (ids, labels) = if variant == "left_pad" { ("left_ids", "left_labels") } else { ("ids", "labels") };
        let (rows, len) = inputs[ids].dims2().unwrap();
        let unsigned = |name: &str| integers(&inputs[name]).into_iter().map(|x| x as u32).collect::<Vec<_>>();
        let positions = match variant {
            "left_pad" => unsigned("left_pos"),
            "pos_shift" => unsigned("shift_pos"),
            // PEFT's own positions: behind `offset` virtual tokens.
            _ if offset > 0 => (0..rows).flat_map(|_| offset..offset + len as u32).collect(),
            _ => (0..rows).flat_map(|_| 0..len as u32).collect(),
        };
        let mask = match variant {
            "left_pad" => Some("left_mask"),
            "right_mask" => Some("right_mask"),
            _ => None,
        };
        let keep = mask.map(|name| integers(&inputs[name]).into_iter().map(|x| x == 1).collect());
        Self {
            ids: unsigned(ids),
            positions,
            bounds: (0..=rows).map(|r| r * len).collect(),
            keep,
            labels: integers(&inputs[labels]),
            rows,
            len,
        }
    }

    fn tokens(&self) -> Tokens<'_> {
        Tokens { ids: &self.ids, positions: &self.positions, rows: Rows { bounds: &self.bounds, keep: self.keep.as_deref() } }
    }

    fn targets(&self) -> Vec<(u32, u32)> {
        let at = |row: usize, t: usize| row * self.len + t;
        let all = (0..self.rows).flat_map(|row| (1..self.len).map(move |t| (row, t)));
        all.filter(|&(row, t)| self.labels[at(row, t)] != -100)
            .map(|(row, t)| (at(row, t - 1) as u32, self.labels[at(row, t)] as u32))
            .collect()
    }

    /// `[B, S - 1]` losses from those at the targets.
    fn token_loss(&self, nll: &[f32]) -> Tensor {
        let mut out = vec![0f32; self.rows * (self.len - 1)];
        for (&(at, _), loss) in self.targets().iter().zip(nll) {
            let (row, t) = (at as usize / self.len, at as usize % self.len);
            out[row * (self.len - 1) + t] = *loss;
        }
        Tensor::from_vec(out, (self.rows, self.len - 1), &Device::Cpu).unwrap()
    }
}

fn mean(nll: &[f32]) -> Tensor {
    let mean = nll.iter().map(|&x| f64::from(x)).sum::<f64>() / nll.len() as f64;
    Tensor::new(mean as f32, &Device::Cpu).unwrap()
}

/// Logits, losses and, with a method, gradients of one variant; those of the gradients that the golden file has. Gives the names of these.
pub fn check_variant(
    c: &mut Comparison,
    model: &ChatGlm2,
    method: Option<(&dyn PeftMethod, Box<dyn TrainHooks + '_>)>,
    batch: &Batch,
    name: &str,
    recompute: Recompute,
    gradient: &dyn Fn(&str) -> String,
) -> BTreeSet<String> {
    let tokens = batch.tokens();
    let no_hooks: &dyn Hooks = &NoHooks;
    let (hidden, tape) = match &method {
        Some((_, hooks)) => model.forward(tokens, &**hooks, Keep::ForBackward(recompute)).unwrap(),
        None => model.forward(tokens, no_hooks, Keep::Nothing).unwrap(),
    };
    let v = model.config.padded_vocab_size;
    let whole = c.golden.contains_key(&format!("{name}.logits")); // some variants have a loss and gradients alone
    if whole {
        c.check(&format!("{name}.logits"), &loss::logits(model, &hidden).unwrap().reshape((batch.rows, batch.len, v)).unwrap());
    }
    let targets = batch.targets();
    let Some((method, mut hooks)) = method else {
        let nll = loss::nll(model, &hidden, &targets).unwrap();
        check_losses(c, batch, name, whole, &nll);
        return BTreeSet::new();
    };
    let (nll, dhidden) = loss::nll_and_gradient(model, &hidden, &targets, &mut *hooks).unwrap();
    assert_eq!(loss::nll(model, &hidden, &targets).unwrap(), nll, "with and without a gradient the losses are the same bits");
    check_losses(c, batch, name, whole, &nll);
    model.backward(dhidden, tape, tokens, &mut *hooks, &mut |_| Ok(())).unwrap();
    let site = (hooks.into_site_grad().unwrap() / nll.len() as f64).unwrap();
    let grads = method.params().layout().views(&method.param_grad(&site).unwrap()).unwrap();
    let trains_base = !method.trained_base_weights().unwrap().is_empty();
    let mut compared = BTreeSet::new();
    for (parameter, grad) in grads {
        let golden = gradient(&parameter);
        if c.golden.contains_key(&golden) {
            let zero = exact_zero(&model.config, if trains_base { &parameter } else { "" });
            c.check_except(&golden, &grad, 0.0, &zero);
            compared.insert(golden);
        }
    }
    compared
}

fn check_losses(c: &mut Comparison, batch: &Batch, name: &str, whole: bool, nll: &[f32]) {
    if c.golden.contains_key(&format!("{name}.token_loss")) || whole {
        c.check(&format!("{name}.token_loss"), &batch.token_loss(nll));
    }
    if c.golden.contains_key(&format!("{name}.loss")) {
        c.check(&format!("{name}.loss"), &mean(nll));
    }
}

/// `[T, V]` of the plain variant.
pub fn plain_logits(model: &ChatGlm2, inputs: &BTreeMap<String, Tensor>) -> Tensor {
    let batch = Batch::new(inputs, "plain");
    loss::logits(model, &model.forward(batch.tokens(), &NoHooks, Keep::Nothing).unwrap().0).unwrap()
}

pub fn eval_hooks(method: &dyn PeftMethod) -> Box<dyn TrainHooks + '_> {
    method.hooks(RowContext { stream_positions: &[], row_bounds: &[], mode: Mode::Eval }).unwrap()
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
                let mut c = case.compare(file).unwrap();
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
        let mut comparison = case.compare("taps").unwrap();
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
                "ptuning" | "ptuning_proj" => Some(Box::new(thudm_prefix(&model, &case.tensors(file).unwrap()))),
                _ if file.starts_with("lora") => match case.tensors(file) {
                    Some(golden) => Some(Box::new(lora(&model, &golden, file))),
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
