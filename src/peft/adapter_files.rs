//! Bottleneck adapters and fusions in the adapters library's format (version 1.3.0).
//!
//! An adapter is a folder with `adapter_config.json` and `pytorch_adapter.bin`; a fusion is one with `adapter_setup.json`, a folder an adapter
//! (`a`, `b`) and the folder `a,b` with the fusion's own parameters: the library's `save_adapter_setup`. Weights are written as `.bin` alone,
//! which the library reads whether told `use_safetensors` or not; either is read here. The library fills in what is missing or unknown at
//! random and only logs it: here it is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Value, json};

use super::ExportContext;
use super::adapter::{AdapterKind, Settings};
use super::export::{self, ABOUT_FILE, ExportError, Files};
use super::understood;
use crate::formats::{TensorFile, torch_pickle};
use crate::model::ModelConfig;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: [&str; 2] = ["pytorch_adapter.bin", "adapter.safetensors"];
const FUSION_CONFIG: &str = "adapter_fusion_config.json";
const FUSION_WEIGHTS: [&str; 2] = ["pytorch_model_adapter_fusion.bin", "model_adapter_fusion.safetensors"];
pub const SETUP: &str = "adapter_setup.json";
const VERSION: &str = "adapters.1.3.0";
const LAYERS: &str = "transformer.encoder.layers.";

/// What an adapter's name may be: it is a part of parameters' names and of paths.
pub(super) const A_NAME: &str = "a name without `.`, `,`, `/` and `\\`";

pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['.', ',', '/', '\\', '\0'])
}

