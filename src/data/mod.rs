//! From files to micro-batches: record -> Example -> prompt -> tokens -> Sample -> Sampler -> MicroBatch.
//!
//! Knows no tensor and no device; a rank is two integers. The tokenizer and the other ranks come in as the traits [`Encode`] and
//! [`Exchange`].

pub mod bad_rows;
pub mod cache;
pub mod collate;
pub mod column_use;
pub mod csv;
pub mod dataset;
pub mod demo;
mod encoding;
pub mod error;
pub mod history;
pub mod load;
pub mod loader;
mod nested;
pub mod prompt;
pub mod record;
pub mod rows;
pub mod sampler;
pub mod tokenize;
mod wire;

pub use bad_rows::{BadRowKind, BadRows, RowError};
pub use collate::collate;
pub use dataset::{Dataset, SampleRef};
pub use error::DataError;
pub use sampler::{eval_slot, num_eval_slots, slots_of_rank};
pub use tokenize::Encode;

use std::path::Path;
use std::sync::Arc;

/// Where a row came from, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowOrigin {
    pub file: Arc<Path>,
    /// 1-based line (JSON lines, CSV) or 1-based element of the array (JSON array).
    pub row: usize,
}

/// One row as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub prompt: String,
    pub response: String,
    /// Earlier rounds, oldest first: (query, answer).
    pub history: Vec<(String, String)>,
    pub origin: RowOrigin,
}

/// One row as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// `[gMASK] sop prompt answer eos`, no padding.
    pub ids: Vec<u32>,
    /// Same length as `ids`: this token is in the loss (predicted from the tokens before it).
    pub is_target: Vec<bool>,
}

impl Sample {
    pub fn num_targets(&self) -> usize {
        self.is_target.iter().filter(|&&t| t).count()
    }
}

/// The ranks of a job, as far as data needs them: every rank calls the same sequence of gathers.
pub trait Exchange {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// Every rank's bytes, ordered by rank; lengths may differ. Waits for the other ranks as long as it takes.
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, String>;
}

/// A job of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Exchange for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, String> {
        Ok(vec![mine.to_vec()])
    }
}

/// Rows packed one behind the other, ready for the device: the content of one slot. Holds host vectors only.
///
/// A row's last token predicts nothing, so it is in `targets` and not in `ids`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// `[T]` tokens of all rows.
    pub ids: Vec<u32>,
    /// `[T]` rotary positions; each row starts again at 0.
    pub positions: Vec<u32>,
    /// `[R + 1]` row r is `row_bounds[r]..row_bounds[r + 1]`.
    pub row_bounds: Vec<usize>,
    /// `[N]` (index into `ids` of the token that predicts, id that it should predict), ascending.
    pub targets: Vec<(u32, u32)>,
    /// `[R]` position of each row in the endless training stream: the key of its random numbers.
    pub stream_positions: Vec<u64>,
    /// `[R]` index of each row in the data set.
    pub sample_indices: Vec<usize>,
}
