//! Reading checkpoints, holding every byte against the manifest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::manifest::{FORMAT_VERSION, Manifest};
use super::{CheckpointError, Disk, MANIFEST, SUMS, TENSORS, by_step, sha256_hex};
use crate::formats::{candle_dtype, safetensors};

/// A checkpoint that was found whole.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub path: PathBuf,
    pub manifest: Manifest,
    /// On the CPU.
    pub tensors: BTreeMap<String, Tensor>,
}

/// A checkpoint that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub path: PathBuf,
    pub reason: String,
}

/// The newest whole checkpoint, and the newer ones that are not.
#[derive(Clone, Debug)]
pub struct Latest {
    pub checkpoint: Checkpoint,
    pub skipped: Vec<Skipped>,
}

/// Reads a checkpoint; `load(path)?.tensors` are exactly what was saved.
///
/// # Errors
/// When it has no manifest, is of a newer format, or a file or tensor is missing or damaged; the error names it.
pub fn load(disk: &dyn Disk, path: &Path) -> Result<Checkpoint, CheckpointError> {
    let damaged =
        |what: String, expected: String, found: String| Err(CheckpointError::Damaged { path: path.to_owned(), what, expected, found });
    let manifest = read_manifest(disk, path)?;
    let mut state = None;
    for (name, entry) in &manifest.files {
        let at = path.join(name);
        let bytes = match disk.read(&at) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return damaged(name.clone(), format!("{} bytes", entry.bytes), "no such file".to_owned());
            }
            Err(source) => return Err(CheckpointError::Io { action: "read", path: at, source }),
        };
        if bytes.len() as u64 != entry.bytes {
            return damaged(name.clone(), format!("{} bytes", entry.bytes), format!("{} bytes", bytes.len()));
        }
        let found = sha256_hex(&bytes);
        if found != entry.sha256 {
            return damaged(name.clone(), format!("sha256 {}", entry.sha256), found);
        }
        if name == TENSORS {
            state = Some(bytes);
        }
    }
    let Some(state) = state else {
        return Err(CheckpointError::Incomplete { path: path.to_owned(), reason: format!("its manifest names no {TENSORS}") });
    };
    let tensors = read_tensors(path, &manifest, &state)?;
    Ok(Checkpoint { path: path.to_owned(), manifest, tensors })
}

/// Whether a checkpoint has an undamaged manifest and all of its files have their lengths: [`load`] without reading the content.
pub(super) fn looks_whole(disk: &dyn Disk, path: &Path) -> bool {
    read_manifest(disk, path)
        .is_ok_and(|manifest| manifest.files.iter().all(|(name, entry)| disk.len(&path.join(name)).is_ok_and(|len| len == entry.bytes)))
}

fn read_manifest(disk: &dyn Disk, path: &Path) -> Result<Manifest, CheckpointError> {
    let incomplete = |reason: String| CheckpointError::Incomplete { path: path.to_owned(), reason };
    let read = |name: &str| match disk.read(&path.join(name)) {
        Ok(bytes) => Ok(bytes),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Err(incomplete(format!("it has no {name}")))
        }
        Err(source) => Err(CheckpointError::Io { action: "read", path: path.join(name), source }),
    };
    let bytes = read(MANIFEST)?;
    let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| incomplete(format!("its {MANIFEST} is not JSON: {e}")))?;
    match json.get("format_version").and_then(serde_json::Value::as_u64) {
        Some(version) if version <= u64::from(FORMAT_VERSION) => {}
        Some(found) => return Err(CheckpointError::NewerFormat { path: path.to_owned(), found, supported: FORMAT_VERSION }),
        None => return Err(incomplete(format!("its {MANIFEST} has no `format_version`"))),
    }
    let sums = read(SUMS)?;
    let found = sha256_hex(&bytes);
    let expected = String::from_utf8_lossy(&sums)
        .lines()
        .find_map(|line| Some(line.strip_suffix(MANIFEST)?.trim_end().to_owned()))
        .ok_or_else(|| incomplete(format!("its {SUMS} has no line for {MANIFEST}")))?;
    if expected != found {
        return Err(CheckpointError::Damaged {
            path: path.to_owned(),
            what: MANIFEST.to_owned(),
            expected: format!("sha256 {expected}"),
            found,
        });
    }
    serde_json::from_value(json).map_err(|e| incomplete(format!("its {MANIFEST} cannot be read: {e}")))
}

fn read_tensors(path: &Path, manifest: &Manifest, state: &[u8]) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
    let damaged = |what: String, expected: String, found: String| CheckpointError::Damaged { path: path.to_owned(), what, expected, found };
    let views = safetensors::views(state).map_err(|e| damaged(TENSORS.to_owned(), "a safetensors file".to_owned(), e))?;
    if let Some(name) = views.keys().find(|name| !manifest.tensors.contains_key(*name)) {
        return Err(damaged(format!("tensor `{name}`"), "no such tensor".to_owned(), "one".to_owned()));
    }
    manifest
        .tensors
        .iter()
        .map(|(name, entry)| {
            let what = format!("tensor `{name}`");
            let Some((dtype, shape, bytes)) = views.get(name) else {
                return Err(damaged(what, format!("shape {:?}", entry.shape), "no such tensor".to_owned()));
            };
            let (expected, found) = (format!("{} {:?}", entry.dtype, entry.shape), format!("{dtype:?} {shape:?}"));
            if expected != found {
                return Err(damaged(what, expected, found));
            }
            let sha256 = sha256_hex(bytes);
            if sha256 != entry.sha256 {
                return Err(damaged(what, format!("sha256 {}", entry.sha256), sha256));
            }
            let Some(dtype) = candle_dtype(*dtype) else {
                return Err(damaged(what, "a dtype that candle knows".to_owned(), found));
            };
            Ok((name.clone(), Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu)?))
        })
        .collect()
}

