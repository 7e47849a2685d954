//! Adapters in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`. `thudm.rs` has a prefix in THUDM's.
//!
//! Of a prefix PEFT's file holds the encoder's output, THUDM's the encoder itself. What this program knows beyond either format goes into
//! a third file, [`ABOUT_FILE`]: PEFT warns at unknown keys in its configuration, and older versions refuse them.
//!
//! Shapes: P virtual tokens, W = 2 * layers * groups * kv; of a row, slot 2i is layer i's key and 2i+1 its value, `[groups, kv]` each.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::understood::{self, Rules};
use crate::formats::{FormatError, TensorFile, safetensors};
use crate::model::config::{ModelConfig, ModelError};
use crate::paths::{self, NotThere};

/// Method, sizes, base fingerprint, tokenizer hash and template of an exported prefix.
pub const ABOUT_FILE: &str = "glmddp.json";
pub(super) const PEFT_CONFIG: &str = "adapter_config.json";
/// What PEFT puts before the base's names.
pub(super) const PEFT_PREFIX: &str = "base_model.model.";
const PEFT_TENSORS: &str = "adapter_model.safetensors";
const PEFT_TENSORS_OLD: &str = "adapter_model.bin";
const PEFT_TABLE: &str = "prompt_embeddings";

#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not valid JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: key `{key}` is {found}, expected {expected}", path.display())]
    Key { path: PathBuf, key: &'static str, expected: String, found: String },
    #[error("{}: key `{key}` is {found}, and this program does not know what that changes", path.display())]
    UnknownKey { path: PathBuf, key: String, found: String },
    #[error("tensor `{name}`{} has shape {found}, expected {expected}", path.as_ref().map(|p| format!(" in {}", p.display())).unwrap_or_default())]
    Shape { path: Option<PathBuf>, name: String, expected: String, found: String },
    #[error("tensor `{name}` of the prefix encoder is missing")]
    MissingTensor { name: String },
    #[error("tensor `{name}` does not belong to a prefix encoder")]
    UnknownTensor { name: String },
    #[error("{} holds no adapter: {reason}", path.display())]
    NoAdapter { path: PathBuf, reason: String },
    #[error("{} holds a prefix, and {}, which says how long it is, is not there", weights.display(), path.display())]
    NoPrefixConfig { path: PathBuf, weights: PathBuf },
    #[error("{} and {} each hold a prefix", paths[0].display(), paths[1].display())]
    TwoPrefixes { paths: Box<[PathBuf; 2]> },
    #[error("tensor `{name}` in {} is not the base's: element {index} is {}, and {} in the base", path.display(), values[0], values[1])]
    OtherWeight { path: PathBuf, name: String, index: usize, values: [f32; 2] },
    #[error("{}: the adapter was trained on {what} {found}, and this is {what} {expected}", path.display())]
    OtherBase { path: PathBuf, what: &'static str, expected: String, found: String },
    #[error("{} is for {found} layers, expected {expected}", path.display())]
    Layers { path: PathBuf, expected: usize, found: usize },
    #[error("{} holds tensor `{name}`, which such an adapter does not have", path.display())]
    OtherTensor { path: PathBuf, name: String },
    #[error("`{name}` cannot be written as {}: element {at} would be {value}", dtype.as_str())]
    Overflow { name: String, dtype: DType, at: String, value: &'static str },
    #[error(transparent)]
    NotThere(#[from] NotThere),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl ExportError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.hint(),
            Self::Format(error) => error.hint(),
            Self::NoPrefixConfig { .. } => Some(
                "take the config.json that was saved with the prefix, or the base's with `pre_seq_len` and `prefix_projection` added to it"
                    .to_owned(),
            ),
            Self::TwoPrefixes { .. } => Some("remove one of the two files".to_owned()),
            Self::OtherWeight { .. } => Some(
                "the prefix was trained on another base, or its base was trained with it: give the base that it was trained on".to_owned(),
            ),
            Self::NotThere(error) => Some(error.hint_and("a run exports its adapter to OUTPUT_DIR/adapter")),
            Self::NoAdapter { path, .. } if path.join("adapter").join(PEFT_CONFIG).exists() => {
                Some(format!("is `{}` meant?", path.join("adapter").display()))
            }
            Self::NoAdapter { .. } => Some(
                "give the folder that a run exported, OUTPUT_DIR/adapter; a fully tuned model is a base: --model_name_or_path".to_owned(),
            ),
            Self::OtherBase { .. } => {
                Some("give the base that the adapter was trained on; adapter_config.json names its folder".to_owned())
            }
            Self::Io { path, .. } if path.ends_with(PEFT_CONFIG) => {
                Some("give the folder that a run exported, OUTPUT_DIR/adapter, or that PEFT or the adapters library saved".to_owned())
            }
            Self::UnknownKey { key, .. } => Some(format!(
                "if `{key}` changes nothing of what the adapter computes, remove it from the file; else use the adapter with the library that \
                 saved it, which can also merge a LoRA into its base"
            )),
            Self::Key { key: "init_lora_weights", .. } => Some(
                "another start may have changed the base's weights as well: save the adapter again in PEFT with \
                 `save_pretrained(FOLDER, path_initial_model_for_weight_conversion=UNTRAINED_ADAPTER)`, which makes a plain LoRA of it, or \
                 merge it into its own base and give the merged model as the base"
                    .to_owned(),
            ),
            Self::Overflow { .. } => {
                Some("the changed weight is greater than this type can hold: use the adapter beside its base".to_owned())
            }
            Self::Key { key: "pre_seq_len", .. } => Some("give the folder that the prefix was saved to, not the base model's".to_owned()),
            _ => None,
        }
    }
}

/// The sizes of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixShape {
    pub layers: usize,
    pub groups: usize,
    pub kv: usize,
    pub virtual_tokens: usize,
}

