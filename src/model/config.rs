//! config.json of ChatGLM2 and its relatives.
//!
//! All sizes come from the file. What a key means that the file does not have:
//!
//! | key | if absent |
//! | --- | --- |
//! | sizes, `multi_query_attention`, `multi_query_group_num`, `add_qkv_bias`, `layernorm_epsilon`, `seq_length`, `torch_dtype`, `eos_token_id` | refused: the default of the published configuration class is not the published value, or there is none |
//! | `add_bias_linear` false, `post_layer_norm` true, `rmsnorm` true, `apply_residual_connection_post_layernorm` false, `fp32_residual_connection` false, `hidden_dropout` 0, `attention_dropout` 0, `quantization_bit` 0 | the class's default, which all published files have |
//! | `original_rope` true, `interleaved_qkv` false, `tie_word_embeddings` false | as in all published files; the published code has no other way, or does not run without the key |
//! | `pad_token_id` 0 | padding is masked, so that no result depends on it |
//! | `rope_ratio` 1 | as in ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B; refused where the file is of a 32k model, which has one |
//!
//! What the forward pass does not know is refused here, by name; so is what models of the family read in different ways, unless the file
//! says which of them it is of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::{Map, Value};

pub use super::error::ModelError;
use super::family::{Family, model_name};
use super::shape::ModelShape;
use crate::{json, paths};

/// Base of the rotary angles in all of the family.
pub const ROTARY_BASE: f64 = 10_000.0;
/// Rows of GLM-4's embedding. Its config.json calls itself `chatglm` too.
const GLM4_VOCABULARY: usize = 151_552;
/// `seq_length` of ChatGLM3-6B. Its 32k model has 32768, and a `rope_ratio`.
const CHATGLM3_TOKENS: usize = 8192;
/// No size of a real model comes near; keeps products of two sizes within 64 bits.
const MAX_SIZE: u64 = 1 << 31;
const MAX_LAYERS: u64 = 1 << 12;
/// Greatest layers times the square of the widest side of a matrix; 2^37 in ChatGLM2-6B. Keeps sums of products of sizes within 64 bits.
const MAX_WEIGHTS: u128 = 1 << 48;

/// A model of the ChatGLM2 family.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `_name_or_path`, else the folder's name.
    pub name: String,
    pub num_layers: usize,
    pub hidden_size: usize,
    /// Width of one half of the gated feed-forward layer.
    pub ffn_hidden_size: usize,
    pub num_attention_heads: usize,
    /// Channels of one head.
    pub kv_channels: usize,
    /// Groups of query heads that share a key and value head; as many as heads without multi-query attention.
    pub multi_query_group_num: usize,
    pub padded_vocab_size: usize,
    pub layernorm_epsilon: f64,
    /// Longest sequence (tokens) that the model was made for.
    pub seq_length: usize,
    pub add_qkv_bias: bool,
    pub add_bias_linear: bool,
    pub post_layer_norm: bool,
    pub rope: Rope,
    pub torch_dtype: DType,
    pub eos_token_id: u32,
    pub pad_token_id: u32,
    /// Virtual tokens of a prefix that was saved with this file.
    pub pre_seq_len: Option<usize>,
    pub prefix_projection: bool,
}

/// How rotary angles come from positions: angle = position / `position_scale` * `base`^(-2i / (kv_channels / 2)).
///
/// `rope_ratio` acts in two ways in the family: ChatGLM2-6B-32k divides positions by it, ChatGLM3-6B-32k multiplies the base. No key of
/// config.json says which. The model's name does: `_name_or_path`, else the repository before `--` in `auto_map`, which a file has
/// that was saved again. A ratio other than 1 without such a name is refused; `transformers_version` is that of whoever saved the file last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    pub base: f64,
    pub position_scale: f64,
}

