//! Files of tensors: safetensors and PyTorch's `.bin`, read memory-mapped; both written.
//!
//! The parsers are pure functions from a file's bytes to where each tensor lies in it ([`Placed`]). They execute nothing, take no
//! size on trust, and allocate no more than the file's own size justifies. Tensor bytes are read from the map when asked for.

use std::io;
use std::path::PathBuf;

mod convert;
mod file;
mod map;
pub mod safetensors;
pub mod torch_pickle;
mod view;

pub use ::safetensors::Dtype;
pub use convert::{candle_dtype, file_dtype, tensor_bytes, tensor_bytes_in};
pub use file::TensorFile;
pub use view::{Placed, TensorView};

#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is a folder, expected a file of tensors", path.display())]
    Folder { path: PathBuf },
    #[error("{} is empty", path.display())]
    Empty { path: PathBuf },
    #[error("{} is a Git LFS pointer, not the file itself", path.display())]
    LfsPointer { path: PathBuf },
    #[error("{} is cut off: expected {expected} bytes, found {found}", path.display())]
    Truncated { path: PathBuf, expected: u64, found: u64 },
    #[error("{} is not a whole {format} file: {reason}", path.display())]
    Malformed { path: PathBuf, format: &'static str, reason: String },
    #[error("{} holds no tensor `{name}`", path.display())]
    NoSuchTensor { path: PathBuf, name: String },
    #[error("tensor `{name}` of {}: {reason}", path.display())]
    Tensor { path: PathBuf, name: String, reason: String },
    #[error("tensor `{name}` of {} holds {} at element {index}{}, expected finite numbers", path.display(), text_of(*value), place(*index, shape))]
    NotFinite {
        path: PathBuf,
        name: String,
        /// In row-major order.
        index: usize,
        value: f64,
        shape: Vec<usize>,
    },
    #[error("cannot write tensor `{name}`: {reason}")]
    Write { name: String, reason: String },
}

impl FormatError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::LfsPointer { .. } => Some("run `git lfs pull` in the model's folder, or download the file from the hub".to_owned()),
            Self::Empty { .. } | Self::Truncated { .. } | Self::Malformed { .. } => {
                Some("download the file again; it did not arrive whole or is of another kind".to_owned())
            }
            Self::NotFinite { .. } => Some(
                "every result would be NaN: download the file again; if it is as it was saved, its training had diverged, and an earlier \
                 checkpoint of it is needed"
                    .to_owned(),
            ),
            Self::Io { .. } | Self::Folder { .. } | Self::NoSuchTensor { .. } | Self::Tensor { .. } | Self::Write { .. } => None,
        }
    }
}

/// A value that is not finite, in words.
pub fn text_of(value: f64) -> &'static str {
    match value {
        _ if value.is_nan() => "NaN",
        _ if value > 0.0 => "infinity",
        _ => "-infinity",
    }
}

/// ` ([row, column])` of an element of a matrix or of a tensor of more dimensions, given its row-major index.
pub fn place(index: usize, shape: &[usize]) -> String {
    if shape.len() < 2 {
        return String::new();
    }
    let (mut rest, mut indices) = (index, vec![0; shape.len()]);
    for (i, &dim) in indices.iter_mut().zip(shape).rev() {
        (*i, rest) = (rest % dim.max(1), rest / dim.max(1));
    }
    format!(" ({indices:?})")
}

/// Why bytes are not a file of tensors; [`TensorFile::open`] adds the path.
#[derive(Debug, PartialEq, Eq)]
pub enum ParseError {
    Truncated { expected: u64, found: u64 },
    Malformed(String),
}

impl ParseError {
    fn new(reason: impl Into<String>) -> Self {
        Self::Malformed(reason.into())
    }
}