impl PrefixShape {
    pub fn of(config: &ModelConfig, virtual_tokens: usize) -> Self {
        Self { layers: config.num_layers, groups: config.multi_query_group_num, kv: config.kv_channels, virtual_tokens }
    }

    /// W: elements per virtual token.
    pub fn width(&self) -> usize {
        2 * self.layers * self.token_dim()
    }

    /// Elements of a key or value of one layer.
    fn token_dim(&self) -> usize {
        self.groups * self.kv
    }
}

/// Files as (name, content).
pub type Files = Vec<(String, Vec<u8>)>;

/// A prefix that was read in PEFT's format.
#[derive(Clone, Debug)]
pub struct PeftPrefix {
    pub shape: PrefixShape,
    /// `[P, W]` f32, the encoder's output.
    pub table: Tensor,
    /// [`ABOUT_FILE`], where there is one.
    pub about: Option<Value>,
}

/// The files of PEFT's format for a `table` of shape `[P, W]`. `base_model` is the base's name on the hub or its folder.
///
/// A projected prefix is written as a plain one: its output is all that PEFT keeps.
///
/// # Errors
/// When the table has another shape or cannot be read from its device.
pub fn peft_files(shape: &PrefixShape, table: &Tensor, base_model: &str, about: &Value) -> Result<Files, ExportError> {
    check_shape(PEFT_TABLE, table, &[shape.virtual_tokens, shape.width()], None)?;
    let config = json!({
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "encoder_hidden_size": shape.token_dim(),
        "inference_mode": true,
        "modules_to_save": null,
        "num_attention_heads": shape.groups,
        "num_layers": shape.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": shape.virtual_tokens,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": false,
        "revision": null,
        "task_type": "CAUSAL_LM",
        "token_dim": shape.token_dim(),
    });
    peft_adapter(&config, &BTreeMap::from([(PEFT_TABLE.to_owned(), table.to_dtype(DType::F32)?)]), about)
}

/// The files of PEFT's format for its `adapter_config.json` and its tensors by name.
///
/// # Errors
/// When a tensor cannot be read from its device.
pub fn peft_adapter(config: &Value, tensors: &BTreeMap<String, Tensor>, about: &Value) -> Result<Files, ExportError> {
    Ok(vec![
        (PEFT_CONFIG.to_owned(), pretty(config)),
        (PEFT_TENSORS.to_owned(), safetensors::to_bytes(tensors)?),
        (ABOUT_FILE.to_owned(), pretty(about)),
    ])
}

/// What an export says of itself, with notes for its reader.
pub(super) fn with_notes(about: &Value, notes: impl IntoIterator<Item = &'static str>) -> Value {
    let mut about = about.clone();
    let notes: Vec<Value> = notes.into_iter().map(Value::from).collect();
    if let (Value::Object(about), false) = (&mut about, notes.is_empty()) {
        about.insert("notes".to_owned(), notes.into());
    }
    about
}

/// An adapter in PEFT's format, opened.
pub struct PeftFile {
    /// Where `config` is from.
    path: PathBuf,
    pub config: Value,
    tensors: TensorFile,
}

impl PeftFile {
    /// # Errors
    /// When a file is missing or not whole, or the adapter is not of `peft_type`.
    pub fn open(dir: &Path, peft_type: &str) -> Result<Self, ExportError> {
        Self::open_one_of(dir, &[peft_type])
    }