impl ModelConfig {
    /// Reads `dir`/config.json.
    ///
    /// # Errors
    /// When the folder or the file is missing, the file is not JSON, lacks a needed key, or describes a model that this program does not compute.
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        Keys::read(dir)?.model(dir)
    }

    /// As [`Self::load`], beside a prefix in THUDM's format: as far as a prefix has to fit its base. How its trainer had quantized the base
    /// (`quantization_bit`) does not count, and in which way `rope_ratio` acts the base says.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_beside_prefix(dir: &Path) -> Result<Self, ModelError> {
        let mut keys = Keys::read(dir)?;
        keys.keys.remove("quantization_bit");
        keys.keys.insert("_name_or_path".to_owned(), Value::from(Family::ChatGlm2.title()));
        keys.model(dir)
    }

    /// Query heads that share one key and value head.
    pub fn heads_per_group(&self) -> usize {
        self.num_attention_heads / self.multi_query_group_num
    }

    /// Elements of a prefix per virtual token: key and value of all groups in all layers.
    pub fn prefix_width(&self) -> usize {
        2 * self.num_layers * self.multi_query_group_num * self.kv_channels
    }

    /// Names and shapes of the checkpoint's parameters.
    pub fn parameter_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shape = ModelShape::from(self);
        shape.weights().map(|weight| (weight.name(), shape.dims(weight))).collect()
    }
}

/// The file's keys, with errors that name them.
struct Keys {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl Keys {
    fn read(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(|source| match paths::expect_folder(dir) {
            Err(error) => error.into(),
            Ok(()) => ModelError::Io { path: path.clone(), source },
        })?;
        match json::value(&text).map_err(|source| ModelError::Json { path: path.clone(), source })? {
            Value::Object(keys) => Ok(Self { path, keys }),
            _ => Err(ModelError::Inconsistent { path, reason: "expected a JSON object at the top".to_owned() }),
        }
    }

    fn model(&self, dir: &Path) -> Result<ModelConfig, ModelError> {
        self.check_architecture()?;
        let num_attention_heads = self.size("num_attention_heads")?;
        let groups = if self.flag("multi_query_attention")? { self.size("multi_query_group_num")? } else { num_attention_heads };
        let folder = || dir.canonicalize().unwrap_or_else(|_| dir.to_owned()).file_name().map(|n| n.to_string_lossy().into_owned());
        let config = ModelConfig {
            name: self.text("_name_or_path").filter(|n| !n.is_empty()).map(str::to_owned).or_else(folder).unwrap_or_default(),
            num_layers: self.size("num_layers")?,
            hidden_size: self.size("hidden_size")?,
            ffn_hidden_size: self.size("ffn_hidden_size")?,
            num_attention_heads,
            kv_channels: self.size("kv_channels")?,
            multi_query_group_num: groups,
            padded_vocab_size: self.size("padded_vocab_size")?,
            layernorm_epsilon: self.positive("layernorm_epsilon")?,
            seq_length: self.size("seq_length")?,
            add_qkv_bias: self.flag("add_qkv_bias")?,
            add_bias_linear: self.flag_or("add_bias_linear", false)?,
            post_layer_norm: self.flag_or("post_layer_norm", true)?,
            rope: self.rope()?,
            torch_dtype: self.dtype()?,
            eos_token_id: self.eos()?,
            pad_token_id: self.optional("pad_token_id", |key| self.count(key))?.unwrap_or(0) as u32,
            pre_seq_len: self.optional("pre_seq_len", |key| self.size(key))?,
            prefix_projection: self.flag_or("prefix_projection", false)?,
        };
        self.check_sizes(&config)?;
        Ok(config)
    }

