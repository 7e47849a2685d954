//! Every tuning method against the golden cases: logits, losses, gradients and training steps. A method is a row of the two tables here.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;
use glmddp::model::{ChatGlm2, ModelConfig, Recompute};
use glmddp::peft::adapter::{self, Adapter, AdapterKind};
use glmddp::peft::adapter_fusion::AdapterFusion;
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::lora::{self, Lora};
use glmddp::peft::p_tuning::{EncoderKind, PTuning};
use glmddp::peft::prefix_tuning::{self, PrefixTuning};
use glmddp::peft::prompt_encoder::Shape;
use glmddp::peft::prompt_tuning::{PromptInit, PromptTuning};
use glmddp::peft::ptuning_v2::{self, PtuningV2};
use glmddp::peft::{ExportContext, FinetuningType, MethodPlan, PeftMethod, create};

use crate::golden::{Case, cases};
use crate::golden_model::{Batch, check_variant, eval_hooks, model};
use crate::golden_train::{Steps, check_steps, micro_batch};

type Tensors = BTreeMap<String, Tensor>;
/// (model, a golden file's tensors, the file's name) -> the method with the file's parameters.
type Build = fn(&ChatGlm2, &Tensors, &str) -> Box<dyn PeftMethod>;

/// Logits, losses and gradients of one file.
pub struct Subject {
    pub file: &'static str,
    variants: &'static [&'static str],
    build: Build,
    /// (variant, parameter) -> name of its gradient in the file.
    gradient: fn(&str, &str) -> String,
}

/// Training steps of one file; learning rate and number of steps stand in its JSON.
pub struct Training {
    pub file: &'static str,
    /// File with the parameters at the start; none: the base's.
    initial: Option<&'static str>,
    build: Build,
    /// Parameter -> its name in the file.
    golden_name: fn(&str) -> String,
}

const ALL_VARIANTS: &[&str] = &["plain", "right_mask", "left_pad", "pos_shift"];
const PLAIN: &[&str] = &["plain"];

#[rustfmt::skip]
pub const SUBJECTS: &[Subject] = &[
    Subject { file: "ptuning", variants: ALL_VARIANTS, build: prefix, gradient: with_variant },
    Subject { file: "ptuning_proj", variants: ALL_VARIANTS, build: prefix, gradient: with_variant },
    Subject { file: "prefix_tuning_proj", variants: &["plain", "left_pad", "offset_pos"], build: prefix_tuning, gradient: with_variant },
    Subject { file: "prompt_tuning", variants: ALL_VARIANTS, build: prompt_tuning, gradient: with_variant },
    Subject { file: "p_tuning_lstm", variants: &["plain", "left_pad"], build: p_tuning, gradient: with_variant },
    Subject { file: "p_tuning_mlp", variants: &["plain", "left_pad"], build: p_tuning, gradient: with_variant },
    Subject { file: "lora_qkv_fresh", variants: PLAIN, build: low_rank, gradient: of_low_rank },
    Subject { file: "lora_qkv_random", variants: PLAIN, build: low_rank, gradient: of_low_rank },
    Subject { file: "lora_all_fresh", variants: PLAIN, build: low_rank, gradient: of_low_rank },
    Subject { file: "lora_all_random", variants: PLAIN, build: low_rank, gradient: of_low_rank },
    Subject { file: "rslora_qkv_random", variants: PLAIN, build: low_rank, gradient: of_low_rank },
    Subject { file: "dora_qkv_fresh", variants: PLAIN, build: low_rank, gradient: of_low_rank },
    Subject { file: "dora_qkv_random", variants: PLAIN, build: low_rank, gradient: of_low_rank },
    Subject { file: "adapter_houlsby_fresh", variants: &["plain", "right_mask"], build: bottlenecks, gradient: with_variant },
    Subject { file: "adapter_houlsby_random", variants: &["plain", "right_mask"], build: bottlenecks, gradient: with_variant },
    Subject { file: "adapter_pfeiffer_fresh", variants: &["plain", "right_mask"], build: bottlenecks, gradient: with_variant },
    Subject { file: "adapter_pfeiffer_random", variants: &["plain", "right_mask"], build: bottlenecks, gradient: with_variant },
    Subject { file: "adapter_fusion", variants: &["plain", "right_mask"], build: fusion, gradient: with_variant },
    Subject { file: "full_grads", variants: PLAIN, build: full, gradient: |_, parameter| parameter.to_owned() },
    Subject { file: "freeze", variants: PLAIN, build: freeze, gradient: with_variant },
];

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

