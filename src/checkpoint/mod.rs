//! Checkpoints: folders of named bytes that are complete or invisible. Knows no method and no model.
//!
//! `checkpoint-{step}` holds a shard a rank (`state-*.safetensors.zst`), the files that the caller adds, `SHA256SUMS` (for `sha256sum
//! --check`) and, written last, `manifest.json`; `FORMAT.md` beside this file specifies it. It is written as `.tmp-checkpoint-{step}`, made
//! durable file by file and renamed: a folder called `checkpoint-{step}` was complete when it got its name. All changes go through [`Disk`],
//! so a test can stop at each of them.

mod ahead;
mod diff;
mod disk;
mod draft;
mod error;
mod fault;
mod manifest;
mod output_dir;
mod publish;
mod read;
mod shard;
mod stream;

pub use diff::{Change, Difference, Measure, changes, difference};
pub use disk::{Disk, DiskFile, RealDisk};
pub use draft::{Draft, save};
pub use error::CheckpointError;
pub use fault::{Attempt, Call, Fault, FaultyDisk};
pub use manifest::{
    FORMAT_VERSION, FileEntry, Header, Identity, Manifest, Mismatch, PieceEntry, Probe, ProbeRow, ShardEntry, TensorEntry, compare,
};
pub use output_dir::{Claim, Fate, Keep, Named, claim, clean_leftovers, fates, leftovers, named, retention, to_resume};
pub use publish::{publish, publish_file};
pub use read::{Checkpoint, open};
pub use shard::{Flat, Part, Written, WrittenPiece, ZSTD_LEVEL, sum_of};

use std::path::{Path, PathBuf};

use manifest::is_inside;

const MANIFEST: &str = "manifest.json";
const SUMS: &str = "SHA256SUMS";
const PREFIX: &str = "checkpoint-";
/// Being written.
const TEMPORARY: &str = ".tmp-";
/// Moved out of the way of a newer one of the same name; it is the only copy until that has its name.
const REPLACED: &str = ".replaced-";
/// Being deleted.
const TRASH: &str = ".trash-";

/// The step in a checkpoint's name.
fn step_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    digits.parse().ok().filter(|step: &u64| step.to_string() == digits)
}

/// The checkpoints of an output folder by name alone, newest first; none where there is no such folder.
fn by_step(disk: &dyn Disk, output_dir: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut found: Vec<(u64, PathBuf)> = match disk.list(output_dir) {
        Ok(paths) => paths.into_iter().filter_map(|path| Some((step_of(&path)?, path))).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(CheckpointError::Io { action: "list", path: output_dir.to_owned(), source }),
    };
    found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(found)
}

/// The step of the newest checkpoint of an output folder, by name alone; none where there is none.
///
/// # Errors
/// When the folder cannot be read.
pub fn newest_step(disk: &dyn Disk, output_dir: &Path) -> Result<Option<u64>, CheckpointError> {
    Ok(by_step(disk, output_dir)?.first().map(|(step, _)| *step))
}

/// The checkpoints of an output folder by name alone, newest first.
///
/// # Errors
/// When the folder cannot be read.
pub fn newest_first(disk: &dyn Disk, output_dir: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    Ok(by_step(disk, output_dir)?.into_iter().map(|(_, path)| path).collect())
}

/// `folder/.tmp-name` for `folder/name`.
fn beside(path: &Path, prefix: &str) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!("{prefix}{name}"))
}

#[cfg(test)]
mod testing {
    //! What the tests of this module share.

    use super::*;
    use crate::params::Layout;
    use candle_core::{Device, Tensor};
    use std::collections::BTreeMap;
    use std::ops::Range;

    pub fn header(step: u64) -> Header {
        let identity = Identity {
            method: "ptuning_v2".to_owned(),
            sizes: BTreeMap::from([("pre_seq_len".to_owned(), 7.into())]),
            base_fingerprint: "aa".to_owned(),
            tokenizer_sha256: "bb".to_owned(),
            template: "chatglm2".to_owned(),
        };
        let plan = serde_json::json!({"learning_rate": 0.02});
        Header { step, consumed_rows: 16 * step, world_size: 2, eval_loss: None, identity, plan, probe: None }
    }

    /// 18 elements: a scalar, a matrix, an empty tensor and a vector.
    pub fn layout() -> Layout {
        let shapes = [("a", vec![]), ("m.b", vec![3, 4]), ("n", vec![2, 0]), ("v", vec![5])];
        Layout::new(shapes.map(|(name, shape)| (name.to_owned(), shape)).into())
    }

    pub const KINDS: [&str; 3] = ["p", "m", "s"];

    /// Element `at` of the buffer of a kind in the state of a step.
    pub fn element(step: u64, kind: usize, at: usize) -> f32 {
        step as f32 + 100.0 * kind as f32 + at as f32 / 32.0
    }

    pub fn part(step: u64, range: Range<usize>) -> Part {
        let flat = |kind: usize| Tensor::from_iter(range.clone().map(|at| element(step, kind, at)), &Device::Cpu).unwrap();
        Part { flats: (0..3).map(|kind| Flat::copy(KINDS[kind], &flat(kind)).unwrap()).collect(), range: range.clone() }
    }

    /// Cuts the matrix in two, and leaves a shard without anything.
    pub fn save_step(disk: &dyn Disk, dir: &Path, step: u64) -> Result<PathBuf, CheckpointError> {
        save_parts(disk, dir, &header(step), &[0..8, 8..8, 8..18])
    }

    pub fn save_parts(disk: &dyn Disk, dir: &Path, header: &Header, ranges: &[Range<usize>]) -> Result<PathBuf, CheckpointError> {
        let parts: Vec<Part> = ranges.iter().map(|range| part(header.step, range.clone())).collect();
        let extra = [("adapter/adapter_config.json".to_owned(), b"{}".to_vec())];
        save(disk, dir, header, &layout(), &parts, &extra)
    }

    /// Reads and checks all of a checkpoint, and that it is the state of its step -> its step.
    pub fn load(path: &Path) -> Result<u64, CheckpointError> {
        let checkpoint = open(&RealDisk, path)?;
        checkpoint.verify(&RealDisk)?;
        let step = checkpoint.manifest.header.step;
        let flats = checkpoint.flats(&RealDisk, &layout(), &KINDS.map(|kind| (kind, 0..18)))?;
        for (kind, flat) in flats.iter().enumerate() {
            assert!(flat.iter().enumerate().all(|(at, value)| *value == element(step, kind, at)), "{}", path.display());
        }
        Ok(step)
    }

    /// The newest checkpoint of a folder that is whole, and how many newer ones are not.
    pub fn latest(dir: &Path) -> Option<(u64, usize)> {
        let all = newest_first(&RealDisk, dir).unwrap();
        all.iter().enumerate().find_map(|(skipped, path)| Some((load(path).ok()?, skipped)))
    }
}
