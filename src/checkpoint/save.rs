//! Writing a folder so that it is complete or invisible.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Component, Path, PathBuf};

use candle_core::Tensor;

use super::manifest::{FORMAT_VERSION, FileEntry, Header, Manifest, TensorEntry};
use super::{CheckpointError, Disk, MANIFEST, PREFIX, REPLACED, SUMS, TEMPORARY, TENSORS, TRASH, beside, sha256_hex};
use crate::formats::{safetensors, tensor_bytes};

/// Room beyond the files' own bytes that saving asks for (folders, block rounding).
const SLACK_BYTES: u64 = 1 << 16;

/// Writes `output_dir/checkpoint-{step}` and returns its path. A checkpoint of the same step is replaced once the new one is durable.
///
/// `extra_files` are (relative path, content), such as an exported adapter.
///
/// # Errors
/// When the disk is full or fails: what was there before is untouched, and what was begun is removed as far as the disk allows.
pub fn save(
    disk: &dyn Disk,
    output_dir: &Path,
    header: &Header,
    tensors: &BTreeMap<String, Tensor>,
    extra_files: &[(String, Vec<u8>)],
) -> Result<PathBuf, CheckpointError> {
    let path = output_dir.join(format!("{PREFIX}{}", header.step));
    let state = safetensors::to_bytes(tensors)?;
    let mut contents: Vec<(&str, &[u8])> = vec![(TENSORS, &state)];
    contents.extend(extra_files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    let files = contents
        .iter()
        .map(|(name, bytes)| ((*name).to_owned(), FileEntry { bytes: bytes.len() as u64, sha256: sha256_hex(bytes) }))
        .collect::<BTreeMap<_, _>>();
    let manifest = Manifest { format_version: FORMAT_VERSION, header: header.clone(), tensors: describe(tensors)?, files };
    let invalid = |e: serde_json::Error| CheckpointError::Io { action: "describe", path: path.clone(), source: e.into() };
    let mut manifest_json = serde_json::to_vec_pretty(&manifest).map_err(invalid)?;
    manifest_json.push(b'\n');
    let mut sums: String = manifest.files.iter().map(|(name, file)| format!("{}  {name}\n", file.sha256)).collect();
    sums.push_str(&format!("{}  {MANIFEST}\n", sha256_hex(&manifest_json)));
    contents.push((SUMS, sums.as_bytes()));
    contents.push((MANIFEST, &manifest_json));
    publish(disk, &path, &contents)?;
    Ok(path)
}

/// Writes a whole folder: into a temporary one beside it, each file made durable in the order given, then renamed. A folder that was
/// there before keeps its name until then, and is deleted last.
///
/// # Errors
/// As [`save`].
pub fn publish(disk: &dyn Disk, path: &Path, files: &[(&str, &[u8])]) -> Result<(), CheckpointError> {
    if let Some((bad, _)) = files.iter().find(|(name, _)| !is_inside(name)) {
        return Err(CheckpointError::BadPath { path: (*bad).to_owned() });
    }
    let temporary = beside(path, TEMPORARY);
    let result = write_folder(disk, path, &temporary, files).and_then(|()| replace(disk, &temporary, path));
    if result.is_err() {
        // Gives the room back; should this fail too, the next start cleans up.
        _ = disk.remove(&temporary);
    }
    result
}

/// Writes one file so that at any time the old content or the new one stands under its name, whole.
///
/// # Errors
/// When the disk is full or fails; the old content stays.
pub fn publish_file(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let temporary = beside(path, TEMPORARY);
    let write = || {
        let mut file = disk.create(&temporary)?;
        file.write_all(bytes)?;
        file.flush()?;
        file.sync()?;
        disk.rename(&temporary, path)?;
        disk.sync_dir(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
    };
    write().map_err(|e| CheckpointError::io("write", path, bytes.len() as u64, e))
}

/// A plain relative path below a folder.
fn is_inside(name: &str) -> bool {
    let path = Path::new(name);
    !name.is_empty() && path.components().all(|part| matches!(part, Component::Normal(_)))
}

fn write_folder(disk: &dyn Disk, path: &Path, temporary: &Path, files: &[(&str, &[u8])]) -> Result<(), CheckpointError> {
    let needed = files.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>() + SLACK_BYTES;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let full = |error| match error {
        CheckpointError::DiskFull { path, needed_bytes, .. } => {
            CheckpointError::DiskFull { path, needed_bytes, free_bytes: disk.free_bytes(parent).ok() }
        }
        other => other,
    };
    let wrap = |action, at: &Path, source| full(CheckpointError::io(action, at, needed, source));
    disk.create_dir(parent).map_err(|e| wrap("create", parent, e))?;
    if let Ok(free) = disk.free_bytes(parent)
        && free < needed
    {
        return Err(CheckpointError::DiskFull { path: path.to_owned(), needed_bytes: needed, free_bytes: Some(free) });
    }
    match disk.remove(temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(wrap("remove", temporary, e)),
        _ => disk.create_dir(temporary).map_err(|e| wrap("create", temporary, e))?,
    }
    let mut folders = std::collections::BTreeSet::from([temporary.to_owned()]);
    for (name, bytes) in files {
        let at = temporary.join(name);
        if let Some(folder) = at.parent()
            && folders.insert(folder.to_owned())
        {
            disk.create_dir(folder).map_err(|e| wrap("create", folder, e))?;
            folders.extend(folder.ancestors().take_while(|f| *f != temporary).map(Path::to_owned));
        }
        let mut file = disk.create(&at).map_err(|e| wrap("create", &at, e))?;
        file.write_all(bytes).and_then(|()| file.flush()).map_err(|e| wrap("write", &at, e))?;
        file.sync().map_err(|e| wrap("make durable", &at, e))?;
    }
    folders.iter().rev().try_for_each(|folder| disk.sync_dir(folder)).map_err(|e| wrap("make durable", temporary, e))
}

/// Gives a durable temporary folder its name.
fn replace(disk: &dyn Disk, temporary: &Path, path: &Path) -> Result<(), CheckpointError> {
    let wrap = |action| move |source| CheckpointError::io(action, path, 0, source);
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let old = beside(path, REPLACED);
    let had_old = disk.list(path).is_ok();
    if had_old {
        disk.rename(path, &old).map_err(wrap("rename"))?;
    }
    if let Err(error) = disk.rename(temporary, path) {
        if had_old {
            // Should this fail too, the next start gives the old folder its name back.
            _ = disk.rename(&old, path);
        }
        return Err(wrap("rename")(error));
    }
    disk.sync_dir(parent).map_err(wrap("make durable"))?;
    if had_old {
        discard(disk, &old)?;
    }
    Ok(())
}

/// Deletes a folder; at no time does a part of it bear its name.
pub(super) fn discard(disk: &dyn Disk, path: &Path) -> Result<(), CheckpointError> {
    let trash = beside(path, TRASH);
    disk.rename(path, &trash).and_then(|()| disk.remove(&trash)).map_err(|e| CheckpointError::io("remove", path, 0, e))
}

fn describe(tensors: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, TensorEntry>, CheckpointError> {
    tensors
        .iter()
        .map(|(name, tensor)| {
            let entry = TensorEntry {
                shape: tensor.dims().to_vec(),
                dtype: dtype_name(tensor.dtype()),
                sha256: sha256_hex(&tensor_bytes(tensor)?),
            };
            Ok((name.clone(), entry))
        })
        .collect()
}

fn dtype_name(dtype: candle_core::DType) -> String {
    crate::formats::file_dtype(dtype).map_or_else(|| format!("{dtype:?}"), |d| format!("{d:?}"))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{header, save_step, tensors, value};
    use super::super::{Fault, FaultyDisk, RealDisk, clean_leftovers, latest, load};
    use super::*;

    #[test]
    fn saved_checkpoint_loads_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, &dir.path().join("new/out"), 20).unwrap();
        assert!(path.ends_with("new/out/checkpoint-20"));
        let checkpoint = load(&RealDisk, &path).unwrap();
        assert_eq!(checkpoint.manifest.header, header(20));
        for (name, tensor) in tensors(20.0) {
            let read = &checkpoint.tensors[&name];
            assert_eq!((read.dims(), tensor_bytes(read).unwrap()), (tensor.dims(), tensor_bytes(&tensor).unwrap()), "{name}");
        }
        assert_eq!(std::fs::read(path.join("adapter/adapter_config.json")).unwrap(), b"{}");
        assert_eq!(std::fs::read_dir(dir.path().join("new/out")).unwrap().count(), 1, "no temporary folder is left");
    }

    #[test]
    fn equal_states_give_equal_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| {
            let path = save_step(&RealDisk, &dir.path().join(name), 3).unwrap();
            [TENSORS, SUMS, MANIFEST].map(|file| std::fs::read(path.join(file)).unwrap())
        };
        assert_eq!(read("a"), read("b"));
    }

    /// Stops or fails at every changing call of a second save: the first checkpoint, or the whole second one, is always found.
    fn every_fault(fault: Fault, second_step: u64) {
        let num_calls = {
            let dir = tempfile::tempdir().unwrap();
            save_step(&RealDisk, dir.path(), 10).unwrap();
            let disk = FaultyDisk::new(usize::MAX, fault);
            save_step(&disk, dir.path(), second_step).unwrap();
            disk.num_calls()
        };
        assert!(num_calls > 10);
        for at in 0..num_calls {
            let dir = tempfile::tempdir().unwrap();
            save_step(&RealDisk, dir.path(), 10).unwrap();
            let result = save_step(&FaultyDisk::new(at, fault), dir.path(), second_step);
            let before = latest(&RealDisk, dir.path()).unwrap();
            clean_leftovers(&RealDisk, dir.path()).unwrap();
            let found = latest(&RealDisk, dir.path()).unwrap().unwrap();
            assert!(found.skipped.is_empty(), "call {at}: {:?}", found.skipped);
            if second_step != 10 {
                assert!(before.is_some(), "call {at}: the first checkpoint vanished");
                let step = found.checkpoint.manifest.header.step;
                assert!(step == second_step || (step == 10 && result.is_err()), "call {at}: found {step}, {result:?}");
            }
            assert_eq!(value(&found.checkpoint), found.checkpoint.manifest.header.step as f32);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1 + usize::from(step_count(dir.path()) > 1), "call {at}");
            save_step(&RealDisk, dir.path(), second_step).unwrap();
            assert_eq!(latest(&RealDisk, dir.path()).unwrap().unwrap().checkpoint.manifest.header.step, second_step);
        }
    }

    fn step_count(dir: &Path) -> usize {
        std::fs::read_dir(dir).unwrap().flatten().filter(|e| super::super::step_of(&e.path()).is_some()).count()
    }

    #[test]
    fn kill_at_any_call_leaves_the_old_checkpoint_or_the_whole_new_one() {
        every_fault(Fault::Stop, 20);
        every_fault(Fault::TornWrite, 20);
    }

    #[test]
    fn failure_of_any_call_leaves_the_old_checkpoint_or_the_whole_new_one() {
        every_fault(Fault::Fail(std::io::ErrorKind::StorageFull), 20);
        every_fault(Fault::Fail(std::io::ErrorKind::PermissionDenied), 20);
    }

    #[test]
    fn kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two() {
        every_fault(Fault::Stop, 10);
        every_fault(Fault::Fail(std::io::ErrorKind::StorageFull), 10);
    }

    #[test]
    fn full_disk_is_said_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::with_free_bytes(1000);
        let error = save_step(&disk, dir.path(), 5).unwrap_err();
        let CheckpointError::DiskFull { needed_bytes, free_bytes, .. } = &error else { panic!("{error}") };
        assert_eq!(*free_bytes, Some(1000));
        assert!(*needed_bytes > SLACK_BYTES);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let text = error.to_string();
        assert!(text.contains("checkpoint-5 needs") && text.ends_with("and 1000 are free"), "{text}");
    }

    #[test]
    fn extra_file_outside_the_checkpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x", "/x", "", "a/../../x", "./x"] {
            let result = publish(&RealDisk, &dir.path().join("out"), &[(name, b"")]);
            assert!(matches!(result, Err(CheckpointError::BadPath { .. })), "{name}");
        }
    }
}