fn with_variant(variant: &str, parameter: &str) -> String {
    format!("{variant}.grad.{parameter}")
}

fn same(parameter: &str) -> String {
    parameter.to_owned()
}

fn of_low_rank(_: &str, parameter: &str) -> String {
    format!("grad.{}", golden_low_rank_name(parameter))
}

/// `...lora_A.weight` -> `A....`, as the golden files have it.
fn golden_low_rank_name(name: &str) -> String {
    let parts = [(".lora_A.weight", "A"), (".lora_B.weight", "B"), (".lora_magnitude_vector", "magnitude")];
    parts.iter().find_map(|(end, kind)| Some(format!("{kind}.{}", name.strip_suffix(end)?))).unwrap()
}

/// The prefix of a golden file, with or without projection as its names say.
pub fn thudm_prefix(model: &ChatGlm2, golden: &Tensors) -> PtuningV2 {
    let params: Tensors =
        golden.iter().filter(|(n, _)| n.starts_with("transformer.prefix_encoder.")).map(|(n, t)| (n.clone(), t.clone())).collect();
    let shape = ptuning_v2::shape(&model.config, params[ptuning_v2::NAMES.embedding].dim(0).unwrap(), params.len() > 1);
    PtuningV2::from_tensors(shape, 0.0, 0, &params).unwrap()
}

fn prefix(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(thudm_prefix(model, golden))
}

/// The prefix of a golden file under PEFT's names, behind its projection.
pub fn peft_prefix(model: &ChatGlm2, golden: &Tensors) -> PrefixTuning {
    let names = prefix_tuning::NAMES;
    let params: Tensors =
        names.first.into_iter().chain(names.second).chain([names.embedding]).map(|name| (name.to_owned(), golden[name].clone())).collect();
    let (virtual_tokens, hidden) = (params[names.embedding].dim(0).unwrap(), params[names.first[1]].dim(0).unwrap());
    PrefixTuning::from_tensors(prefix_tuning::shape(&model.config, virtual_tokens, true, Some(hidden)), &params).unwrap()
}

fn prefix_tuning(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(peft_prefix(model, golden))
}

fn prompt_tuning(_: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(PromptTuning::from_table(PromptInit::Random, golden["prompt_embeddings"].clone()).unwrap())
}

/// The encoder of a golden file, LSTM or MLP as its names say.
pub fn prompt_encoder(model: &ChatGlm2, golden: &Tensors) -> PTuning {
    let parts = ["embedding.", "lstm_head.", "mlp_head."];
    let params: Tensors =
        golden.iter().filter(|(n, _)| parts.iter().any(|part| n.starts_with(part))).map(|(n, t)| (n.clone(), t.clone())).collect();
    let (kind, width) = match params.get("lstm_head.weight_hh_l0") {
        Some(recurrent) => (EncoderKind::Lstm, recurrent.dim(1).unwrap()),
        None => (EncoderKind::Mlp, params["mlp_head.2.weight"].dim(0).unwrap()),
    };
    let virtual_tokens = params["embedding.weight"].dim(0).unwrap();
    PTuning::from_tensors(Shape { kind, virtual_tokens, hidden_size: model.config.hidden_size, width }, &params).unwrap()
}

fn p_tuning(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(prompt_encoder(model, golden))
}

