//! A model's weights on disk, in any of the hub's layouts, memory-mapped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Deserialize;

use super::error::ModelError;
use crate::digest::sha256_hex;
use crate::formats::{Dtype, FormatError, TensorFile, TensorView};
use crate::json;

/// Where weights are looked for, in this order.
const CANDIDATES: [&str; 4] = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// The precision of a model's weights while it is trained. On a CPU they lie in memory as f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    #[default]
    Float32,
    /// Values that bfloat16 has.
    Bfloat16,
}

/// The weights of one model. Opening it reads names and shapes; tensors are read from the map when asked for.
#[derive(Debug)]
pub struct WeightSource {
    files: Vec<TensorFile>,
    /// Name -> its file.
    places: BTreeMap<String, usize>,
    /// What to name when a tensor is nowhere: the single file or the index.
    root: PathBuf,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightSource {
    /// Finds the weights in `dir`: one safetensors file, shards of it, one `.bin` file, or shards of it.
    ///
    /// # Errors
    /// When there are none, shards are missing, or a file is not whole.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let Some(root) = CANDIDATES.iter().map(|name| dir.join(name)).find(|path| path.exists()) else {
            return Err(no_weights(dir));
        };
        if root.extension().is_none_or(|e| e != "json") {
            let file = TensorFile::open(&root)?;
            let places = file.names().map(|name| (name.to_owned(), 0)).collect();
            return Ok(Self { files: vec![file], places, root });
        }
        let index = read_index(&root)?;
        let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        let missing: Vec<String> = shards.iter().filter(|name| !dir.join(name).exists()).map(|name| (*name).to_owned()).collect();
        if !missing.is_empty() {
            return Err(ModelError::MissingShards { path: dir.to_owned(), num_shards: shards.len(), names: missing });
        }
        let files = shards.iter().map(|name| Ok(TensorFile::open(&dir.join(name))?)).collect::<Result<Vec<_>, ModelError>>()?;
        let numbers: BTreeMap<&str, usize> = shards.iter().enumerate().map(|(i, name)| (*name, i)).collect();
        let places = index.weight_map.iter().map(|(name, shard)| (name.clone(), numbers[shard.as_str()])).collect();
        Ok(Self { files, places, root })
    }

    /// One parameter on `device` as `dtype`.
    ///
    /// # Errors
    /// When it is missing, of another shape, or not a float.
    pub fn get(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor, ModelError> {
        let view = self.view(name, shape)?;
        Ok(view.to_tensor(dtype, device)?)
    }

    /// The type that one parameter is stored in.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn dtype(&self, name: &str, shape: &[usize]) -> Result<DType, ModelError> {
        Ok(match self.view(name, shape)?.dtype() {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            _ => DType::F32, // `view` refuses all others
        })
    }

    /// Holds names, shapes and dtypes against config.json's before anything is loaded.
    ///
    /// # Errors
    /// When a tensor is missing, of another shape, or not a float.
    pub fn check(&self, shapes: &BTreeMap<String, Vec<usize>>) -> Result<(), ModelError> {
        shapes.iter().try_for_each(|(name, shape)| self.view(name, shape).map(|_| ()))
    }

    /// A sha256 over name, shape, dtype and content of each of the model's tensors: the same for the same weights of one dtype, however
    /// they are stored. Reads every byte of them, on all threads; needs the memory of the few tensors that lie strided in a file.
    ///
    /// # Errors
    /// When a tensor is missing, of another shape, or not a float.
    pub fn fingerprint(&self, shapes: &BTreeMap<String, Vec<usize>>) -> Result<String, ModelError> {
        let lines = shapes
            .par_iter()
            .map(|(name, shape)| {
                let view = self.view(name, shape)?;
                Ok(format!("{name} {shape:?} {:?} {}\n", view.dtype(), sha256_hex(view.to_bytes())))
            })
            .collect::<Result<Vec<String>, ModelError>>()?;
        Ok(sha256_hex(lines.concat()))
    }

    fn view(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, ModelError> {
        let missing = |path: &Path| ModelError::MissingTensor { path: path.to_owned(), name: name.to_owned() };
        let file = &self.files[*self.places.get(name).ok_or_else(|| missing(&self.root))?];
        let view = file.get(name).map_err(|error| match error {
            FormatError::NoSuchTensor { path, .. } => missing(&path),
            other => other.into(),
        })?;
        if !matches!(view.dtype(), Dtype::F16 | Dtype::BF16 | Dtype::F32) {
            let found = format!("{:?}", view.dtype());
            return Err(ModelError::WrongDtype { path: file.path().to_owned(), name: name.to_owned(), found });
        }
        if view.shape() != shape {
            let (expected, found) = (shape.to_vec(), view.shape().to_vec());
            return Err(ModelError::WrongShape { path: file.path().to_owned(), name: name.to_owned(), expected, found });
        }
        Ok(view)
    }
}

fn no_weights(dir: &Path) -> ModelError {
    match std::fs::read_dir(dir) {
        Err(source) => ModelError::Io { path: dir.to_owned(), source },
        Ok(entries) => {
            let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names.truncate(8);
            let found = if names.is_empty() { "an empty folder".to_owned() } else { names.join(", ") };
            ModelError::NoWeights { path: dir.to_owned(), expected: &CANDIDATES, found }
        }
    }
}

fn read_index(path: &Path) -> Result<Index, ModelError> {
    let text = std::fs::read(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    let index: Index = json::read(&text).map_err(|source| ModelError::Json { path: path.to_owned(), source })?;
    let bad = |reason: String| ModelError::BadIndex { path: path.to_owned(), reason };
    if index.weight_map.is_empty() {
        return Err(bad("`weight_map` is empty".to_owned()));
    }
    let is_plain = |name: &str| Path::new(name).file_name().is_some_and(|file| file == name);
    match index.weight_map.values().find(|name| !is_plain(name)) {
        Some(name) => Err(bad(format!("shard `{name}` is not a plain file name"))),
        None => Ok(index),
    }
}
