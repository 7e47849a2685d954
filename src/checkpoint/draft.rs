//! A checkpoint that is being written: invisible until it is complete. Its ranks write at the same time, each its own shard.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::manifest::{FORMAT_VERSION, FileEntry, Header, Manifest, PieceEntry, TensorEntry};
use super::publish::{SLACK_BYTES, parent_of, put, replace, start_folder, sync_folders};
use super::shard::{self, Part, Written};
use super::{CheckpointError, Disk, MANIFEST, PREFIX, SUMS, TEMPORARY, beside, is_inside};
use crate::digest::sha256_hex;
use crate::params::Layout;

/// `.tmp-checkpoint-{step}`, which becomes `checkpoint-{step}`. One rank begins, then each rank writes its shard, and when all have, the one
/// that began commits, or abandons.
#[derive(Clone)]
pub struct Draft<'d> {
    disk: &'d dyn Disk,
    path: PathBuf,
    temporary: PathBuf,
}

impl<'d> Draft<'d> {
    pub fn new(disk: &'d dyn Disk, output_dir: &Path, step: u64) -> Self {
        let path = output_dir.join(format!("{PREFIX}{step}"));
        Self { disk, temporary: beside(&path, TEMPORARY), path }
    }

    /// Where the checkpoint will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder, empty. `needed_bytes` is what all ranks together may write.
    ///
    /// # Errors
    /// When the disk fails or has no room for it.
    pub fn begin(&self, needed_bytes: u64) -> Result<(), CheckpointError> {
        start_folder(self.disk, &self.path, &self.temporary, needed_bytes + SLACK_BYTES)
    }

    /// Writes one rank's shard, the `index`-th of `num_shards`, and reads it back.
    ///
    /// # Errors
    /// When the disk fails, or gives back other bytes than it was given.
    pub fn write_shard(&self, index: usize, num_shards: usize, layout: &Layout, part: &Part) -> Result<Written, CheckpointError> {
        shard::write(self.disk, &self.temporary, index, num_shards, layout, part).map_err(|e| self.at_end(e))
    }

    /// Writes other files of the checkpoint: (relative path, content), such as an exported adapter.
    ///
    /// # Errors
    /// When the disk fails, or a path leads out of the checkpoint.
    pub fn write_files(&self, files: &[(String, Vec<u8>)]) -> Result<BTreeMap<String, FileEntry>, CheckpointError> {
        let mut entries = BTreeMap::new();
        for (name, bytes) in files {
            if !is_inside(name) {
                return Err(CheckpointError::BadPath { path: name.clone() });
            }
            put(self.disk, &self.temporary, name, bytes).map_err(|e| self.at_end(e))?;
            entries.insert(name.clone(), FileEntry { bytes: bytes.len() as u64, sha256: sha256_hex(bytes) });
        }
        Ok(entries)
    }

    /// Writes the manifest, makes all durable, and gives the folder its name. A checkpoint of the same step is replaced once the new one is
    /// durable.
    ///
    /// # Errors
    /// When the disk fails or has not every rank's shard, or the shards are not all of one state: what was there before is untouched.
    pub fn commit(
        &self,
        header: &Header,
        layout: &Layout,
        shards: &[Written],
        files: &BTreeMap<String, FileEntry>,
    ) -> Result<(), CheckpointError> {
        for (rank, written) in shards.iter().enumerate() {
            let path = self.temporary.join(&written.shard.file);
            let found = self.disk.len(&path);
            if !found.as_ref().is_ok_and(|bytes| *bytes == written.shard.bytes) {
                let found = found.map_or_else(|e| e.to_string(), |bytes| format!("{bytes} bytes of {}", written.shard.bytes));
                return Err(self.at_end(CheckpointError::Unseen { path, rank, found }));
            }
        }
        let invalid = |reason: String| CheckpointError::Incomplete { path: self.path.clone(), reason };
        let manifest = manifest(header, layout, shards, files).map_err(invalid)?;
        let mut json = serde_json::to_vec_pretty(&manifest).map_err(|e| invalid(e.to_string()))?;
        json.push(b'\n');
        let sums = manifest.sums(&sha256_hex(&json));
        put(self.disk, &self.temporary, SUMS, sums.as_bytes())
            .and_then(|()| put(self.disk, &self.temporary, MANIFEST, &json))
            .and_then(|()| sync_folders(self.disk, &self.temporary, files.keys().map(String::as_str)))
            .and_then(|()| replace(self.disk, &self.temporary, &self.path))
            .map_err(|e| self.at_end(e))
    }

