//! Which keys of another library's configuration are understood, and what each may say. A key that is not listed may change what the
//! adapter computes: it is refused by its name, unless it is off.
//!
//! Keys and defaults are those of PEFT 0.3 to 0.20 (`peft/config.py`, `peft/tuners/*/config.py`).

use std::path::Path;

use serde_json::{Map, Value};

use super::export::ExportError;

/// What a key may say.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// Anything: it says where the adapter is from or how it was trained, and its tensors mean the same whatever it says. Also keys that
    /// another key with a rule of its own switches on, and those that the reader checks.
    Any,
    /// Off, see [`is_off`]; the text is the library's default.
    Off(&'static str),
    /// Null or false: an empty object switches it on.
    Null,
    /// Off, or one of these JSON values, whatever their case.
    OneOf(&'static [&'static str]),
}

pub(super) type Rules = &'static [(&'static str, Rule)];

use Rule::{Any, Null, Off, OneOf};

/// Of all of PEFT's configurations.
const COMMON: Rules = &[
    ("auto_mapping", Any),
    ("base_model_name_or_path", Any),
    ("inference_mode", Any),
    ("peft_type", Any),
    ("peft_version", Any),
    ("revision", Any),
    ("task_type", Any),
];

/// Of `LoraConfig`.
pub(super) const LORA: Rules = &[
    ("r", Any),
    ("lora_alpha", Any),
    ("lora_dropout", Any),
    ("target_modules", Any),
    ("use_dora", Any),
    ("use_rslora", Any),
    ("bias", OneOf(&["\"none\""])),
    ("fan_in_fan_out", Off("false")),
    // These set the start of A and B alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take something off the base's weights as well, and
    // PEFT does it again when it loads the adapter (peft/tuners/lora/layer.py, `update_layer`).
    ("init_lora_weights", OneOf(&["true", "false", "\"gaussian\"", "\"eva\"", "\"orthogonal\"", "\"mica\""])),
    ("alpha_pattern", Off("{}")),
    ("rank_pattern", Off("{}")),
    ("exclude_modules", Off("null")),
    ("layers_pattern", Off("null")),
    ("layers_to_transform", Off("null")),
    ("layer_replication", Off("null")),
    ("modules_to_save", Off("null")),
    ("target_parameters", Off("null")),
    ("trainable_token_indices", Off("null")),
    ("lora_bias", Off("false")),
    ("alora_invocation_tokens", Off("null")),
    ("arrow_config", Off("null")),
    ("use_bdlora", Off("null")),
    ("kasa_config", Null),
    ("monteclora_config", Null),
    ("velora_config", Null),
    ("megatron_config", Off("null")),
    ("megatron_core", Any), // with megatron_config
    ("use_qalora", Off("false")),
    ("qalora_group_size", Any), // with use_qalora
    // With an init_lora_weights of their name.
    ("corda_config", Any),
    ("eva_config", Any),
    ("loftq_config", Any),
    ("lora_ga_config", Any),
    ("ensure_weight_tying", Any), // of modules_to_save and of embeddings, which cannot be targets
    ("runtime_config", Any),      // PEFT ignores it in a file
    ("enable_lora", Off("null")),
    ("merge_weights", Any), // whether PEFT 0.2 merged for evaluation
];

/// Of `IA3Config`.
pub(super) const IA3: Rules = &[
    ("target_modules", Any),
    ("feedforward_modules", Any),
    ("init_ia3_weights", Any),
    ("exclude_modules", Off("null")),
    ("fan_in_fan_out", Off("false")),
    ("modules_to_save", Off("null")),
];

/// Of `PromptLearningConfig`, and what its kinds add: `PrefixTuningConfig`, `PromptTuningConfig`, `PromptEncoderConfig`. PEFT saves the
/// output of an encoder, so nothing that is said of it counts.
pub(super) const PROMPT: Rules = &[
    ("num_virtual_tokens", Any),
    ("token_dim", Any),
    ("num_layers", Any),
    ("num_attention_heads", Any),
    ("num_transformer_submodules", OneOf(&["1"])),
    ("modules_to_save", Off("null")),
    ("task_type", OneOf(&["\"CAUSAL_LM\""])), // PEFT puts nothing before a row, or something elsewhere, for others
    ("prefix_projection", Any),
    ("init_weights", Any),
    ("encoder_hidden_size", Any),
    ("encoder_num_layers", Any),
    ("encoder_dropout", Any),
    ("encoder_reparameterization_type", Any),
    ("prompt_tuning_init", Any),
    ("prompt_tuning_init_text", Any),
    ("tokenizer_kwargs", Any),
    ("tokenizer_name_or_path", Any),
];

/// Whether a value says "none": null, false, "", [] or {}, which PEFT treats the same.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(keys) => keys.is_empty(),
        _ => false,
    }
}

/// Holds every key of PEFT's configuration in `path` against `own`, the rules of its kind, and those of all kinds.
///
/// # Errors
/// The first key, by name, that is not understood or says what is not computed here.
pub(super) fn check_peft(path: &Path, config: &Value, own: Rules) -> Result<(), ExportError> {
    let Value::Object(keys) = config else { return Ok(()) };
    for (key, value) in keys {
        match own.iter().chain(COMMON).find(|(name, _)| name == key) {
            Some((name, rule)) => check(path, name, value, *rule)?,
            None => refuse_unknown(path, key, value)?,
        }
    }
    Ok(())
}

fn check(path: &Path, key: &'static str, value: &Value, rule: Rule) -> Result<(), ExportError> {
    let (holds, expected) = match rule {
        Any => (true, String::new()),
        Off(default) => (is_off(value), default.to_owned()),
        Null => (matches!(value, Value::Null | Value::Bool(false)), "null".to_owned()),
        OneOf(values) => {
            let text = value.to_string();
            (is_off(value) || values.iter().any(|one| one.eq_ignore_ascii_case(&text)), one_of(values))
        }
    };
    if holds { Ok(()) } else { Err(ExportError::Key { path: path.to_owned(), key, expected, found: shortened(value) }) }
}

/// Refuses keys of `object` that are not `known`, unless they are off; `prefix` stands before their names in the error.
///
/// # Errors
/// The first such key, by name.
pub(super) fn check_known(path: &Path, object: &Map<String, Value>, prefix: &str, known: &[&str]) -> Result<(), ExportError> {
    let unknown = object.iter().filter(|(key, _)| !known.contains(&key.as_str()));
    unknown.into_iter().try_for_each(|(key, value)| refuse_unknown(path, &format!("{prefix}{key}"), value))
}

fn refuse_unknown(path: &Path, key: &str, value: &Value) -> Result<(), ExportError> {
    if is_off(value) {
        return Ok(());
    }
    Err(ExportError::UnknownKey { path: path.to_owned(), key: key.to_owned(), found: shortened(value) })
}

fn one_of(values: &[&str]) -> String {
    match values {
        [rest @ .., last] if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => values.concat(),
    }
}

/// A value as JSON, cut to what a message can hold.
fn shortened(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}