/// Keys of an adapter's configuration that change what it computes, with the only value that is computed here, which is also the library's
/// where the key is absent.
fn fixed() -> [(&'static str, Value); 12] {
    [
        ("config.output_adapter", json!(true)),
        ("config.original_ln_after", json!(true)),
        ("config.residual_before_ln", json!(true)),
        ("config.adapter_residual_before_ln", json!(false)),
        ("config.ln_before", json!(false)),
        ("config.ln_after", json!(false)),
        ("config.is_parallel", json!(false)),
        ("config.use_gating", json!(false)),
        ("config.phm_layer", json!(false)),
        ("config.inv_adapter", Value::Null),
        ("config.scaling", json!(1.0)),
        ("config.leave_out", json!([])),
    ]
}

/// Those that go with where adapters stand.
fn by_kind(kind: AdapterKind) -> [(&'static str, Value); 3] {
    let houlsby = kind == AdapterKind::Houlsby;
    [
        ("config.mh_adapter", json!(houlsby)),
        ("config.non_linearity", json!(if houlsby { "swish" } else { "relu" })),
        ("config.original_ln_before", json!(!houlsby)),
    ]
}

/// The library's default, "dynamic", without what acts in training alone.
fn of_fusion() -> [(&'static str, Value); 7] {
    [
        ("config.query", json!(true)),
        ("config.key", json!(true)),
        ("config.value", json!(true)),
        ("config.value_before_softmax", json!(true)),
        ("config.query_before_ln", json!(false)),
        ("config.residual_before", json!(false)),
        ("config.temperature", json!(false)),
    ]
}

/// Keys of an adapter's configuration that are read, or that act on its start, in training, or with another key that is off here.
const OTHER_KEYS: [&str; 19] = [
    "architecture",
    "cross_adapter", // in an encoder-decoder
    "dropout",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "reduction_factor",
    "shared_W_phm",
    "shared_phm_rule",
    "stochastic_depth",
];

/// Those of a fusion's.
const OTHER_FUSION_KEYS: [&str; 3] = ["dropout_prob", "regularization", "value_initialized"];

/// A JSON file of the library.
struct Config {
    path: PathBuf,
    json: Value,
}

impl Config {
    fn read(path: PathBuf) -> Result<Self, ExportError> {
        Ok(Self { json: export::read_json(&path)?, path })
    }

    /// `a.b` is key b of the object at key a.
    fn get(&self, key: &str) -> Option<&Value> {
        key.split('.').try_fold(&self.json, |value, key| value.get(key))
    }

    fn error(&self, key: &'static str, expected: impl ToString) -> ExportError {
        let found = self.get(key).map_or("not there".to_owned(), Value::to_string);
        ExportError::Key { path: self.path.clone(), key, expected: expected.to_string(), found }
    }

    /// Tests a key that is there; numbers by value.
    fn expect(&self, key: &'static str, expected: &Value) -> Result<(), ExportError> {
        match self.get(key) {
            Some(found) if found == expected || (understood::is_off(found) && understood::is_off(expected)) => Ok(()),
            Some(found) if found.is_number() && found.as_f64() == expected.as_f64() => Ok(()),
            None => Ok(()),
            Some(_) => Err(self.error(key, expected)),
        }
    }

    /// Tests that no key of the object `config` but `fixed` and `others` is there, unless it is off.
    fn expect_known<'a>(&self, fixed: impl Iterator<Item = &'a str>, others: &[&'a str]) -> Result<(), ExportError> {
        let known: Vec<&str> = fixed.filter_map(|key| key.strip_prefix("config.")).chain(others.iter().copied()).collect();
        match self.get("config") {
            Some(Value::Object(keys)) => understood::check_known(&self.path, keys, "config.", &known),
            _ => Ok(()),
        }
    }

    fn require(&self, key: &'static str, expected: &Value) -> Result<(), ExportError> {
        if self.get(key).is_none() { Err(self.error(key, expected)) } else { self.expect(key, expected) }
    }
}

/// An adapter's folder: what its configuration says. Its weights are opened by [`Self::tensors`].
pub(super) struct AdapterFolder {
    dir: PathBuf,
    config: Config,
    pub settings: Settings,
}

impl AdapterFolder {
    /// # Errors
    /// When there is no configuration or one of another kind, or it asks for what is not computed here.
    pub fn open(dir: &Path) -> Result<Self, ExportError> {
        let config = Config::read(dir.join(CONFIG))?;
        config.expect("config.architecture", &Value::Null)?;
        let kind = match config.get("config.mh_adapter") {
            Some(Value::Bool(true)) => AdapterKind::Houlsby,
            Some(Value::Bool(false)) => AdapterKind::Pfeiffer,
            _ => return Err(config.error("config.mh_adapter", "true or false, as the adapters library has it")),
        };
        by_kind(kind).iter().try_for_each(|(key, value)| match (*key, value) {
            ("config.original_ln_before", Value::Bool(false)) => config.expect(key, value), // the library's where absent
            _ => config.require(key, value),
        })?;
        fixed().iter().try_for_each(|(key, value)| config.expect(key, value))?;
        config.expect_known(fixed().iter().map(|(key, _)| *key).chain(by_kind(kind).iter().map(|(key, _)| *key)), &OTHER_KEYS)?;
        let factor = config.get("config.reduction_factor").and_then(Value::as_f64).filter(|f| f.fract() == 0.0);
        let factor = factor.and_then(|f| NonZeroUsize::new(f as usize));
        let reduction_factor = factor.ok_or_else(|| config.error("config.reduction_factor", "a whole number above 0 for all layers"))?;
        let name = config.get("name").and_then(Value::as_str).filter(|name| is_name(name));
        let name = name.ok_or_else(|| config.error("name", A_NAME))?.to_owned();
        Ok(Self { dir: dir.to_owned(), settings: Settings { kind, reduction_factor, adapter_name: name }, config })
    }

    /// # Errors
    /// When the adapter stands elsewhere.
    pub fn expect_kind(&self, kind: AdapterKind) -> Result<(), ExportError> {
        by_kind(kind).iter().try_for_each(|(key, value)| self.config.expect(key, value))
    }

    /// # Errors
    /// When the adapter would drop some of its output in training.
    pub fn expect_no_dropout(&self) -> Result<(), ExportError> {
        ["config.dropout", "config.stochastic_depth"].iter().try_for_each(|key| self.config.expect(key, &json!(0.0)))
    }

    /// # Errors
    /// When the weights' file is missing or not whole, or its sizes are others.
    pub fn tensors(&self, shapes: &Shapes, model: &ModelConfig) -> Result<BTreeMap<String, Tensor>, ExportError> {
        self.config.expect("hidden_size", &json!(model.hidden_size))?;
        read_weights(&self.dir, WEIGHTS, shapes, model.num_layers)
    }

    /// The fingerprint of the base that the adapter says it was trained on.
    ///
    /// # Errors
    /// When [`ABOUT_FILE`] is not valid.
    pub fn base_fingerprint(&self) -> Result<Option<String>, ExportError> {
        let about = export::read_about(&self.dir)?;
        Ok(about.and_then(|about| Some(about.get("base_fingerprint")?.as_str()?.to_owned())))
    }
}

/// Parameters, name -> shape.
type Shapes = BTreeMap<String, Vec<usize>>;

/// Reads the first of `files` that is there; it has to hold these tensors and no others.
fn read_weights(dir: &Path, files: [&str; 2], shapes: &Shapes, num_layers: usize) -> Result<BTreeMap<String, Tensor>, ExportError> {
    let path = files.map(|file| dir.join(file)).into_iter().find(|path| path.exists());
    let file = TensorFile::open(&path.unwrap_or_else(|| dir.join(files[0])))?;
    let layers: BTreeSet<&str> = file.names().filter_map(|name| name.strip_prefix(LAYERS)?.split('.').next()).collect();
    if !layers.is_empty() && layers.len() != num_layers {
        return Err(ExportError::Layers { path: file.path().to_owned(), expected: num_layers, found: layers.len() });
    }
    if let Some(name) = file.names().find(|name| !shapes.contains_key(*name)) {
        return Err(ExportError::OtherTensor { path: file.path().to_owned(), name: name.to_owned() });
    }
    shapes.iter().map(|(name, shape)| Ok((name.clone(), export::read_tensor(&file, name, shape)?))).collect()
}

/// A fusion's folder.
pub(super) struct FusionFolder {
    dir: PathBuf,
    /// In the order that they were joined in.
    pub adapters: Vec<AdapterFolder>,
}

impl FusionFolder {
    /// # Errors
    /// When a configuration is missing, of another kind, or asks for what is not computed here.
    pub fn open(dir: &Path) -> Result<Self, ExportError> {
        let setup = Config::read(dir.join(SETUP))?;
        setup.require("adapter_setup.type", &json!("Fuse"))?;
        setup.expect("head_setup", &Value::Null)?;
        let children = setup.get("adapter_setup.children").and_then(Value::as_array);
        let names = children.filter(|children| children.len() > 1).and_then(|children| {
            let single = |child: &Value| match (child.get("type")?.as_str()?, child.get("children")?.as_array()?.as_slice()) {
                ("single", [name]) => name.as_str().filter(|name| is_name(name)).map(str::to_owned),
                _ => None,
            };
            children.iter().map(single).collect::<Option<Vec<String>>>()
        });
        let names = names.ok_or_else(|| setup.error("adapter_setup.children", "two or more single adapters"))?;
        let own = dir.join(names.join(","));
        let config = Config::read(own.join(FUSION_CONFIG))?;
        of_fusion().iter().try_for_each(|(key, value)| config.require(key, value))?;
        config.expect_known(of_fusion().iter().map(|(key, _)| *key), &OTHER_FUSION_KEYS)?;
        let adapters = names.iter().map(|name| {
            let adapter = AdapterFolder::open(&dir.join(name))?;
            adapter.config.require("name", &json!(name))?;
            Ok(adapter)
        });
        Ok(Self { adapters: adapters.collect::<Result<_, ExportError>>()?, dir: own })
    }

    /// # Errors
    /// When the weights' file is missing or not whole, or its sizes are others.
    pub fn tensors(&self, shapes: &Shapes, model: &ModelConfig) -> Result<BTreeMap<String, Tensor>, ExportError> {
        read_weights(&self.dir, FUSION_WEIGHTS, shapes, model.num_layers)
    }
}

/// Where the fusion in `dir` has its own configuration.
///
/// # Errors
/// As [`FusionFolder::open`].
pub(super) fn fusion_config(dir: &Path) -> Result<PathBuf, ExportError> {
    Ok(FusionFolder::open(dir)?.dir.join(FUSION_CONFIG))
}

/// The keys around a configuration, in the library's order: that of the alphabet.
fn envelope(config: Value, name: &str, context: &ExportContext) -> Value {
    json!({
        "config": config,
        "hidden_size": context.config.hidden_size,
        "model_class": "ChatGLMForConditionalGeneration",
        "model_name": context.model_dir.display().to_string(),
        "model_type": "chatglm",
        "name": name,
        "version": VERSION,
    })
}

/// One adapter's files.
pub(super) fn of_adapter(settings: &Settings, tensors: &BTreeMap<String, Tensor>, context: &ExportContext) -> Result<Files, ExportError> {
    let mut config: BTreeMap<&str, Value> = BTreeMap::from([
        ("cross_adapter", json!(false)),
        ("dropout", json!(0.0)),
        ("factorized_phm_W", json!(true)),
        ("factorized_phm_rule", json!(false)),
        ("hypercomplex_nonlinearity", json!("glorot-uniform")),
        ("init_weights", json!("bert")),
        ("init_weights_seed", Value::Null),
        ("inv_adapter_reduction_factor", Value::Null),
        ("learn_phm", json!(true)),
        ("phm_bias", json!(true)),
        ("phm_c_init", json!("normal")),
        ("phm_dim", json!(4)),
        ("phm_init_range", json!(0.0001)),
        ("phm_rank", json!(1)),
        ("reduction_factor", json!(settings.reduction_factor)),
        ("shared_W_phm", json!(false)),
        ("shared_phm_rule", json!(true)),
        ("stochastic_depth", json!(0.0)),
    ]);
    config.extend(fixed().into_iter().chain(by_kind(settings.kind)).filter_map(|(key, value)| Some((key.strip_prefix("config.")?, value))));
    Ok(vec![
        (CONFIG.to_owned(), export::pretty(&envelope(json!(config), &settings.adapter_name, context))),
        (WEIGHTS[0].to_owned(), torch_pickle::to_bytes(tensors)?),
        ("adapter_interface.json".to_owned(), export::pretty(&interface())),
    ])
}

/// Where the library finds its places in the published ChatGLM2 (its `AdapterModelInterface`).
fn interface() -> Value {
    json!({
        "interface": {
            "adapter_methods": ["bottleneck"],
            "attn_k_proj": null,
            "attn_o_proj": "dense",
            "attn_q_proj": null,
            "attn_qkv_proj": "query_key_value",
            "attn_v_proj": null,
            "base_model": null,
            "layer_cross_attn": null,
            "layer_intermediate_proj": "mlp.dense_h_to_4h",
            "layer_ln_1": null,
            "layer_ln_2": null,
            "layer_output_proj": "mlp.dense_4h_to_h",
            "layer_pre_cross_attn": null,
            "layer_pre_ffn": "post_attention_layernorm",
            "layer_pre_self_attn": "input_layernorm",
            "layer_self_attn": "self_attention",
            "model_embeddings": "embedding.word_embeddings",
            "model_layers": "encoder.layers",
        },
        "model_type": "chatglm",
        "version": VERSION,
    })
}

/// A fusion's files but for those of its adapters; `names` in the order that they are joined in.
pub(super) fn of_fusion_of(names: &[&str], tensors: &BTreeMap<String, Tensor>, context: &ExportContext) -> Result<Files, ExportError> {
    let name = names.join(",");
    let mut config: BTreeMap<&str, Value> =
        BTreeMap::from([("dropout_prob", Value::Null), ("regularization", json!(true)), ("value_initialized", json!(true))]);
    config.extend(of_fusion().into_iter().filter_map(|(key, value)| Some((key.strip_prefix("config.")?, value))));
    let mut json = json!({ "adapter_names": names });
    if let (Value::Object(keys), Value::Object(rest)) = (&mut json, envelope(json!(config), &name, context)) {
        keys.extend(rest);
    }
    let children: Vec<Value> = names.iter().map(|name| json!({ "type": "single", "children": [name] })).collect();
    let setup = json!({ "adapter_setup": { "type": "Fuse", "children": children }, "head_setup": null, "version": VERSION });
    Ok(vec![
        (SETUP.to_owned(), export::pretty(&setup)),
        (format!("{name}/{FUSION_CONFIG}"), export::pretty(&json)),
        (format!("{name}/{}", FUSION_WEIGHTS[0]), torch_pickle::to_bytes(tensors)?),
    ])
}

/// What this program knows beyond the library's format.
pub(super) fn about(context: &ExportContext) -> (String, Vec<u8>) {
    (ABOUT_FILE.to_owned(), export::pretty(context.about))
}
