//! Reading a checkpoint, holding every byte against the manifest. Nothing in it is trusted: no name leads out of its folder, no link is
//! followed, and no size is taken from a file that the file's own length does not justify.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::manifest::{FORMAT_VERSION, FileEntry, Manifest, PieceEntry, TensorEntry, element_bytes};
use super::shard::sum_of;
use super::stream::Stream;
use super::{CheckpointError, Disk, MANIFEST, SUMS};
use crate::digest::{hex, sha256_hex};
use crate::formats::{Dtype, candle_dtype, safetensors};
use crate::params::Layout;

/// Bytes that are read and handed on at a time; a multiple of every type's size.
pub(super) const BLOCK: usize = 1 << 18;

/// A checkpoint whose manifest is whole and makes sense; the rest of it is checked while it is read.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub path: PathBuf,
    pub manifest: Manifest,
}

/// A piece of a tensor as the manifest has it.
#[derive(Clone, Copy, Debug)]
struct Piece<'m> {
    tensor: &'m str,
    entry: &'m TensorEntry,
    piece: &'m PieceEntry,
}

/// Opens the checkpoint in the folder `path`.
///
/// # Errors
/// When it has no manifest, is of another format, or its manifest is damaged or describes no checkpoint.
pub fn open(disk: &dyn Disk, path: &Path) -> Result<Checkpoint, CheckpointError> {
    let incomplete = |reason: String| CheckpointError::Incomplete { path: path.to_owned(), reason };
    let read = |name: &str| match disk.read(&path.join(name)) {
        Ok(bytes) => Ok(bytes),
        Err(source) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(incomplete(format!("it has no {name}")))
        }
        Err(source) => Err(CheckpointError::Io { action: "read", path: path.join(name), source }),
    };
    let bytes = read(MANIFEST)?;
    let json = crate::json::value(&bytes).map_err(|e| incomplete(format!("its {MANIFEST} is not JSON: {e}")))?;
    let supported = FORMAT_VERSION;
    match json.get("format_version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(supported) => {}
        Some(found) if found < u64::from(supported) => {
            return Err(CheckpointError::OlderFormat { path: path.to_owned(), found, supported });
        }
        Some(found) => return Err(CheckpointError::NewerFormat { path: path.to_owned(), found, supported }),
        None => return Err(incomplete(format!("its {MANIFEST} has no `format_version`"))),
    }
    let sums = read(SUMS)?;
    let found = sha256_hex(&bytes);
    let expected = String::from_utf8_lossy(&sums)
        .lines()
        .find_map(|line| Some(line.strip_suffix(MANIFEST)?.trim_end().to_owned()))
        .ok_or_else(|| incomplete(format!("its {SUMS} has no line for {MANIFEST}")))?;
    if expected != found {
        let (what, expected) = (MANIFEST.to_owned(), format!("sha256 {expected}"));
        return Err(CheckpointError::Damaged { path: path.to_owned(), what, expected, found });
    }
    let manifest: Manifest = serde_json::from_value(json).map_err(|e| incomplete(format!("its {MANIFEST} cannot be read: {e}")))?;
    manifest.check().map_err(|reason| incomplete(format!("its {MANIFEST} describes no checkpoint: {reason}")))?;
    Ok(Checkpoint { path: path.to_owned(), manifest })
}

impl Checkpoint {
    /// Holds every byte against the manifest.
    ///
    /// # Errors
    /// What is missing or damaged first: which file, and in a shard which tensor and elements.
    pub fn verify(&self, disk: &dyn Disk) -> Result<(), CheckpointError> {
        self.check_files(disk)?;
        (0..self.manifest.shards.len()).try_for_each(|shard| self.read_shard(disk, shard, |_| true, |_, _, _| (), Err))
    }

