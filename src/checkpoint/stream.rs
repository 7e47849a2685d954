//! The content of a shard while it is decompressed: within the bounds of the manifest, and to the end of the file.

use std::io::{self, BufRead, Read};

use zstd::stream::read::Decoder;

use super::CheckpointError;
use super::ahead::Ahead;
use super::manifest::{ShardEntry, element_bytes};
use super::read::Checkpoint;
use crate::formats::safetensors;

/// log2 of the most memory (bytes) that a frame may ask its reader to keep.
const MAX_WINDOW_LOG: u32 = 23;
/// The first bytes of a zstd frame, with its content size.
const FRAME_HEADER: usize = 18;

/// The content of a shard while it is decompressed.
pub(super) struct Stream<'c> {
    checkpoint: &'c Checkpoint,
    shard: &'c ShardEntry,
    decoder: Decoder<'static, Ahead>,
    /// Bytes of the content that were read.
    at: u64,
}

impl<'c> Stream<'c> {
    pub(super) fn open(checkpoint: &'c Checkpoint, shard: &'c ShardEntry, file: Box<dyn Read + Send>) -> Result<Self, CheckpointError> {
        let fail = |source| CheckpointError::Io { action: "read", path: checkpoint.path.join(&shard.file), source };
        let mut input = Ahead::new(Box::new(file.take(shard.bytes)), shard.bytes);
        let start = input.fill_buf().map_err(fail)?;
        let content = zstd::zstd_safe::get_frame_content_size(&start[..start.len().min(FRAME_HEADER)]);
        if !matches!(content, Ok(Some(bytes)) if bytes == shard.content_bytes) {
            let found = match content {
                Ok(Some(bytes)) => format!("a zstd frame of {bytes}"),
                Ok(None) => "a zstd frame that does not say".to_owned(),
                Err(_) => "no zstd frame".to_owned(),
            };
            return Err(checkpoint.damaged(shard.file.clone(), format!("a zstd frame of {} bytes", shard.content_bytes), found));
        }
        let mut decoder = Decoder::with_buffer(input).map_err(fail)?.single_frame();
        decoder.window_log_max(MAX_WINDOW_LOG).map_err(fail)?;
        Ok(Self { checkpoint, shard, decoder, at: 0 })
    }

    /// Reads the next bytes of the content; `inside` says what they are of.
    pub(super) fn fill(&mut self, bytes: &mut [u8], inside: &dyn Fn() -> String) -> Result<(), CheckpointError> {
        match self.decoder.read_exact(bytes) {
            Ok(()) => {
                self.at += bytes.len() as u64;
                Ok(())
            }
            Err(error) => Err(self.broken(&inside(), error)),
        }
    }

    fn broken(&self, inside: &str, error: io::Error) -> CheckpointError {
        let Self { checkpoint, shard, at, .. } = self;
        if error.raw_os_error().is_some() {
            return CheckpointError::Io { action: "read", path: checkpoint.path.join(&shard.file), source: error };
        }
        let what = format!("{}, {inside}, at or behind byte {at} of its content", shard.file);
        checkpoint.damaged(what, "a whole zstd frame".to_owned(), error.to_string())
    }

    /// The safetensors header. Its memory is bounded by what the manifest says is in the shard.
    pub(super) fn header(&mut self) -> Result<Vec<safetensors::Announced>, CheckpointError> {
        let mut len = [0; 8];
        self.fill(&mut len, &|| "header".to_owned())?;
        let len = u64::from_le_bytes(len);
        let index = self.checkpoint.manifest.shards.iter().position(|shard| shard == self.shard);
        let tensors = self.checkpoint.manifest.tensors.values();
        let pieces = || {
            tensors.clone().flat_map(|entry| entry.pieces.iter().map(move |piece| (entry, piece))).filter(|(_, p)| Some(p.shard) == index)
        };
        // A name may be escaped to six times its length; a dimension, an offset or a bracket has no more than 24 characters.
        let most: usize = 1024 + pieces().map(|(entry, piece)| 6 * piece.stored_as.len() + 24 * (entry.shape.len() + 8)).sum::<usize>();
        let data: u64 = pieces().map(|(entry, piece)| ((piece.end - piece.start) * element_bytes(entry.dtype).unwrap_or(1)) as u64).sum();
        let what = || format!("{}, header", self.shard.file);
        if len > most as u64 || len + 8 + data != self.shard.content_bytes {
            let expected = format!("{} bytes and no more than {most}", self.shard.content_bytes.saturating_sub(8 + data));
            return Err(self.checkpoint.damaged(what(), expected, len.to_string()));
        }
        let mut json = vec![0; len as usize];
        self.fill(&mut json, &|| "header".to_owned())?;
        safetensors::parse_header(&json).map_err(|e| self.checkpoint.damaged(what(), "that of a safetensors file".to_owned(), e))
    }

    /// Nothing may follow, in the frame or behind it, and the file as a whole must be the one that was written.
    pub(super) fn end(mut self) -> Result<(), CheckpointError> {
        match self.decoder.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => {
                let what = format!("{}, behind byte {} of its content", self.shard.file, self.at);
                return Err(self.checkpoint.damaged(what, "its end".to_owned(), "more".to_owned()));
            }
            Err(error) => return Err(self.broken("end", error)),
        }
        let mut rest = self.decoder.finish();
        let fail = |source| CheckpointError::Io { action: "read", path: self.checkpoint.path.join(&self.shard.file), source };
        let more = io::copy(&mut rest, &mut io::sink()).map_err(fail)?;
        if more > 0 {
            let what = format!("{}, behind its zstd frame", self.shard.file);
            return Err(self.checkpoint.damaged(what, "nothing".to_owned(), format!("{more} bytes")));
        }
        self.checkpoint.expect_sha256(self.shard.file.clone(), &self.shard.sha256, rest.sha256())
    }
}
