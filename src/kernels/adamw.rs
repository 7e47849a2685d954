//! The norm of a flat f32 gradient, the factor that clips it, and AdamW's step (Loshchilov and Hutter 2019, arXiv:1711.05101).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::host::{F32View, with_3_f32_mut};
use super::simd::vectorize;

/// Elements of a task; part of the definition of the norm's bits, so that shards begin at multiples of it.
pub const CHUNK: usize = 1 << 14;

/// The sum of squares of each chunk of [`CHUNK`] elements. Those of shards that begin at multiples of it are, one shard behind the other,
/// those of the whole buffer.
///
/// # Errors
/// When the buffer is not contiguous f32 on the CPU.
pub fn chunk_square_sums(flat: &Tensor) -> Result<Vec<f64>> {
    Ok(F32View::new(flat)?.par_chunks(CHUNK).map(square_sum).collect())
}

/// The 2-norm of a buffer from the sums of its chunks, in their order.
pub fn norm_of_chunks(square_sums: impl IntoIterator<Item = f64>) -> f64 {
    square_sums.into_iter().sum::<f64>().sqrt()
}

/// Eight sums side by side, so that one addition need not wait for the one before.
fn square_sum(chunk: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (octets, rest) = chunk.as_chunks::<8>();
    for octet in octets {
        for (lane, &x) in lanes.iter_mut().zip(octet) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
}

/// What a gradient of norm `norm` is to be multiplied by so that its norm is at most `max_norm`; at most 1.
///
/// # Source
/// torch's `clip_grad_norm_`: the factor is max_norm / (norm + 1e-6), at most 1.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 { factor as f32 } else { 1.0 }
}

/// m = lerp(m, g, weight1); v = keep2 v + weight2 g²; p = keep p + step_size m / (sqrt(v) / correction + epsilon), in f32.
///
/// Multiply-adds are fused where torch's vector code fuses them: the moments have torch's bits on a CPU, the parameters are within an ulp a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    pub weight1: f32,
    pub keep2: f32,
    pub weight2: f32,
    pub keep: f32,
    /// Negative.
    pub step_size: f32,
    pub correction: f32,
    pub epsilon: f32,
}

impl Update {
    /// All of it in one pass over memory: 4 values read and 3 written an element.
    ///
    /// # Errors
    /// When a buffer is not contiguous f32 on the CPU.
    pub fn apply(&self, params: &Tensor, exp_avg: &Tensor, exp_avg_sq: &Tensor, grads: &Tensor) -> Result<()> {
        let g = F32View::new(grads)?;
        with_3_f32_mut([params, exp_avg, exp_avg_sq], "adamw", |p, m, v| {
            let chunks = p.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK)).zip(g.par_chunks(CHUNK));
            // Compiled for the widest vector unit at hand. Fused multiply-add is exactly rounded with or without hardware: the same bits.
            chunks.for_each(|(((p, m), v), g)| {
                vectorize(|| {
                    let &Self { weight1, keep2, weight2, keep, step_size, correction, epsilon } = self;
                    for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                        // In the form that torch's lerp takes on either side of 0.5.
                        *m = if weight1 < 0.5 { weight1.mul_add(g - *m, *m) } else { (weight1 - 1.0).mul_add(g - *m, g) };
                        *v = (weight2 * g).mul_add(g, *v * keep2);
                        *p = *p * keep + step_size * *m / (v.sqrt() / correction + epsilon);
                    }
                });
            });
        })
    }
}

/// The kernels of `adamw.cu`. Nothing of them waits for the host, and each gives the bits of the code above.
pub mod device {
    use bytemuck::NoUninit;

    use super::{CHUNK, Update};
    use crate::kernels::launch::{Bytes, Executor, Launch, LaunchError, launch, require_aligned};

