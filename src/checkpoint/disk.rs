//! The file system as saving sees it: each call that changes something is one step, so that a test can stop before any of them.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// An open file that is being written.
pub trait DiskFile: Write {
    /// Makes the content durable.
    fn sync(&mut self) -> io::Result<()>;
}

pub trait Disk {
    /// Creates a file, or empties it.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Creates a folder and those above it.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file, or a folder with all in it.
    fn remove(&self, path: &Path) -> io::Result<()>;

    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Bytes of a file.
    fn len(&self, path: &Path) -> io::Result<u64>;
    /// The entries of a folder, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
    /// Bytes that the user may still write in this folder.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// The machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl DiskFile for std::fs::File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(std::fs::File::create(path)?))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::File::open(path)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if std::fs::symlink_metadata(path)?.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        std::fs::read(path)
    }

    fn len(&self, path: &Path) -> io::Result<u64> {
        Ok(std::fs::metadata(path)?.len())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = std::fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let fs = rustix::fs::statvfs(path)?;
        Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
    }
}
