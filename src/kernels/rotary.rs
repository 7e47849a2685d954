//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as ChatGLM2 has it: only the first half of a head turns, in interleaved pairs.

use std::cell::OnceCell;

use candle_core::{DType, Result, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::host::with_f32_mut;
use super::on_gpu::{OnGpu, on_gpu};

/// In which arithmetic angles are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f64 inside, so exact to f32.
    Exact,
    /// Positions, frequencies, angles and results rounded to this type, as THUDM's RotaryEmbedding does with `config.torch_dtype`.
    Published(DType),
}

/// Base and scaling of the angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Angles {
    /// Frequencies are base^(-2i/rot).
    pub base: f64,
    /// Positions are divided by this.
    pub position_divisor: f64,
    pub precision: Precision,
}

/// Cosine and sine of each token's angles.
#[derive(Clone, Debug)]
pub struct Table {
    /// `[T * D/4]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
    /// Cosines and sines on the GPU that the table was used on: sent once.
    on_gpu: OnceCell<[Tensor; 2]>,
}

impl Table {
    /// For heads of `head_dim` values, of which the first half turns.
    ///
    /// # Source
    /// THUDM modeling_chatglm.py, RotaryEmbedding.forward_impl.
    pub fn new(positions: &[u32], head_dim: usize, angles: Angles) -> Self {
        let pairs = head_dim / 4;
        let rot = (head_dim / 2) as f64;
        let mut cos = Vec::with_capacity(positions.len() * pairs);
        let mut sin = Vec::with_capacity(positions.len() * pairs);
        let round = |x: f64| match angles.precision {
            Precision::Exact => x,
            Precision::Published(DType::F16) => f64::from(f16::from_f32(x as f32)),
            Precision::Published(DType::BF16) => f64::from(bf16::from_f32(x as f32)),
            Precision::Published(_) => f64::from(x as f32),
        };
        let theta: Vec<f64> = (0..pairs)
            .map(|i| {
                let exponent = round(round(2.0 * i as f64) / rot);
                round(1.0 / round(round(angles.base).powf(exponent)))
            })
            .collect();
        for &position in positions {
            let position = round(round(f64::from(position)) / angles.position_divisor);
            for &theta in &theta {
                let angle = round(position * theta);
                let (s, c) = if angles.precision == Precision::Exact {
                    angle.sin_cos()
                } else {
                    let angle = angle as f32;
                    (f64::from(angle.sin()), f64::from(angle.cos()))
                };
                cos.push(round(c) as f32);
                sin.push(round(s) as f32);
            }
        }
        Self { cos, sin, pairs, on_gpu: OnceCell::new() }
    }

    fn on(&self, gpu: &OnGpu) -> Result<(&Tensor, &Tensor)> {
        if self.on_gpu.get().is_none() {
            let sent = [gpu.upload_f32(&self.cos)?, gpu.upload_f32(&self.sin)?];
            _ = self.on_gpu.set(sent);
        }
        let Some([cos, sin]) = self.on_gpu.get() else { bail!("rotary: no table on the GPU") };
        Ok((cos, sin))
    }

