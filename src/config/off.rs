//! The spellings of "off" and "not given" in a run file: null, `""`, `[]`, `{}`, false, `"no"`, `"none"`, `"off"`.

use toml::Value;

use super::values::truth;
use super::{Key, check_type};

/// What a value asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    /// `""`, `[]`, `{}`: as if the key were not there.
    Nothing,
    /// false or a word for it.
    Off,
    Something,
}

impl Asks {
    pub fn of(value: &Value) -> Self {
        match value {
            Value::Array(values) if values.is_empty() => Self::Nothing,
            Value::Table(table) if table.is_empty() => Self::Nothing,
            Value::String(text) if text.trim().is_empty() => Self::Nothing,
            Value::Boolean(false) => Self::Off,
            Value::String(text) if is_off(text) => Self::Off,
            _ => Self::Something,
        }
    }
}

pub(super) fn is_off(text: &str) -> bool {
    ["no", "none", "off", "false", "null"].iter().any(|word| word.eq_ignore_ascii_case(text.trim()))
}

/// Keys that can be off, beside paths: off is their default.
const OFF_IS_DEFAULT: &[&str] = &[
    "input_column",
    "history_column",
    "max_train_samples",
    "max_eval_samples",
    "global_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "eval_steps",
    "save_total_limit",
    "save_keep_every",
    "save_before_timeout",
    "threads",
    "encoder_hidden_size",
    "fusion_regularization",
    "freeze_trainable_modules",
];

/// Keys that can be off, and are on by default: off is 0.
const OFF_IS_ZERO: &[&str] = &["save_steps", "audit_steps", "stall_timeout", "max_grad_norm", "prefix_dropout", "lora_dropout"];

/// Keys that can be off, and for which "off" is a value, `none`, beside those that list it among their words.
const OFF_IS_NONE: &[&str] = &["memory_limit"];

/// Keys for which an empty list asks for something: the method judges it.
const EMPTY_IS_A_VALUE: &[&str] = &["ia3_feedforward"];

/// The value that `key` gets from what a file says, which is not null; `None`: it is not given.
///
/// # Errors
/// When the key cannot hold the value; says what was found and expected.
pub(super) fn meant(key: &Key, value: Value) -> Result<Option<Value>, String> {
    let name = key.name.as_str();
    let asks = Asks::of(&value);
    if asks == Asks::Nothing && !EMPTY_IS_A_VALUE.contains(&name) {
        return Ok(None);
    }
    if let (true, Some(on)) = (key.is_bool, value.as_str().and_then(truth)) {
        return Ok(Some(Value::Boolean(on)));
    }
    if asks == Asks::Off && (key.is_path || OFF_IS_DEFAULT.contains(&name)) {
        return Ok(None);
    }
    if asks == Asks::Off && (OFF_IS_NONE.contains(&name) || key.words.iter().any(|word| word == "none")) {
        return Ok(Some(Value::String("none".to_owned())));
    }
    // serde's message of a word that is no text names Rust's kinds of values.
    if !(key.is_bool || key.words.is_empty() || value.is_str()) {
        return Err(format!("{} `{value}`, expected one of `{}`", value.type_str(), key.words.join("`, `")));
    }
    let value = if asks == Asks::Off && OFF_IS_ZERO.contains(&name) { zero(key) } else { value };
    check_type(key.section, name, &value).map(|()| Some(value))
}

/// Zero in the form that the key takes: a number, or a time.
fn zero(key: &Key) -> Value {
    let number = Value::Integer(0);
    if check_type(key.section, &key.name, &number).is_ok() { number } else { Value::String("0s".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::super::KeyTable;
    use super::*;

    #[test]
    fn keys_that_can_be_off_are_keys_and_take_what_off_is() {
        let keys = KeyTable::new();
        for name in [OFF_IS_DEFAULT, OFF_IS_ZERO, EMPTY_IS_A_VALUE].concat() {
            let key = keys.get(name).unwrap_or_else(|| panic!("{name} is no key"));
            assert!(!key.is_bool && !key.is_path, "{name}");
        }
        for name in OFF_IS_ZERO {
            let key = keys.get(name).unwrap();
            assert!(check_type(key.section, name, &zero(key)).is_ok(), "{name}");
        }
    }
}
