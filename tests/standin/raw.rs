//! The driver's calls as the host makes them, without what glmddp and candle do to get them right.
#![allow(unsafe_code, reason = "the driver is a C library")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "addresses are those that the driver gave, or wrong on purpose: the stand-in is to notice"
)]

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result::{self, event, stream};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUfunction, CUstream};
use cudarc::driver::{CudaContext, DriverError};

/// What the kernels of `faults.cu` take: x has 64 values of which the first 32 are written, y has 64.
#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    y: u64,
}

pub const BYTES: usize = 256;
/// A GPU, two streams that have opted out of the legacy stream's rules.
pub struct Raw {
    context: Arc<CudaContext>,
    pub a: CUstream,
    pub b: CUstream,
}

type Done = Result<(), DriverError>;

impl Raw {
    pub fn new() -> Self {
        let context = CudaContext::new(0).unwrap();
        let [a, b] = [(); 2].map(|()| stream::create(stream::StreamKind::NonBlocking).unwrap());
        Self { context, a, b }
    }

    pub fn alloc(&self, on: CUstream) -> u64 {
        self.try_alloc(BYTES, on).unwrap()
    }

    pub fn try_alloc(&self, bytes: usize, on: CUstream) -> Result<u64, DriverError> {
        unsafe { result::malloc_async(on, bytes) }
    }

    pub fn free(&self, at: u64, on: CUstream) -> Done {
        unsafe { result::free_async(at, on) }
    }

    /// Memory on `on` with `value` in it.
    pub fn filled(&self, value: u8, on: CUstream) -> u64 {
        let at = self.alloc(on);
        self.fill(at, value, on);
        at
    }

    pub fn fill(&self, at: u64, value: u8, on: CUstream) {
        unsafe { result::memset_d8_async(at, value, BYTES, on) }.unwrap();
    }

    pub fn up(&self, to: u64, from: &[u8], on: CUstream) -> Done {
        unsafe { result::memcpy_htod_async(to, from, on) }
    }

    pub fn down(&self, to: &mut [u8], from: u64, on: CUstream) -> Done {
        unsafe { result::memcpy_dtoh_async(to, from, on) }
    }

    pub fn copy(&self, to: u64, from: u64, bytes: usize, on: CUstream) -> Done {
        unsafe { result::memcpy_dtod_async(to, from, bytes, on) }
    }

    /// Pinned memory of the host with `value` in it.
    pub fn pinned(&self, value: u8) -> &'static mut [u8] {
        let bytes = unsafe { std::slice::from_raw_parts_mut(result::malloc_host(BYTES, 0).unwrap().cast::<u8>(), BYTES) };
        bytes.fill(value);
        bytes
    }

    pub fn unpin(&self, bytes: &mut [u8]) -> Done {
        unsafe { result::free_host(bytes.as_mut_ptr().cast()) }
    }

    pub fn record(&self, on: CUstream) -> CUevent {
        let new = event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
        unsafe { event::record(new, on) }.unwrap();
        new
    }

    pub fn query(&self, event: CUevent) -> Done {
        unsafe { event::query(event) }
    }

    pub fn wait_for(&self, event: CUevent, on: CUstream) {
        unsafe { stream::wait_event(on, event, cudarc::driver::sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }.unwrap();
    }

    pub fn synchronize(&self, on: CUstream) -> Done {
        unsafe { stream::synchronize(on) }
    }

    pub fn function(&self, kernel: &str) -> Result<CUfunction, DriverError> {
        let module = unsafe { result::module::load_data([0u8; 4].as_ptr().cast()) }?;
        unsafe { result::module::get_function(module, std::ffi::CString::new(kernel).unwrap()) }
    }

    pub fn launch(&self, kernel: &str, [x, y]: [u64; 2], on: CUstream) -> Done {
        self.launch_as(kernel, [x, y], 1, 64, BYTES as u32, on)
    }

    pub fn launch_as(&self, kernel: &str, [x, y]: [u64; 2], blocks: u32, threads: u32, shared_bytes: u32, on: CUstream) -> Done {
        let function = self.function(kernel)?;
        let mut args = Args { x, y };
        let mut params: [*mut c_void; 1] = [(&raw mut args).cast()];
        unsafe { result::launch_kernel(function, (blocks, 1, 1), (threads, 1, 1), shared_bytes, on, &mut params) }
    }

    /// Waits for everything.
    pub fn end(&self) -> Done {
        self.context.synchronize()
    }
}
