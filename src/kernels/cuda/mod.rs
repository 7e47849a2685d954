//! NVIDIA GPUs: what this build has for them, what the machine has, and (with the feature `cuda`) the `CudaExecutor`.
//!
//! Without the feature the same functions are there and say so; what is made of facts, such as texts, does not need it.

#[cfg_attr(not(feature = "cuda"), path = "absent.rs")]
mod device;
mod error;
#[cfg(feature = "cuda")]
mod executor;
#[cfg(feature = "cuda")]
mod images;
mod library;
#[cfg(feature = "cuda")]
mod products;
#[cfg(feature = "cuda")]
mod staging;

pub use device::{address, build, driver, gpu_of, load, open, tensor_device};
pub use error::CudaError;
#[cfg(feature = "cuda")]
pub use executor::CudaExecutor;
pub use library::{CUBLAS, CUBLAS_LT, CURAND, DRIVER, Library, NCCL};

use std::fmt;

/// The oldest GPUs that have what kernels use: bfloat16 on tensor cores, and copies beside the computation.
pub const OLDEST_CAPABILITY: Version = Version(8, 0);

/// Of CUDA, or of a GPU (its compute capability): major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// What this binary was built with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    pub toolkit: Version,
    /// With machine code.
    pub architectures: Vec<Version>,
    /// The one whose PTX the driver compiles for newer GPUs.
    pub ptx: Version,
    pub num_kernels: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub ordinal: usize,
    pub name: String,
    pub capability: Version,
    pub memory_bytes: u64,
}

impl Device {
    /// # Errors
    /// When the kernels do not run on it.
    pub fn usable(&self) -> Result<(), CudaError> {
        if self.capability < OLDEST_CAPABILITY { Err(CudaError::Architecture { device: self.clone() }) } else { Ok(()) }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {} ({}, compute capability {})", self.ordinal, self.name, self.capability)
    }
}

/// What the driver says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA that it runs.
    pub cuda: Version,
    pub devices: Vec<Device>,
}

impl Driver {
    /// Device `ordinal`, if a program built with `toolkit` runs on it.
    ///
    /// # Errors
    /// When the driver or the device is too old, or there is no such device.
    pub fn device(&self, ordinal: usize, toolkit: Version) -> Result<&Device, CudaError> {
        if self.cuda < toolkit {
            return Err(CudaError::DriverTooOld { required: toolkit, found: self.cuda });
        }
        let device = self.devices.get(ordinal).ok_or(CudaError::NoSuchDevice { ordinal, found: self.devices.len() })?;
        device.usable().map(|()| device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(cuda: Version, capability: Version) -> Driver {
        Driver { cuda, devices: vec![Device { ordinal: 0, name: "NVIDIA T".into(), capability, memory_bytes: 1 << 34 }] }
    }

    #[test]
    fn device_of_a_driver_is_refused_for_the_first_thing_that_is_too_old() {
        let toolkit = Version(13, 0);
        assert!(driver(Version(13, 0), Version(8, 0)).device(0, toolkit).is_ok());
        assert!(driver(Version(14, 1), Version(12, 0)).device(0, toolkit).is_ok());
        let refused = |driver: Driver, ordinal| driver.device(ordinal, toolkit).unwrap_err();
        let too_old = CudaError::DriverTooOld { required: toolkit, found: Version(12, 9) };
        assert_eq!(refused(driver(Version(12, 9), Version(7, 5)), 0), too_old);
        assert_eq!(refused(driver(toolkit, Version(8, 9)), 1), CudaError::NoSuchDevice { ordinal: 1, found: 1 });
        assert!(
            matches!(refused(driver(toolkit, Version(7, 5)), 0), CudaError::Architecture { device } if device.capability == Version(7, 5))
        );
    }
}