    /// As [`Self::verify`], on the threads of the pool, but goes on behind a damage as far as can be read: every damage, of files first and
    /// then shard by shard. `progress` gets the bytes that were looked at; [`Self::num_bytes`] in all where nothing is damaged.
    pub fn damages(&self, disk: &dyn Disk, progress: &(dyn Fn(u64) + Sync)) -> Vec<CheckpointError> {
        let files = self.manifest.files.par_iter().filter_map(|(name, entry)| {
            let result = self.check_file(disk, name, entry);
            progress(entry.bytes);
            result.err()
        });
        let shards = (0..self.manifest.shards.len()).into_par_iter().flat_map_iter(|shard| {
            let mut found = Vec::new();
            let count = |_: Piece<'_>, _: usize, bytes: &[u8]| progress(bytes.len() as u64);
            let keep = |damage| {
                found.push(damage);
                Ok(())
            };
            if let Err(error) = self.read_shard(disk, shard, |_| true, count, keep) {
                found.push(error);
            }
            found
        });
        self.check_sums(disk).err().into_iter().chain(files.chain(shards).collect::<Vec<_>>()).collect()
    }

    /// Bytes of all tensors and of the files beside the shards.
    pub fn num_bytes(&self) -> u64 {
        let tensors = self.manifest.tensors.values();
        let tensors = tensors.map(|entry| (entry.num_elements().unwrap_or(0) * element_bytes(entry.dtype).unwrap_or(0)) as u64);
        tensors.chain(self.manifest.files.values().map(|file| file.bytes)).sum()
    }

    /// Whether all files have their lengths: [`Self::verify`] without reading the content.
    pub fn has_its_lengths(&self, disk: &dyn Disk) -> bool {
        let shards = self.manifest.shards.iter().map(|shard| (&shard.file, shard.bytes));
        let mut all = shards.chain(self.manifest.files.iter().map(|(name, file)| (name, file.bytes)));
        all.all(|(name, bytes)| disk.len(&self.path.join(name)).is_ok_and(|len| len == bytes))
    }

    /// Holds all files but the shards against the manifest.
    ///
    /// # Errors
    /// The first that is missing or damaged.
    pub fn check_files(&self, disk: &dyn Disk) -> Result<(), CheckpointError> {
        self.check_sums(disk)?;
        self.manifest.files.iter().try_for_each(|(name, entry)| self.check_file(disk, name, entry))
    }

    /// The sums of all other files, as the manifest has them.
    fn check_sums(&self, disk: &dyn Disk) -> Result<(), CheckpointError> {
        let (_, sha256) = sum_of(disk, &self.path.join(MANIFEST))?;
        let expected = sha256_hex(self.manifest.sums(&sha256));
        let (_, found) = sum_of(disk, &self.path.join(SUMS))?;
        if found == expected {
            Ok(())
        } else {
            Err(self.damaged(SUMS.to_owned(), format!("the sums of {MANIFEST}, sha256 {expected}"), found))
        }
    }

    fn check_file(&self, disk: &dyn Disk, name: &str, entry: &FileEntry) -> Result<(), CheckpointError> {
        self.check_length(disk, name, entry.bytes)?;
        let (_, found) = sum_of(disk, &self.path.join(name))?;
        self.expect_sha256(name.to_owned(), &entry.sha256, found)
    }

    pub(super) fn expect_sha256(&self, what: String, expected: &str, found: String) -> Result<(), CheckpointError> {
        if found == expected { Ok(()) } else { Err(self.damaged(what, format!("sha256 {expected}"), found)) }
    }

    /// A file beside the shards, held against the manifest.
    ///
    /// # Errors
    /// When there is none of this name, or it is damaged.
    pub fn file(&self, disk: &dyn Disk, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let Some(entry) = self.manifest.files.get(name) else {
            return Err(CheckpointError::Incomplete { path: self.path.clone(), reason: format!("it has no {name}") });
        };
        self.check_length(disk, name, entry.bytes)?;
        let at = self.path.join(name);
        let bytes = disk.read(&at).map_err(|source| CheckpointError::Io { action: "read", path: at, source })?;
        self.expect_sha256(name.to_owned(), &entry.sha256, sha256_hex(&bytes))?;
        Ok(bytes)
    }

