//! Tuning methods as golden files have them: a method is a row of the table.

use std::collections::BTreeMap;

use candle_core::Tensor;
use glmddp::model::{ChatGlm2, ModelConfig};
use glmddp::peft::adapter::{self, Adapter, AdapterKind};
use glmddp::peft::adapter_fusion::AdapterFusion;
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::lora::{self, Lora};
use glmddp::peft::p_tuning::{EncoderKind, PTuning};
use glmddp::peft::prefix_tuning::{self, PrefixTuning};
use glmddp::peft::prompt_encoder::Shape;
use glmddp::peft::prompt_tuning::{PromptInit, PromptTuning};
use glmddp::peft::ptuning_v2::{self, PtuningV2};
use glmddp::peft::{FinetuningType, MethodPlan, PeftMethod, create};

pub type Tensors = BTreeMap<String, Tensor>;
/// (model, a golden file's tensors, the file's name) -> the method with the file's parameters.
pub type Build = fn(&ChatGlm2, &Tensors, &str) -> Box<dyn PeftMethod>;

/// Logits, losses and gradients of one file.
pub struct Subject {
    pub file: &'static str,
    pub variants: &'static [&'static str],
    pub build: Build,
    /// (variant, parameter) -> name of its gradient in the file.
    pub gradient: fn(&str, &str) -> String,
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

pub fn with_variant(variant: &str, parameter: &str) -> String {
    format!("{variant}.grad.{parameter}")
}

pub fn of_low_rank(_: &str, parameter: &str) -> String {
    format!("grad.{}", golden_low_rank_name(parameter))
}

/// `...lora_A.weight` -> `A....`, as the golden files have it.
pub fn golden_low_rank_name(name: &str) -> String {
    let parts = [(".lora_A.weight", "A"), (".lora_B.weight", "B"), (".lora_magnitude_vector", "magnitude")];
    parts.iter().find_map(|(end, kind)| Some(format!("{kind}.{}", name.strip_suffix(end)?))).unwrap()
}

/// The prefix of a golden file, with or without projection as its names say.
pub fn thudm_prefix(model: &ChatGlm2, golden: &Tensors) -> PtuningV2 {
    let params: Tensors =
        golden.iter().filter(|(n, _)| n.starts_with("transformer.prefix_encoder.")).map(|(n, t)| (n.clone(), t.clone())).collect();
    let shape = ptuning_v2::shape(&model.config, params[ptuning_v2::NAMES.embedding].dim(0).unwrap(), params.len() > 1);
    let mut method = PtuningV2::from_tensors(shape, 0.0, 0, &params).unwrap();
    method.encoder.move_to(model.device(), model.dtype()).unwrap();
    method
}

pub fn prefix(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
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

pub fn prefix_tuning(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(peft_prefix(model, golden))
}

pub fn prompt_tuning(_: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
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

pub fn p_tuning(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
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

pub fn low_rank(model: &ChatGlm2, golden: &Tensors, file: &str) -> Box<dyn PeftMethod> {
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

pub fn bottlenecks(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(bottleneck(model, golden, "a"))
}

/// The fusion of a golden file with a weight of the regularization; it is in no loss and no gradient of the files.
pub fn golden_fusion(model: &ChatGlm2, golden: &Tensors, regularization: f64) -> AdapterFusion {
    let own = golden.iter().filter(|(n, _)| !n.contains("grad.") && n.contains(".adapter_fusion_layer."));
    let tensors = own.map(|(n, t)| (n.clone(), t.clone())).collect();
    let adapters = ["a", "b"].map(|name| bottleneck(model, golden, name)).into();
    AdapterFusion::from_tensors(adapters, regularization, &model.config, &tensors).unwrap()
}

pub fn fusion(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    Box::new(golden_fusion(model, golden, 0.0))
}

pub fn full(model: &ChatGlm2, _: &Tensors, _: &str) -> Box<dyn PeftMethod> {
    create(&MethodPlan::resolve(FinetuningType::Full, &MethodKeys::default()).unwrap(), model, 0).unwrap()
}

/// As many last layers as the file has.
pub fn freeze(model: &ChatGlm2, golden: &Tensors, _: &str) -> Box<dyn PeftMethod> {
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
