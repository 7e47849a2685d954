//! Kernels on a GPU, in the order of their launches.
#![allow(unsafe_code, reason = "kernels are started by the driver, a C library")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DriverError, result};
use cudarc::nvrtc::Ptx;

use super::super::launch::{Buffer, Executor, Launch, LaunchError};
use super::device::{failed, name_and_text};
use super::products::Blas;
use super::staging::Staging;
use super::{Build, CudaError, Device, build, driver, images};

/// Bytes of dynamic shared memory that a kernel gets without asking.
const SHARED_BYTES: u32 = 48 << 10;

/// One GPU, one stream.
pub struct CudaExecutor {
    device: Device,
    build: Build,
    context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    /// By source.
    modules: Mutex<BTreeMap<&'static str, Arc<CudaModule>>>,
    /// By name, each with the dynamic shared memory that it may have.
    kernels: Mutex<BTreeMap<String, (CudaFunction, u32)>>,
    /// By address.
    pub(super) buffers: Mutex<BTreeMap<u64, CudaSlice<u8>>>,
    /// For messages: a failure is seen at a later call.
    pub(super) last: Mutex<String>,
    /// Made by the first product.
    pub(super) blas: Mutex<Option<Blas>>,
    pub(super) staging: Mutex<Staging>,
}

impl CudaExecutor {
    /// GPU `ordinal`, of those that this process sees.
    ///
    /// # Errors
    /// When there is none that the kernels run on: driver, device or architecture.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let (device, build) = usable(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(|e| failed("cuDevicePrimaryCtxRetain", e))?;
        let stream = context.new_stream().map_err(|e| failed("cuStreamCreate", e))?;
        Self::with_stream(device, build, stream)
    }

    /// For what is queued on a stream of tensors' own.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn of_stream(ordinal: usize, stream: Arc<CudaStream>) -> Result<Self, CudaError> {
        let (device, build) = usable(ordinal)?;
        Self::with_stream(device, build, stream)
    }

    fn with_stream(device: Device, build: Build, stream: Arc<CudaStream>) -> Result<Self, CudaError> {
        let context = stream.context().clone();
        // SAFETY: all that is queued goes to the one stream, so that nothing has to be ordered by events. They would be two an allocation.
        unsafe { context.disable_event_tracking() };
        keep_freed_memory(&context).map_err(|e| failed("cuMemPoolSetAttribute", e))?;
        let (modules, kernels, buffers, last, blas, staging) = Default::default();
        Ok(Self { device, build, context, stream, modules, kernels, buffers, last, blas, staging })
    }

    /// Waits for all that was queued, and gives back what copies were sent from.
    fn finish(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()?;
        // sync: an executor of tensors lives as long as its process.
        self.stream.synchronize()?;
        // SAFETY: the context is this thread's, and the stream has come to its end.
        unsafe { locked(&self.staging).free_all() }
    }

    /// The kernel, its module loaded if it is the first of it.
    fn kernel(&self, name: &str) -> Result<CudaFunction, CudaError> {
        if let Some((kernel, _)) = locked(&self.kernels).get(name) {
            return Ok(kernel.clone());
        }
        let image = images::of(name).ok_or_else(|| CudaError::kernel_not_found(name, &images::kernels()))?;
        let mut modules = locked(&self.modules);
        let module = match modules.get(image.source) {
            Some(module) => module.clone(),
            None => {
                let module = self.context.load_module(Ptx::from_binary(image.bytes.to_vec())).map_err(|e| {
                    let (code, text) = name_and_text(e);
                    CudaError::image_refused(name, &code, &text, &self.device, &self.build)
                })?;
                modules.insert(image.source, module.clone());
                module
            }
        };
        let kernel = module.load_function(name).map_err(|e| failed("cuModuleGetFunction", e))?;
        locked(&self.kernels).insert(name.to_owned(), (kernel.clone(), SHARED_BYTES));
        Ok(kernel)
    }

    /// Lets `name` have so much dynamic shared memory.
    fn allow_shared(&self, name: &str, bytes: u32) -> Result<(), CudaError> {
        let mut kernels = locked(&self.kernels);
        let Some((kernel, allowed)) = kernels.get_mut(name).filter(|(_, allowed)| *allowed < bytes) else { return Ok(()) };
        let limit =
            self.context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).map_err(|e| failed("cuDeviceGetAttribute", e))?;
        if bytes > limit as u32 {
            let (kernel, device) = (name.to_owned(), self.device.clone());
            return Err(CudaError::SharedMemory { kernel, bytes, device, limit: limit as u32 });
        }
        kernel.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as i32).map_err(|e| failed("cuFuncSetAttribute", e))?;
        *allowed = bytes;
        Ok(())
    }

    /// Makes the GPU's context that of the calling thread, which may be any.
    pub(super) fn bind(&self, kernel: &str) -> Result<(), LaunchError> {
        let failed = |e| LaunchError::Kernel { kernel: kernel.to_owned(), reason: failed("cuCtxSetCurrent", e).to_string() };
        self.context.bind_to_thread().map_err(failed)
    }

    /// An error of memory; it may be that of a kernel that was started before.
    pub(super) fn memory_error(&self, buffer: Buffer, call: &'static str, error: DriverError) -> LaunchError {
        let last = locked(&self.last);
        let since = if last.is_empty() { String::new() } else { format!(" (the last kernel started was `{last}`)") };
        let name = format!("at {:#x}", buffer.address);
        LaunchError::Memory { name, bytes: buffer.bytes, reason: format!("{}{since}", failed(call, error)) }
    }
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::warn!("a GPU could not be given back: {}", failed("the driver", error));
        }
    }
}

