//! The keys of all tuning methods, as a user gives them: section `[method]` of a configuration file, and `--key` on the command line.
//!
//! A field's name is its key, its doc comment the help text. Nothing here has a default: `None` means "not given". Where a key exists in PEFT,
//! in the adapters library, in THUDM's scripts or in LLaMA-Factory, it has the name that it has there.

use std::num::NonZeroUsize;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::de::value::{Error as NameError, StrDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer};
use serde::{Deserialize, Serialize};

use super::FinetuningType;
use super::adapter::AdapterKind;
use super::p_tuning::EncoderKind;
use super::prompt_tuning::PromptInit;

/// `[method]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Method", rename_all = "snake_case")]
pub struct MethodKeys {
    /// Tuning method [default: ptuning_v2]
    #[arg(long, value_name = "METHOD", value_parser = named::<FinetuningType>(super::METHOD_NAMES))]
    pub finetuning_type: Option<FinetuningType>,
    /// Virtual tokens of the prefix of ptuning_v2 and prefix_tuning [default: 128]
    #[arg(long, value_name = "TOKENS")]
    pub pre_seq_len: Option<usize>,
    /// Put the prefix through an MLP while training [default: false; true for prefix_tuning]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub prefix_projection: Option<bool>,
    /// Dropout on the prefix of ptuning_v2 [default: 0.1]
    #[arg(long, value_name = "SHARE")]
    pub prefix_dropout: Option<f64>,
    /// Soft tokens of prompt_tuning and p_tuning [default: 20]
    #[arg(long, value_name = "TOKENS")]
    pub num_virtual_tokens: Option<usize>,
    /// What the soft tokens of prompt_tuning start as: N(0, 1), or rows of the word embedding [default: vocab]
    #[arg(long, value_name = "START", value_parser = named::<PromptInit>(&["random", "vocab"]))]
    pub prompt_init: Option<PromptInit>,
    /// What computes the soft tokens of p_tuning [default: MLP]
    #[arg(long, value_name = "ENCODER", value_parser = named::<EncoderKind>(&["MLP", "LSTM"]))]
    pub encoder_reparameterization_type: Option<EncoderKind>,
    /// Width of the encoder of prefix_tuning and p_tuning [default: that of one layer's keys; the model's hidden size]
    #[arg(long, value_name = "WIDTH")]
    pub encoder_hidden_size: Option<usize>,
    /// Rank of the updates of `lora` [default: 8]
    #[arg(long, value_name = "RANK")]
    pub lora_rank: Option<usize>,
    /// The updates count alpha / rank times [default: twice the rank]
    #[arg(long, value_name = "ALPHA")]
    pub lora_alpha: Option<f64>,
    /// Dropout before the updates [default: 0.1]
    #[arg(long, value_name = "SHARE")]
    pub lora_dropout: Option<f64>,
    /// Linear layers that get updates: names separated by commas (query_key_value, dense, dense_h_to_4h, dense_4h_to_h), `all`, or a regular
    /// expression for whole names such as `.*layers\.2[0-7]\..*dense` [default: query_key_value]
    #[arg(long, value_name = "LAYERS")]
    pub lora_target: Option<String>,
    /// Let the updates count alpha / sqrt(rank) times [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub use_rslora: Option<bool>,
    /// Train the size of each output's weights apart from their direction (DoRA) [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub use_dora: Option<bool>,
    /// Where adapters stand: behind attention and MLP (houlsby), or behind the MLP (pfeiffer) [default: pfeiffer]
    #[arg(long, value_name = "KIND", value_parser = named::<AdapterKind>(&["houlsby", "pfeiffer"]))]
    pub adapter_config: Option<AdapterKind>,
    /// An adapter's width is the hidden size divided by this [default: 16]
    #[arg(long, value_name = "FACTOR")]
    pub reduction_factor: Option<usize>,
    /// The name that an adapter is saved under [default: default]
    #[arg(long, value_name = "NAME")]
    pub adapter_name: Option<String>,
    /// Folders of two or more trained pfeiffer adapters that adapter_fusion joins, separated by commas
    #[arg(long, value_name = "DIRS", value_hint = clap::ValueHint::DirPath)]
    pub fusion_adapters: Option<String>,
    /// Keep the value matrices of adapter_fusion near the identity with this weight, as the adapters library does with 0.01 [default: 0]
    #[arg(long, value_name = "WEIGHT")]
    pub fusion_regularization: Option<f64>,
    /// Linear layers that ia3 scales, separated by commas [default: query_key_value,dense_4h_to_h]
    #[arg(long, value_name = "LAYERS")]
    pub ia3_target: Option<String>,
    /// Those of them whose input it scales in place of their output [default: dense_4h_to_h, if it is one of them]
    #[arg(long, value_name = "LAYERS")]
    pub ia3_feedforward: Option<String>,
    /// Last layers that `freeze` trains [default: 2]
    #[arg(long, value_name = "LAYERS")]
    pub freeze_trainable_layers: Option<usize>,
    /// Parameters that `freeze` trains in place of whole last layers: names separated by commas, or a regular expression for whole names
    #[arg(long, value_name = "NAMES")]
    pub freeze_trainable_modules: Option<String>,
}

/// A key whose value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyError {
    /// Its name, without the section.
    pub key: &'static str,
    pub found: String,
    pub expected: &'static str,
}

impl KeyError {
    pub fn new(key: &'static str, found: impl ToString, expected: &'static str) -> Self {
        Self { key, found: found.to_string(), expected }
    }
}

/// No width, rank or number of virtual tokens comes near; keeps the products of a plan's sizes within 64 bits.
const MAX_SIZE: usize = 1 << 16;

/// # Errors
/// When a given value is 0 or beyond all use.
pub fn positive(key: &'static str, value: usize) -> Result<NonZeroUsize, KeyError> {
    if value > MAX_SIZE {
        return Err(KeyError::new(key, value, "at most 65536"));
    }
    NonZeroUsize::new(value).ok_or_else(|| KeyError::new(key, value, "1 or more"))
}

/// # Errors
/// When the value is not in [0, 1).
pub fn share_below_one(key: &'static str, value: f64) -> Result<f64, KeyError> {
    within(key, value, (0.0..1.0).contains(&value), "a share of at least 0 and below 1")
}

/// # Errors
/// When the condition does not hold or the value is not finite.
pub fn within(key: &'static str, value: f64, holds: bool, expected: &'static str) -> Result<f64, KeyError> {
    if holds && value.is_finite() { Ok(value) } else { Err(KeyError::new(key, value, expected)) }
}

/// Reads one of `names` on the command line, as serde reads it in a file; help and completions list them.
pub fn named<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| {
        let name: StrDeserializer<'_, NameError> = name.as_str().into_deserializer();
        T::deserialize(name)
    })
}
