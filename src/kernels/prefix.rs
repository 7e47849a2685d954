//! A trainable table of keys and values for every layer, as attention takes them, with keyed dropout; and the sum of their gradients.
//!
//! Shapes: P virtual tokens, L layers, G kv groups, D head dim, R rows, W = 2 L G D. A table row is [layer 0 K | layer 0 V | layer 1 K | ...], G D each.

use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{F32View, tensor, with_f32_mut};
use super::on_gpu::{on_gpu, upload_u64};
use crate::rng::{KeyedRng, Stream, unit};

/// Sizes of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// P.
    pub virtual_tokens: usize,
    /// L.
    pub layers: usize,
    /// G.
    pub groups: usize,
    /// D, a multiple of 4.
    pub head_dim: usize,
}

impl Layout {
    /// Values of a table row: W.
    pub fn width(&self) -> usize {
        2 * self.layers * self.groups * self.head_dim
    }

    pub fn len(&self) -> usize {
        self.virtual_tokens * self.width()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// First table element of (virtual token, slot, group); slot 2i are the keys of layer i, slot 2i + 1 its values.
    fn at(&self, p: usize, slot: usize, group: usize) -> usize {
        ((p * 2 * self.layers + slot) * self.groups + group) * self.head_dim
    }
}

/// What rows drop of the table.
#[derive(Debug)]
pub enum Dropout {
    /// Nothing: all rows share one prefix.
    None,
    /// Multipliers `[R, P, 2L, G, D]` of R rows: 0 or 1 / (1 - p).
    Multipliers { rows: usize, values: Vec<f32> },
    /// Computed by the kernel, from the rows' places in the training stream.
    Keyed { rows: usize, positions: Tensor, seed: u64, p: f32 },
}

impl Dropout {
    /// Of probability `p`, keyed by the rows' places in the training stream, for a table on `device`.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn keyed(layout: Layout, seed: u64, p: f32, positions: &[u64], device: &Device) -> Result<Self> {
        let rows = positions.len();
        if !device.is_cpu() {
            return Ok(Self::Keyed { rows, positions: upload_u64(positions, device)?, seed, p });
        }
        let kept = 1.0 / (1.0 - p);
        let mut values = vec![0f32; rows * layout.len()];
        let width = layout.width();
        values.par_chunks_mut(width).enumerate().for_each(|(i, values)| {
            let (row, token) = (i / layout.virtual_tokens, i % layout.virtual_tokens);
            let rng = KeyedRng::new(seed, Stream::PrefixDropout, positions[row]);
            for (block, four) in values.chunks_exact_mut(4).enumerate() {
                let bits = rng.block((token * width / 4 + block) as u32);
                four.iter_mut().zip(bits).for_each(|(m, bits)| *m = if unit(bits) < p { 0.0 } else { kept });
            }
        });
        Ok(Self::Multipliers { rows, values })
    }

    /// Rows that get a prefix of their own: one for all if nothing is dropped.
    fn num_rows(&self) -> usize {
        match self {
            Self::None => 1,
            Self::Multipliers { rows, .. } | Self::Keyed { rows, .. } => *rows,
        }
    }

    /// Multipliers of the table's values for `row`; `None` if nothing is dropped.
    fn of_row(&self, layout: Layout, row: usize) -> Result<Option<&[f32]>> {
        match self {
            Self::None => Ok(None),
            Self::Multipliers { values, .. } => Ok(Some(&values[row * layout.len()..][..layout.len()])),
            Self::Keyed { .. } => bail!("prefix: dropout of a GPU for a table of a CPU"),
        }
    }
}