    fn check_architecture(&self) -> Result<(), ModelError> {
        match self.keys.get("model_type") {
            Some(Value::String(model_type)) if model_type == "chatglm" => {}
            None => return Err(self.missing("model_type")),
            Some(found) => return Err(self.other_model("model_type", "\"chatglm\"", found)),
        }
        let known = |a: &Value| matches!(a.as_str(), Some("ChatGLMModel" | "ChatGLMForConditionalGeneration"));
        if let Some(found) = self.present("architectures")
            && !found.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(known))
        {
            return Err(self.other_model("architectures", "[\"ChatGLMModel\"]", found));
        }
        // The first ChatGLM-6B calls itself `chatglm` too.
        if let Some(found) = self.present("position_encoding_2d").or_else(|| self.present("inner_hidden_size")) {
            let key = if self.present("position_encoding_2d").is_some() { "position_encoding_2d" } else { "inner_hidden_size" };
            return Err(self.other_model(key, "no such key, which only ChatGLM-6B has", found));
        }
        if let Some(found @ Value::Array(_)) = self.keys.get("eos_token_id") {
            return Err(self.other_model("eos_token_id", "one number (a list of them is GLM-4's)", found));
        }
        if let Some(found) = self.keys.get("padded_vocab_size").filter(|v| v.as_u64() == Some(GLM4_VOCABULARY as u64)) {
            return Err(self.other_model("padded_vocab_size", "65024 (151552 is GLM-4's)", found));
        }
        for (key, expected) in [
            ("rmsnorm", true),
            ("original_rope", true),
            ("apply_residual_connection_post_layernorm", false),
            ("fp32_residual_connection", false),
            ("tie_word_embeddings", false),
            ("interleaved_qkv", false),
        ] {
            if let Some(found) = self.present(key).filter(|found| found.as_bool() != Some(expected)) {
                return Err(self.other_model(key, &expected.to_string(), found));
            }
        }
        for key in ["hidden_dropout", "attention_dropout"] {
            if let Some(found) = self.present(key).filter(|found| found.as_f64() != Some(0.0)) {
                return Err(self.other_model(key, "0 (the published models drop nothing out)", found));
            }
        }
        if let Some(found) = self.present("quantization_config") {
            return Err(self.other_model("quantization_config", "no such key (f16, bf16 or f32 weights)", found));
        }
        match self.present("quantization_bit") {
            Some(bits) if bits.as_u64() != Some(0) => Err(self.other_model("quantization_bit", "none (f16, bf16 or f32 weights)", bits)),
            _ => Ok(()),
        }
    }

    fn check_sizes(&self, c: &ModelConfig) -> Result<(), ModelError> {
        let fail = |reason| Err(ModelError::Inconsistent { path: self.path.clone(), reason });
        if c.num_layers as u64 > MAX_LAYERS {
            return Err(self.wrong("num_layers", &format!("at most {MAX_LAYERS}"), &Value::from(c.num_layers)));
        }
        if !c.num_attention_heads.is_multiple_of(c.multi_query_group_num) {
            return fail(format!(
                "`num_attention_heads` {} is not a multiple of `multi_query_group_num` {}",
                c.num_attention_heads, c.multi_query_group_num
            ));
        }
        if !c.kv_channels.is_multiple_of(4) {
            return fail(format!("`kv_channels` {} is not a multiple of 4, but half of it turns in pairs", c.kv_channels));
        }
        let shape = ModelShape::from(c);
        let widest = [shape.hidden, 2 * shape.ffn, shape.qkv_width(), shape.vocab].into_iter().max().map_or(0, u128::from);
        if widest * widest * u128::from(shape.layers) > MAX_WEIGHTS {
            return fail("its sizes are those of more weights than any model has".to_owned());
        }
        for (key, id) in [("eos_token_id", c.eos_token_id), ("pad_token_id", c.pad_token_id)] {
            if id as usize >= c.padded_vocab_size {
                return fail(format!("`{key}` {id} is not below `padded_vocab_size` {}", c.padded_vocab_size));
            }
        }
        Ok(())
    }

