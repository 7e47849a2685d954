//! Folders of models and of adapters.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;
use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};
use glmddp::formats::{safetensors, torch_pickle};
use glmddp::model::shape::ModelShape;
use glmddp::model::weights::WeightSource;
use glmddp::model::{ChatGlm2, ModelConfig, RopeTable};
use glmddp::peft::export::read_peft;
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::thudm::read_thudm;
use glmddp::peft::{self, Base, ExportContext, FinetuningType, MethodPlan, Mode, RowContext};
use serde_json::json;

use crate::harness::{Bound, Target, as_it_is, fuzz, read_one};
use crate::mutate::{Folder, JSON_WORDS};

const WORDS: &[&[u8]] = &[
    b"4294967296",
    b"\"..\"",
    b"\"../outside/model.safetensors\"",
    b"\"/etc/passwd\"",
    b"\"r\": ",
    b"\"peft_type\": \"LORA\"",
    b"\"peft_type\": \"IA3\"",
    b"\"peft_type\": \"PREFIX_TUNING\"",
    b"\"(a{1000}){1000}\"",
    b"\".*\"",
    b"\"all-linear\"",
    b"\"name\": \"../outside\"",
    b"PK\x03\x04",
    b"\xff",
    b"\"num_virtual_tokens\": ",
    b"\"num_layers\": ",
    b"\"reduction_factor\": ",
];

fn text(error: impl Display) -> String {
    error.to_string()
}

fn config_json() -> serde_json::Value {
    json!({
        "_name_or_path": "THUDM/chatglm2-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": false,
        "add_qkv_bias": true, "ffn_hidden_size": 8, "hidden_size": 8, "kv_channels": 4, "layernorm_epsilon": 1e-5,
        "multi_query_attention": true, "multi_query_group_num": 1, "num_attention_heads": 2, "num_layers": 2, "padded_vocab_size": 32,
        "post_layer_norm": true, "rmsnorm": true, "seq_length": 64, "torch_dtype": "float32", "eos_token_id": 2, "pad_token_id": 0,
    })
}

fn config() -> ModelConfig {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    ModelConfig::load(dir.path()).unwrap()
}

fn weights() -> BTreeMap<String, Tensor> {
    let ones = |(name, shape): (String, Vec<usize>)| (name, Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap());
    config().parameter_shapes().into_iter().map(ones).collect()
}

/// The tiny model in two shards, in one file, and in PyTorch's.
fn model_folders() -> Vec<Folder> {
    let all = weights();
    let (first, second): (BTreeMap<_, _>, BTreeMap<_, _>) = all.clone().into_iter().partition(|(name, _)| name.contains("layers.0"));
    let shard = |name: &str| if first.contains_key(name) { "model-1.safetensors" } else { "model-2.safetensors" };
    let map: BTreeMap<&str, &str> = all.keys().map(|name| (name.as_str(), shard(name))).collect();
    let index = json!({ "metadata": {}, "weight_map": map }).to_string();
    let with = |files: Vec<(&str, Vec<u8>)>| {
        let config = ("config.json", config_json().to_string().into_bytes());
        files.into_iter().chain([config]).map(|(name, bytes)| (name.to_owned(), bytes)).collect::<Folder>()
    };
    let sharded = with(vec![
        ("model.safetensors.index.json", index.clone().into_bytes()),
        ("model-1.safetensors", safetensors::to_bytes(&first).unwrap()),
        ("model-2.safetensors", safetensors::to_bytes(&second).unwrap()),
    ]);
    let leading_out = |to: &str| {
        let mut folder = sharded.clone();
        folder.insert("model.safetensors.index.json".into(), index.replace("model-1.safetensors", to).into_bytes());
        folder
    };
    let sized = |key: &str, value: serde_json::Value| {
        let mut config = config_json();
        config[key] = value;
        let mut folder = sharded.clone();
        folder.insert("config.json".into(), config.to_string().into_bytes());
        folder
    };
    vec![
        sharded.clone(),
        with(vec![("model.safetensors", safetensors::to_bytes(&all).unwrap())]),
        with(vec![("pytorch_model.bin", torch_pickle::to_bytes(&all).unwrap())]),
        leading_out("../outside/model-1.safetensors"),
        leading_out("/../outside/model-1.safetensors"),
        leading_out("in/../../outside/model-1.safetensors"),
        leading_out(".."),
        leading_out(""),
        sized("num_layers", json!(4096)),
        sized("hidden_size", json!(2_147_483_647u64)),
        sized("padded_vocab_size", json!(2_147_483_647u64)),
        sized("kv_channels", json!(2_147_483_644u64)),
        sized("layernorm_epsilon", json!(1e-320)),
        sized("rope_ratio", json!(1e308)),
    ]
}

/// All that a run and `glmddp plan` do with a model's folder.
fn read_model(dir: &Path) -> Result<(), String> {
    let config = ModelConfig::load(dir).map_err(text)?;
    let shape = ModelShape::from(&config);
    assert!(shape.parameters() >= shape.trunk_weights());
    assert!(config.prefix_width() as u64 == shape.prefix_width());
    let source = WeightSource::open(dir).map_err(text)?;
    let shapes = config.parameter_shapes();
    source.check(&shapes).map_err(text)?;
    source.fingerprint(&shapes).map_err(text)?;
    ChatGlm2::load(config, &source, RopeTable::Exact, DType::F32, &Device::Cpu).map(drop).map_err(text)
}

#[test]
fn model_from_anyone_is_read_or_refused() {
    fuzz(&model(model_folders()));
}