    /// Gives the room back; where the disk fails in this too, the next start cleans up.
    pub fn abandon(&self) {
        _ = self.disk.remove(&self.temporary);
    }

    /// A full disk's error names what was to be saved, and says what room there is.
    fn at_end(&self, error: CheckpointError) -> CheckpointError {
        match error {
            CheckpointError::DiskFull { needed_bytes, .. } => {
                let free_bytes = self.disk.free_bytes(parent_of(&self.path)).ok();
                CheckpointError::DiskFull { path: self.path.clone(), needed_bytes, free_bytes }
            }
            other => other,
        }
    }
}

/// Writes a whole checkpoint from one process: as many shards as there are parts.
///
/// # Errors
/// As [`Draft::commit`]; what was begun is removed as far as the disk allows.
pub fn save(
    disk: &dyn Disk,
    output_dir: &Path,
    header: &Header,
    layout: &Layout,
    parts: &[Part],
    files: &[(String, Vec<u8>)],
) -> Result<PathBuf, CheckpointError> {
    let draft = Draft::new(disk, output_dir, header.step);
    let num_bytes = parts.iter().map(Part::num_bytes).chain(files.iter().map(|(_, bytes)| bytes.len() as u64)).sum();
    let write = || {
        draft.begin(num_bytes)?;
        let shards: Result<Vec<_>, _> = parts.iter().enumerate().map(|(i, part)| draft.write_shard(i, parts.len(), layout, part)).collect();
        draft.commit(header, layout, &shards?, &draft.write_files(files)?)
    };
    match write() {
        Ok(()) => Ok(draft.path),
        Err(error) => {
            draft.abandon();
            Err(error)
        }
    }
}