    fn rope(&self) -> Result<Rope, ModelError> {
        let name = self.text("_name_or_path").unwrap_or_default();
        let Some(ratio) = self.optional("rope_ratio", |key| self.positive(key))? else {
            let seq_length = self.size("seq_length")?;
            let is_32k = if model_name(name).to_lowercase().contains("32k") {
                Some(format!("`_name_or_path` {name:?} is a 32k model"))
            } else if Family::of(name) == Some(Family::ChatGlm3) && seq_length > CHATGLM3_TOKENS {
                Some(format!("`_name_or_path` is {name:?} and `seq_length` {seq_length}, where ChatGLM3-6B has {CHATGLM3_TOKENS}"))
            } else {
                None
            };
            return match is_32k {
                None => Ok(Rope { base: ROTARY_BASE, position_scale: 1.0 }),
                Some(why) => Err(ModelError::Undecided {
                    path: self.path.clone(),
                    readings: format!(
                        "{why}, but there is no `rope_ratio`: ChatGLM2-6B-32k has 16 and ChatGLM3-6B-32k 50; 1 changes nothing"
                    ),
                    hint: "add the key `rope_ratio` to config.json: the model's own, from its page on the hub, or 1 if it was trained without one"
                        .to_owned(),
                }),
            };
        };
        match Family::of(name).or_else(|| Some(Family::of_auto_map(self.present("auto_map")?)?.0)) {
            _ if ratio == 1.0 => Ok(Rope { base: ROTARY_BASE, position_scale: 1.0 }),
            Some(Family::ChatGlm3) => Ok(Rope { base: ROTARY_BASE * ratio, position_scale: 1.0 }),
            Some(Family::ChatGlm2) => Ok(Rope { base: ROTARY_BASE, position_scale: ratio }),
            _ => Err(ModelError::Undecided {
                path: self.path.clone(),
                readings: format!(
                    "`rope_ratio` is {ratio}, which divides positions in ChatGLM2-6B-32k and multiplies the base of the angles in \
                     ChatGLM3-6B-32k, and {} does not say which of the two this is",
                    if name.is_empty() { "a file without `_name_or_path`".to_owned() } else { format!("`_name_or_path` {name:?}") }
                ),
                hint: "set `_name_or_path` in config.json to the model that this one was made from, \"THUDM/chatglm2-6b-32k\" or \
                       \"THUDM/chatglm3-6b-32k\""
                    .to_owned(),
            }),
        }
    }

    fn dtype(&self) -> Result<DType, ModelError> {
        let key = if self.present("torch_dtype").is_none() && self.present("dtype").is_some() { "dtype" } else { "torch_dtype" };
        match self.required(key)? {
            Value::String(s) if s == "float16" => Ok(DType::F16),
            Value::String(s) if s == "bfloat16" => Ok(DType::BF16),
            Value::String(s) if s == "float32" => Ok(DType::F32),
            other => Err(self.wrong(key, "\"float16\", \"bfloat16\" or \"float32\"", other)),
        }
    }

    fn eos(&self) -> Result<u32, ModelError> {
        Ok(self.count("eos_token_id")? as u32)
    }

    /// A key's value; null counts as absent.
    fn present(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|v| !v.is_null())
    }

    fn required(&self, key: &'static str) -> Result<&Value, ModelError> {
        self.present(key).ok_or_else(|| self.missing(key))
    }

    fn optional<T>(&self, key: &'static str, read: impl Fn(&'static str) -> Result<T, ModelError>) -> Result<Option<T>, ModelError> {
        self.present(key).map(|_| read(key)).transpose()
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.present(key)?.as_str()
    }

    fn count(&self, key: &'static str) -> Result<usize, ModelError> {
        let value = self.required(key)?;
        match value.as_u64().filter(|&v| v < MAX_SIZE) {
            Some(count) => Ok(count as usize),
            None => Err(self.wrong(key, "a whole number below 2^31", value)),
        }
    }

    fn size(&self, key: &'static str) -> Result<usize, ModelError> {
        match self.count(key)? {
            0 => Err(self.wrong(key, "a number above 0", &Value::from(0))),
            size => Ok(size),
        }
    }

    fn positive(&self, key: &'static str) -> Result<f64, ModelError> {
        let value = self.required(key)?;
        value.as_f64().filter(|v| *v > 0.0).ok_or_else(|| self.wrong(key, "a number above 0", value))
    }

    fn flag(&self, key: &'static str) -> Result<bool, ModelError> {
        let value = self.required(key)?;
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value))
    }

    fn flag_or(&self, key: &'static str, default: bool) -> Result<bool, ModelError> {
        Ok(self.optional(key, |key| self.flag(key))?.unwrap_or(default))
    }

    fn missing(&self, key: &'static str) -> ModelError {
        ModelError::MissingKey { path: self.path.clone(), key }
    }

    fn wrong(&self, key: &'static str, expected: &str, found: &Value) -> ModelError {
        ModelError::WrongValue { path: self.path.clone(), key, expected: expected.to_owned(), found: found.to_string() }
    }

    fn other_model(&self, key: &'static str, expected: &str, found: &Value) -> ModelError {
        ModelError::OtherModel { path: self.path.clone(), key, expected: expected.to_owned(), found: found.to_string() }
    }
}