fn model(seeds: Vec<Folder>) -> Target<'static> {
    Target {
        name: "model",
        executions: 1500,
        seeds,
        words: [JSON_WORDS, WORDS].concat(),
        assemble: as_it_is,
        // config.json may ask for 4,096 layers, and the names and shapes of their 40,000 parameters are made before weights are looked for.
        bound: Bound { constant: 8 << 20, factor: 256 },
        read: Box::new(read_model),
    }
}

/// The reader's answer to the tiny model with another size in its config.json.
pub fn model_with(key: &str, size: u64) -> Result<(), String> {
    let mut config = config_json();
    config[key] = size.into();
    read_one(&model(Vec::new()), &Folder::from([("config.json".to_owned(), config.to_string().into_bytes())]))
}

/// A model of ones, small enough to be made once.
static MODEL: LazyLock<ChatGlm2> = LazyLock::new(|| {
    let weights = weights();
    ChatGlm2::from_tensors(config(), RopeTable::Exact, |name, _| Ok(weights[name].clone())).unwrap()
});

pub fn exported(keys: MethodKeys) -> Folder {
    let plan = MethodPlan::resolve(keys.finetuning_type.unwrap(), &keys).unwrap();
    let method = peft::create(&plan, &MODEL, 1).unwrap();
    let about = json!({ "method": method.name(), "base_fingerprint": "aa", "tokenizer_sha256": "bb", "template": "chatglm2" });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config_json().to_string()).unwrap();
    let context = ExportContext { model_dir: dir.path(), config: &MODEL.config, about: &about, dtype: None };
    method.export(&context).unwrap().into_iter().collect()
}

pub fn keys(kind: FinetuningType) -> MethodKeys {
    MethodKeys { finetuning_type: Some(kind), ..MethodKeys::default() }
}

/// `folder` with its configuration on one line.
pub fn compact(mut folder: Folder) -> Folder {
    let config = folder.get_mut("adapter_config.json").unwrap();
    *config = serde_json::from_slice::<serde_json::Value>(config).unwrap().to_string().into_bytes();
    folder
}

/// `folder` with `to` in the place of `from` in its configuration.
pub fn with(folder: &Folder, from: &str, to: &str) -> Folder {
    let mut folder = folder.clone();
    let bytes = folder.get_mut("adapter_config.json").unwrap();
    let text = String::from_utf8(std::mem::take(bytes)).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    *bytes = text.replace(from, to).into_bytes();
    folder
}

/// What the export of each method leaves, and what nobody should have made of it.
fn adapter_folders() -> Vec<Folder> {
    let lora = exported(MethodKeys { lora_rank: Some(2), lora_target: Some("all".into()), ..keys(FinetuningType::Lora) });
    let prefix = exported(MethodKeys { pre_seq_len: Some(2), ..keys(FinetuningType::PtuningV2) });
    let names = ["one", "two"];
    let adapter =
        |name: &str| exported(MethodKeys { reduction_factor: Some(4), adapter_name: Some(name.into()), ..keys(FinetuningType::Adapter) });
    let dir = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        for (file, bytes) in adapter(name) {
            std::fs::write(dir.path().join(name).join(file), bytes).unwrap();
        }
    }
    let joined = names.map(|name| dir.path().join(name).display().to_string()).join(",");
    let fusion = exported(MethodKeys { fusion_adapters: Some(joined), ..keys(FinetuningType::AdapterFusion) });
    let huge = u64::MAX.to_string();
    vec![
        lora.clone(),
        exported(MethodKeys { lora_rank: Some(1), use_dora: Some(true), ..keys(FinetuningType::Lora) }),
        exported(keys(FinetuningType::Ia3)),
        prefix.clone(),
        exported(MethodKeys {
            pre_seq_len: Some(2),
            prefix_projection: Some(true),
            encoder_hidden_size: Some(3),
            ..keys(FinetuningType::PrefixTuning)
        }),
        exported(MethodKeys { num_virtual_tokens: Some(2), ..keys(FinetuningType::PromptTuning) }),
        exported(MethodKeys { num_virtual_tokens: Some(2), ..keys(FinetuningType::PTuning) }),
        adapter("one"),
        fusion.clone(),
        with(&lora, "\"r\": 2", &format!("\"r\": {huge}")),
        with(&lora, "\"r\": 2", "\"r\": 1000000000"),
        with(&lora, "\"query_key_value\"", "\"nothing\""),
        with(&prefix, "\"num_virtual_tokens\": 2", "\"num_virtual_tokens\": 4294967295"),
        with(&prefix, "\"num_layers\": 2", "\"num_layers\": 4294967295"),
    ]
}

/// All that generation does with an adapter, and what an import does.
fn read_adapter(dir: &Path) -> Result<(), String> {
    // Of a prefix each format is read by itself as well; the adapter's own answer is what counts.
    for error in [read_peft(dir).err(), read_thudm(dir).err()].into_iter().flatten() {
        let error = error.to_string();
        assert!(error.contains(&*dir.to_string_lossy()), "{error}");
    }
    let base = Base { model: &MODEL, fingerprint: "aa", tokenizer_sha256: "bb" };
    let mut method = peft::read(dir, base).map_err(text)?;
    method.refresh().map_err(text)?;
    let rows = RowContext { stream_positions: &[0], row_bounds: &[0, 3], mode: Mode::Eval };
    method.hooks(rows).map_err(text)?;
    method.sizes();
    method.merged_base_weights(&MODEL).map(drop).map_err(text)
}

pub fn adapter(seeds: Vec<Folder>) -> Target<'static> {
    Target {
        name: "adapter",
        executions: 2500,
        seeds,
        words: [JSON_WORDS, WORDS].concat(),
        assemble: as_it_is,
        bound: Bound { constant: 1 << 20, factor: 256 },
        read: Box::new(read_adapter),
    }
}

#[test]
fn adapter_from_anyone_is_read_or_refused() {
    fuzz(&adapter(adapter_folders()));
}
