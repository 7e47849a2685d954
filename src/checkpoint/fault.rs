//! A disk that fails on purpose, for tests of what a failure leaves behind.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::disk::{Disk, DiskFile, RealDisk};

/// What happens at the chosen call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This call alone fails, as on a bad sector or a full disk.
    Fail(io::ErrorKind),
    /// This call and all after it fail and change nothing, as if the process had been killed.
    Stop,
    /// A write stores half of its bytes, then everything stops.
    TornWrite,
}

/// A real disk whose n-th changing call (create, write, sync, rename, remove, ...) meets a fault.
#[derive(Clone, Debug)]
pub struct FaultyDisk {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    calls: AtomicUsize,
    at: usize,
    fault: Fault,
    free_bytes: Option<u64>,
}

impl FaultyDisk {
    /// Counts calls from 0; `at` beyond the last call means no fault.
    pub fn new(at: usize, fault: Fault) -> Self {
        Self { state: Arc::new(State { calls: AtomicUsize::new(0), at, fault, free_bytes: None }) }
    }

    /// A disk without faults that says it has this much room.
    pub fn with_free_bytes(free_bytes: u64) -> Self {
        Self { state: Arc::new(State { calls: AtomicUsize::new(0), at: usize::MAX, fault: Fault::Stop, free_bytes: Some(free_bytes) }) }
    }

    /// Changing calls so far.
    pub fn num_calls(&self) -> usize {
        self.state.calls.load(Ordering::SeqCst)
    }
}

impl State {
    /// Counts one changing call; true when a write is to be torn.
    fn step(&self) -> io::Result<bool> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let stopped = || io::Error::other("stopped by a test");
        match self.fault {
            Fault::Fail(kind) if call == self.at => Err(kind.into()),
            Fault::Stop if call >= self.at => Err(stopped()),
            Fault::TornWrite if call > self.at => Err(stopped()),
            Fault::TornWrite => Ok(call == self.at),
            _ => Ok(false),
        }
    }

    fn whole_step(&self) -> io::Result<()> {
        if self.step()? { Err(io::Error::other("stopped by a test")) } else { Ok(()) }
    }
}

struct FaultyFile {
    file: Box<dyn DiskFile>,
    state: Arc<State>,
}

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.state.step()? {
            self.file.write_all(&bytes[..bytes.len() / 2])?;
            return Err(io::Error::other("stopped by a test"));
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl DiskFile for FaultyFile {
    fn sync(&mut self) -> io::Result<()> {
        self.state.whole_step()?;
        self.file.sync()
    }
}

impl Disk for FaultyDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.state.whole_step()?;
        Ok(Box::new(FaultyFile { file: RealDisk.create(path)?, state: self.state.clone() }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.state.whole_step()?;
        RealDisk.create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.state.whole_step()?;
        RealDisk.rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.state.whole_step()?;
        RealDisk.sync_dir(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.state.whole_step()?;
        RealDisk.remove(path)
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
