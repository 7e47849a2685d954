//! Memory of the host that a GPU reads while the host goes on: a copy from other memory holds the host up until the stream has come to it.
#![allow(unsafe_code, reason = "page-locked memory is the driver's")]

use std::collections::VecDeque;
use std::ffi::c_void;

use cudarc::driver::{DriverError, result, sys};

/// Bytes of a block at least: what a micro-batch's tables take.
const BLOCK_BYTES: usize = 256 << 10;
/// Copies begin at multiples of it: what is written for the next shares no page with what the GPU may still read.
const PAGE_BYTES: usize = 4096;

/// Blocks of page-locked memory, each of which is written again when the GPU is done with it.
#[derive(Default)]
pub struct Staging {
    /// The one that is being filled.
    current: Option<Block>,
    /// Full ones, the oldest first.
    full: VecDeque<Block>,
}

struct Block {
    memory: *mut c_void,
    bytes: usize,
    used: usize,
    /// Recorded behind the last copy of a full block.
    event: sys::CUevent,
}

// SAFETY: the driver's handles may be used on any thread that has the context; `Staging` is behind a lock.
unsafe impl Send for Block {}

impl Staging {
    /// Queues a copy of `bytes` to `address` on `stream`, and is done with them. It never waits for the GPU: where all blocks are in use there
    /// will be one more.
    ///
    /// # Safety
    /// The calling thread has the stream's context, and `bytes.len()` bytes at `address` are the caller's to write.
    ///
    /// # Errors
    /// When the driver has no more page-locked memory, or fails.
    pub unsafe fn send(&mut self, bytes: &[u8], address: u64, stream: sys::CUstream) -> Result<(), DriverError> {
        let needed = bytes.len().next_multiple_of(PAGE_BYTES);
        if self.current.as_ref().is_none_or(|block| block.bytes - block.used < needed) {
            if let Some(full) = &self.current {
                // SAFETY: event and stream are alive.
                unsafe { result::event::record(full.event, stream) }?;
            }
            self.full.extend(self.current.take());
            self.current = Some(self.free(needed)?);
        }
        let Some(block) = &mut self.current else { return Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) };
        // SAFETY: the block has at least these bytes behind those that are used, and no copy reads them.
        let place = unsafe { std::slice::from_raw_parts_mut(block.memory.cast::<u8>().add(block.used), bytes.len()) };
        place.copy_from_slice(bytes);
        block.used += needed;
        // SAFETY: the place is written again only behind the block's event, and freed behind the stream.
        unsafe { result::memcpy_htod_async(address, place, stream) }
    }

    /// A block with room for `bytes`: the oldest that is large enough, if the GPU is done with it, or a new one.
    fn free(&mut self, bytes: usize) -> Result<Block, DriverError> {
        if let Some(oldest) = self.full.iter().position(|block| block.bytes >= bytes)
            // SAFETY: the event is alive.
            && unsafe { result::event::query(self.full[oldest].event) }.is_ok()
            && let Some(block) = self.full.remove(oldest)
        {
            return Ok(Block { used: 0, ..block });
        }
        let bytes = bytes.max(BLOCK_BYTES);
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: a plain call of the driver; both are given back by `Staging::free_all`.
        match unsafe { result::malloc_host(bytes, 0) } {
            Ok(memory) => Ok(Block { memory, bytes, used: 0, event }),
            Err(error) => {
                // SAFETY: nobody else has the event.
                unsafe { result::event::destroy(event) }?;
                Err(error)
            }
        }
    }

    /// Gives all blocks back.
    ///
    /// # Safety
    /// The calling thread has the context, and the stream has come to its end.
    ///
    /// # Errors
    /// When the driver fails.
    pub unsafe fn free_all(&mut self) -> Result<(), DriverError> {
        for block in self.current.take().into_iter().chain(self.full.drain(..)) {
            // SAFETY: both are this block's own, and no copy reads its memory.
            unsafe {
                result::event::destroy(block.event)?;
                result::free_host(block.memory)?;
            }
        }
        Ok(())
    }
}
