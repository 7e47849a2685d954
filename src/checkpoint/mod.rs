//! Checkpoints: folders of named bytes that are complete or invisible. Knows no method and no model.
//!
//! `checkpoint-{step}` holds `state.safetensors` (tensors by name), the files that the caller adds, `SHA256SUMS` (for
//! `sha256sum --check`) and, written last, `manifest.json`. It is written as `.tmp-checkpoint-{step}`, made durable file by file and
//! renamed: a folder called `checkpoint-{step}` was complete when it got its name. All changes go through [`Disk`], so a test can stop
//! at each of them.

mod disk;
mod error;
mod fault;
mod load;
mod manifest;
mod output_dir;
mod save;

pub use disk::{Disk, DiskFile, RealDisk};
pub use error::CheckpointError;
pub use fault::{Fault, FaultyDisk};
pub use load::{Checkpoint, Latest, Skipped, latest, load};
pub use manifest::{FORMAT_VERSION, FileEntry, Header, Identity, Manifest, Mismatch, TensorEntry, compare};
pub use output_dir::{Claim, claim, clean_leftovers, retention};
pub use save::{publish, publish_file, save};

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const MANIFEST: &str = "manifest.json";
const SUMS: &str = "SHA256SUMS";
const TENSORS: &str = "state.safetensors";
const PREFIX: &str = "checkpoint-";
/// Being written.
const TEMPORARY: &str = ".tmp-";
/// Moved out of the way of a newer one of the same name; it is the only copy until that has its name.
const REPLACED: &str = ".replaced-";
/// Being deleted.
const TRASH: &str = ".trash-";

/// sha256 in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

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

/// `folder/.tmp-name` for `folder/name`.
fn beside(path: &Path, prefix: &str) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!("{prefix}{name}"))
}

#[cfg(test)]
mod testing {
    //! What the tests of this module share.

    use super::*;
    use candle_core::{Device, Tensor};
    use std::collections::BTreeMap;

    pub fn header(step: u64) -> Header {
        let identity = Identity {
            method: "ptuning_v2".to_owned(),
            sizes: BTreeMap::from([("pre_seq_len".to_owned(), 7.into())]),
            base_fingerprint: "aa".to_owned(),
            tokenizer_sha256: "bb".to_owned(),
            template: "chatglm2".to_owned(),
        };
        Header { step, consumed_rows: 16 * step, world_size: 2, identity, plan: serde_json::json!({"learning_rate": 0.02}) }
    }

    pub fn tensors(value: f32) -> BTreeMap<String, Tensor> {
        let t = Tensor::full(value, (3, 4), &Device::Cpu).unwrap();
        BTreeMap::from([("m.a".to_owned(), t.clone()), ("p.a".to_owned(), t.t().unwrap()), ("s".to_owned(), t.sum_all().unwrap())])
    }

    pub fn save_step(disk: &dyn Disk, dir: &Path, step: u64) -> Result<PathBuf, CheckpointError> {
        let extra = [("adapter/adapter_config.json".to_owned(), b"{}".to_vec())];
        save(disk, dir, &header(step), &tensors(step as f32), &extra)
    }

    /// The value that the tensors of a checkpoint were made of.
    pub fn value(checkpoint: &Checkpoint) -> f32 {
        checkpoint.tensors["m.a"].flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
    }
}
