//! A base has to be a bare one: what tuning or quantizing leaves in a model's folder is refused by name, never passed over.
//!
//! A tensor is the base's if config.json says so, or a buffer of the hub's files. Everything else is refused; the table of `KINDS` only
//! decides what the message says of it.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::MethodError;
use super::export::{self, PEFT_CONFIG};
use crate::model::weights::{Others, WeightSource};
use crate::model::{ModelConfig, ModelError};

/// Names of a file that a message lists before it counts the rest.
const LISTED: usize = 3;

/// The model in `dir`. Whether a weight is missing or of another shape shows when it is asked for.
///
/// # Errors
/// When a file is missing or damaged, or the folder holds more than a base: tensors, an adapter, or `pre_seq_len`.
pub fn open(dir: &Path) -> Result<(ModelConfig, WeightSource), MethodError> {
    match open_if_there(dir)? {
        (config, Some(source)) => Ok((config, source)),
        // To say what is missing.
        (config, None) => Ok((config, WeightSource::open(dir)?)),
    }
}

/// As [`open`]; no weights where there are none, or not all shards.
///
/// # Errors
/// As [`open`].
pub fn open_if_there(dir: &Path) -> Result<(ModelConfig, Option<WeightSource>), MethodError> {
    let config = alone(dir)?;
    let source = match WeightSource::open(dir) {
        Ok(source) => Some(source),
        Err(ModelError::NoWeights { .. } | ModelError::MissingShards { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let others = source.as_ref().map_or(Vec::new(), |source| source.others(&config.parameter_shapes()));
    if let Some(Others { path, .. }) = others.first() {
        let path = if others.len() > 1 { dir } else { path };
        let names: BTreeSet<&str> = others.iter().flat_map(|file| &file.names).map(String::as_str).collect();
        return Err(refusal(path, names, &config));
    }
    no_prefix(dir, &config)?;
    Ok((config, source))
}

const CONFIG: &str = "config.json";
/// How the names of files begin that hold an adapter's weights, or a fusion's.
const ADAPTER_WEIGHTS: [&str; 4] = ["adapter_model.", "adapter_model-", "pytorch_adapter.", "pytorch_model_adapter_fusion."];
/// Keys of config.json by which PEFT and the adapters library say what they put on a model.
const ADAPTER_KEYS: [&str; 2] = ["peft_config", "adapters"];

/// The configuration in `dir`, which holds no adapter beside it: Python's `from_pretrained` would put that on the model.
fn alone(dir: &Path) -> Result<ModelConfig, MethodError> {
    let refused = |what: String, hint| Err(MethodError::NotBare { path: dir.to_owned(), what, hint });
    if dir.join(PEFT_CONFIG).exists() {
        let hint = format!(
            "give the bare base as --model_name_or_path, and to generate and evaluate this folder as --adapter; if base and adapter share the \
             folder, move {PEFT_CONFIG} and the adapter's weights to one of their own"
        );
        return refused(format!("it holds an adapter ({PEFT_CONFIG})"), hint);
    }
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    if let Some(weights) = names.filter(|name| ADAPTER_WEIGHTS.iter().any(|start| name.starts_with(start))).min() {
        let hint = format!(
            "if the adapter is to be used, put its weights and its {PEFT_CONFIG} into a folder of their own, and give that to generate and \
             evaluate as --adapter; else move the file out of the base's folder"
        );
        return refused(format!("it holds an adapter's weights ({weights}), and no {PEFT_CONFIG} that says how they are used"), hint);
    }
    let config = ModelConfig::load(dir)?;
    match adapter_key(dir)? {
        None => Ok(config),
        Some(key) => Err(MethodError::NotBare {
            path: dir.join(CONFIG),
            what: format!("`{key}` is there, as in the file of a model with adapters on it"),
            hint: format!(
                "give the bare base as --model_name_or_path; if the weights are the base's and no adapter belongs to them, remove `{key}` \
                 from config.json"
            ),
        }),
    }
}

/// The first of [`ADAPTER_KEYS`] in config.json that says something.
fn adapter_key(dir: &Path) -> Result<Option<&'static str>, MethodError> {
    fn says_something(value: &Value) -> bool {
        match value {
            Value::Null | Value::Bool(false) => false,
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(list) => list.iter().any(says_something),
            // The adapters library writes its tables, all empty, for a model without adapters.
            Value::Object(object) => object.values().any(says_something),
            _ => true,
        }
    }
    let config = export::read_json(&dir.join(CONFIG))?;
    Ok(ADAPTER_KEYS.into_iter().find(|key| config.get(*key).is_some_and(says_something)))
}

/// What to do with a folder that holds a prefix.
const PREFIX_HINT: &str = "give the bare base as --model_name_or_path; generate and evaluate take this folder as --adapter";

fn no_prefix(dir: &Path, config: &ModelConfig) -> Result<(), MethodError> {
    let Some(tokens) = config.pre_seq_len else { return Ok(()) };
    Err(MethodError::NotBare {
        path: dir.join("config.json"),
        what: format!("`pre_seq_len` is {tokens}, as in the file of a tuned prefix"),
        hint: format!("{PREFIX_HINT}; if the weights are the base's and no prefix belongs to them, remove `pre_seq_len` from config.json"),
    })
}

/// What a tensor's name says of how it came to be there.
struct Kind {
    holds: fn(&str) -> bool,
    what: &'static str,
    hint: &'static str,
}

/// Whether one of the parts of a name, between its dots, is as `is` says.
fn any_part(name: &str, is: impl Fn(&str) -> bool) -> bool {
    name.split('.').any(is)
}

/// The first that holds a name speaks of it.
const KINDS: [Kind; 5] = [
    Kind { holds: |name| any_part(name, |part| part == "prefix_encoder"), what: "a tuned prefix", hint: PREFIX_HINT },
    Kind {
        holds: |name| {
            const PARTS: [&str; 5] = ["base_layer", "modules_to_save", "original_module", "prompt_encoder", "prompt_embeddings"];
            const STARTS: [&str; 7] = ["lora_", "ia3_", "vera_", "hada_", "lokr_", "oft_", "boft_"];
            any_part(name, |part| PARTS.contains(&part) || STARTS.iter().any(|start| part.starts_with(start)))
        },
        what: "parts of a PEFT adapter",
        hint: PEFT_HINT,
    },
    Kind { holds: |name| name.starts_with("base_model."), what: "a model inside a PEFT adapter", hint: PEFT_HINT },
    Kind {
        holds: |name| {
            const STARTS: [&str; 5] = ["adapter_", "adapters", "loras", "prefix_tunings", "prompt_tunings"];
            any_part(name, |part| STARTS.iter().any(|start| part.starts_with(start)))
        },
        what: "parts of an adapter of the adapters library",
        hint: "give the bare base as --model_name_or_path, and to generate and evaluate the folder that `save_adapter` wrote as --adapter",
    },
    Kind {
        holds: |name| {
            const LAST: [&str; 10] =
                ["weight_scale", "weight_format", "scales", "qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "nested_absmax"];
            any_part(name, |part| LAST.contains(&part) || part.starts_with("quant_state"))
        },
        what: "scales of quantized weights",
        hint: "quantized weights cannot be trained on: take the f16 model from the hub",
    },
];
const PEFT_HINT: &str = "give the bare base as --model_name_or_path, and to generate and evaluate the folder that PEFT saved \
                         (adapter_config.json and adapter_model.safetensors) as --adapter; or fold the adapter into the base in Python \
                         (`merge_and_unload`, then `save_pretrained`) and give the result";

/// What is said of the tensors `names` in `path`, which the model of `config` does not have.
fn refusal(path: &Path, names: BTreeSet<&str>, config: &ModelConfig) -> MethodError {
    let mut left: Vec<&str> = names.into_iter().collect();
    let mut parts = Vec::new();
    let mut hint = None;
    for kind in &KINDS {
        let (found, rest): (Vec<&str>, Vec<&str>) = left.into_iter().partition(|name| (kind.holds)(name));
        left = rest;
        if !found.is_empty() {
            parts.push(format!("it holds {} ({})", kind.what, listed(&found)));
            hint.get_or_insert(kind.hint);
        }
    }
    if !left.is_empty() {
        parts.push(format!("it holds {}, which the model of config.json does not have{}", listed(&left), by_config(&left, config)));
        hint.get_or_insert("take config.json and weights from the same place, or save the weights without these tensors");
    }
    MethodError::NotBare { path: path.to_owned(), what: parts.join("; "), hint: hint.unwrap_or_default().to_owned() }
}

/// The key of config.json because of which a tensor is not the model's, where there is one.
fn by_config(names: &[&str], config: &ModelConfig) -> String {
    let layer = |name: &str| name.strip_prefix("transformer.encoder.layers.")?.split('.').next()?.parse::<usize>().ok();
    let any = |end: &str| names.iter().any(|name| name.ends_with(end));
    if names.iter().filter_map(|name| layer(name)).any(|layer| layer >= config.num_layers) {
        format!(": its `num_layers` is {}", config.num_layers)
    } else if any("query_key_value.bias") {
        ": its `add_qkv_bias` is false".to_owned()
    } else if any(".bias") {
        format!(": its `add_bias_linear` is {}", config.add_bias_linear)
    } else if any("final_layernorm.weight") {
        ": its `post_layer_norm` is false".to_owned()
    } else {
        String::new()
    }
}

fn listed(names: &[&str]) -> String {
    let first: Vec<String> = names.iter().take(LISTED).map(|name| format!("`{}`", name.escape_debug())).collect();
    match names.len().saturating_sub(LISTED) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}