    /// Every tensor, on the CPU.
    ///
    /// # Errors
    /// When a shard is missing or damaged.
    pub fn tensors(&self, disk: &dyn Disk) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
        // Grows with what is read: a size in the manifest takes no memory.
        let mut contents: BTreeMap<&str, BTreeMap<usize, Vec<u8>>> = BTreeMap::new();
        for shard in 0..self.manifest.shards.len() {
            let take = |piece: Piece<'_>, _: usize, bytes: &[u8]| piece_of(&mut contents, &self.manifest, piece).extend_from_slice(bytes);
            self.read_shard(disk, shard, |_| true, take, Err)?;
        }
        let tensors = self.manifest.tensors.iter().map(|(name, entry)| {
            let bytes = contents.remove(name.as_str()).map_or(Vec::new(), |pieces| pieces.into_values().collect::<Vec<_>>().concat());
            let dtype = candle_dtype(entry.dtype).ok_or_else(|| {
                self.damaged(format!("tensor `{name}`"), "a dtype that candle knows".to_owned(), format!("{:?}", entry.dtype))
            })?;
            Ok((name.clone(), Tensor::from_raw_buffer(&bytes, dtype, &entry.shape, &Device::Cpu)?))
        });
        tensors.collect()
    }

    /// Elements of flat f32 buffers over `layout`, by kind; of a shard that none of them needs beyond some piece, the rest is not read.
    ///
    /// # Errors
    /// When the checkpoint holds other kinds or other tensors than these, or a shard is missing or damaged.
    pub fn flats(&self, disk: &dyn Disk, layout: &Layout, wanted: &[(&str, Range<usize>)]) -> Result<Vec<Vec<f32>>, CheckpointError> {
        self.check_tensors(layout, wanted)?;
        let mut flats: Vec<Vec<f32>> = wanted.iter().map(|(_, range)| vec![0.0; range.len()]).collect();
        // What of a piece's tensor is wanted, and by whom: (index, elements of the flat buffer at which the piece starts and ends).
        let place = |piece: &Piece<'_>| {
            let (kind, name) = piece.tensor.split_once('.')?;
            let index = wanted.iter().position(|(wanted, _)| *wanted == kind)?;
            let offset = layout.get(name)?.offset;
            Some((index, offset + piece.piece.start, offset + piece.piece.end))
        };
        let is_wanted =
            |piece: &Piece<'_>| place(piece).is_some_and(|(index, start, end)| start < wanted[index].1.end && end > wanted[index].1.start);
        for shard in 0..self.manifest.shards.len() {
            let take = |piece: Piece<'_>, first: usize, bytes: &[u8]| {
                let Some((index, start, _)) = place(&piece) else { return };
                let range = &wanted[index].1;
                for (i, value) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    let at = start + first + i;
                    if range.contains(&at) {
                        flats[index][at - range.start] = f32::from_le_bytes(*value);
                    }
                }
            };
            self.read_shard(disk, shard, is_wanted, take, Err)?;
        }
        Ok(flats)
    }

    /// The flat f32 buffer of one kind over `layout`.
    ///
    /// # Errors
    /// As [`Self::flats`].
    pub fn kind(&self, disk: &dyn Disk, kind: &str, layout: &Layout) -> Result<Vec<f32>, CheckpointError> {
        let others: BTreeSet<&str> = self.manifest.tensors.keys().filter_map(|name| Some(name.split_once('.')?.0)).collect();
        let mut wanted = vec![(kind, 0..layout.num_elements())];
        wanted.extend(others.into_iter().filter(|other| *other != kind).map(|other| (other, 0..0)));
        Ok(self.flats(disk, layout, &wanted)?.swap_remove(0))
    }

    fn check_tensors(&self, layout: &Layout, wanted: &[(&str, Range<usize>)]) -> Result<(), CheckpointError> {
        let other = |name: &str, expected: String, found: String| CheckpointError::OtherTensors {
            path: self.path.clone(),
            name: name.to_owned(),
            expected,
            found,
        };
        let mut known = BTreeSet::new();
        for (kind, _) in wanted {
            for (name, entry) in layout.iter() {
                let name = format!("{kind}.{name}");
                let expected = format!("F32 {:?}", entry.shape);
                match self.manifest.tensors.get(&name) {
                    None => return Err(other(&name, expected, "no such tensor".to_owned())),
                    Some(found) if found.dtype != Dtype::F32 || found.shape != entry.shape => {
                        return Err(other(&name, expected, format!("{:?} {:?}", found.dtype, found.shape)));
                    }
                    Some(_) => known.insert(name),
                };
            }
        }
        match self.manifest.tensors.iter().find(|(name, _)| !known.contains(*name)) {
            Some((name, found)) => Err(other(name, "no such tensor".to_owned(), format!("{:?} {:?}", found.dtype, found.shape))),
            None => Ok(()),
        }
    }

    /// Reads a shard up to its last wanted piece, or to its end where all are wanted: `take(piece, first element, bytes)`, block by block.
    /// A piece whose hash turns out wrong has been handed on before; `mismatch` says whether that ends it, and the caller drops it all.
    fn read_shard(
        &self,
        disk: &dyn Disk,
        index: usize,
        is_wanted: impl Fn(&Piece<'_>) -> bool,
        mut take: impl FnMut(Piece<'_>, usize, &[u8]) + Send,
        mut mismatch: impl FnMut(CheckpointError) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let shard = &self.manifest.shards[index];
        self.check_length(disk, &shard.file, shard.bytes)?;
        let at = self.path.join(&shard.file);
        let file = disk.open(&at).map_err(|source| CheckpointError::Io { action: "read", path: at, source })?;
        let mut stream = Stream::open(self, shard, file)?;
        let pieces = self.pieces_in_order(index, &stream.header()?)?;
        let needed = pieces.iter().rposition(&is_wanted).map_or(0, |last| last + 1);
        let (mut block, mut next, mut is_whole) = (Vec::new(), Vec::new(), true);
        for piece in &pieces[..needed] {
            let (wanted, size) = (is_wanted(piece), element_bytes(piece.entry.dtype).unwrap_or(1));
            let (mut sha256, mut first) = (Sha256::new(), 0);
            let num_elements = piece.piece.end - piece.piece.start;
            let mut fill = |block: &mut Vec<u8>, first: usize| {
                block.resize((num_elements - first).min(BLOCK / size) * size, 0);
                stream.fill(block, &|| piece.to_string())
            };
            fill(&mut block, 0)?;
            while first < num_elements {
                let behind = first + block.len() / size;
                let look = || {
                    sha256.update(&block);
                    if wanted {
                        take(*piece, first, &block);
                    }
                };
                // One block is hashed while the next is decompressed.
                rayon::join(look, || fill(&mut next, behind)).1?;
                (first, block, next) = (behind, next, block);
            }
            let what = format!("{}, {piece}", shard.file);
            if let Err(damage) = self.expect_sha256(what, &piece.piece.sha256, hex(&sha256.finalize())) {
                mismatch(damage)?;
                is_whole = false;
            }
        }
        // The file as a whole is another where a piece is.
        if needed == pieces.len() && is_whole { stream.end() } else { Ok(()) }
    }

    /// The pieces of a shard in the order of its file; they are those of the manifest, and no others.
    fn pieces_in_order(&self, index: usize, header: &[safetensors::Announced]) -> Result<Vec<Piece<'_>>, CheckpointError> {
        let file = &self.manifest.shards[index].file;
        let mut expected: BTreeMap<&str, Piece<'_>> = BTreeMap::new();
        for (tensor, entry) in &self.manifest.tensors {
            let here = entry.pieces.iter().filter(|piece| piece.shard == index);
            expected.extend(here.map(|piece| (piece.stored_as.as_str(), Piece { tensor, entry, piece })));
        }
        let mut pieces = Vec::with_capacity(expected.len());
        for (name, dtype, shape) in header {
            let what = || format!("{file}, tensor `{name}`");
            let found = format!("{dtype:?} {shape:?}");
            let Some(piece) = expected.remove(name.as_str()) else {
                return Err(self.damaged(what(), "no such tensor".to_owned(), found));
            };
            let expected = format!("{:?} {:?}", piece.entry.dtype, piece.piece.shape(piece.tensor, piece.entry));
            if expected != found {
                return Err(self.damaged(what(), expected, found));
            }
            pieces.push(piece);
        }
        match expected.into_values().next() {
            Some(missing) => Err(self.damaged(format!("{file}, {missing}"), "to be in it".to_owned(), "no such tensor".to_owned())),
            None => Ok(pieces),
        }
    }

    fn check_length(&self, disk: &dyn Disk, name: &str, bytes: u64) -> Result<(), CheckpointError> {
        let at = self.path.join(name);
        let expected = || format!("{bytes} bytes");
        let folders = at.ancestors().skip(1).take_while(|above| *above != self.path);
        let is_missing = |at: &Path| disk.len(at).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        if let Some(link) = folders.into_iter().find(|above| !disk.is_folder(above) && !is_missing(above)) {
            let found = format!("{} is no folder itself", link.display());
            return Err(self.damaged(name.to_owned(), expected(), found));
        }
        match disk.len(&at) {
            Ok(len) if len == bytes => Ok(()),
            Ok(len) => Err(self.damaged(name.to_owned(), expected(), format!("{len} bytes"))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(self.damaged(name.to_owned(), expected(), "no such file".to_owned())),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Err(self.damaged(name.to_owned(), expected(), e.to_string())),
            Err(source) => Err(CheckpointError::Io { action: "read", path: at, source }),
        }
    }

    pub(super) fn damaged(&self, what: String, expected: String, found: String) -> CheckpointError {
        CheckpointError::Damaged { path: self.path.clone(), what, expected, found }
    }
}

impl std::fmt::Display for Piece<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tensor `{}`, elements {}..{}", self.tensor, self.piece.start, self.piece.end)
    }
}

