//! A prefix in THUDM's format: the encoder's tensors, `transformer.prefix_encoder.*`, in a model's weight files, and the base's config.json with
//! `pre_seq_len` and `prefix_projection`. THUDM's trainer writes these tensors alone; ChatGLM3's script writes them beside the base's.
//!
//! Shapes: P virtual tokens, W = 2 * layers * groups * kv; of a row, slot 2i is layer i's key and 2i+1 its value, `[groups, kv]` each;
//! E the projection's width.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use half::bf16;
use rayon::prelude::*;
use serde_json::Value;

use super::base_weights::by_name;
use super::export::{self, ABOUT_FILE, ExportError, Files, PrefixShape, check_shape, pretty, read_tensor};
use super::prefix::{Projection, Shape};
use super::ptuning_v2::PtuningV2;
use super::{Base, understood};
use crate::formats::{FormatError, TensorFile, torch_pickle};
use crate::kernels::host::F32View;
use crate::model::config::{ModelConfig, ROTARY_BASE};
use crate::model::weights::{BUFFERS, WeightSource};

const CONFIG: &str = "config.json";
/// What is written; read is any of the names that a model's weights may have.
const TENSORS: &str = "pytorch_model.bin";
/// What may stand before the names of the encoder's own tensors: a model's state, that of its trunk, the encoder's alone.
const SPELLINGS: [&str; 3] = ["transformer.prefix_encoder.", "prefix_encoder.", ""];
/// `[P, W]`, also before a projection.
const EMBEDDING: &str = "embedding.weight";
/// `[E, W]`, `[E]`, `[W, E]`, `[W]`.
const PROJECTION: [&str; 4] = ["trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"];

/// Keys of `ChatGLMConfig` and those that transformers adds: what config.json may hold. [`ModelConfig::load`] checks their values.
#[rustfmt::skip]
const CONFIG_KEYS: &[&str] = &[
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_bias_linear", "add_qkv_bias",
    "apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "auto_map", "bias_dropout_fusion", "bos_token_id", "classifier_dropout", "do_sample", "dtype",
    "eos_token_id", "ffn_hidden_size", "finetuning_task", "fp32_residual_connection", "gmask_token_id", "hidden_dropout",
    "hidden_size", "id2label", "interleaved_qkv", "kv_channels", "label2id", "layernorm_epsilon", "max_length",
    "max_new_tokens", "model_type", "multi_query_attention", "multi_query_group_num", "num_attention_heads", "num_beams",
    "num_hidden_layers", "num_layers", "original_rope", "output_attentions", "output_hidden_states", "pad_token_id",
    "padded_vocab_size", "post_layer_norm", "pre_seq_len", "prefix_projection", "problem_type", "quantization_bit",
    "repetition_penalty", "return_dict", "rmsnorm", "rope_ratio", "rotary_percent", "seq_length", "temperature", "tie_word_embeddings",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
];

/// A prefix that was read in THUDM's format.
#[derive(Clone, Debug)]
pub struct ThudmPrefix {
    pub shape: PrefixShape,
    pub projection: bool,
    /// f32, under THUDM's names.
    pub tensors: BTreeMap<String, Tensor>,
    /// [`ABOUT_FILE`], where there is one.
    pub about: Option<Value>,
}

/// The files of THUDM's format: `tensors` under THUDM's names (`transformer.prefix_encoder.embedding.weight` `[P, W]`, with a projection
/// also `.trans.{0,2}.{weight,bias}`), and the base's config.json with `pre_seq_len` and `prefix_projection`.
///
/// # Errors
/// When a tensor is missing, unknown, of another shape, or cannot be read from its device.
pub fn thudm_files(
    shape: &PrefixShape,
    tensors: &BTreeMap<String, Tensor>,
    base_config: &Value,
    about: &Value,
) -> Result<Files, ExportError> {
    let projection = tensors.len() > 1;
    let width = tensors.get(&written(PROJECTION[1])).and_then(|bias| bias.dims().first().copied()).unwrap_or(0);
    let expected = shapes(shape, projection.then_some(width));
    if let Some(name) = tensors.keys().find(|name| !expected.keys().any(|own| written(own) == **name)) {
        return Err(ExportError::UnknownTensor { name: name.clone() });
    }
    for (own, dims) in &expected {
        let name = written(own);
        match tensors.get(&name) {
            Some(tensor) => check_shape(&name, tensor, dims, None)?,
            None => return Err(ExportError::MissingTensor { name }),
        }
    }
    let mut config = base_config.clone();
    if let Some(keys) = config.as_object_mut() {
        keys.insert("pre_seq_len".to_owned(), Value::from(shape.virtual_tokens));
        keys.insert("prefix_projection".to_owned(), Value::from(projection));
    }
    Ok(vec![
        (CONFIG.to_owned(), pretty(&config)),
        (TENSORS.to_owned(), torch_pickle::to_bytes(tensors)?),
        (ABOUT_FILE.to_owned(), pretty(about)),
    ])
}

