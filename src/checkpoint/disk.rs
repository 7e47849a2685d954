//! The file system as saving sees it: each call that changes something is one step, so that a test can stop before any of them.

use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An open file that is being written.
pub trait DiskFile: Write + Send {
    /// Makes the content durable.
    fn sync(&mut self) -> io::Result<()>;
}

/// Used from several threads at once.
pub trait Disk: Send + Sync {
    /// Creates a file, or empties it.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Creates a folder and those above it.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file, or a folder with all in it.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Opens a regular file to read it. A link is refused.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>>;
    /// Bytes of a regular file. A link is refused.
    fn len(&self, path: &Path) -> io::Result<u64>;
    /// Whether this is a folder itself and not a link to one.
    fn is_folder(&self, path: &Path) -> bool;
    /// The entries of a folder, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
    /// Bytes that the user may still write in this folder.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;

    /// All of a regular file, with memory for no more than its length.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path)?.take(self.len(path)?).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
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

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        // Not blocking: a pipe would otherwise wait for a writer before it can be refused.
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
        let file = file.map_err(|e| if e.raw_os_error() == Some(libc::ELOOP) { irregular() } else { e })?;
        if file.metadata()?.is_file() { Ok(Box::new(file)) } else { Err(irregular()) }
    }

    fn len(&self, path: &Path) -> io::Result<u64> {
        let metadata = std::fs::symlink_metadata(path)?;
        if metadata.is_file() { Ok(metadata.len()) } else { Err(irregular()) }
    }

    fn is_folder(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
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

fn irregular() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file, and links are not followed")
}
