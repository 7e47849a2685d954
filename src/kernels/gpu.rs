//! What only a GPU has beside kernels: cuBLASLt's matrix products, copies, and its clock.

use super::launch::{Buffer, Executor, KernelDtype, LaunchError};

/// How the operands of a [`Product`] lie, all row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operands {
    /// a `[M, K]`, b `[N, K]`: a linear layer's forward, as [`super::matmul::nt`].
    Nt,
    /// a `[M, K]`, b `[K, N]`: its gradient towards x, as [`super::matmul::nn`].
    Nn,
    /// a `[K, M]`, b `[K, N]`: its gradient towards the weight, as [`super::matmul::tn`].
    Tn,
}

/// d `[M, N]` = a b + bias + residual, summed in f32 and rounded once. Addresses are of contiguous memory, multiples of 16 bytes.
///
/// The epilogues save passes: a bias or a residual that is added here is neither read nor written by a kernel of its own.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub operands: Operands,
    /// M, N, K.
    pub sizes: [usize; 3],
    pub a: u64,
    pub b: u64,
    pub d: u64,
    /// Of a and b.
    pub dtype: KernelDtype,
    /// Of d, the bias and the residual: that of the operands, or F32.
    pub out_dtype: KernelDtype,
    /// `[N]`, added to each row.
    pub bias: Option<u64>,
    /// `[M, N]`, added; may be d itself.
    pub residual: Option<u64>,
}

impl Product {
    pub fn flops(&self) -> u64 {
        2 * self.sizes.iter().map(|&size| size as u64).product::<u64>()
    }
}

pub trait Gpu: Executor + Send + Sync {
    /// Queues a product behind the kernels that were started.
    ///
    /// # Errors
    /// When an address is no multiple of 16 bytes, or cuBLASLt has no way to do it, or fails.
    fn product(&self, product: &Product) -> Result<(), LaunchError>;

    /// Queues a copy of the host's `bytes`, which are the caller's again.
    ///
    /// # Errors
    /// When the lengths differ or the device fails.
    fn send(&self, bytes: &[u8], to: Buffer) -> Result<(), LaunchError>;

    /// Queues a copy.
    ///
    /// # Errors
    /// When the lengths differ or the device fails.
    fn copy(&self, from: Buffer, to: Buffer) -> Result<(), LaunchError>;

    /// Frees all memory that was allocated; its addresses are of no more use.
    fn free_all(&self);

    /// The time between the start and the end of what `work` queues behind `before`, by the GPU's clock.
    ///
    /// # Errors
    /// When `before`, `work` or the device fails.
    fn time(&self, before: Queue, work: Queue) -> Result<Elapsed, LaunchError>;

    /// The library that computes products, and its version.
    ///
    /// # Errors
    /// When it is not there.
    fn product_library(&self) -> Result<String, LaunchError>;
}

/// What work took.
#[derive(Clone, Copy, Debug)]
pub struct Elapsed {
    pub ms: f64,
    /// The GPU was done with `before` when the host had queued the rest: it may have waited for the host, and that is in the time.
    pub host_was_late: bool,
}

/// What queues work.
pub type Queue<'q> = &'q mut dyn FnMut() -> Result<(), LaunchError>;
