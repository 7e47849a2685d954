//! What several integration tests need.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};

use glmddp::checkpoint::RealDisk;
use glmddp::digest::sha256_hex;

use crate::not_run::{Missing, not_run};

/// Folders with golden values: `GLMDDP_GOLDEN_DIR` alone if it is set, else the committed copy, and `../shared/golden` and
/// `golden_gpu` if they are there.
pub fn golden_roots() -> Vec<PathBuf> {
    if let Some(dir) = std::env::var_os("GLMDDP_GOLDEN_DIR") {
        return vec![PathBuf::from(dir)];
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut roots = vec![root.join("tests/golden")];
    roots.extend(shared("golden"));
    roots.extend(shared("golden_gpu"));
    roots
}

/// A file or folder of `../shared`, or of what `GLMDDP_SHARED` names (nothing if it is empty); None after saying that the test did not run on it.
pub fn shared(name: &str) -> Option<PathBuf> {
    let folder = match std::env::var_os("GLMDDP_SHARED") {
        Some(folder) if folder.is_empty() => None,
        Some(folder) => Some(PathBuf::from(folder)),
        None => Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")),
    };
    let path = folder.map(|folder| folder.join(name)).filter(|path| path.exists());
    if path.is_none() {
        not_run(Missing::Shared, &format!("../shared/{name} is not there, and the test needs it"));
    }
    path
}

/// The safetensors shard of a model's folder that holds a tensor.
pub fn first_shard_with(dir: &Path, tensor: &str) -> PathBuf {
    let index = std::fs::read_to_string(dir.join("model.safetensors.index.json")).expect("an index of shards");
    let index: serde_json::Value = serde_json::from_str(&index).expect("JSON");
    dir.join(index["weight_map"][tensor].as_str().expect("the tensor has a shard"))
}

/// sha256 of each tensor of a checkpoint's state, by name: the same however it was dealt to ranks.
pub fn state_sums(checkpoint: &Path) -> Vec<(String, String)> {
    let opened = glmddp::checkpoint::open(&RealDisk, checkpoint).expect("a whole checkpoint");
    opened.check_files(&RealDisk).expect("a whole checkpoint");
    let tensors = opened.tensors(&RealDisk).expect("a whole checkpoint");
    assert!(!tensors.is_empty());
    tensors.into_iter().map(|(name, tensor)| (name, sha256_hex(glmddp::formats::tensor_bytes(&tensor).expect("a tensor")))).collect()
}
