//! The one place that maps files into memory.
#![allow(unsafe_code, reason = "memory-mapping is unsafe by nature")]

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// Maps a non-empty file read-only.
pub fn map_file(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is read-only and lives as long as its owner. The user guarantees that nobody shortens a model file
    // or writes to it while a run reads it, as every reader of mapped checkpoints asks; the bytes are only ever taken as plain numbers.
    unsafe { Mmap::map(&file) }
}