/// table `[P, W]` f32 -> keys and values of `layer`, `[R, G, P, D]` each in `dtype`; R is 1 if nothing is dropped.
///
/// # Errors
/// When the sizes differ, or the table is not on a supported device.
pub fn expand(table_PW: &Tensor, layout: Layout, layer: usize, dropout: &Dropout, dtype: DType) -> Result<(Tensor, Tensor)> {
    check(table_PW, layout, layer)?;
    let Layout { virtual_tokens, groups, head_dim, .. } = layout;
    let rows = dropout.num_rows();
    let shape = (rows, groups, virtual_tokens, head_dim);
    if let Some(gpu) = on_gpu(table_PW)? {
        let (k, v) = (gpu.result_of(shape, dtype)?, gpu.result_of(shape, dtype)?);
        let Some(of_result) = on_gpu(&k)? else { bail!("prefix: a result on another device") };
        let at = device::At { table: gpu.at(table_PW)?, k: of_result.at(&k)?, v: of_result.at(&v)?, layout, layer, rows };
        let keyed = device::Keyed::of(dropout, &gpu)?;
        of_result.run(|e, dtype| device::expand(e, dtype, &at, &keyed))?;
        return Ok((k, v));
    }
    if dtype != DType::F32 {
        bail!("prefix: a CPU computes in f32, found {dtype:?}");
    }
    let table = F32View::new(table_PW)?;
    let slot = |slot: usize| {
        let mut out = vec![0f32; rows * groups * virtual_tokens * head_dim];
        let multipliers = (0..rows).map(|row| dropout.of_row(layout, row)).collect::<Result<Vec<_>>>()?;
        out.par_chunks_mut(virtual_tokens * head_dim).enumerate().for_each(|(i, out)| {
            let (row, group) = (i / groups, i % groups);
            for (p, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let at = layout.at(p, slot, group);
                out.copy_from_slice(&table[at..at + head_dim]);
                if let Some(multipliers) = multipliers[row] {
                    out.iter_mut().zip(&multipliers[at..at + head_dim]).for_each(|(x, m)| *x *= m);
                }
            }
        });
        tensor(out, &[rows, groups, virtual_tokens, head_dim])
    };
    Ok((slot(2 * layer)?, slot(2 * layer + 1)?))
}

/// Adds the gradients of what [`expand`] gave, `[R, G, P, D]` f32 each, to the table's gradient `[P, W]` f32, row by row in order.
///
/// # Errors
/// As [`expand`].
pub fn sum_(grad_PW: &Tensor, layout: Layout, layer: usize, [dk, dv]: [&Tensor; 2], dropout: &Dropout) -> Result<()> {
    check(grad_PW, layout, layer)?;
    let Layout { virtual_tokens, groups, head_dim, .. } = layout;
    let rows = dk.dim(0)?;
    let expected = [rows, groups, virtual_tokens, head_dim];
    if dk.dims() != expected || dv.dims() != expected || !(matches!(dropout, Dropout::None) || rows == dropout.num_rows()) {
        bail!("prefix: gradients {:?} and {:?}, expected {expected:?} of {} rows", dk.dims(), dv.dims(), dropout.num_rows());
    }
    if let Some(gpu) = on_gpu(grad_PW)? {
        let at = device::At { table: gpu.at(grad_PW)?, k: gpu.at(dk)?, v: gpu.at(dv)?, layout, layer, rows };
        let keyed = device::Keyed::of(dropout, &gpu)?;
        return gpu.run(|e, _| device::sum_(e, &at, &keyed));
    }
    for (slot, grad) in [(2 * layer, dk), (2 * layer + 1, dv)] {
        let grad = F32View::new(grad)?;
        let multipliers = (0..rows).map(|row| dropout.of_row(layout, row)).collect::<Result<Vec<_>>>()?;
        with_f32_mut(grad_PW, "prefix_sum", |sums| {
            for p in 0..virtual_tokens {
                for group in 0..groups {
                    let at = layout.at(p, slot, group);
                    let sum = &mut sums[at..at + head_dim];
                    for (row, multipliers) in multipliers.iter().enumerate() {
                        let from = ((row * groups + group) * virtual_tokens + p) * head_dim;
                        let grad = &grad[from..from + head_dim];
                        match multipliers {
                            Some(m) => sum.iter_mut().zip(grad).zip(&m[at..at + head_dim]).for_each(|((s, g), m)| *s += g * m),
                            None => sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g),
                        }
                    }
                }
            }
        })?;
    }
    Ok(())
}

