//! A disk that fails on purpose and writes down what it did, for tests of what a failure leaves behind.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{Disk, DiskFile, RealDisk};

/// What happens at the chosen call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This call alone fails with an `errno`, as on a bad sector or a full disk.
    Fail(i32),
    /// This call and all after it fail with `EROFS`, as on a file system that an error has made read-only.
    ReadOnly,
    /// This call and all after it fail and change nothing, as if the process had been killed.
    Stop,
    /// A write stores half of its bytes, then everything stops.
    TornWrite,
}

/// One call that changes the disk. Folders are made and removed one by one, with what is in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    MakeFolder(PathBuf),
    Create(PathBuf),
    Write(PathBuf, Vec<u8>),
    Sync(PathBuf),
    Rename(PathBuf, PathBuf),
    SyncFolder(PathBuf),
    RemoveFile(PathBuf),
    RemoveFolder(PathBuf),
}

/// A call that was asked for.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Of a torn write, with the bytes that were stored.
    pub call: Call,
    /// Whether it changed the disk.
    pub is_done: bool,
}

/// A real disk whose n-th changing call meets a fault.
#[derive(Clone, Debug)]
pub struct FaultyDisk {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    attempts: Mutex<Vec<Attempt>>,
    at: usize,
    fault: Fault,
    free_bytes: Option<u64>,
}

impl FaultyDisk {
    /// Counts calls from 0; `at` beyond the last call means no fault.
    pub fn new(at: usize, fault: Fault) -> Self {
        Self { state: Arc::new(State { attempts: Mutex::default(), at, fault, free_bytes: None }) }
    }

    /// A disk without faults that says it has this much room.
    pub fn with_free_bytes(free_bytes: u64) -> Self {
        Self { state: Arc::new(State { attempts: Mutex::default(), at: usize::MAX, fault: Fault::Stop, free_bytes: Some(free_bytes) }) }
    }

    /// Changing calls so far.
    pub fn num_calls(&self) -> usize {
        self.state.attempts().len()
    }

    /// The changing calls so far, in the order in which they were made.
    pub fn attempts(&self) -> Vec<Attempt> {
        self.state.attempts().clone()
    }
}

fn stopped() -> io::Error {
    io::Error::other("stopped by a test")
}

impl State {
    fn attempts(&self) -> MutexGuard<'_, Vec<Attempt>> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one changing call, and makes it unless it meets the fault.
    fn step<T>(&self, mut call: Call, act: impl FnOnce(&Call) -> io::Result<T>) -> io::Result<T> {
        let mut attempts = self.attempts();
        let (index, at) = (attempts.len(), self.at);
        let is_torn = self.fault == Fault::TornWrite && index == at;
        let refused = match self.fault {
            Fault::Fail(errno) if index == at => Some(io::Error::from_raw_os_error(errno)),
            Fault::ReadOnly if index >= at => Some(io::Error::from_raw_os_error(libc::EROFS)),
            Fault::Stop if index >= at => Some(stopped()),
            Fault::TornWrite if index > at => Some(stopped()),
            _ => None,
        };
        let result = match (refused, &mut call) {
            (Some(error), _) => Err(error),
            (None, Call::Write(_, bytes)) if is_torn => {
                bytes.truncate(bytes.len() / 2);
                act(&call)
            }
            _ if is_torn => Err(stopped()),
            _ => act(&call),
        };
        attempts.push(Attempt { call, is_done: result.is_ok() });
        if is_torn { Err(stopped()) } else { result }
    }
}

struct FaultyFile {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    state: Arc<State>,
}

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let call = Call::Write(self.path.clone(), bytes.to_owned());
        self.state.step(call, |call| match call {
            Call::Write(_, stored) => self.file.write_all(stored).map(|()| stored.len()),
            _ => Ok(0),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl DiskFile for FaultyFile {
    fn sync(&mut self) -> io::Result<()> {
        self.state.step(Call::Sync(self.path.clone()), |_| self.file.sync())
    }
}

impl Disk for FaultyDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = self.state.step(Call::Create(path.to_owned()), |_| RealDisk.create(path))?;
        Ok(Box::new(FaultyFile { file, path: path.to_owned(), state: self.state.clone() }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.state.step(Call::MakeFolder(path.to_owned()), |_| RealDisk.create_dir(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.state.step(Call::Rename(from.to_owned(), to.to_owned()), |_| RealDisk.rename(from, to))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.state.step(Call::SyncFolder(path.to_owned()), |_| RealDisk.sync_dir(path))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if !self.is_folder(path) {
            return self.state.step(Call::RemoveFile(path.to_owned()), |_| RealDisk.remove(path));
        }
        self.list(path)?.iter().try_for_each(|entry| self.remove(entry))?;
        self.state.step(Call::RemoveFolder(path.to_owned()), |_| RealDisk.remove(path))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        RealDisk.open(path)
    }

    fn len(&self, path: &Path) -> io::Result<u64> {
        RealDisk.len(path)
    }

    fn is_folder(&self, path: &Path) -> bool {
        RealDisk.is_folder(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        RealDisk.list(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.state.free_bytes.map_or_else(|| RealDisk.free_bytes(path), Ok)
    }
}
