//! The search for what is not finite.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::host::F32View;

/// Elements a task looks at.
const CHUNK: usize = 1 << 14;

/// The first element of a flat buffer that is not finite: its place and value.
///
/// # Errors
/// When the buffer is not contiguous f32 on the CPU.
pub fn first_non_finite(flat: &Tensor) -> Result<Option<(usize, f32)>> {
    let data = F32View::new(flat)?;
    let first = |data: &[f32]| {
        let chunk = data.par_chunks(CHUNK).position_first(|chunk| chunk.iter().any(|x| !x.is_finite()))?;
        let at = chunk * CHUNK + data[chunk * CHUNK..].iter().position(|x| !x.is_finite())?;
        Some((at, data[at]))
    };
    Ok(first(&data))
}

/// The kernel of `non_finite.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use crate::kernels::launch::{Bytes, Executor, Launch, LaunchError, launch, require_aligned};

    const THREADS: u32 = 256;
    /// Loads of 16 bytes that a thread makes.
    const LOADS: usize = 4;

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        x: u64,
        fault: u64,
        n: i64,
    }

    /// As [`super::first_non_finite`] of x `[n]` f32, losses for example: the index goes to `fault`, 8 bytes, unless that holds a lower one.
    /// Gradients need no pass of their own: [`adamw::device::chunk_square_sums`](crate::kernels::adamw::device::chunk_square_sums) looks too.
    ///
    /// # Errors
    /// When the address is no multiple of 16 bytes, or the launch fails.
    pub fn first(executor: &dyn Executor, x: u64, n: usize, fault: u64) -> Result<(), LaunchError> {
        let name = "non_finite_f32";
        require_aligned(name, &[x])?;
        let blocks = n.div_ceil(4 * LOADS * THREADS as usize);
        launch(executor, name, Launch::row(blocks, THREADS, 0), &Args { x, fault, n: n as i64 })
    }

    /// Of [`first`].
    pub fn bytes(n: usize) -> Bytes {
        Bytes { read: 4 * n as u64, written: 0 }
    }
}
