//! The driver asked.
#![allow(unsafe_code, reason = "the loader and the driver are C libraries")]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor, bail};
use cudarc::driver::{DevicePtr, DriverError, result, sys};

use super::executor::{locked, usable};
use super::{Build, CUBLAS, CUBLAS_LT, CURAND, CudaError, CudaExecutor, DRIVER, Device, Driver, Library, Version, images};
use crate::kernels::gpu::Gpu;

/// Those that run kernels for tensors, by the stream of the tensors' device. A process opens a device or two, and keeps them.
static OF_TENSORS: Mutex<BTreeMap<usize, Arc<CudaExecutor>>> = Mutex::new(BTreeMap::new());

/// What build.rs compiled.
pub fn build() -> Option<Build> {
    let version = |(major, minor): (u32, u32)| Version(major, minor);
    Some(Build {
        toolkit: version(images::TOOLKIT),
        architectures: images::ARCHITECTURES.iter().copied().map(version).collect(),
        ptx: version(images::PTX),
        num_kernels: images::kernels().len(),
    })
}

/// GPU `ordinal`, of those that this process sees.
///
/// # Errors
/// When there is none that the kernels run on.
pub fn open(ordinal: usize) -> Result<Box<dyn Gpu>, CudaError> {
    Ok(Box::new(CudaExecutor::open(ordinal)?))
}

/// GPU `ordinal` as a device for tensors, with a stream of its own.
///
/// # Errors
/// When there is none that the kernels run on, or a library that candle needs is missing.
pub fn tensor_device(ordinal: usize) -> Result<candle_core::Device, CudaError> {
    load(&DRIVER)?;
    // candle makes a handle of both, and cudarc panics where a library is missing.
    load(&CUBLAS)?;
    load(&CURAND)?;
    load(&CUBLAS_LT)?;
    usable(ordinal)?;
    let device = CudaDevice::new_with_stream(ordinal).map_err(|error| CudaError::Tensors { reason: error.to_string() })?;
    let stream = device.cuda_stream();
    let key = stream.cu_stream() as usize;
    let executor = Arc::new(CudaExecutor::of_stream(ordinal, stream)?);
    locked(&OF_TENSORS).insert(key, executor);
    Ok(candle_core::Device::Cuda(device))
}

/// What runs kernels for the tensors of `device`.
///
/// # Errors
/// When [`tensor_device`] did not make it.
pub fn gpu_of(device: &candle_core::Device) -> Result<Arc<dyn Gpu>, CudaError> {
    let found = match device {
        candle_core::Device::Cuda(device) => locked(&OF_TENSORS).get(&(device.cuda_stream().cu_stream() as usize)).cloned(),
        _ => None,
    };
    let Some(found) = found else { return Err(CudaError::ForeignDevice { device: format!("{:?}", device.location()) }) };
    Ok(found)
}

/// Where the values of a contiguous tensor on a GPU begin. It holds as long as the tensor's memory lives.
///
/// # Errors
/// When it is none.
pub fn address(tensor: &Tensor) -> candle_core::Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, _)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor, found {layout:?}") };
    let Storage::Cuda(storage) = &*storage else { bail!("expected a tensor on a GPU, found one on {:?}", tensor.device().location()) };
    let first = match storage.dtype() {
        DType::F32 => first_of::<f32>(storage)?,
        DType::BF16 => first_of::<half::bf16>(storage)?,
        DType::F16 => first_of::<half::f16>(storage)?,
        DType::U32 => first_of::<u32>(storage)?,
        DType::U8 => first_of::<u8>(storage)?,
        dtype => bail!("no kernel takes {dtype:?}"),
    };
    Ok(first + (start * storage.dtype().size_in_bytes()) as u64)
}

fn first_of<T: CudaDType>(storage: &CudaStorage) -> candle_core::Result<u64> {
    let stream = storage.device().cuda_stream();
    Ok(storage.as_cuda_slice::<T>()?.device_ptr(&stream).0)
}

