//! How kernels are started, wherever they run: a GPU, or the host that compiled them for checks.
//!
//! A kernel `name.cu` takes one struct by value; its mirror in Rust is `repr(C)` and plain bytes, addresses in it are `u64`. What is launched with
//! which sizes stands beside the CPU's code of an op, which is the specification.

use bytemuck::{NoUninit, Pod};

use super::cuda::CudaError;

/// Threads that move together.
pub const WARP: u32 = 32;

/// Blocks, threads of a block and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared_bytes: u32,
}

impl Launch {
    /// `blocks` of `threads` in a row.
    pub fn row(blocks: usize, threads: u32, shared_bytes: u32) -> Self {
        Self { grid: [blocks as u32, 1, 1], threads, shared_bytes }
    }
}

/// Memory of an [`Executor`], which frees it when it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub address: u64,
    pub bytes: usize,
}

/// What runs kernels, in the order of their launches.
pub trait Executor {
    /// Its name and what of it matters for results.
    fn describe(&self) -> String;

    /// Memory that nothing is known of; `name` is for messages. Aligned to 256 bytes.
    ///
    /// # Errors
    /// When there is not enough.
    fn alloc(&self, name: &str, bytes: usize) -> Result<Buffer, LaunchError>;

    /// # Errors
    /// When the device fails, or the lengths differ.
    fn write(&self, to: Buffer, bytes: &[u8]) -> Result<(), LaunchError>;

    /// Waits for all launches; every byte must have been written by somebody.
    ///
    /// # Errors
    /// When a kernel failed, or the device.
    fn read(&self, from: Buffer) -> Result<Vec<u8>, LaunchError>;

    /// Starts the kernel `name` with `args`, the bytes of its one argument.
    ///
    /// # Errors
    /// When there is no such kernel, or it cannot be started so.
    fn launch(&self, name: &str, launch: Launch, args: &[u8]) -> Result<(), LaunchError>;
}

/// Starts a kernel with its arguments' struct.
///
/// # Errors
/// As [`Executor::launch`].
pub fn launch<A: NoUninit>(executor: &dyn Executor, name: &str, launch: Launch, args: &A) -> Result<(), LaunchError> {
    executor.launch(name, launch, bytemuck::bytes_of(args))
}

/// An error with `reason` unless the kernel can be started so.
///
/// # Errors
/// When `is_so` is false.
pub fn require(is_so: bool, kernel: &str, reason: impl FnOnce() -> String) -> Result<(), LaunchError> {
    if is_so { Ok(()) } else { Err(LaunchError::Kernel { kernel: kernel.to_owned(), reason: reason() }) }
}

/// An error unless all of `addresses` are multiples of 16, as loads of 16 bytes want them.
///
/// # Errors
/// When one is not.
pub fn require_aligned(kernel: &str, addresses: &[u64]) -> Result<(), LaunchError> {
    let odd = addresses.iter().find(|address| !address.is_multiple_of(16));
    require(odd.is_none(), kernel, || format!("a buffer at {:#x}, expected a multiple of 16 bytes", odd.copied().unwrap_or_default()))
}

/// Blocks for a row of `columns` values of which each of their `threads` takes 16 bytes.
///
/// # Errors
/// When the width is no multiple of 16 bytes.
pub fn tiles(kernel: &str, dtype: KernelDtype, columns: usize, threads: u32) -> Result<usize, LaunchError> {
    let wide = dtype.wide();
    let fits = columns > 0 && columns.is_multiple_of(wide) && i32::try_from(columns).is_ok();
    require(fits, kernel, || format!("rows of {columns} values, expected a multiple of {wide}"))?;
    Ok((columns / wide).div_ceil(threads as usize))
}

/// Bytes of global memory that a kernel's threads ask for; what several of them read counts each time, wherever it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    pub read: u64,
    pub written: u64,
}

/// What a fault's 8 bytes hold before a kernel may report one: the lowest position of something that it cannot go on with.
pub const NO_FAULT: u64 = u64::MAX;

/// The address of new memory with `bytes` in it.
///
/// # Errors
/// As [`Executor::alloc`] and [`Executor::write`].
pub fn upload(executor: &dyn Executor, name: &str, bytes: &[u8]) -> Result<u64, LaunchError> {
    let buffer = executor.alloc(name, bytes.len())?;
    executor.write(buffer, bytes)?;
    Ok(buffer.address)
}

/// What is in a buffer.
///
/// # Errors
/// As [`Executor::read`].
pub fn download<T: Pod>(executor: &dyn Executor, buffer: Buffer) -> Result<Vec<T>, LaunchError> {
    Ok(bytemuck::allocation::pod_collect_to_vec(&executor.read(buffer)?))
}

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("kernel `{kernel}`: {reason}")]
    Kernel { kernel: String, reason: String },
    #[error("buffer `{name}` of {bytes} bytes: {reason}")]
    Memory { name: String, bytes: usize, reason: String },
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl LaunchError {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Cuda(error) => error.hint(),
            Self::Kernel { .. } | Self::Memory { .. } => None,
        }
    }
}

/// The type of what kernels read and write; sums are in f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelDtype {
    F32,
    Bf16,
    F16,
}

impl KernelDtype {
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// The end of a kernel's name.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    pub fn num_bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Elements of 16 bytes.
    pub fn wide(self) -> usize {
        16 / self.num_bytes()
    }

    /// Half the distance of 1 to the next larger number.
    pub fn epsilon(self) -> f32 {
        match self {
            Self::F32 => f32::EPSILON / 2.0,
            Self::Bf16 => half::bf16::EPSILON.to_f32() / 2.0,
            Self::F16 => half::f16::EPSILON.to_f32() / 2.0,
        }
    }

    /// `value` rounded to this type.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
            Self::F16 => half::f16::from_f32(value).to_f32(),
        }
    }

    /// `values` in this type, as bytes.
    pub fn to_bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => bytemuck::cast_slice(values).to_vec(),
            Self::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        }
    }

    /// The other way; bytes that do not make an element are left out.
    pub fn from_bytes(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Self::Bf16 => bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            Self::F16 => bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        }
    }
}
