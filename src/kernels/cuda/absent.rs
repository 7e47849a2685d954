//! What `device.rs` has, in a build without CUDA.

use super::{Build, CudaError, Driver, Library};
use crate::kernels::gpu::Gpu;

/// Nothing.
pub fn build() -> Option<Build> {
    None
}

/// # Errors
/// Always: nobody is asked.
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