/// The newest checkpoint that is whole; none where there are none at all.
///
/// # Errors
/// When there are checkpoints and none is whole, or the folder cannot be read.
pub fn latest(disk: &dyn Disk, output_dir: &Path) -> Result<Option<Latest>, CheckpointError> {
    let mut skipped = Vec::new();
    for (_, path) in by_step(disk, output_dir)? {
        match load(disk, &path) {
            Ok(checkpoint) => return Ok(Some(Latest { checkpoint, skipped })),
            Err(error) => skipped.push(Skipped { path, reason: error.to_string() }),
        }
    }
    match skipped.first() {
        None => Ok(None),
        Some(newest) => Err(CheckpointError::NoneGood { path: output_dir.to_owned(), num: skipped.len(), newest: newest.reason.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::save_step;
    use super::super::{RealDisk, compare};
    use super::*;

    fn with_damage(damage: impl Fn(&Path)) -> CheckpointError {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        damage(&path);
        load(&RealDisk, &path).unwrap_err()
    }

    fn flip(path: &Path, at: usize) {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn damage_is_named_with_the_file_and_both_values() {
        let text = |e: CheckpointError| e.to_string().split_once("damaged: ").map_or(e.to_string(), |(_, rest)| rest.to_owned());
        assert!(text(with_damage(|p| flip(&p.join(TENSORS), 200))).starts_with("state.safetensors: expected sha256 "));
        let cut = with_damage(|p| std::fs::write(p.join("adapter/adapter_config.json"), b"{").unwrap());
        assert_eq!(text(cut), "adapter/adapter_config.json: expected 2 bytes, found 1 bytes");
        let gone = with_damage(|p| std::fs::remove_file(p.join(TENSORS)).unwrap());
        assert!(text(gone).ends_with("found no such file"));
        assert!(text(with_damage(|p| std::fs::remove_file(p.join(MANIFEST)).unwrap())).contains("it has no manifest.json"));
        let step_changed = with_damage(|p| {
            let text = std::fs::read_to_string(p.join(MANIFEST)).unwrap();
            std::fs::write(p.join(MANIFEST), text.replace("\"step\": 7", "\"step\": 8")).unwrap();
        });
        assert!(text(step_changed).starts_with("manifest.json: expected sha256 "));
    }

    #[test]
    fn any_changed_byte_of_any_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        for name in [TENSORS, MANIFEST, "adapter/adapter_config.json"] {
            let file = path.join(name);
            for at in 0..std::fs::metadata(&file).unwrap().len() as usize {
                flip(&file, at);
                assert!(load(&RealDisk, &path).is_err(), "{name} byte {at}");
                flip(&file, at);
            }
        }
        load(&RealDisk, &path).unwrap();
    }

    #[test]
    fn newer_format_is_refused_as_such() {
        let error = with_damage(|p| std::fs::write(p.join(MANIFEST), br#"{"format_version": 99}"#).unwrap());
        assert!(error.to_string().ends_with("has format version 99, and this program reads up to 1"), "{error}");
    }

    #[test]
    fn latest_passes_over_damaged_ones_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        assert!(latest(&RealDisk, &dir.path().join("no")).unwrap().is_none());
        for step in [9, 10, 100] {
            save_step(&RealDisk, dir.path(), step).unwrap();
        }
        std::fs::create_dir(dir.path().join("checkpoint-7x")).unwrap();
        flip(&dir.path().join("checkpoint-100").join(TENSORS), 200);
        let found = latest(&RealDisk, dir.path()).unwrap().unwrap();
        assert_eq!(found.checkpoint.manifest.header.step, 10);
        assert_eq!(found.skipped.len(), 1);
        assert!(found.skipped[0].path.ends_with("checkpoint-100") && found.skipped[0].reason.contains("damaged"));
        for step in [9, 10] {
            std::fs::remove_file(dir.path().join(format!("checkpoint-{step}")).join(MANIFEST)).unwrap();
        }
        let text = latest(&RealDisk, dir.path()).unwrap_err().to_string();
        assert!(text.starts_with("none of the 3 checkpoints"), "{text}");
    }

    #[test]
    fn mismatch_names_both_values_and_ignores_world_size_and_plan() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        let mut manifest = load(&RealDisk, &path).unwrap().manifest;
        let mut run = manifest.header.identity.clone();
        manifest.header.world_size = 3;
        manifest.header.plan = serde_json::json!({"learning_rate": 1.0});
        assert_eq!(compare(&manifest, &run), []);
        run.sizes.insert("pre_seq_len".to_owned(), 8.into());
        run.base_fingerprint = "cc".to_owned();
        let texts: Vec<String> = compare(&manifest, &run).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            ["`pre_seq_len` is 7 in the checkpoint and 8 in this run", "`base_fingerprint` is aa in the checkpoint and cc in this run"]
        );
        run.method = "lora".to_owned();
        assert_eq!(compare(&manifest, &run)[0].to_string(), "`method` is ptuning_v2 in the checkpoint and lora in this run");
    }
}
