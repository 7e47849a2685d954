//! Dropout of packed rows (Srivastava et al. 2014), keyed: what becomes of a value depends on the seed, its row's place in the training stream and
//! its own place in the row, and on nothing else.

use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{F32View, tensor};
use super::on_gpu::{on_gpu, upload, upload_u64};
use crate::rng::{KeyedRng, Stream, unit};

/// What is dropped where.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub seed: u64,
    pub stream: Stream,
    /// Which of the places in the model that have masks of their own, below 2^12.
    pub place: u32,
    /// The probability of being dropped, below 1.
    pub p: f32,
}

impl Key {
    /// What is left is multiplied with this.
    pub fn kept(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }
}

/// The rows of a micro-batch: row r is tokens `bounds[r]..bounds[r + 1]`.
#[derive(Clone, Debug)]
pub struct Rows<'a> {
    bounds: &'a [usize],
    positions: &'a [u64],
    /// Both on the GPU.
    sent: Option<[Tensor; 2]>,
}

impl<'a> Rows<'a> {
    /// `[R + 1]` bounds and `[R]` places in the training stream, for masks of values on `device`.
    ///
    /// # Errors
    /// When the numbers of rows differ, or there is not enough memory.
    pub fn new(bounds: &'a [usize], positions: &'a [u64], device: &Device) -> Result<Self> {
        if bounds.len() != positions.len() + 1 {
            bail!("dropout: {} bounds of {} rows", bounds.len(), positions.len());
        }
        let sent = if device.is_cpu() {
            None
        } else {
            let words: Vec<u32> = bounds.iter().map(|&bound| bound as u32).collect();
            Some([upload(&words, device)?, upload_u64(positions, device)?])
        };
        Ok(Self { bounds, positions, sent })
    }
}

/// A mask of values `[T, C]`: the same each time that it is applied, and whatever a row is packed with.
#[derive(Debug)]
pub struct Mask {
    /// T and C.
    size: (usize, usize),
    of: MaskOf,
}

#[derive(Debug)]
enum MaskOf {
    /// 0 or 1 / (1 - p), `[T, C]`.
    Multipliers(Vec<f32>),
    /// Computed by the kernel.
    Keyed { key: Key, bounds: Tensor, positions: Tensor },
}

impl Mask {
    /// For values of `columns` channels.
    pub fn new(key: Key, rows: &Rows, columns: usize) -> Self {
        let size = (rows.bounds.last().copied().unwrap_or(0), columns);
        if let Some([bounds, positions]) = rows.sent.clone() {
            return Self { size, of: MaskOf::Keyed { key, bounds, positions } };
        }
        let (kept, blocks) = (key.kept(), columns.div_ceil(4));
        let mut out = vec![0f32; size.0 * columns];
        for (bounds, &position) in rows.bounds.windows(2).zip(rows.positions) {
            let rng = KeyedRng::new(key.seed, key.stream, (position << 12) + u64::from(key.place));
            out[bounds[0] * columns..bounds[1] * columns].par_chunks_mut(columns).enumerate().for_each(|(token, out)| {
                for (block, four) in out.chunks_mut(4).enumerate() {
                    let bits = rng.block((token * blocks + block) as u32);
                    four.iter_mut().zip(bits).for_each(|(m, bits)| *m = if unit(bits) < key.p { 0.0 } else { kept });
                }
            });
        }
        Self { size, of: MaskOf::Multipliers(out) }
    }

    /// x `[T, C]` with the mask's values dropped and the others multiplied by 1 / (1 - p), in new memory.
    ///
    /// # Errors
    /// When the sizes differ.
    pub fn apply(&self, x_TC: &Tensor) -> Result<Tensor> {
        let (t, c) = x_TC.dims2()?;
        if (t, c) != self.size {
            bail!("dropout: values [{t}, {c}] and a mask of {:?}", self.size);
        }
        let (key, bounds, positions) = match &self.of {
            MaskOf::Multipliers(multipliers) => {
                let x = F32View::new(x_TC)?;
                let values = x.par_iter().zip(multipliers).map(|(x, m)| x * m).collect();
                return tensor(values, &[t, c]);
            }
            MaskOf::Keyed { key, bounds, positions } => (key, bounds, positions),
        };
        let Some(gpu) = on_gpu(x_TC)? else { bail!("dropout: a mask of a GPU for values of a CPU") };
        let y_TC = gpu.result((t, c))?;
        let rows = device::Rows {
            x: gpu.at(x_TC)?,
            y: gpu.at(&y_TC)?,
            bounds: gpu.at_of(bounds, DType::U32)?,
            positions: gpu.at_of(positions, DType::U32)?,
            tokens: t,
            columns: c,
            rows: bounds.elem_count() - 1,
        };
        gpu.run(|e, dtype| device::apply(e, dtype, *key, &rows))?;
        Ok(y_TC)
    }
}

/// The kernels `dropout_*` of `dropout.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use super::Key;
    use crate::kernels::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, launch, require, require_aligned};

    pub(in crate::kernels) const THREADS: u32 = 256;

    /// Addresses, contiguous: x and y `[T, C]`, which may be the same; bounds `[R + 1]` u32; positions `[R]` u64.
    #[derive(Clone, Copy, Debug)]
    pub struct Rows {
        pub x: u64,
        pub y: u64,
        pub bounds: u64,
        pub positions: u64,
        /// T.
        pub tokens: usize,
        /// C.
        pub columns: usize,
        /// R.
        pub rows: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        x: u64,
        y: u64,
        bounds: u64,
        positions: u64,
        words: i64,
        columns: i32,
        rows: i32,
        key: [u32; 2],
        stream: u32,
        place: u32,
        p: f32,
        kept: f32,
    }

    /// As [`super::Mask::apply`].
    ///
    /// # Errors
    /// When the width or an address is no multiple of 16 bytes, or the launch fails.
    pub fn apply(executor: &dyn Executor, dtype: KernelDtype, key: Key, rows: &Rows) -> Result<(), LaunchError> {
        let &Rows { x, y, bounds, positions, tokens, columns, rows } = rows;
        let name = format!("dropout_{}", dtype.suffix());
        require(columns > 0 && columns.is_multiple_of(dtype.wide()) && i32::try_from(columns).is_ok(), &name, || {
            format!("rows of {columns} values, expected a multiple of {}", dtype.wide())
        })?;
        require_aligned(&name, &[x, y])?;
        let words = tokens * columns / dtype.wide();
        let args = Args {
            x,
            y,
            bounds,
            positions,
            words: words as i64,
            columns: columns as i32,
            rows: rows as i32,
            key: [key.seed as u32, (key.seed >> 32) as u32],
            stream: key.stream as u32,
            place: key.place,
            p: key.p,
            kept: key.kept(),
        };
        launch(executor, &name, Launch::row(words.div_ceil(THREADS as usize), THREADS, 0), &args)
    }

    /// Bytes moved by [`apply`] of one row.
    pub fn bytes_of_a_row(dtype: KernelDtype, tokens: usize, columns: usize) -> Bytes {
        let values = (tokens * columns * dtype.num_bytes()) as u64;
        let threads = (tokens * columns / dtype.wide()) as u64;
        Bytes { read: values + threads * 12, written: values }
    }
}