fn manifest(header: &Header, layout: &Layout, shards: &[Written], files: &BTreeMap<String, FileEntry>) -> Result<Manifest, String> {
    let kinds = shards.first().map_or(&[][..], |written| &written.kinds);
    if let Some(rank) = shards.iter().position(|written| written.kinds != kinds) {
        return Err(format!("rank {rank} saved {:?}, and rank 0 {kinds:?}", shards[rank].kinds));
    }
    let mut tensors = BTreeMap::new();
    for (kind, dtype) in kinds {
        for (name, entry) in layout.iter() {
            tensors.insert(format!("{kind}.{name}"), TensorEntry { shape: entry.shape.clone(), dtype: *dtype, pieces: Vec::new() });
        }
    }
    // Ranges ascend with the rank.
    for (shard, written) in shards.iter().enumerate() {
        for piece in &written.pieces {
            let Some(tensor) = tensors.get_mut(&piece.tensor) else {
                return Err(format!("rank {shard} saved `{}`, which is no part of the state", piece.tensor));
            };
            let (stored_as, sha256) = (piece.stored_as.clone(), piece.sha256.clone());
            tensor.pieces.push(PieceEntry { shard, start: piece.start, end: piece.end, stored_as, sha256 });
        }
    }
    let shards = shards.iter().map(|written| written.shard.clone()).collect();
    let manifest = Manifest { format_version: FORMAT_VERSION, header: header.clone(), tensors, shards, files: files.clone() };
    manifest.check()?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{header, latest, layout, load, part, save_step};
    use super::super::{Fault, FaultyDisk, RealDisk, clean_leftovers, open, step_of};
    use super::*;

    #[test]
    fn saved_checkpoint_loads_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, &dir.path().join("new/out"), 20).unwrap();
        assert!(path.ends_with("new/out/checkpoint-20"));
        assert_eq!(load(&path).unwrap(), 20);
        let checkpoint = open(&RealDisk, &path).unwrap();
        assert_eq!(checkpoint.manifest.header, header(20));
        assert_eq!(std::fs::read(path.join("adapter/adapter_config.json")).unwrap(), b"{}");
        assert_eq!(std::fs::read_dir(dir.path().join("new/out")).unwrap().count(), 1, "no temporary folder is left");
        // The matrix of 12 elements lies behind the scalar: 7 of it are in the first shard.
        let stored: Vec<&str> = checkpoint.manifest.tensors["m.m.b"].pieces.iter().map(|piece| piece.stored_as.as_str()).collect();
        assert_eq!(stored, ["m.m.b@0..7", "m.m.b@7..12"]);
        assert_eq!(checkpoint.manifest.tensors["m.n"].pieces, []);
        assert_eq!(checkpoint.manifest.tensors["m.v"].pieces[0].stored_as, "m.v");
        let tensors = checkpoint.tensors(&RealDisk).unwrap();
        assert_eq!((tensors["p.m.b"].dims(), tensors["p.a"].dims(), tensors["p.n"].dims()), (&[3, 4][..], &[][..], &[2, 0][..]));
        assert_eq!(tensors["p.v"].to_vec1::<f32>().unwrap()[4], super::super::testing::element(20, 0, 17));
    }

    #[test]
    fn shard_is_a_zstd_frame_with_content_size_and_checksum_around_a_safetensors_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 1).unwrap();
        for shard in open(&RealDisk, &path).unwrap().manifest.shards {
            let frame = std::fs::read(path.join(&shard.file)).unwrap();
            assert_eq!(frame[4] & 0b100, 0b100, "the checksum flag of the frame header, RFC 8878 3.1.1.1.1");
            assert_eq!(zstd::zstd_safe::get_frame_content_size(&frame).unwrap(), Some(shard.content_bytes));
            let content = zstd::decode_all(frame.as_slice()).unwrap();
            crate::formats::safetensors::parse(&content).unwrap();
        }
    }

    #[test]
    fn equal_states_give_equal_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| {
            let path = save_step(&RealDisk, &dir.path().join(name), 3).unwrap();
            RealDisk.list(&path).unwrap().iter().filter_map(|file| std::fs::read(file).ok()).collect::<Vec<_>>()
        };
        assert_eq!(read("a").len(), 5, "three shards, a manifest and sums");
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
        assert!(num_calls > 20);
        for at in 0..num_calls {
            let dir = tempfile::tempdir().unwrap();
            save_step(&RealDisk, dir.path(), 10).unwrap();
            let result = save_step(&FaultyDisk::new(at, fault), dir.path(), second_step);
            let before = latest(dir.path());
            clean_leftovers(&RealDisk, dir.path()).unwrap();
            let (step, skipped) = latest(dir.path()).unwrap();
            assert_eq!(skipped, 0, "call {at}");
            if second_step != 10 {
                assert!(before.is_some(), "call {at}: the first checkpoint vanished");
                assert!(step == second_step || (step == 10 && result.is_err()), "call {at}: found {step}, {result:?}");
            }
            let num_checkpoints = std::fs::read_dir(dir.path()).unwrap().flatten().filter(|e| step_of(&e.path()).is_some()).count();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), num_checkpoints, "call {at}: a leftover");
            save_step(&RealDisk, dir.path(), second_step).unwrap();
            assert_eq!(latest(dir.path()), Some((second_step, 0)));
        }
    }

    #[test]
    fn kill_at_any_call_leaves_the_old_checkpoint_or_the_whole_new_one() {
        every_fault(Fault::Stop, 20);
        every_fault(Fault::TornWrite, 20);
    }

    #[test]
    fn failure_of_any_call_leaves_the_old_checkpoint_or_the_whole_new_one() {
        every_fault(Fault::Fail(libc::ENOSPC), 20);
        every_fault(Fault::Fail(libc::EACCES), 20);
    }

    #[test]
    fn kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two() {
        every_fault(Fault::Stop, 10);
        every_fault(Fault::Fail(libc::ENOSPC), 10);
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
    fn commit_without_a_shard_that_a_rank_has_written_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let draft = Draft::new(&RealDisk, dir.path(), 1);
        draft.begin(0).unwrap();
        let written = draft.write_shard(0, 1, &layout(), &part(1, 0..18)).unwrap();
        let shard = draft.temporary.join(&written.shard.file);
        let commit = |written: Written| draft.commit(&header(1), &layout(), &[written], &BTreeMap::new());
        std::fs::rename(&shard, dir.path().join("elsewhere")).unwrap();
        let error = commit(written.clone()).unwrap_err();
        assert!(error.to_string().contains("rank 0 has written ") && error.hint().unwrap().contains("share"), "{error}");
        std::fs::rename(dir.path().join("elsewhere"), &shard).unwrap();
        let part_of_it = draft.write_shard(0, 1, &layout(), &part(1, 0..17)).unwrap();
        let text = commit(part_of_it).unwrap_err().to_string();
        assert!(text.ends_with("tensor `m.v`: elements 4..5 are in no shard"), "{text}");
        draft.write_shard(0, 1, &layout(), &part(1, 0..18)).unwrap();
        commit(written).unwrap();
        assert_eq!(latest(dir.path()), Some((1, 0)));
    }
}
