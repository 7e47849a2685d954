//! Tokenized rows kept between runs: one file a key, made whole by a rename, trusted only with its checksum.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::record::{Columns, OnBadRow};
use super::tokenize::Limits;
use crate::digest::{hex, sha256_hex};

const MAGIC: &[u8; 8] = b"glmddpR1";
/// Changes whenever the same rows would give other samples or other bytes.
const FORMAT_VERSION: u32 = 2;

/// Everything that decides the content of a tokenized file.
#[derive(Serialize)]
pub struct CacheKey<'a> {
    /// Hex sha256 of the file.
    pub file: &'a str,
    /// Hex sha256 of what decides the tokenizer's ids.
    pub tokenizer: &'a str,
    pub columns: &'a Columns,
    pub limits: Limits,
    pub on_bad_row: OnBadRow,
    pub max_samples: Option<usize>,
}

impl CacheKey<'_> {
    /// The place of the file with this key in `dir`.
    pub fn path(&self, dir: &Path) -> PathBuf {
        // A tuple of strings, numbers and plain structs always has a JSON form.
        let text = serde_json::to_vec(&(FORMAT_VERSION, self)).unwrap_or_default();
        dir.join(format!("rows-{}.bin", sha256_hex(text)))
    }
}

/// The payload at `path`, or none where there is no file.
///
/// # Errors
/// Why the file cannot be trusted.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let mut bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot be read: {error}")),
    };
    let head = MAGIC.len() + 32;
    if bytes.len() < head || !bytes.starts_with(MAGIC) {
        return Err("is not a file of tokenized rows".to_owned());
    }
    let payload = bytes.split_off(head);
    if Sha256::digest(&payload)[..] != bytes[MAGIC.len()..] {
        return Err("is damaged: its checksum does not match".to_owned());
    }
    Ok(Some(payload))
}

/// Writes `payload` with its checksum; the file appears whole or not at all.
pub fn write(path: &Path, payload: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    write_atomically(path, &[MAGIC, &Sha256::digest(payload), payload])
}

/// Writes `parts` one behind the other under a temporary name, makes them durable, and renames.
pub(super) fn write_atomically(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy().into_owned();
    let temporary = dir.join(format!(".{name}.tmp-{}", std::process::id()));
    let written = File::create(&temporary).and_then(|mut file| {
        parts.iter().try_for_each(|part| file.write_all(part))?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(dir)?.sync_all()
    });
    if written.is_err() {
        // The first error says more than a failure to tidy up.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Hex sha256 of a whole file, read in pieces.
pub(super) fn sha256_of(mut file: File) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match io::Read::read(&mut file, &mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_comes_back_and_any_flipped_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/rows.bin");
        assert_eq!(read(&path), Ok(None));
        write(&path, b"payload").unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), b"payload");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
        let good = fs::read(&path).unwrap();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(read(&path).is_err(), "byte {i}");
            fs::write(&path, &good[..i]).unwrap();
            assert!(read(&path).is_err(), "cut to {i}");
        }
    }

    #[test]
    fn write_into_a_file_as_directory_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(write(&file.join("rows.bin"), b"y").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