    const LANES: usize = 8;
    const SUM_THREADS: u32 = 128;
    const NORM_THREADS: u32 = 256;
    const STAGED: u32 = 1024;
    const STEP_THREADS: u32 = 256;

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct SquareSumsArgs {
        x: u64,
        sums: u64,
        fault: u64,
        n: i64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct NormArgs {
        sums: u64,
        norm: u64,
        factor: u64,
        chunks: i64,
        max_norm: f64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct StepArgs {
        p: u64,
        m: u64,
        v: u64,
        g: u64,
        rounded: u64,
        factor: u64,
        faults: u64,
        n: i64,
        weight1: f32,
        keep2: f32,
        weight2: f32,
        keep: f32,
        step_size: f32,
        correction: f32,
        epsilon: f32,
        num_faults: i32,
    }

    /// As [`super::chunk_square_sums`] of x `[n]` f32: `sums` `[ceil(n / CHUNK)]` f64. In the same pass the lowest index of what is not finite
    /// goes to `fault`, 8 bytes.
    ///
    /// # Errors
    /// When the launch fails.
    pub fn chunk_square_sums(executor: &dyn Executor, x: u64, n: usize, sums: u64, fault: u64) -> Result<(), LaunchError> {
        let blocks = (n.div_ceil(CHUNK) * LANES).div_ceil(SUM_THREADS as usize);
        launch(executor, "square_sums_f32", Launch::row(blocks, SUM_THREADS, 0), &SquareSumsArgs { x, sums, fault, n: n as i64 })
    }

    /// Of [`chunk_square_sums`].
    pub fn chunk_square_sums_bytes(n: usize) -> Bytes {
        Bytes { read: 4 * n as u64, written: 8 * n.div_ceil(CHUNK) as u64 }
    }

    /// As [`super::norm_of_chunks`] of `sums` `[num_chunks]` f64, of all shards in their order, and [`super::clip_factor`]: `norm` one f64,
    /// `factor` one f32. Without clipping `max_norm` is infinite.
    ///
    /// # Errors
    /// When the launch fails.
    pub fn norm(executor: &dyn Executor, sums: u64, num_chunks: usize, max_norm: f64, norm: u64, factor: u64) -> Result<(), LaunchError> {
        let args = NormArgs { sums, norm, factor, chunks: num_chunks as i64, max_norm };
        launch(executor, "norm_f64", Launch::row(1, NORM_THREADS, STAGED * 8), &args)
    }

    /// Of [`norm`].
    pub fn norm_bytes(num_chunks: usize) -> Bytes {
        Bytes { read: 8 * num_chunks as u64, written: 12 }
    }

    /// Addresses, `[n]` f32: `params` (the masters where there are), the moments `exp_avg` and `exp_avg_sq`, `grads` as they are before clipping;
    /// `rounded` `[n]` bf16, which get the masters rounded; `factor` as [`norm`] leaves it; `faults` `[num_faults]` of 8 bytes.
    #[derive(Clone, Copy, Debug)]
    pub struct Buffers {
        pub params: u64,
        pub exp_avg: u64,
        pub exp_avg_sq: u64,
        pub grads: u64,
        pub rounded: Option<u64>,
        pub factor: u64,
        pub faults: u64,
        pub num_faults: usize,
        pub n: usize,
    }

    /// As [`Update::apply`] with gradients times the factor. Where one of the faults was reported nothing changes: the host, which learns of it
    /// later, finds parameters and moments as they were before the step.
    ///
    /// # Errors
    /// When an address is no multiple of 16 bytes, or the launch fails.
    pub fn step(executor: &dyn Executor, update: &Update, buffers: &Buffers) -> Result<(), LaunchError> {
        let &Update { weight1, keep2, weight2, keep, step_size, correction, epsilon } = update;
        let &Buffers { params: p, exp_avg: m, exp_avg_sq: v, grads: g, rounded, factor, faults, num_faults, n } = buffers;
        let name = if rounded.is_some() { "adamw_step_bf16" } else { "adamw_step_f32" };
        let rounded = rounded.unwrap_or(0);
        require_aligned(name, &[p, m, v, g, rounded])?;
        let (n, num_faults) = (n as i64, num_faults as i32);
        let args =
            StepArgs { p, m, v, g, rounded, factor, faults, n, weight1, keep2, weight2, keep, step_size, correction, epsilon, num_faults };
        launch(executor, name, Launch::row(buffers.n.div_ceil(4 * STEP_THREADS as usize), STEP_THREADS, 0), &args)
    }

    /// Of a [`step`] that is not skipped: every thread asks for the factor and the faults.
    pub fn step_bytes(n: usize, num_faults: usize, has_masters: bool) -> Bytes {
        let threads = n.div_ceil(4).next_multiple_of(STEP_THREADS as usize);
        let written = if has_masters { 14 } else { 12 };
        Bytes { read: (16 * n + threads * (4 + 8 * num_faults)) as u64, written: (written * n) as u64 }
    }
}
