//! Writing a shard: a rank's part of the state as a zstd frame around a safetensors file.

use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zstd::stream::write::Encoder;

use super::manifest::{ShardEntry, element_bytes, stored_as};
use super::{CheckpointError, Disk};
use crate::digest::hex;
use crate::formats::{Dtype, FormatError, file_dtype, safetensors, tensor_bytes_in};
use crate::params::Layout;

/// Measured in benches/results/2026-11-25-checkpoint.md: of random mantissas higher levels find no more, and take longer.
pub const ZSTD_LEVEL: i32 = 1;
/// Bytes that are hashed and compressed at a time, and written at once.
const BLOCK: usize = 1 << 20;

/// One rank's part of a state: elements `range` of flat buffers that share a layout.
#[derive(Clone, Debug)]
pub struct Part {
    pub range: Range<usize>,
    /// In the order of the file; the first are read without the rest.
    pub flats: Vec<Flat>,
}

/// Elements of one flat buffer, copied.
#[derive(Clone, Debug)]
pub struct Flat {
    /// What it is of the parameters, without a dot: a tensor is called `KIND.PARAMETER`.
    pub kind: String,
    pub dtype: Dtype,
    /// Little-endian.
    pub bytes: Vec<u8>,
}

impl Flat {
    /// Copies `flat`, from its device.
    ///
    /// # Errors
    /// When it has a dtype that files lack, or the device fails.
    pub fn copy(kind: &str, flat: &Tensor) -> Result<Self, CheckpointError> {
        Self::copy_in(kind, flat, Vec::new())
    }

    /// As [`Self::copy`], in a buffer that was used before.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub fn copy_in(kind: &str, flat: &Tensor, buffer: Vec<u8>) -> Result<Self, CheckpointError> {
        let Some(dtype) = file_dtype(flat.dtype()) else {
            let reason = format!("dtype {:?} cannot be written", flat.dtype());
            return Err(FormatError::Write { name: kind.to_owned(), reason }.into());
        };
        Ok(Self { kind: kind.to_owned(), dtype, bytes: tensor_bytes_in(flat, buffer)? })
    }
}

impl Part {
    pub fn num_bytes(&self) -> u64 {
        self.flats.iter().map(|flat| flat.bytes.len() as u64).sum()
    }

    /// Bytes of `num_elements` of the same kinds.
    pub fn bytes_of(&self, num_elements: usize) -> u64 {
        self.flats.iter().map(|flat| (num_elements * element_bytes(flat.dtype).unwrap_or(0)) as u64).sum()
    }
}

/// A shard that is durable, as its rank tells it to the one that writes the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    pub shard: ShardEntry,
    /// Kinds and their types; the same on all ranks.
    pub kinds: Vec<(String, Dtype)>,
    pub pieces: Vec<WrittenPiece>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenPiece {
    pub tensor: String,
    pub start: usize,
    pub end: usize,
    pub stored_as: String,
    pub sha256: String,
}

pub(super) fn file_name(index: usize, num_shards: usize) -> String {
    format!("state-{index:05}-of-{num_shards:05}.safetensors.zst")
}

/// Passes bytes on, hashed and counted.
pub(super) struct Hashing<T> {
    pub inner: T,
    sha256: Sha256,
    pub num_bytes: u64,
}

impl<T> Hashing<T> {
    pub fn new(inner: T) -> Self {
        Self { inner, sha256: Sha256::new(), num_bytes: 0 }
    }

    pub fn sha256(&self) -> String {
        hex(&self.sha256.clone().finalize())
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.sha256.update(&bytes[..n]);
        self.num_bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: io::Read> io::Read for Hashing<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(bytes)?;
        self.sha256.update(&bytes[..n]);
        self.num_bytes += n as u64;
        Ok(n)
    }
}

