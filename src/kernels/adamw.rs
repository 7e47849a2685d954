//! The norm of a flat f32 gradient, the factor that clips it, and AdamW's step (Loshchilov and Hutter 2019, arXiv:1711.05101).

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{F32View, tensor, with_3_f32_mut};
use super::on_gpu::on_gpu;
use super::simd::vectorize;

/// Elements of a task; part of the definition of the norm's bits, so that shards begin at multiples of it.
pub const CHUNK: usize = 1 << 14;

/// The sum of squares of each chunk of [`CHUNK`] elements of a flat f32 buffer: `[2 C]`, each f64 as the two f32 words that it is in memory, on the
/// buffer's device. Those of shards that begin at multiples of it are, one shard behind the other, those of the whole buffer.
///
/// # Errors
/// When the buffer is not contiguous f32.
pub fn chunk_square_sums(flat: &Tensor) -> Result<Tensor> {
    let n = flat.elem_count();
    if let Some(gpu) = on_gpu(flat)? {
        let sums = gpu.result_of(2 * n.div_ceil(CHUNK), DType::F32)?;
        let (x, at) = (gpu.at_of(flat, DType::F32)?, gpu.at_of(&sums, DType::F32)?);
        gpu.run(|e, _| device::chunk_square_sums(e, x, n, at))?;
        return Ok(sums);
    }
    let sums: Vec<f64> = F32View::new(flat)?.par_chunks(CHUNK).map(square_sum).collect();
    words(&sums)
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

fn words(values: &[f64]) -> Result<Tensor> {
    tensor(bytemuck::cast_slice(values).to_vec(), &[2 * values.len()])
}

/// The norm of a gradient, on its device.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[2]`: an f64 as two f32 words.
    words: Tensor,
    /// `[1]` f32: what the gradient is to be multiplied by so that its norm is at most what it may be. NaN where the norm is NaN or infinite.
    factor: Tensor,
}

impl Norm {
    /// The norm of a buffer, from the sums of all its chunks in their order ([`chunk_square_sums`]; zeros behind those change nothing), to be clipped to
    /// `max_norm`.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(square_sums: &Tensor, max_norm: Option<f64>) -> Result<Self> {
        let max_norm = max_norm.unwrap_or(f64::INFINITY);
        let num_chunks = square_sums.elem_count() / 2;
        if let Some(gpu) = on_gpu(square_sums)? {
            let (words, factor) = (gpu.result_of(2, DType::F32)?, gpu.result_of(1, DType::F32)?);
            let sums = gpu.at_of(square_sums, DType::F32)?;
            let (norm, at) = (gpu.at_of(&words, DType::F32)?, gpu.at_of(&factor, DType::F32)?);
            gpu.run(|e, _| device::norm(e, sums, num_chunks, max_norm, norm, at))?;
            return Ok(Self { words, factor });
        }
        // `sum` of nothing would be -0.
        let norm = f64s(&F32View::new(square_sums)?).fold(0.0, |sum, x| sum + x).sqrt();
        Ok(Self { words: words(&[norm])?, factor: tensor(vec![clip_factor(norm, max_norm)], &[1])? })
    }

    /// What [`Self::value`] takes, once it was read.
    pub fn words(&self) -> &Tensor {
        &self.words
    }

    /// The norm, from its words.
    pub fn value(words: &[f32]) -> f64 {
        f64s(words).next().unwrap_or(f64::NAN)
    }

    /// The factor, which [`Update::apply`] takes.
    pub fn factor(&self) -> &Tensor {
        &self.factor
    }
}

fn f64s(words: &[f32]) -> impl Iterator<Item = f64> {
    words.as_chunks::<2>().0.iter().map(|pair| bytemuck::cast(*pair))
}

