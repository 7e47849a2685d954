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

/// Buffers that the hub's files have beside the parameters. They are computed, not read.
pub const BUFFERS: [&str; 1] = ["transformer.rotary_pos_emb.inv_freq"];

/// The precision of a model's weights while it is trained. On a CPU they lie in memory as f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    #[default]
    Float32,
    /// Values that bfloat16 has.
    Bfloat16,
}

/// The type of values that a model computes with; sums are f32 whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    Float32,
    Bfloat16,
}

impl std::fmt::Display for ComputeDtype {
    /// As users name it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        })
    }
}

impl ComputeDtype {
    pub fn dtype(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::Bfloat16 => DType::BF16,
        }
    }
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

/// Tensors of one file that are not the model's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Others {
    pub path: PathBuf,
    /// In order.
    pub names: Vec<String>,
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
        match CANDIDATES.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
            Some(root) => Self::open_at(dir, root),
            None => Err(no_weights(dir)),
        }
    }

    /// The weights in `dir` in every layout that is there, in the order in which [`Self::open`] looks for them.
    ///
    /// # Errors
    /// When shards are missing, or a file is not whole.
    pub fn open_all(dir: &Path) -> Result<Vec<Self>, ModelError> {
        let roots = CANDIDATES.iter().map(|name| dir.join(name)).filter(|path| path.exists());
        roots.map(|root| Self::open_at(dir, root)).collect()
    }

    /// Opens one file, or the shards of an index.
    fn open_at(dir: &Path, root: PathBuf) -> Result<Self, ModelError> {
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

    /// Tensors in the folder's weights that are neither among `shapes` nor buffers of the published model, by file: in the files that
    /// are read, in their index, and in weights of another layout beside them. Those are not read otherwise: if one cannot be opened, a
    /// warning says so.
    pub fn others(&self, shapes: &BTreeMap<String, Vec<usize>>) -> Vec<Others> {
        let is_other = |name: &&str| !shapes.contains_key(*name) && !BUFFERS.contains(name);
        let mut found = Vec::new();
        let mut look = |path: &Path, names: &mut dyn Iterator<Item = &str>| {
            let names: BTreeSet<String> = names.filter(is_other).map(str::to_owned).collect();
            if !names.is_empty() {
                found.push(Others { path: path.to_owned(), names: names.into_iter().collect() });
            }
        };
        self.files.iter().for_each(|file| look(file.path(), &mut file.names()));
        look(&self.root, &mut self.places.iter().filter(|(name, file)| !self.files[**file].contains(name)).map(|(name, _)| name.as_str()));
        for root in CANDIDATES.iter().map(|name| self.root.with_file_name(name)).filter(|root| root.exists() && *root != self.root) {
            let unread = |error: &dyn std::fmt::Display| {
                tracing::warn!("{error}; nothing is lost, for the weights are those of {}", self.root.display())
            };
            let files = match root.extension() {
                Some(extension) if extension == "json" => match read_index(&root) {
                    Ok(index) => {
                        look(&root, &mut index.weight_map.keys().map(String::as_str));
                        let shards: BTreeSet<PathBuf> = index.weight_map.values().map(|name| root.with_file_name(name)).collect();
                        shards.into_iter().filter(|shard| shard.exists()).collect()
                    }
                    Err(error) => {
                        unread(&error);
                        Vec::new()
                    }
                },
                _ => vec![root],
            };
            for file in files {
                match TensorFile::open(&file) {
                    Ok(file) => look(file.path(), &mut file.names()),
                    Err(error) => unread(&error),
                }
            }
        }
        found
    }

    /// The single file, or the index.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// All tensors, in the order of their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The file that a tensor is in; `None` if there is no such tensor.
    pub fn file_of(&self, name: &str) -> Option<&TensorFile> {
        self.places.get(name).map(|&file| &self.files[file])
    }

    /// One parameter on `device` as `dtype`.
    ///
    /// # Errors
    /// When it is missing, of another shape, or not a float, or one of its elements is NaN or infinite.
    pub fn get(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor, ModelError> {
        Ok(self.checked(name, shape)?.0.weights(name, dtype, device)?)
    }

    /// The type that one parameter is stored in.
    ///
    /// # Errors
    /// When it is missing, of another shape, or not a float.
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
        Ok(self.checked(name, shape)?.1)
    }

    /// The file of a parameter that has this shape and a dtype of weights.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<(&TensorFile, TensorView<'_>), ModelError> {
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
        Ok((file, view))
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