/// Reads a prefix in THUDM's format, whatever base it is of.
///
/// # Errors
/// When a file is missing or not whole, no weights hold a prefix, config.json has no `pre_seq_len`, or sizes disagree.
pub fn read_thudm(dir: &Path) -> Result<ThudmPrefix, ExportError> {
    match ThudmFolder::open(dir)? {
        Some(folder) => folder.prefix(),
        None => Err(export::no_adapter(dir)),
    }
}

/// A folder with a prefix in THUDM's format.
pub(super) struct ThudmFolder {
    dir: PathBuf,
    /// config.json: its path, its text and what it says.
    path: PathBuf,
    json: Value,
    config: ModelConfig,
    source: WeightSource,
    /// What stands before the encoder's own names.
    spelling: &'static str,
}

impl ThudmFolder {
    /// The folder, opened; `None` if it has no weights, or none that hold a prefix.
    ///
    /// # Errors
    /// When weights are not whole, two files of weights each hold a prefix, or config.json is missing or damaged.
    pub(super) fn open(dir: &Path) -> Result<Option<Self>, ExportError> {
        let spelling = |source: &WeightSource| {
            let own = |name: &str| name == EMBEDDING || PROJECTION.contains(&name);
            SPELLINGS.into_iter().find(|spelling| source.names().any(|name| name.strip_prefix(spelling).is_some_and(own)))
        };
        let sources = WeightSource::open_all(dir)?.into_iter();
        let mut found = sources.filter_map(|source| Some((spelling(&source)?, source)));
        let (spelling, source) = match (found.next(), found.next()) {
            (None, _) => return Ok(None),
            (Some(one), None) => one,
            (Some(one), Some(other)) => {
                return Err(ExportError::TwoPrefixes { paths: Box::new([one, other].map(|(_, source)| source.root().to_owned())) });
            }
        };
        let path = dir.join(CONFIG);
        if !path.exists() {
            return Err(ExportError::NoPrefixConfig { path, weights: source.root().to_owned() });
        }
        let (json, config) = (export::read_json(&path)?, ModelConfig::load_beside_prefix(dir)?);
        Ok(Some(Self { dir: dir.to_owned(), path, json, config, source, spelling }))
    }

    /// Tests that the prefix was trained on this base: config.json has its sizes, and weights beside the prefix are the base's.
    ///
    /// # Errors
    /// The first difference: which key or tensor.
    pub(super) fn expect_base(&self, base: Base) -> Result<(), ExportError> {
        let Self { path, json, config: found, .. } = self;
        // Beside an export of this program it is the base's own config.json, whatever that says.
        if let (Value::Object(keys), None) = (json, export::read_about(&self.dir)?) {
            understood::check_known(path, keys, "", CONFIG_KEYS)?;
        }
        match first_difference(found, &base.model.config) {
            Some((key, expected)) => Err(export::key_error(path, json, key, format!("{expected}, as the base has it"))),
            None => self.expect_base_weights(base),
        }
    }

    fn expect_base_weights(&self, base: Base) -> Result<(), ExportError> {
        let places = by_name(base.model.config.num_layers);
        for name in self.source.names().filter(|name| self.own(name).is_none() && !BUFFERS.contains(name)) {
            let file = self.file(name)?;
            let path = || file.path().to_owned();
            let Some(weight) = places.get(name).and_then(|place| base.model.weight(*place)) else {
                return Err(ExportError::OtherTensor { path: path(), name: name.to_owned() });
            };
            let (found, expected) = (read_tensor(file, name, weight.dims())?, F32View::new(weight)?);
            let found = F32View::new(&found)?;
            // The base may have been rounded to bfloat16 when it was loaded.
            let is_same = |(found, base): (&f32, &f32)| found == base || bf16::from_f32(*found).to_f32() == *base;
            if let Some(index) = found.par_iter().zip(expected.par_iter()).position_first(|pair| !is_same(pair)) {
                return Err(ExportError::OtherWeight {
                    path: path(),
                    name: name.to_owned(),
                    index,
                    values: [found[index], expected[index]],
                });
            }
        }
        Ok(())
    }

    /// The prefix's tensors.
    ///
    /// # Errors
    /// When config.json has no `pre_seq_len`, a tensor is missing or superfluous, or sizes disagree.
    pub(super) fn prefix(&self) -> Result<ThudmPrefix, ExportError> {
        let Self { path, json, config, .. } = self;
        let expected = || "the number of virtual tokens".to_owned();
        let Some(virtual_tokens) = config.pre_seq_len else { return Err(export::key_error(path, json, "pre_seq_len", expected())) };
        let shape = PrefixShape::of(config, virtual_tokens);
        let width = if config.prefix_projection {
            let bias = self.spelt(PROJECTION[1]);
            Some(self.file(&bias)?.get(&bias)?.num_elements())
        } else {
            None
        };
        let shapes = shapes(&shape, width);
        if let Some(name) = self.source.names().find(|name| self.own(name).is_some_and(|own| !shapes.contains_key(own))) {
            let path_of_tensor = self.file(name)?.path().to_owned();
            if self.own(name).is_some_and(|own| PROJECTION.contains(&own)) {
                let expected = format!("true: {} holds `{name}`", path_of_tensor.display());
                return Err(export::key_error(path, json, "prefix_projection", expected));
            }
            return Err(ExportError::OtherTensor { path: path_of_tensor, name: name.to_owned() });
        }
        let tensors = shapes.into_iter().map(|(own, dims)| {
            let name = self.spelt(own);
            Ok((written(own), read_tensor(self.file(&name)?, &name, &dims)?))
        });
        let tensors = tensors.collect::<Result<_, ExportError>>()?;
        Ok(ThudmPrefix { shape, projection: config.prefix_projection, tensors, about: export::read_about(&self.dir)? })
    }

