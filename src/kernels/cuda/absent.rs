//! What `device.rs` has, in a build without CUDA.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{Build, CudaError, Driver, Library};
use crate::kernels::gpu::Gpu;

/// Nothing.
pub fn build() -> Option<Build> {
    None
}

/// # Errors
/// Always: this build has no CUDA.
pub fn driver() -> Result<Driver, CudaError> {
    Err(CudaError::NotBuilt)
}

/// # Errors
/// Always: nothing is loaded.
pub fn load(_: &Library) -> Result<(), CudaError> {
    Err(CudaError::NotBuilt)
}

/// # Errors
/// Always: there is nothing to run on it.
pub fn open(_: usize) -> Result<Box<dyn Gpu>, CudaError> {
    Err(CudaError::NotBuilt)
}

/// # Errors
/// Always: there is no GPU for tensors.
pub fn tensor_device(_: usize) -> Result<Device, CudaError> {
    Err(CudaError::NotBuilt)
}

/// # Errors
/// Always: no tensor is on a GPU.
pub fn gpu_of(_: &Device) -> Result<Arc<dyn Gpu>, CudaError> {
    Err(CudaError::NotBuilt)
}

/// # Errors
/// Always: no tensor is on a GPU.
pub fn address(_: &Tensor) -> candle_core::Result<u64> {
    Err(candle_core::Error::wrap(CudaError::NotBuilt))
}
