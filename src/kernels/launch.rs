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
        Self::grid([blocks, 1], threads, shared_bytes)
    }

    /// Blocks in x and y. Numbers that no grid can have are refused by [`launch`].
    pub fn grid(blocks: [usize; 2], threads: u32, shared_bytes: u32) -> Self {
        let [x, y] = blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        Self { grid: [x, y, 1], threads, shared_bytes }
    }
}

/// The most blocks that a grid has in each dimension (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];

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

/// Starts a kernel with its arguments' struct. A grid without blocks has nothing to do and is not started: the driver would refuse it.
///
/// # Errors
/// If the grid has more blocks than a GPU allows, or as [`Executor::launch`].
pub fn launch<A: NoUninit>(executor: &dyn Executor, name: &str, launch: Launch, args: &A) -> Result<(), LaunchError> {
    if launch.grid.contains(&0) {
        return Ok(());
    }
    require(launch.grid.iter().zip(MAX_GRID).all(|(blocks, most)| *blocks <= most), name, || {
        format!("a grid of {:?} blocks, more than the {MAX_GRID:?} of a GPU: use smaller batches", launch.grid)
    })?;
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

/// The address of a fault that nobody asks for: the host has looked at what the kernel would report.
pub const NO_REPORT: u64 = 0;

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

/// For tests: has no memory, and a launch is an error that says "started".
#[cfg(test)]
pub(crate) struct Nowhere;

#[cfg(test)]
impl Executor for Nowhere {
    fn describe(&self) -> String {
        "nowhere".to_owned()
    }
    fn alloc(&self, name: &str, _: usize) -> Result<Buffer, LaunchError> {
        unreachable!("{name}")
    }
    fn write(&self, to: Buffer, _: &[u8]) -> Result<(), LaunchError> {
        unreachable!("{to:?}")
    }
    fn read(&self, from: Buffer) -> Result<Vec<u8>, LaunchError> {
        unreachable!("{from:?}")
    }
    fn launch(&self, name: &str, _: Launch, _: &[u8]) -> Result<(), LaunchError> {
        Err(LaunchError::Kernel { kernel: name.to_owned(), reason: "started".to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(blocks: [usize; 2]) -> String {
        let result = launch(&Nowhere, "some", Launch::grid(blocks, 32, 0), &[0u64; 1]);
        result.map_or_else(|error| error.to_string(), |()| "not started".to_owned())
    }

    #[test]
    fn launch_of_a_grid_that_a_gpu_has_is_started() {
        assert_eq!([outcome([1, 1]), outcome([i32::MAX as usize, 65_535])], ["kernel `some`: started"; 2]);
    }

    #[test]
    fn launch_without_blocks_is_not_started() {
        assert_eq!([outcome([0, 1]), outcome([5, 0])], ["not started"; 2]);
    }

    #[test]
    fn launch_of_more_blocks_than_a_grid_has_is_refused() {
        insta::assert_snapshot!(
            [outcome([1 << 31, 1]), outcome([1 << 40, 1]), outcome([1, 65_536])].join("\n"),
            @r"
        kernel `some`: a grid of [2147483648, 1, 1] blocks, more than the [2147483647, 65535, 65535] of a GPU: use smaller batches
        kernel `some`: a grid of [4294967295, 1, 1] blocks, more than the [2147483647, 65535, 65535] of a GPU: use smaller batches
        kernel `some`: a grid of [1, 65536, 1] blocks, more than the [2147483647, 65535, 65535] of a GPU: use smaller batches
        "
        );
    }
}