    /// Cosines and sines, `[T * D/4]` each.
    pub fn values(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    pub fn num_tokens(&self) -> usize {
        self.cos.len() / self.pairs.max(1)
    }

    /// (cos, sin) of pair `i` at token `t`.
    pub fn at(&self, t: usize, i: usize) -> (f32, f32) {
        (self.cos[t * self.pairs + i], self.sin[t * self.pairs + i])
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Forward,
    /// The backward pass turns gradients by the opposite angle.
    Inverse,
}

/// Turns the first `num_heads` heads of each row of `x` in place; what follows them in a row (the values) stays.
///
/// # Shapes
/// x `[T, n]` with n >= num_heads * head_dim.
///
/// # Errors
/// When the sizes do not fit.
pub fn rotate_(x_TN: &Tensor, table: &Table, num_heads: usize, head_dim: usize, direction: Direction) -> Result<()> {
    let (t, n) = x_TN.dims2()?;
    let pairs = table.pairs;
    if table.num_tokens() != t || pairs != head_dim / 4 || num_heads * head_dim > n {
        bail!("rotary: x is [{t}, {n}], table {} x {pairs}, {num_heads} heads of {head_dim}", table.num_tokens());
    }
    if let Some(gpu) = on_gpu(x_TN)? {
        let (cos, sin) = table.on(&gpu)?;
        let (cos, sin) = (gpu.at_of(cos, DType::F32)?, gpu.at_of(sin, DType::F32)?);
        let heads = device::Heads { x: gpu.at(x_TN)?, cos, sin, rows: t, stride: n, heads: num_heads, head_dim };
        return gpu.run(|e, dtype| device::rotate_(e, dtype, &heads, direction));
    }
    let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
    with_f32_mut(x_TN, "rotary", |x| {
        let tables = table.cos.par_chunks(pairs).zip(table.sin.par_chunks(pairs));
        x.par_chunks_mut(n).zip(tables).with_min_len(8).for_each(|(row, (cos, sin))| {
            for head in row[..num_heads * head_dim].chunks_exact_mut(head_dim) {
                for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let (a, b, s) = (pair[0], pair[1], s * sign);
                    pair[0] = a * c - b * s;
                    pair[1] = b * c + a * s;
                }
            }
        });
    })
}

/// The kernels of `rotary.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use super::Direction;
    use crate::kernels::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, launch, require, require_aligned};

    const THREADS: u32 = 256;

    /// Addresses: x `[T, n]` with rows `stride` elements apart, which begin with `heads` heads of `head_dim` values; cos and sin `[T, D/4]` f32, as
    /// [`super::Table::values`] gives them.
    #[derive(Clone, Copy, Debug)]
    pub struct Heads {
        pub x: u64,
        pub cos: u64,
        pub sin: u64,
        pub rows: usize,
        pub stride: usize,
        pub heads: usize,
        pub head_dim: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        x: u64,
        cos: u64,
        sin: u64,
        stride: i64,
        rows: i32,
        heads: i32,
        head_dim: i32,
        sign: f32,
    }

    /// As [`super::rotate_`].
    ///
    /// # Errors
    /// When half a head, the stride or an address is no multiple of 16 bytes, rows are shorter than their heads, or the launch fails.
    pub fn rotate_(executor: &dyn Executor, dtype: KernelDtype, heads: &Heads, direction: Direction) -> Result<(), LaunchError> {
        let &Heads { x, cos, sin, rows, stride, heads, head_dim } = heads;
        let (name, wide) = (format!("rotary_{}", dtype.suffix()), dtype.wide());
        require(heads > 0 && head_dim > 0 && head_dim.is_multiple_of(2 * wide), &name, || {
            format!("{heads} heads of {head_dim} values, expected a multiple of {}", 2 * wide)
        })?;
        require(stride >= heads * head_dim && stride.is_multiple_of(wide), &name, || {
            format!("rows {stride} values apart, expected a multiple of {wide} from {} on", heads * head_dim)
        })?;
        require_aligned(&name, &[x, cos, sin])?;
        let threads = rows * heads * (head_dim / 2 / wide);
        require(i32::try_from(threads).is_ok(), &name, || format!("{rows} rows are too many for one launch, split them"))?;
        let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
        let (rows, heads, head_dim) = (rows as i32, heads as i32, head_dim as i32);
        let args = Args { x, cos, sin, stride: stride as i64, rows, heads, head_dim, sign };
        launch(executor, &name, Launch::row(threads.div_ceil(THREADS as usize), THREADS, 0), &args)
    }

    /// Of [`rotate_`].
    pub fn bytes(dtype: KernelDtype, rows: usize, heads: usize, head_dim: usize) -> Bytes {
        let (values, angles) = (rows * heads * head_dim / 2 * dtype.num_bytes(), rows * heads * head_dim * 2);
        Bytes { read: (values + angles) as u64, written: values as u64 }
    }
}