/// Writes `part` as shard `index` into `folder`, makes it durable, and reads it back. Equal parts give equal bytes.
///
/// # Errors
/// When the disk fails, or gives back other bytes than it was given.
pub(super) fn write(
    disk: &dyn Disk,
    folder: &Path,
    index: usize,
    num_shards: usize,
    layout: &Layout,
    part: &Part,
) -> Result<Written, CheckpointError> {
    let file = file_name(index, num_shards);
    let at = folder.join(&file);
    let fail = |action: &'static str| move |source| (action, source);
    let result = (|| {
        let mut out = disk.create(&at).map_err(fail("create"))?;
        let written = encode(&mut *out, file, layout, part).map_err(fail("write"))?;
        out.sync().map_err(fail("make durable"))?;
        Ok(written)
    })();
    let written = result.map_err(|(action, source)| CheckpointError::io(action, &at, part.num_bytes(), source))?;
    let (bytes, sha256) = sum_of(disk, &at)?;
    if (bytes, &sha256) != (written.shard.bytes, &written.shard.sha256) {
        let text = |bytes, sha256| format!("{bytes} bytes of sha256 {sha256}");
        return Err(CheckpointError::Damaged {
            path: folder.to_owned(),
            what: written.shard.file,
            expected: text(written.shard.bytes, &written.shard.sha256),
            found: text(bytes, &sha256),
        });
    }
    Ok(written)
}

/// Length and sha256 of a file.
///
/// # Errors
/// When it cannot be read.
pub fn sum_of(disk: &dyn Disk, path: &Path) -> Result<(u64, String), CheckpointError> {
    let wrap = |source| CheckpointError::Io { action: "read", path: path.to_owned(), source };
    let mut sum = Hashing::new(io::sink());
    let mut file = io::BufReader::with_capacity(BLOCK, disk.open(path).map_err(wrap)?);
    io::copy(&mut file, &mut sum).map_err(wrap)?;
    Ok((sum.num_bytes, sum.sha256()))
}

fn encode(out: &mut dyn Write, file: String, layout: &Layout, part: &Part) -> io::Result<Written> {
    let (mut announced, mut slices) = (Vec::new(), Vec::new());
    for flat in &part.flats {
        let size = element_bytes(flat.dtype).filter(|size| size * part.range.len() == flat.bytes.len());
        let size = size.ok_or_else(|| io::Error::other(format!("`{}` has {} bytes", flat.kind, flat.bytes.len())))?;
        for (name, entry) in layout.iter() {
            let end = entry.offset + entry.num_elements();
            let here = entry.offset.max(part.range.start)..end.min(part.range.end);
            if here.is_empty() {
                continue;
            }
            let tensor = format!("{}.{name}", flat.kind);
            let piece = here.start - entry.offset..here.end - entry.offset;
            let name = stored_as(&tensor, &piece, entry.num_elements());
            let shape = if name == tensor { entry.shape.clone() } else { vec![piece.len()] };
            announced.push((name, flat.dtype, shape));
            let bytes = (here.start - part.range.start) * size..(here.end - part.range.start) * size;
            slices.push((tensor, piece, &flat.bytes[bytes]));
        }
    }
    let header = safetensors::header(&announced)?;
    let content_bytes = header.len() as u64 + slices.iter().map(|(_, _, bytes)| bytes.len() as u64).sum::<u64>();
    let out = Hashing::new(BufWriter::with_capacity(BLOCK, out));
    let mut encoder = Encoder::new(out, ZSTD_LEVEL)?;
    encoder.include_checksum(true)?;
    encoder.set_pledged_src_size(Some(content_bytes))?;
    encoder.write_all(&header)?;
    let mut pieces = Vec::with_capacity(slices.len());
    for ((stored_as, _, _), (tensor, range, bytes)) in announced.into_iter().zip(slices) {
        let mut piece = Hashing::new(&mut encoder);
        bytes.chunks(BLOCK).try_for_each(|block| piece.write_all(block))?;
        pieces.push(WrittenPiece { tensor, start: range.start, end: range.end, stored_as, sha256: piece.sha256() });
    }
    let mut out = encoder.finish()?;
    out.flush()?;
    let shard = ShardEntry { file, bytes: out.num_bytes, sha256: out.sha256(), content_bytes };
    let kinds = part.flats.iter().map(|flat| (flat.kind.clone(), flat.dtype)).collect();
    Ok(Written { shard, kinds, pieces })
}
