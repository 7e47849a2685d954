//! What can be wrong with a model's folder.

use std::io;
use std::path::PathBuf;

use crate::formats::FormatError;
use crate::paths::NotThere;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} is not valid JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: key `{key}` is missing", path.display())]
    MissingKey { path: PathBuf, key: &'static str },
    #[error("{}: key `{key}` is {found}, expected {expected}", path.display())]
    WrongValue { path: PathBuf, key: &'static str, expected: String, found: String },
    #[error("{} is of another model: `{key}` is {found}, expected {expected}", path.display())]
    OtherModel { path: PathBuf, key: &'static str, expected: String, found: String },
    #[error("{}: {reason}", path.display())]
    Inconsistent { path: PathBuf, reason: String },
    /// A value on which models of the family differ, in a file that does not name its model.
    #[error("{}: {readings}", path.display())]
    Undecided { path: PathBuf, readings: String, hint: String },
    #[error("{} holds no weights: expected one of {}; found {found}", path.display(), expected.join(", "))]
    NoWeights { path: PathBuf, expected: &'static [&'static str], found: String },
    #[error("{} is not an index of weights: {reason}", path.display())]
    BadIndex { path: PathBuf, reason: String },
    #[error("{} of {num_shards} weight shards are missing in {}: {}", names.len(), path.display(), names.join(", "))]
    MissingShards { path: PathBuf, num_shards: usize, names: Vec<String> },
    #[error("tensor `{name}` is missing: {} does not hold it", path.display())]
    MissingTensor { path: PathBuf, name: String },
    #[error("tensor `{name}` in {} has shape {found:?}, expected {expected:?} by config.json", path.display())]
    WrongShape { path: PathBuf, name: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("tensor `{name}` in {} holds {found}, expected f16, bf16 or f32", path.display())]
    WrongDtype { path: PathBuf, name: String, found: String },
    #[error("{} exists and is not empty", path.display())]
    FolderTaken { path: PathBuf },
    #[error(transparent)]
    NotThere(#[from] NotThere),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotThere(error) => {
                error.hint_and("the base is a folder as the hub has it, and nothing is downloaded; `glmddp init-model` makes a small one")
            }
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "give the folder of a ChatGLM2 model as the hub has it: config.json, weights, tokenizer.model; `glmddp init-model` makes one".to_owned()
            }
            Self::MissingKey { .. } => "take config.json from the model's page on the hub; the defaults of its class are not the published values".to_owned(),
            Self::OtherModel { .. } => "ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load".to_owned(),
            Self::Undecided { hint, .. } => hint.clone(),
            Self::NoWeights { .. } => "give the folder of a model as the hub has it, weights included".to_owned(),
            Self::MissingShards { names, .. } => format!("download {} into the folder", names.join(" ")),
            Self::MissingTensor { .. } => "the weights are of another model, or a shard is of another version: download index and shards anew".to_owned(),
            Self::WrongShape { .. } => "config.json and weights are of different models: take both from the same place".to_owned(),
            Self::WrongDtype { .. } => "quantized weights cannot be trained on: take the f16 model from the hub".to_owned(),
            Self::FolderTaken { .. } => "name another folder, or remove this one".to_owned(),
            Self::Format(error) => return error.hint(),
            Self::Io { .. }
            | Self::Write { .. }
            | Self::Json { .. }
            | Self::WrongValue { .. }
            | Self::Inconsistent { .. }
            | Self::BadIndex { .. }
            | Self::Tensor(_) => return None,
        })
    }
}