/// Device `ordinal`, and what this binary was built with, if its kernels run there.
pub(super) fn usable(ordinal: usize) -> Result<(Device, Build), CudaError> {
    let build = build().ok_or(CudaError::NotBuilt)?;
    let device = driver()?.device(ordinal, build.toolkit)?.clone();
    Ok((device, build))
}

/// A panic of another thread left nothing half done here: each lock guards whole insertions.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the device's pool keep what was freed. By default each synchronisation gives it back to the system, and the next allocation pays for it.
fn keep_freed_memory(context: &CudaContext) -> Result<(), DriverError> {
    let mut most = u64::MAX;
    // SAFETY: the device is the context's own; the driver copies the attribute, 8 bytes.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut most).cast())
    }
}

const NOT_OURS: &str = "this executor has no such buffer";

fn wrong_buffer(buffer: Buffer, reason: String) -> LaunchError {
    LaunchError::Memory { name: format!("at {:#x}", buffer.address), bytes: buffer.bytes, reason }
}

impl Executor for CudaExecutor {
    fn describe(&self) -> String {
        format!("{}, kernels built with CUDA {}", self.device, self.build.toolkit)
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<Buffer, LaunchError> {
        let memory = |reason| LaunchError::Memory { name: name.to_owned(), bytes, reason };
        // Nothing has no address; SAFETY: bytes of any value are bytes, and that they are written before they are read is checked by tests/standin.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) }.map_err(|e| memory(failed("cuMemAllocAsync", e).to_string()))?;
        let address = slice.device_ptr(&self.stream).0;
        locked(&self.buffers).insert(address, slice);
        Ok(Buffer { address, bytes })
    }

    fn write(&self, to: Buffer, bytes: &[u8]) -> Result<(), LaunchError> {
        if bytes.len() != to.bytes {
            return Err(wrong_buffer(to, format!("{} bytes are written into it", bytes.len())));
        }
        let mut buffers = locked(&self.buffers);
        let view = buffers.get_mut(&to.address).and_then(|slice| slice.try_slice_mut(..to.bytes));
        let mut view = view.ok_or_else(|| wrong_buffer(to, NOT_OURS.into()))?;
        self.stream.memcpy_htod(bytes, &mut view).map_err(|e| self.memory_error(to, "cuMemcpyHtoDAsync", e))?;
        // sync: `bytes` is the caller's again.
        self.stream.synchronize().map_err(|e| self.memory_error(to, "cuStreamSynchronize", e))
    }

    fn read(&self, from: Buffer) -> Result<Vec<u8>, LaunchError> {
        let buffers = locked(&self.buffers);
        let view = buffers.get(&from.address).and_then(|slice| slice.try_slice(..from.bytes));
        let view = view.ok_or_else(|| wrong_buffer(from, NOT_OURS.into()))?;
        let bytes = self.stream.clone_dtoh(&view).map_err(|e| self.memory_error(from, "cuMemcpyDtoHAsync", e))?;
        // sync: the bytes are read here.
        self.stream.synchronize().map_err(|e| self.memory_error(from, "cuStreamSynchronize", e))?;
        Ok(bytes)
    }

    fn launch(&self, name: &str, launch: Launch, args: &[u8]) -> Result<(), LaunchError> {
        let kernel_error = |reason: String| LaunchError::Kernel { kernel: name.to_owned(), reason };
        let kernel = self.kernel(name)?;
        let expected = images::argument_bytes(name).unwrap_or_default();
        if args.len() != expected {
            return Err(kernel_error(format!("its argument has {expected} bytes, and it was given {}", args.len())));
        }
        self.allow_shared(name, launch.shared_bytes)?;
        self.bind(name)?;
        // `args` may lack the alignment of the kernel's struct.
        let mut words = vec![0u128; args.len().div_ceil(size_of::<u128>())];
        bytemuck::cast_slice_mut(&mut words)[..args.len()].copy_from_slice(args);
        let grid = (launch.grid[0], launch.grid[1], launch.grid[2]);
        let mut params = [words.as_mut_ptr().cast::<c_void>()];
        let (function, stream) = (kernel.cu_function(), self.stream.cu_stream());
        // SAFETY: the driver copies the one argument, which has as many bytes as the kernel's struct; addresses in it are of memory of this stream, by
        // the caller's word: whoever frees it queues the free behind this launch.
        unsafe { result::launch_kernel(function, grid, (launch.threads, 1, 1), launch.shared_bytes, stream, &mut params) }
            .map_err(|e| kernel_error(format!("{launch:?}: {}", failed("cuLaunchKernel", e))))?;
        name.clone_into(&mut locked(&self.last));
        Ok(())
    }
}