/// What a gradient of norm `norm` is to be multiplied by so that its norm is at most `max_norm`; at most 1.
///
/// # Source
/// torch's `clip_grad_norm_`: the factor is max_norm / (norm + 1e-6), at most 1.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    let factor = max_norm / (norm + 1e-6);
    match norm.is_finite() {
        true if factor < 1.0 => factor as f32,
        true => 1.0,
        false => f32::NAN,
    }
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
    /// All of it in one pass over memory: 4 values read and 3 written an element. The gradient is multiplied by `factor` `[1]` on the way. Where
    /// that is NaN nothing changes: who reads the norm later finds all as it was before the step.
    ///
    /// # Errors
    /// When the buffers differ in size, or one is not contiguous f32.
    pub fn apply(&self, params: &Tensor, exp_avg: &Tensor, exp_avg_sq: &Tensor, grads: &Tensor, factor: &Tensor) -> Result<()> {
        let n = grads.elem_count();
        for buffer in [params, exp_avg, exp_avg_sq] {
            if buffer.elem_count() != n {
                bail!("adamw: {n} gradients, and a buffer of {}", buffer.elem_count());
            }
        }
        if let Some(gpu) = on_gpu(grads)? {
            let at = |x: &Tensor| gpu.at_of(x, DType::F32);
            let buffers = device::Buffers {
                params: at(params)?,
                exp_avg: at(exp_avg)?,
                exp_avg_sq: at(exp_avg_sq)?,
                grads: at(grads)?,
                rounded: None,
                factor: at(factor)?,
                n,
            };
            return gpu.run(|e, _| device::step(e, self, &buffers));
        }
        let (g, factor) = (F32View::new(grads)?, F32View::new(factor)?.first().copied().unwrap_or(f32::NAN));
        if factor.is_nan() {
            return Ok(());
        }
        with_3_f32_mut([params, exp_avg, exp_avg_sq], "adamw", |p, m, v| {
            let chunks = p.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK)).zip(g.par_chunks(CHUNK));
            // Compiled for the widest vector unit at hand. Fused multiply-add is exactly rounded with or without hardware: the same bits.
            chunks.for_each(|(((p, m), v), g)| {
                vectorize(|| {
                    let &Self { weight1, keep2, weight2, keep, step_size, correction, epsilon } = self;
                    for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                        let g = g * factor;
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
        n: i64,
        weight1: f32,
        keep2: f32,
        weight2: f32,
        keep: f32,
        step_size: f32,
        correction: f32,
        epsilon: f32,
        padding: u32,
    }

    /// As [`super::chunk_square_sums`] of x `[n]` f32: `sums` `[ceil(n / CHUNK)]` f64.
    ///
    /// # Errors
    /// When the launch fails.
    pub fn chunk_square_sums(executor: &dyn Executor, x: u64, n: usize, sums: u64) -> Result<(), LaunchError> {
        let blocks = (n.div_ceil(CHUNK) * LANES).div_ceil(SUM_THREADS as usize);
        launch(executor, "square_sums_f32", Launch::row(blocks, SUM_THREADS, 0), &SquareSumsArgs { x, sums, n: n as i64 })
    }

    /// Of [`chunk_square_sums`].
    pub fn chunk_square_sums_bytes(n: usize) -> Bytes {
        Bytes { read: 4 * n as u64, written: 8 * n.div_ceil(CHUNK) as u64 }
    }

    /// As [`super::Norm::new`] of `sums` `[num_chunks]` f64: `norm` one f64, `factor` one f32. Without clipping `max_norm` is infinite.
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
    /// `rounded` `[n]` bf16, which get the masters rounded; `factor` as [`norm`] leaves it.
    #[derive(Clone, Copy, Debug)]
    pub struct Buffers {
        pub params: u64,
        pub exp_avg: u64,
        pub exp_avg_sq: u64,
        pub grads: u64,
        pub rounded: Option<u64>,
        pub factor: u64,
        pub n: usize,
    }

    /// As [`Update::apply`].
    ///
    /// # Errors
    /// When an address is no multiple of 16 bytes, or the launch fails.
    pub fn step(executor: &dyn Executor, update: &Update, buffers: &Buffers) -> Result<(), LaunchError> {
        let &Update { weight1, keep2, weight2, keep, step_size, correction, epsilon } = update;
        let &Buffers { params: p, exp_avg: m, exp_avg_sq: v, grads: g, rounded, factor, n } = buffers;
        let name = if rounded.is_some() { "adamw_step_bf16" } else { "adamw_step_f32" };
        let rounded = rounded.unwrap_or(0);
        require_aligned(name, &[p, m, v, g, rounded])?;
        let n = n as i64;
        let args = StepArgs { p, m, v, g, rounded, factor, n, weight1, keep2, weight2, keep, step_size, correction, epsilon, padding: 0 };
        launch(executor, name, Launch::row(buffers.n.div_ceil(4 * STEP_THREADS as usize), STEP_THREADS, 0), &args)
    }

    /// Of a [`step`] that is not skipped: every thread asks for the factor.
    pub fn step_bytes(n: usize, has_masters: bool) -> Bytes {
        let threads = n.div_ceil(4).next_multiple_of(STEP_THREADS as usize);
        let written = if has_masters { 14 } else { 12 };
        Bytes { read: (16 * n + 4 * threads) as u64, written: (written * n) as u64 }
    }
}