fn check(table_PW: &Tensor, layout: Layout, layer: usize) -> Result<()> {
    if table_PW.dims() != [layout.virtual_tokens, layout.width()] || layer >= layout.layers {
        bail!("prefix: layer {layer} of a table of {:?}, expected {layout:?}", table_PW.dims());
    }
    Ok(())
}

/// The kernels `prefix_*` of `dropout.cu`.
pub mod device {
    use bytemuck::NoUninit;
    use candle_core::DType;

    use super::{Dropout, Layout};
    use crate::kernels::dropout::device::THREADS;
    use crate::kernels::launch::{Executor, KernelDtype, Launch, LaunchError, launch, require, require_aligned};
    use crate::kernels::on_gpu::OnGpu;
    use crate::rng::Stream;

    /// Addresses: the table or its gradient `[P, W]` f32, k and v `[R, G, P, D]`.
    #[derive(Clone, Copy, Debug)]
    pub struct At {
        pub table: u64,
        pub k: u64,
        pub v: u64,
        pub layout: Layout,
        pub layer: usize,
        /// R.
        pub rows: usize,
    }

    /// What is dropped; positions `[R]` u64 are at an address, which is 0 if nothing is dropped.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Keyed {
        pub positions: u64,
        pub seed: u64,
        pub p: f32,
    }

    impl Keyed {
        pub(super) fn of(dropout: &Dropout, gpu: &OnGpu) -> candle_core::Result<Self> {
            match dropout {
                Dropout::None => Ok(Self::default()),
                Dropout::Keyed { positions, seed, p, .. } => Ok(Self { positions: gpu.at_of(positions, DType::U32)?, seed: *seed, p: *p }),
                Dropout::Multipliers { .. } => candle_core::bail!("prefix: multipliers of a CPU for a table of a GPU"),
            }
        }
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        table: u64,
        k: u64,
        v: u64,
        positions: u64,
        rows: i32,
        groups: i32,
        length: i32,
        head_dim: i32,
        layers: i32,
        layer: i32,
        key: [u32; 2],
        stream: u32,
        p: f32,
        kept: f32,
        padding: i32,
    }

    /// As [`super::expand`].
    ///
    /// # Errors
    /// When a head or an address is no multiple of 16 bytes, or the launch fails.
    pub fn expand(executor: &dyn Executor, dtype: KernelDtype, at: &At, keyed: &Keyed) -> Result<(), LaunchError> {
        let name = format!("prefix_expand_{}", dtype.suffix());
        let Layout { virtual_tokens, groups, head_dim, .. } = at.layout;
        start(executor, &name, dtype.wide(), at, keyed, at.rows * groups * virtual_tokens * head_dim)
    }

    /// As [`super::sum_`].
    ///
    /// # Errors
    /// As [`expand`].
    pub fn sum_(executor: &dyn Executor, at: &At, keyed: &Keyed) -> Result<(), LaunchError> {
        let Layout { virtual_tokens, groups, head_dim, .. } = at.layout;
        start(executor, "prefix_sum_f32", 4, at, keyed, groups * virtual_tokens * head_dim)
    }

    fn start(executor: &dyn Executor, name: &str, wide: usize, at: &At, keyed: &Keyed, num_values: usize) -> Result<(), LaunchError> {
        let &At { table, k, v, layout, layer, rows } = at;
        let Layout { virtual_tokens, layers, groups, head_dim } = layout;
        require(head_dim > 0 && head_dim.is_multiple_of(wide), name, || {
            format!("heads of {head_dim} values, expected a multiple of {wide}")
        })?;
        require_aligned(name, &[table, k, v])?;
        let args = Args {
            table,
            k,
            v,
            positions: keyed.positions,
            rows: rows as i32,
            groups: groups as i32,
            length: virtual_tokens as i32,
            head_dim: head_dim as i32,
            layers: layers as i32,
            layer: layer as i32,
            key: [keyed.seed as u32, (keyed.seed >> 32) as u32],
            stream: Stream::PrefixDropout as u32,
            p: keyed.p,
            kept: 1.0 / (1.0 - keyed.p),
            padding: 0,
        };
        launch(executor, name, Launch::grid([(num_values / wide).div_ceil(THREADS as usize), 2], THREADS, 0), &args)
    }
}