    /// # Errors
    /// When a file is missing or not whole, or the adapter is of none of `peft_types`.
    pub fn open_one_of(dir: &Path, peft_types: &[&str]) -> Result<Self, ExportError> {
        let path = dir.join(PEFT_CONFIG);
        let config = read_json(&path)?;
        if !config.get("peft_type").and_then(Value::as_str).is_some_and(|found| peft_types.contains(&found)) {
            let expected: Vec<_> = peft_types.iter().map(|name| format!("\"{name}\"")).collect();
            return Err(key_error(&path, &config, "peft_type", expected.join(" or ")));
        }
        let file = [PEFT_TENSORS, PEFT_TENSORS_OLD].map(|name| dir.join(name)).into_iter().find(|file| file.exists());
        let tensors = TensorFile::open(&file.unwrap_or_else(|| dir.join(PEFT_TENSORS)))?;
        Ok(Self { path, config, tensors })
    }

    /// # Errors
    /// When the key is there with another value.
    pub fn expect(&self, key: &'static str, expected: &Value) -> Result<(), ExportError> {
        if self.config.get(key).is_none_or(|found| found == expected) {
            return Ok(());
        }
        Err(key_error(&self.path, &self.config, key, expected.to_string()))
    }

    /// Holds every key of the configuration against the rules of its kind.
    ///
    /// # Errors
    /// When a key is not understood or says what is not computed here.
    pub(super) fn expect_understood(&self, rules: Rules) -> Result<(), ExportError> {
        understood::check_peft(&self.path, &self.config, rules)
    }

    /// Whether a key is true; none, null and their like are false.
    ///
    /// # Errors
    /// When it is neither true nor false.
    pub fn flag(&self, key: &'static str) -> Result<bool, ExportError> {
        match self.config.get(key) {
            Some(Value::Bool(true)) => Ok(true),
            None => Ok(false),
            Some(value) if understood::is_off(value) => Ok(false),
            Some(_) => Err(self.key_error(key, "true or false".to_owned())),
        }
    }

    /// # Errors
    /// When the key is missing or has a value of another kind than `expected` says.
    pub fn read<T: DeserializeOwned>(&self, key: &'static str, expected: &str) -> Result<T, ExportError> {
        let found = self.config.get(key).and_then(|value| T::deserialize(value).ok());
        found.ok_or_else(|| key_error(&self.path, &self.config, key, expected.to_owned()))
    }

    /// A dropout.
    ///
    /// # Errors
    /// When the key is missing or not a number in [0, 1).
    pub fn share(&self, key: &'static str) -> Result<f64, ExportError> {
        let expected = "a share of at least 0 and below 1";
        let share = self.read(key, expected)?;
        if (0.0..1.0).contains(&share) { Ok(share) } else { Err(self.key_error(key, expected.to_owned())) }
    }

    /// `target_modules` and its like: a list of names, as [`super::select::Selector`] writes it, or a pattern.
    ///
    /// # Errors
    /// When the key is missing or neither.
    pub fn names_or_pattern(&self, key: &'static str) -> Result<String, ExportError> {
        match self.config.get(key) {
            Some(Value::String(pattern)) => Ok(pattern.clone()),
            _ => Ok(self.read::<Vec<String>>(key, "a list of names or a pattern")?.join(",")),
        }
    }

    /// Tests that there is no tensor beside those of `names`, whose layers' names begin with `layers` and a number: PEFT itself only warns
    /// of them, and an adapter of a deeper model would be cut off.
    ///
    /// # Errors
    /// When the file has tensors of another number of layers, or one that is not named.
    pub fn expect_tensors<'a>(&self, names: impl Iterator<Item = &'a str>, layers: &str) -> Result<(), ExportError> {
        let expected: BTreeSet<&str> = names.collect();
        let layer = |name: &str| name.strip_prefix(layers).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let [found, needed] = [self.tensors.names().filter_map(layer).collect(), expected.iter().filter_map(|name| layer(name)).collect()]
            .map(|layers: BTreeSet<usize>| layers.len());
        if found != needed {
            return Err(ExportError::Layers { path: self.tensors.path().to_owned(), expected: needed, found });
        }
        match self.tensors.names().find(|name| !expected.contains(name)) {
            Some(name) => Err(ExportError::OtherTensor { path: self.tensors.path().to_owned(), name: name.to_owned() }),
            None => Ok(()),
        }
    }

    /// A key that has another value than it should.
    pub fn key_error(&self, key: &'static str, expected: String) -> ExportError {
        key_error(&self.path, &self.config, key, expected)
    }

    /// One tensor, in f32.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Result<Tensor, ExportError> {
        read_tensor(&self.tensors, name, dims)
    }
}

/// Why the folder `dir`, in which no adapter was found, holds none.
pub(super) fn no_adapter(dir: &Path) -> ExportError {
    if let Err(error) = paths::expect_folder(dir) {
        return error.into();
    }
    let reason = "neither adapter_config.json (PEFT, the adapters library), nor adapter_setup.json (a fusion), nor weights with \
                  transformer.prefix_encoder.* (THUDM) are there";
    ExportError::NoAdapter { path: dir.to_owned(), reason: reason.to_owned() }
}

