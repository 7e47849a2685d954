//! All samples of one file as flat vectors.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::bad_rows::BadRows;
use super::column_use::ColumnUse;
use super::error::DataError;
use super::{RowOrigin, Sample};
use crate::digest::hex;

/// A sample inside a [`Dataset`]; see [`Sample`] for the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleRef<'a> {
    pub ids: &'a [u32],
    pub is_target: &'a [bool],
}

impl SampleRef<'_> {
    pub fn num_targets(&self) -> usize {
        self.is_target.iter().filter(|&&t| t).count()
    }

    /// Tokens before the first one in the loss.
    pub fn num_before_targets(&self) -> usize {
        self.is_target.iter().take_while(|&&t| !t).count()
    }
}

impl Sample {
    pub fn as_ref(&self) -> SampleRef<'_> {
        SampleRef { ids: &self.ids, is_target: &self.is_target }
    }
}

/// The tokenized rows of a file, in file order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    file: Arc<Path>,
    ids: Vec<u32>,
    is_target: Vec<bool>,
    /// Sample i is `bounds[i]..bounds[i + 1]`.
    bounds: Vec<usize>,
    /// Line or element of each sample.
    rows: Vec<u64>,
    /// Rows that were left out.
    pub bad_rows: BadRows,
    /// Number of rows whose prompt was cut to `max_source_length`.
    pub num_cut_prompts: usize,
    /// Number of rows whose answer was cut to `max_target_length`.
    pub num_cut_answers: usize,
    /// What the rows have in columns that no key names.
    pub column_use: ColumnUse,
}

/// Lengths of the samples (tokens).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LengthStats {
    pub min: usize,
    pub mean: f64,
    pub median: usize,
    pub p95: usize,
    pub max: usize,
}

impl Dataset {
    /// A set without samples, to be filled by [`Self::push`].
    pub fn new(file: &Path) -> Self {
        Self {
            file: Arc::from(file),
            ids: Vec::new(),
            is_target: Vec::new(),
            bounds: vec![0],
            rows: Vec::new(),
            bad_rows: BadRows::default(),
            num_cut_prompts: 0,
            num_cut_answers: 0,
            column_use: ColumnUse::default(),
        }
    }

    /// Adds a sample that stands at `row` (line or element) of the file.
    pub fn push(&mut self, sample: SampleRef<'_>, row: usize) {
        self.ids.extend_from_slice(sample.ids);
        self.is_target.extend_from_slice(sample.is_target);
        self.bounds.push(self.ids.len());
        self.rows.push(row as u64);
    }

    /// Adds what stands behind this set's rows in the file.
    pub(super) fn append(&mut self, later: &Self) {
        let base = self.ids.len();
        self.ids.extend_from_slice(&later.ids);
        self.is_target.extend_from_slice(&later.is_target);
        self.bounds.extend(later.bounds[1..].iter().map(|end| base + end));
        self.rows.extend_from_slice(&later.rows);
        self.bad_rows.append(later.bad_rows.clone());
        self.num_cut_prompts += later.num_cut_prompts;
        self.num_cut_answers += later.num_cut_answers;
        self.column_use.append(&later.column_use);
    }

    pub(super) fn check_size(&self) -> Result<(), DataError> {
        match u32::try_from(self.num_samples()) {
            Ok(_) => Ok(()),
            Err(_) => Err(DataError::TooManyRows { found: self.num_samples() }),
        }
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    pub fn num_samples(&self) -> usize {
        self.rows.len()
    }

    /// Sample `i`; `i` must be below [`Self::num_samples`].
    pub fn sample(&self, i: usize) -> SampleRef<'_> {
        let range = self.bounds[i]..self.bounds[i + 1];
        SampleRef { ids: &self.ids[range.clone()], is_target: &self.is_target[range] }
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = SampleRef<'_>> {
        (0..self.num_samples()).map(|i| self.sample(i))
    }

    pub fn origin(&self, i: usize) -> RowOrigin {
        RowOrigin { file: Arc::clone(&self.file), row: self.rows[i] as usize }
    }

    /// sha256 over each sample's length, ids and target marks, in order: what a run trains on, wherever its file lies.
    pub fn sha256(&self) -> String {
        let mut sha256 = Sha256::new();
        for sample in self.iter() {
            sha256.update((sample.ids.len() as u64).to_le_bytes());
            sha256.update(sample.ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>());
            sha256.update(sample.is_target.iter().map(|&is_target| u8::from(is_target)).collect::<Vec<u8>>());
        }
        hex(&sha256.finalize())
    }

    /// Tokens of all samples.
    pub fn num_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Tokens in the loss of all samples.
    pub fn num_targets(&self) -> usize {
        self.is_target.iter().filter(|&&t| t).count()
    }

    /// None for a set without samples.
    pub fn length_stats(&self) -> Option<LengthStats> {
        let mut lengths: Vec<usize> = self.bounds.windows(2).map(|w| w[1] - w[0]).collect();
        lengths.sort_unstable();
        let (min, max) = (*lengths.first()?, *lengths.last()?);
        // Nearest rank: the smallest length that at least p percent of the rows do not exceed.
        let percentile = |p: usize| lengths[(lengths.len() * p).div_ceil(100).saturating_sub(1)];
        let mean = self.num_tokens() as f64 / lengths.len() as f64;
        Some(LengthStats { min, mean, median: percentile(50), p95: percentile(95), max })
    }

    pub(super) fn rows(&self) -> &[u64] {
        &self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(lengths: &[usize]) -> Dataset {
        let mut set = Dataset::new(Path::new("x"));
        for (i, &n) in lengths.iter().enumerate() {
            let sample = Sample { ids: vec![i as u32; n], is_target: (0..n).map(|t| t * 2 >= n).collect() };
            set.push(sample.as_ref(), i + 1);
        }
        set
    }

    #[test]
    fn appended_sets_equal_one_set() {
        let mut first = set(&[3, 1]);
        let all = set(&[3, 1, 4, 2]);
        let mut later = Dataset::new(Path::new("x"));
        (2..4).for_each(|i| later.push(all.sample(i), i + 1));
        first.append(&later);
        assert_eq!(first, all);
    }

    #[test]
    fn length_stats_of_known_lengths_match() {
        let lengths: Vec<usize> = (1..=100).rev().collect();
        let stats = set(&lengths).length_stats().unwrap();
        assert_eq!(stats, LengthStats { min: 1, mean: 50.5, median: 50, p95: 95, max: 100 });
        assert_eq!(set(&[]).length_stats(), None);
    }
}