/// Where the bytes of a piece are gathered.
fn piece_of<'c, 'm>(
    contents: &'c mut BTreeMap<&'m str, BTreeMap<usize, Vec<u8>>>,
    manifest: &'m Manifest,
    piece: Piece<'_>,
) -> &'c mut Vec<u8> {
    let name = manifest.tensors.get_key_value(piece.tensor).map_or("", |(name, _)| name.as_str());
    contents.entry(name).or_default().entry(piece.piece.start).or_default()
}

#[cfg(test)]
mod tests {
    use super::super::RealDisk;
    use super::super::testing::{KINDS, element, header, layout, load, save_parts, save_step};
    use super::*;

    const SHARD: &str = "state-00000-of-00003.safetensors.zst";

    fn with_damage(damage: impl Fn(&Path)) -> CheckpointError {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        damage(&path);
        load(&path).unwrap_err()
    }

    fn text(error: CheckpointError) -> String {
        error.to_string().split_once("damaged: ").map_or(error.to_string(), |(_, rest)| rest.to_owned())
    }

    fn flip(path: &Path, at: usize) {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    /// Puts another manifest there, with its hash: what an attacker can do, and a disk cannot.
    fn forge(path: &Path, change: impl Fn(&mut Manifest)) {
        let mut manifest: Manifest = serde_json::from_slice(&std::fs::read(path.join(MANIFEST)).unwrap()).unwrap();
        change(&mut manifest);
        let json = serde_json::to_vec(&manifest).unwrap();
        std::fs::write(path.join(SUMS), manifest.sums(&sha256_hex(&json))).unwrap();
        std::fs::write(path.join(MANIFEST), json).unwrap();
    }

    /// Puts another content into the first shard, with its hashes.
    fn forge_shard(path: &Path, content: &[u8], frame: Vec<u8>) {
        std::fs::write(path.join(SHARD), &frame).unwrap();
        forge(path, |manifest| {
            let shard = &mut manifest.shards[0];
            (shard.bytes, shard.sha256, shard.content_bytes) = (frame.len() as u64, sha256_hex(&frame), content.len() as u64);
        });
    }

    fn compressed(content: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(content, 1).unwrap()
    }

    #[test]
    fn damage_is_named_with_the_file_and_both_values() {
        let cut = with_damage(|p| std::fs::write(p.join("adapter/adapter_config.json"), b"{").unwrap());
        assert_eq!(text(cut), "adapter/adapter_config.json: expected 2 bytes, found 1 bytes");
        let gone = with_damage(|p| std::fs::remove_file(p.join(SHARD)).unwrap());
        assert!(text(gone).ends_with("found no such file"));
        assert!(text(with_damage(|p| std::fs::remove_file(p.join(MANIFEST)).unwrap())).contains("it has no manifest.json"));
        let step_changed = with_damage(|p| {
            let text = std::fs::read_to_string(p.join(MANIFEST)).unwrap();
            std::fs::write(p.join(MANIFEST), text.replace("\"step\": 7", "\"step\": 8")).unwrap();
        });
        assert!(text(step_changed).starts_with("manifest.json: expected sha256 "));
    }

    #[test]
    fn damage_in_a_shard_is_named_with_tensor_and_elements() {
        let content = |p: &Path| zstd::decode_all(std::fs::read(p.join(SHARD)).unwrap().as_slice()).unwrap();
        let other_value = with_damage(|p| {
            let mut content = content(p);
            *content.last_mut().unwrap() ^= 1;
            forge_shard(p, &content, compressed(&content));
        });
        let text_of_it = text(other_value);
        assert!(text_of_it.starts_with(&format!("{SHARD}, tensor `s.m.b`, elements 0..7: expected sha256 ")), "{text_of_it}");
        let torn = with_damage(|p| {
            let frame = std::fs::read(p.join(SHARD)).unwrap();
            let half = frame[..frame.len() / 2].to_vec();
            forge_shard(p, &content(p), half);
        });
        assert!(text(torn).contains("byte 0 of its content: expected a whole zstd frame, found "));
        // Two shards of the same size, each other's content.
        let dir = tempfile::tempdir().unwrap();
        let path = save_parts(&RealDisk, dir.path(), &header(1), &[0..1, 1..2, 2..18]).unwrap();
        let name = |i: usize| path.join(format!("state-0000{i}-of-00003.safetensors.zst"));
        let second = std::fs::read(name(1)).unwrap();
        std::fs::copy(name(0), name(1)).unwrap();
        std::fs::write(name(0), second).unwrap();
        let text_of_it = text(load(&path).unwrap_err());
        assert!(text_of_it.starts_with("state-00000-of-00003.safetensors.zst"), "{text_of_it}");
    }

    #[test]
    fn any_changed_byte_of_any_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        let shards = (0..3).map(|i| format!("state-0000{i}-of-00003.safetensors.zst"));
        for name in shards.chain([MANIFEST, SUMS, "adapter/adapter_config.json"].map(str::to_owned)) {
            let file = path.join(&name);
            for at in 0..std::fs::metadata(&file).unwrap().len() as usize {
                flip(&file, at);
                assert!(load(&path).is_err(), "{name} byte {at}");
                flip(&file, at);
            }
        }
        load(&path).unwrap();
    }

