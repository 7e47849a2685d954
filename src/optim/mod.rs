//! From a summed gradient to changed parameters: finite check, clipping, learning rate, AdamW.
//!
//! All of it works on flat f32 buffers. Sums over elements run over fixed chunks, everything else is element by element: the number
//! of threads changes no bit.

mod adamw;
mod clip;
mod schedule;

use candle_core::{CpuStorage, Layout, Result, WithDType, bail};

pub use adamw::{AdamW, AdamWConfig, OptimError};
pub use clip::{NonFinite, chunk_square_sums, clip_grad, first_non_finite, global_norm, norm_of_chunks};
pub use schedule::{Schedule, SchedulerType, Warmup};

/// Elements of a task; part of the definition of [`global_norm`]'s bits, so that shards begin at multiples of it.
pub const CHUNK: usize = 1 << 14;

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let data = f32::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("an optimizer's buffers must be contiguous, found {layout:?}"),
    }
}

fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        _ => bail!("an optimizer's buffers must be contiguous f32, found {layout:?}"),
    }
}