/// The low-rank updates of a golden file (alpha 16), with the targets that it has.
pub fn lora(model: &ChatGlm2, golden: &Tensors, file: &str) -> Lora {
    let all = |name: &str| golden.keys().any(|n| n.starts_with("A.") && n.ends_with(name));
    let keys = MethodKeys {
        lora_rank: Some(golden.iter().find(|(name, _)| name.starts_with("A.")).unwrap().1.dim(0).unwrap()),
        lora_alpha: Some(16.0),
        lora_dropout: Some(0.0),
        lora_target: Some(if all("dense_4h_to_h") { "all" } else { "query_key_value" }.to_owned()),
        use_rslora: Some(file.contains("rslora")),
        use_dora: Some(file.contains("dora")),
        ..MethodKeys::default()
    };
    let settings = lora::Settings::resolve(&keys).unwrap();
    let fresh = create(&MethodPlan::Lora(settings.clone()), model, 0).unwrap();
    let tensors = fresh.params().layout().iter().map(|(name, _)| (name.to_owned(), golden[&golden_low_rank_name(name)].clone())).collect();
    Lora::from_tensors(&settings, model, &tensors).unwrap()
}

fn low_rank(model: &ChatGlm2, golden: &Tensors, file: &str) -> Box<dyn PeftMethod> {
    Box::new(lora(model, golden, file))
}

/// The adapter `name` of a golden file, of the kind that its sites say.
pub fn bottleneck(model: &ChatGlm2, golden: &Tensors, name: &str) -> Adapter {
    let is_own = |parameter: &str| !parameter.contains("grad.") && parameter.contains(&format!("_adapters.adapters.{name}."));
    let tensors: Tensors = golden.iter().filter(|(n, _)| is_own(n)).map(|(n, t)| (n.clone(), t.clone())).collect();
    let houlsby = tensors.keys().any(|n| n.contains("attention_adapters"));
    let keys = MethodKeys {
        adapter_config: Some(if houlsby { AdapterKind::Houlsby } else { AdapterKind::Pfeiffer }),
        adapter_name: Some(name.to_owned()),
        ..MethodKeys::default()
    };
    Adapter::from_tensors(adapter::Settings::resolve(&keys).unwrap(), &model.config, &tensors).unwrap()
}

fn bottlenecks(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(bottleneck(model, golden, "a"))
}

/// The fusion of a golden file with a weight of the regularization; it is in no loss and no gradient of the files.
pub fn golden_fusion(model: &ChatGlm2, golden: &Tensors, regularization: f64) -> AdapterFusion {
    let own = golden.iter().filter(|(n, _)| !n.contains("grad.") && n.contains(".adapter_fusion_layer."));
    let tensors = own.map(|(n, t)| (n.clone(), t.clone())).collect();
    let adapters = ["a", "b"].map(|name| bottleneck(model, golden, name)).into();
    AdapterFusion::from_tensors(adapters, regularization, &model.config, &tensors).unwrap()
}

fn fusion(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(golden_fusion(model, golden, 0.0))
}

fn full(model: &ChatGlm2, _: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    create(&MethodPlan::resolve(FinetuningType::Full, &MethodKeys::default()).unwrap(), model, 0).unwrap()
}

/// As many last layers as the file has.
fn freeze(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    let layers = (0..model.config.num_layers).filter(|layer| golden.keys().any(|name| name.contains(&format!("layers.{layer}.")))).count();
    let keys = MethodKeys { freeze_trainable_layers: Some(layers), ..MethodKeys::default() };
    create(&MethodPlan::resolve(FinetuningType::Freeze, &keys).unwrap(), model, 0).unwrap()
}

/// Elements whose exact gradient is 0, in training without a prefix: adding to a key what is not rotated changes all scores of a query alike.
pub fn exact_zero(config: &ModelConfig, parameter: &str) -> impl Fn(usize) -> bool + 'static {
    let is_bias = parameter.ends_with("query_key_value.bias");
    let (keys, groups, d) = (config.num_attention_heads * config.kv_channels, config.multi_query_group_num, config.kv_channels);
    move |i| is_bias && (keys..keys + groups * d).contains(&i) && (i - keys) % d >= d / 2
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
            let initial = training.initial.map_or_else(|| golden.clone(), |file| case.tensors(file).unwrap());
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