    #[test]
    fn shard_cut_at_any_length_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        let whole = std::fs::read(path.join(SHARD)).unwrap();
        for len in 0..whole.len() {
            std::fs::write(path.join(SHARD), &whole[..len]).unwrap();
            assert!(load(&path).is_err(), "{len}");
        }
    }

    #[test]
    fn manifest_that_leads_out_of_its_folder_or_promises_too_much_is_refused() {
        type Change = fn(&mut Manifest);
        let changes: [(Change, &str); 9] = [
            (|m| m.shards[0].file = "../state".to_owned(), "shard `../state` is not the name of a file"),
            (|m| m.shards[0].file = "a/b".to_owned(), "shard `a/b` is not the name of a file"),
            (|m| m.shards[1].file = SHARD.to_owned(), "two files are called `state-00000-of-00003.safetensors.zst`"),
            (
                |m| drop(m.files.insert("/etc/passwd".to_owned(), super::super::FileEntry { bytes: 1, sha256: String::new() })),
                "file `/etc/passwd` is not a path inside a checkpoint",
            ),
            (|m| m.shards[0].content_bytes = 1 << 60, "cannot hold 1152921504606846976"),
            (|m| m.tensors.values_mut().for_each(|t| t.shape = vec![1 << 40, 1 << 40]), "overflows"),
            (|m| m.tensors.values_mut().for_each(|t| t.pieces.truncate(1)), "are in no shard"),
            (|m| m.tensors.values_mut().flat_map(|t| &mut t.pieces).for_each(|p| p.shard = 9), "there is no shard 9"),
            (|m| m.tensors.values_mut().flat_map(|t| &mut t.pieces).for_each(|p| p.shard = 1), "shard 1 is too small"),
        ];
        for (change, expected) in changes {
            let found = text(with_damage(|p| forge(p, change)));
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn shard_that_is_more_or_less_than_the_manifest_says_is_refused() {
        let content = |p: &Path| zstd::decode_all(std::fs::read(p.join(SHARD)).unwrap().as_slice()).unwrap();
        // A bomb: the frame says another size than the manifest, or holds more than it says.
        let bomb = with_damage(|p| {
            std::fs::write(p.join(SHARD), compressed(&vec![0; 1 << 24])).unwrap();
            forge(p, |m| m.shards[0].bytes = std::fs::metadata(p.join(SHARD)).unwrap().len());
        });
        assert!(text(bomb).contains("found a zstd frame of 16777216"));
        let behind = with_damage(|p| {
            let content = content(p);
            forge_shard(p, &content, [compressed(&content), b"more".to_vec()].concat());
        });
        assert!(text(behind).ends_with("behind its zstd frame: expected nothing, found 4 bytes"));
        let header = with_damage(|p| {
            let mut content = content(p);
            content[..8].copy_from_slice(&u64::MAX.to_le_bytes());
            forge_shard(p, &content, compressed(&content));
        });
        assert!(text(header).contains("header: expected "));
        let window = with_damage(|p| {
            let content = content(p);
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            // A content size of more than the window keeps the frame from being one segment.
            encoder.window_log(27).unwrap();
            std::io::Write::write_all(&mut encoder, &content).unwrap();
            forge_shard(p, &content, encoder.finish().unwrap());
        });
        assert!(text(window).contains("a zstd frame that does not say"));
    }

    #[test]
    fn links_are_not_followed() {
        let text_of = |damage: &dyn Fn(&Path)| text(with_damage(damage));
        let moved = |p: &Path, name: &str| {
            let to = p.parent().unwrap().join("outside");
            std::fs::rename(p.join(name), &to).unwrap();
            std::os::unix::fs::symlink(to, p.join(name)).unwrap();
        };
        assert!(text_of(&|p| moved(p, SHARD)).ends_with("it is no regular file, and links are not followed"));
        assert!(text_of(&|p| moved(p, "adapter/adapter_config.json")).ends_with("links are not followed"));
        assert!(text_of(&|p| moved(p, "adapter")).ends_with("adapter is no folder itself"));
        assert!(text_of(&|p| moved(p, MANIFEST)).ends_with("links are not followed"));
    }

    #[test]
    fn newer_and_older_formats_are_refused_as_such() {
        let of = |version: u32| with_damage(|p| std::fs::write(p.join(MANIFEST), format!("{{\"format_version\": {version}}}")).unwrap());
        let text = of(99).to_string();
        assert!(text.ends_with("has format version 99, and this program reads up to 2"), "{text}");
        let text = of(1).to_string();
        assert!(text.ends_with("has format version 1, saved by an older glmddp, and this program reads version 2"), "{text}");
    }

    #[test]
    fn flats_of_any_range_are_read_from_any_shards() {
        let dir = tempfile::tempdir().unwrap();
        for (step, ranges) in [(1, vec![0..18, 18..18]), (2, vec![0..0, 0..3, 3..18]), (3, vec![0..5, 5..9, 9..13, 13..18])] {
            let path = save_parts(&RealDisk, dir.path(), &header(step), &ranges).unwrap();
            let checkpoint = open(&RealDisk, &path).unwrap();
            for own in [0..18, 0..0, 2..6, 12..18] {
                let wanted = [("p", 0..18), ("m", own.clone()), ("s", own.clone())];
                let flats = checkpoint.flats(&RealDisk, &layout(), &wanted).unwrap();
                for (kind, (flat, (_, range))) in flats.iter().zip(wanted).enumerate() {
                    let expected: Vec<f32> = range.map(|at| element(step, kind, at)).collect();
                    assert_eq!(*flat, expected, "{ranges:?} {own:?}");
                }
            }
        }
    }

    #[test]
    fn state_of_other_tensors_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        let checkpoint = open(&RealDisk, &path).unwrap();
        let refused = |layout: &Layout, kinds: &[&'static str]| {
            let wanted: Vec<_> = kinds.iter().map(|kind| (*kind, 0..1)).collect();
            text(checkpoint.flats(&RealDisk, layout, &wanted).unwrap_err()).split_once("has: ").unwrap().1.to_owned()
        };
        assert_eq!(refused(&layout(), &["p", "m"]), "tensor `s.a`: expected no such tensor, found F32 []");
        assert_eq!(refused(&layout(), &["p", "m", "s", "x"]), "tensor `x.a`: expected F32 [], found no such tensor");
        let other = Layout::new(layout().iter().map(|(name, e)| (name.to_owned(), [&e.shape[..], &[1]].concat())).collect());
        assert_eq!(refused(&other, &KINDS), "tensor `p.a`: expected F32 [1], found F32 []");
    }
}