/// The driver and the GPUs that it lets this process see.
///
/// # Errors
/// When there is no driver, no GPU, or one of its calls fails.
pub fn driver() -> Result<Driver, CudaError> {
    load(&DRIVER)?;
    let mut number = 0;
    // SAFETY: `number` outlives the call.
    unsafe { sys::cuDriverGetVersion(&raw mut number) }.result().map_err(|e| failed("cuDriverGetVersion", e))?;
    let cuda = Version(number as u32 / 1000, number as u32 % 1000 / 10);
    result::init().map_err(|e| failed("cuInit", e))?;
    let count = result::device::get_count().map_err(|e| failed("cuDeviceGetCount", e))?;
    let devices = (0..count).map(device).collect::<Result<_, _>>()?;
    Ok(Driver { cuda, devices })
}

fn device(ordinal: i32) -> Result<Device, CudaError> {
    use sys::CUdevice_attribute_enum::{CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR};
    let handle = result::device::get(ordinal).map_err(|e| failed("cuDeviceGet", e))?;
    let attribute = |which| {
        // SAFETY: the handle is the driver's own.
        let value = unsafe { result::device::get_attribute(handle, which) };
        value.map(|v| v as u32).map_err(|e| failed("cuDeviceGetAttribute", e))
    };
    let capability =
        Version(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?, attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
    let name = result::device::get_name(handle).map_err(|e| failed("cuDeviceGetName", e))?;
    // SAFETY: as above.
    let memory_bytes = unsafe { result::device::total_mem(handle) }.map_err(|e| failed("cuDeviceTotalMem", e))? as u64;
    Ok(Device { ordinal: ordinal as usize, name, capability, memory_bytes })
}

/// Loads a library as it will be loaded when it is used, so that its absence is an error and not the end of the process.
///
/// # Errors
/// When none of its files can be loaded.
pub fn load(library: &Library) -> Result<(), CudaError> {
    let mut reason = None;
    for file in library.files {
        match open_library(file) {
            Ok(()) => return Ok(()),
            // The file itself is not there: nothing to tell. Else it is there and lacks something.
            Err(text) if text.starts_with(&format!("{file}: cannot open shared object file: No such file")) => {}
            Err(text) => reason = Some(text),
        }
    }
    Err(if *library == DRIVER { CudaError::NoDriver { reason } } else { CudaError::Library { library: *library, reason } })
}

/// Opens a library for as long as the process lives; the loader's text where it cannot.
fn open_library(file: &str) -> Result<(), String> {
    let name = CString::new(file).map_err(|e| e.to_string())?;
    // SAFETY: `name` is a C string. Initialisers that run are those of NVIDIA's libraries, which run in any case when these are used.
    if !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) }.is_null() {
        return Ok(());
    }
    // SAFETY: what it gives is null or a C string, valid until this thread's next call of the loader.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return Err(format!("{file}: unknown reason"));
    }
    // SAFETY: as above.
    Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Name and text of a code.
pub(super) fn name_and_text(error: DriverError) -> (String, String) {
    let of = |text: Result<&CStr, DriverError>| text.ok().map(|t| t.to_string_lossy().into_owned());
    let name = of(error.error_name()).unwrap_or_else(|| format!("{:?}", error.0));
    (name, of(error.error_string()).unwrap_or_else(|| "the driver has no text for this code".into()))
}

/// The error of a call.
pub(super) fn failed(call: &'static str, error: DriverError) -> CudaError {
    let (name, text) = name_and_text(error);
    CudaError::call_failed(call, &name, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_of_a_library_that_is_not_there_names_its_files() {
        let library = Library { name: "cuNothing", needed_for: "nothing", files: &["libcunothing.so", "libcunothing.so.9"], remedy: "-" };
        assert_eq!(load(&library), Err(CudaError::Library { library, reason: None }));
    }

    #[test]
    fn load_of_a_library_that_is_no_library_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libcubroken.so");
        std::fs::write(&path, "text").unwrap();
        let file: &'static str = path.to_str().unwrap().to_owned().leak();
        let library = Library { name: "cuBroken", needed_for: "nothing", files: vec![file].leak(), remedy: "-" };
        let error = load(&library).unwrap_err().to_string();
        assert!(error.contains("file too short"), "{error}");
    }
}
