//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as ChatGLM2 has it: only the first half of a head turns, in interleaved pairs.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Result, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::host::with_f32_mut;
use super::ids::Ids;
use super::on_gpu::{OnGpu, on_gpu};

/// Positions whose angles are computed at once at least.
const LEAST_POSITIONS: usize = 256;

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

/// Cosines and sines of the positions from 0 on.
#[derive(Debug)]
struct Values {
    /// `[P * D/4]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Both on the GPU that they were used on: sent once.
    on_gpu: OnceLock<[Tensor; 2]>,
}

/// The angles of a model, computed as far as its rows have needed them, and kept.
#[derive(Debug)]
pub struct Cache {
    /// D / 4: half a head turns, in pairs.
    pairs: usize,
    angles: Angles,
    values: Mutex<Arc<Values>>,
}

impl Cache {
    /// For heads of `head_dim` values.
    pub fn new(head_dim: usize, angles: Angles) -> Self {
        let pairs = head_dim / 4;
        Self { pairs, angles, values: Mutex::new(Arc::new(angles.values(0, pairs))) }
    }

    /// The angles of tokens at `positions`, `[T]`.
    pub fn table(&self, positions: &[u32]) -> Table {
        let needed = positions.iter().max().map_or(0, |&position| position as usize + 1);
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        if values.cos.len() < needed * self.pairs {
            *values = Arc::new(self.angles.values(needed.next_power_of_two().max(LEAST_POSITIONS), self.pairs));
        }
        Table { values: Arc::clone(&values), positions: Ids::new(positions), pairs: self.pairs }
    }
}

impl Angles {
    /// Those of the positions below `num_positions`.
    ///
    /// # Source
    /// THUDM modeling_chatglm.py, RotaryEmbedding.forward_impl.
    fn values(self, num_positions: usize, pairs: usize) -> Values {
        let rot = 2.0 * pairs as f64;
        let round = |x: f64| match self.precision {
            Precision::Exact => x,
            Precision::Published(DType::F16) => f64::from(f16::from_f32(x as f32)),
            Precision::Published(DType::BF16) => f64::from(bf16::from_f32(x as f32)),
            Precision::Published(_) => f64::from(x as f32),
        };
        let theta: Vec<f64> = (0..pairs)
            .map(|i| {
                let exponent = round(round(2.0 * i as f64) / rot);
                round(1.0 / round(round(self.base).powf(exponent)))
            })
            .collect();
        let of = |position: usize| {
            let position = round(round(position as f64) / self.position_divisor);
            theta.iter().map(move |&theta| {
                let angle = round(position * theta);
                let (s, c) = if self.precision == Precision::Exact {
                    angle.sin_cos()
                } else {
                    let angle = angle as f32;
                    (f64::from(angle.sin()), f64::from(angle.cos()))
                };
                (round(c) as f32, round(s) as f32)
            })
        };
        let (cos, sin) = (0..num_positions).flat_map(of).unzip();
        Values { cos, sin, on_gpu: OnceLock::new() }
    }
}

/// Cosine and sine of each token's angles.
#[derive(Debug)]
pub struct Table {
    values: Arc<Values>,
    positions: Ids,
    pairs: usize,
}

impl Table {
    /// The angles of tokens at `positions`, `[T]`, for heads of `head_dim` values.
    pub fn new(positions: &[u32], head_dim: usize, angles: Angles) -> Self {
        Cache::new(head_dim, angles).table(positions)
    }

    fn on(&self, gpu: &OnGpu) -> Result<(&Tensor, &Tensor)> {
        let values = &self.values;
        if values.on_gpu.get().is_none() {
            let sent = [gpu.upload_f32(&values.cos)?, gpu.upload_f32(&values.sin)?];
            _ = values.on_gpu.set(sent);
        }
        let Some([cos, sin]) = values.on_gpu.get() else { bail!("rotary: no table on the GPU") };
        Ok((cos, sin))
    }

    /// `[T]`
    pub fn positions(&self) -> &[u32] {
        self.positions.as_slice()
    }

    /// Cosines and sines of the positions from 0 on, `[P * D/4]` each.
    pub fn values(&self) -> (&[f32], &[f32]) {
        (&self.values.cos, &self.values.sin)
    }

    pub fn num_tokens(&self) -> usize {
        self.positions.len()
    }

    /// The place of token `t`'s first pair.
    fn start(&self, t: usize) -> usize {
        self.positions.as_slice()[t] as usize * self.pairs
    }

    /// (cos, sin) of pair `i` at token `t`.
    pub fn at(&self, t: usize, i: usize) -> (f32, f32) {
        let at = self.start(t) + i;
        (self.values.cos[at], self.values.sin[at])
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
        let positions = gpu.at_of(table.positions.on(&gpu)?, DType::U32)?;
        let heads = device::Heads { x: gpu.at(x_TN)?, positions, cos, sin, rows: t, stride: n, heads: num_heads, head_dim };
        return gpu.run(|e, dtype| device::rotate_(e, dtype, &heads, direction));
    }
    let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
    with_f32_mut(x_TN, "rotary", |x| {
        x.par_chunks_mut(n).enumerate().with_min_len(8).for_each(|(t, row)| {
            let angles = table.start(t)..table.start(t) + pairs;
            let (cos, sin) = (&table.values.cos[angles.clone()], &table.values.sin[angles]);
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

    /// Addresses: x `[T, n]` with rows `stride` elements apart, which begin with `heads` heads of `head_dim` values; positions `[T]` u32; cos and sin
    /// `[P, D/4]` f32, as [`super::Table::values`] gives them.
    #[derive(Clone, Copy, Debug)]
    pub struct Heads {
        pub x: u64,
        pub positions: u64,
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
        positions: u64,
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
        let &Heads { x, positions, cos, sin, rows, stride, heads, head_dim } = heads;
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
        let args = Args { x, positions, cos, sin, stride: stride as i64, rows, heads, head_dim, sign };
        launch(executor, &name, Launch::row(threads.div_ceil(THREADS as usize), THREADS, 0), &args)
    }

    /// Of [`rotate_`].
    pub fn bytes(dtype: KernelDtype, rows: usize, heads: usize, head_dim: usize) -> Bytes {
        let (values, angles) = (rows * heads * head_dim / 2 * dtype.num_bytes(), rows * heads * head_dim * 2);
        let threads = rows * heads * (head_dim / 2 / dtype.wide());
        Bytes { read: (values + angles + 4 * threads) as u64, written: values as u64 }
    }
}