pub(super) fn key_error(path: &Path, config: &Value, key: &'static str, expected: String) -> ExportError {
    let found = config.get(key).map_or("not there".to_owned(), Value::to_string);
    ExportError::Key { path: path.to_owned(), key, expected, found }
}

/// Reads a prefix in PEFT's format.
///
/// # Errors
/// When a file is missing or not whole, the adapter is of another kind, or sizes disagree.
pub fn read_peft(dir: &Path) -> Result<PeftPrefix, ExportError> {
    let file = PeftFile::open(dir, "PREFIX_TUNING")?;
    file.expect_understood(understood::PROMPT)?;
    let size = |key| file.read::<NonZeroU32>(key, "a number above 0").map(|size| size.get() as usize);
    let (groups, token_dim) = (size("num_attention_heads")?, size("token_dim")?);
    if token_dim % groups != 0 {
        let expected = format!("a multiple of `num_attention_heads` {groups}");
        return Err(key_error(&file.path, &file.config, "token_dim", expected));
    }
    let shape = PrefixShape { layers: size("num_layers")?, groups, kv: token_dim / groups, virtual_tokens: size("num_virtual_tokens")? };
    file.expect_tensors([PEFT_TABLE].into_iter(), PEFT_PREFIX)?;
    let table = file.tensor(PEFT_TABLE, &[shape.virtual_tokens, shape.width()])?;
    Ok(PeftPrefix { shape, table, about: read_about(dir)? })
}

pub(super) fn read_tensor(file: &TensorFile, name: &str, dims: &[usize]) -> Result<Tensor, ExportError> {
    let view = file.get(name)?;
    if view.shape() != dims {
        return Err(wrong_shape(name, &format!("{dims:?}"), &format!("{:?}", view.shape()), Some(file.path())));
    }
    Ok(file.weights(name, DType::F32, &Device::Cpu)?)
}

pub(super) fn check_shape(name: &str, tensor: &Tensor, dims: &[usize], path: Option<&Path>) -> Result<(), ExportError> {
    if tensor.dims() == dims { Ok(()) } else { Err(wrong_shape(name, &format!("{dims:?}"), &format!("{:?}", tensor.dims()), path)) }
}

fn wrong_shape(name: &str, expected: &str, found: &str, path: Option<&Path>) -> ExportError {
    ExportError::Shape { path: path.map(Path::to_owned), name: name.to_owned(), expected: expected.to_owned(), found: found.to_owned() }
}

pub(super) fn read_json(path: &Path) -> Result<Value, ExportError> {
    let text = std::fs::read(path).map_err(|source| match path.parent().map(paths::expect_folder) {
        Some(Err(error)) => error.into(),
        _ => ExportError::Io { path: path.to_owned(), source },
    })?;
    crate::json::value(&text).map_err(|source| ExportError::Json { path: path.to_owned(), source })
}

pub(super) fn read_about(dir: &Path) -> Result<Option<Value>, ExportError> {
    let path = dir.join(ABOUT_FILE);
    path.exists().then(|| read_json(&path)).transpose()
}

pub(super) fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: PrefixShape = PrefixShape { layers: 3, groups: 2, kv: 4, virtual_tokens: 5 };

    fn write(dir: &Path, files: &Files) {
        files.iter().for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes).unwrap());
    }

    fn tensor(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        ((Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap() * 0.37).unwrap() - 5.0).unwrap().reshape(shape).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn peft_prefix_written_and_read_back_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let table = tensor(&[5, 48]);
        write(dir.path(), &peft_files(&SHAPE, &table, "THUDM/chatglm2-6b", &json!({"template": "chatglm2"})).unwrap());
        let read = read_peft(dir.path()).unwrap();
        assert_eq!((read.shape, values(&read.table)), (SHAPE, values(&table)));
        assert_eq!(read.about, Some(json!({"template": "chatglm2"})));
    }

    #[test]
    fn table_of_another_shape_is_refused_with_both_shapes() {
        let error = peft_files(&SHAPE, &tensor(&[5, 47]), "", &json!({})).unwrap_err();
        assert_eq!(error.to_string(), "tensor `prompt_embeddings` has shape [5, 47], expected [5, 48]");
    }

    #[test]
    fn peft_adapter_of_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(PEFT_CONFIG), br#"{"peft_type": "LORA"}"#).unwrap();
        let text = read_peft(dir.path()).unwrap_err().to_string();
        assert!(text.contains("key `peft_type` is \"LORA\", expected \"PREFIX_TUNING\""), "{text}");
    }
}