    fn spelt(&self, own: &str) -> String {
        format!("{}{own}", self.spelling)
    }

    /// A tensor's name in the encoder; `None` if it belongs to something else.
    fn own<'n>(&self, name: &'n str) -> Option<&'n str> {
        let own = name.strip_prefix(self.spelling)?;
        (!self.spelling.is_empty() || own == EMBEDDING || PROJECTION.contains(&own)).then_some(own)
    }

    /// The file that holds a tensor.
    fn file(&self, name: &str) -> Result<&TensorFile, ExportError> {
        let missing = || FormatError::NoSuchTensor { path: self.source.root().to_owned(), name: name.to_owned() };
        Ok(self.source.file_of(name).ok_or_else(missing)?)
    }
}

impl ThudmPrefix {
    /// The method that computes this prefix, without dropout.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub(super) fn method(&self, config: &ModelConfig) -> candle_core::Result<PtuningV2> {
        let width = self.tensors.get(&written(PROJECTION[1])).map(Tensor::elem_count);
        let projection = width.map(|hidden| Projection { input: self.shape.width(), hidden });
        PtuningV2::from_tensors(Shape::new(config, self.shape.virtual_tokens, projection), 0.0, 0, &self.tensors)
    }
}

/// The first key of a base's configuration that changes what a prefix acts on and is another in `found`: the key and what `base` has.
fn first_difference(found: &ModelConfig, base: &ModelConfig) -> Option<(&'static str, String)> {
    // A ratio acts through one of the two; which one is told by keys that a prefix's config.json need not have.
    let rope_ratio = |c: &ModelConfig| c.rope.base * c.rope.position_scale;
    let sizes = |c: &ModelConfig| {
        [
            ("num_layers", c.num_layers),
            ("hidden_size", c.hidden_size),
            ("ffn_hidden_size", c.ffn_hidden_size),
            ("num_attention_heads", c.num_attention_heads),
            ("multi_query_group_num", c.multi_query_group_num),
            ("kv_channels", c.kv_channels),
            ("padded_vocab_size", c.padded_vocab_size),
        ]
    };
    let flags = |c: &ModelConfig| {
        [("add_qkv_bias", c.add_qkv_bias), ("add_bias_linear", c.add_bias_linear), ("post_layer_norm", c.post_layer_norm)]
    };
    let sizes = sizes(found).into_iter().zip(sizes(base)).find(|(f, b)| f != b).map(|(_, (key, value))| (key, value.to_string()));
    let flags = flags(found).into_iter().zip(flags(base)).find(|(f, b)| f != b).map(|(_, (key, value))| (key, value.to_string()));
    let epsilon = (found.layernorm_epsilon != base.layernorm_epsilon).then(|| ("layernorm_epsilon", base.layernorm_epsilon.to_string()));
    let ratio = (rope_ratio(found) != rope_ratio(base)).then(|| ("rope_ratio", (rope_ratio(base) / ROTARY_BASE).to_string()));
    sizes.or(flags).or(epsilon).or(ratio)
}

/// THUDM's name of one of the encoder's tensors.
fn written(own: &str) -> String {
    format!("{}{own}", SPELLINGS[0])
}

/// The encoder's tensors by their own names; `projection` is E.
fn shapes(shape: &PrefixShape, projection: Option<usize>) -> BTreeMap<&'static str, Vec<usize>> {
    let w = shape.width();
    let mut shapes = BTreeMap::from([(EMBEDDING, vec![shape.virtual_tokens, w])]);
    if let Some(e) = projection {
        shapes.extend(PROJECTION.into_iter().zip([vec![e, w], vec![e], vec![w, e], vec![w]]));
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use serde_json::json;

    #[test]
    fn thudm_tensors_with_one_missing_or_unknown_are_refused() {
        let shape = PrefixShape { layers: 3, groups: 2, kv: 4, virtual_tokens: 5 };
        let tensor = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        let mut tensors = BTreeMap::from([(written(EMBEDDING), tensor(&[5, 48])), (written(PROJECTION[1]), tensor(&[7]))]);
        let text = thudm_files(&shape, &tensors, &json!({}), &json!({})).unwrap_err().to_string();
        assert_eq!(text, "tensor `transformer.prefix_encoder.trans.0.weight` of the prefix encoder is missing");
        tensors.insert("lora".to_owned(), tensor(&[1]));
        let text = thudm_files(&shape, &tensors, &json!({}), &json!({})).unwrap_err().to_string();
        assert_eq!(text, "tensor `lora` does not belong to a prefix encoder");
    }
}
