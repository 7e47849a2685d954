//! Reading and hashing a file on a thread of its own, some blocks ahead of who takes them.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::shard::Hashing;

/// Bytes of a block: small enough that the allocator keeps its pages.
const BLOCK: u64 = 1 << 16;
/// Blocks that wait to be taken.
const DEPTH: usize = 8;

/// A file of a known length, as a reader.
pub(super) struct Ahead {
    blocks: Receiver<io::Result<Vec<u8>>>,
    block: Vec<u8>,
    /// Bytes of `block` that were taken.
    taken: usize,
    thread: Option<JoinHandle<String>>,
}

impl Ahead {
    /// Reads `file`, of about `bytes`, to its end.
    pub(super) fn new(file: Box<dyn Read + Send>, bytes: u64) -> Self {
        let (sender, blocks) = sync_channel(DEPTH);
        let thread = std::thread::spawn(move || read(file, bytes.clamp(1, BLOCK), &sender));
        Self { blocks, block: Vec::new(), taken: 0, thread: Some(thread) }
    }

    /// The sha256 of all that was read; to be called at the end.
    pub(super) fn sha256(&mut self) -> String {
        // The thread returns once nobody takes its blocks, or all are taken.
        let joined = self.thread.take().map(JoinHandle::join);
        joined.map_or(String::new(), |sha256| sha256.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

fn read(file: impl Read, block_bytes: u64, blocks: &SyncSender<io::Result<Vec<u8>>>) -> String {
    let mut file = Hashing::new(file);
    loop {
        let mut block = Vec::with_capacity(block_bytes as usize);
        let result = file.by_ref().take(block_bytes).read_to_end(&mut block);
        let is_last = !matches!(result, Ok(n) if n > 0);
        if blocks.send(result.map(|_| block)).is_err() || is_last {
            return file.sha256();
        }
    }
}

impl BufRead for Ahead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.taken == self.block.len() {
            // A thread that has ended has sent all there is, or its error.
            self.block = self.blocks.recv().unwrap_or_else(|_| Ok(Vec::new()))?;
            self.taken = 0;
        }
        Ok(&self.block[self.taken..])
    }

    fn consume(&mut self, amount: usize) {
        self.taken += amount;
    }
}

impl Read for Ahead {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(bytes)?;
        self.consume(n);
        Ok(n)
    }
}
