//! SwiGLU (Shazeer 2020, arXiv:2002.05202): act = silu(gate) * up; the gate is the first half of the projection.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{self, F32View};
use super::on_gpu::on_gpu;
use super::simd::{exp, vectorize};

/// Rows a task works on.
const ROWS: usize = 4;

/// gate_up `[T, 2F]` -> act `[T, F]`.
///
/// # Errors
/// When the width is odd.
///
/// # Source
/// THUDM modeling_chatglm.py, MLP.forward (swiglu).
pub fn fwd(gate_up_T2F: &Tensor) -> Result<Tensor> {
    let (t, f) = sizes(gate_up_T2F)?;
    if let Some(gpu) = on_gpu(gate_up_T2F)? {
        let act_TF = gpu.result((t, f))?;
        let rows = device::Rows { gate_up: gpu.at(gate_up_T2F)?, act: gpu.at(&act_TF)?, rows: t, columns: f, stride: 2 * f };
        gpu.run(|e, dtype| device::fwd(e, dtype, &rows))?;
        return Ok(act_TF);
    }
    let mut act = vec![0f32; t * f];
    {
        let gate_up = F32View::new(gate_up_T2F)?;
        act.par_chunks_mut(ROWS * f).zip(gate_up.par_chunks(ROWS * 2 * f)).for_each(|(act, gate_up)| {
            vectorize(|| {
                for (act, gate_up) in act.chunks_exact_mut(f).zip(gate_up.chunks_exact(2 * f)) {
                    let (gate, up) = gate_up.split_at(f);
                    for ((a, g), u) in act.iter_mut().zip(gate).zip(up) {
                        *a = g / (1.0 + exp(-g)) * u;
                    }
                }
            });
        });
    }
    host::tensor(act, &[t, f])
}

/// gate_up `[T, 2F]`, dact `[T, F]` -> dgate_up `[T, 2F]`, on a GPU in the memory of `gate_up`.
///
/// # Errors
/// When the sizes differ.
pub fn bwd(gate_up_T2F: Tensor, dact_TF: &Tensor) -> Result<Tensor> {
    let (t, f) = sizes(&gate_up_T2F)?;
    if dact_TF.dims() != [t, f] {
        bail!("swiglu: gradient has shape {:?}, expected [{t}, {f}]", dact_TF.dims());
    }
    if let Some(gpu) = on_gpu(&gate_up_T2F)? {
        let rows = device::Rows { gate_up: gpu.at(&gate_up_T2F)?, act: gpu.at(dact_TF)?, rows: t, columns: f, stride: 2 * f };
        gpu.run(|e, dtype| device::bwd_(e, dtype, &rows))?;
        return Ok(gate_up_T2F);
    }
    let mut out = vec![0f32; t * 2 * f];
    {
        let (gate_up, dact) = (F32View::new(&gate_up_T2F)?, F32View::new(dact_TF)?);
        let rows = out.par_chunks_mut(ROWS * 2 * f).zip(gate_up.par_chunks(ROWS * 2 * f)).zip(dact.par_chunks(ROWS * f));
        rows.for_each(|((out, gate_up), dact)| {
            vectorize(|| {
                for ((out, gate_up), dact) in out.chunks_exact_mut(2 * f).zip(gate_up.chunks_exact(2 * f)).zip(dact.chunks_exact(f)) {
                    let (gate, up) = gate_up.split_at(f);
                    let (dgate, dup) = out.split_at_mut(f);
                    // Slices of one known length and an index: five zipped iterators are not vectorized.
                    let (dgate, dup, gate, up, dact) = (&mut dgate[..f], &mut dup[..f], &gate[..f], &up[..f], &dact[..f]);
                    for i in 0..f {
                        let (g, d) = (gate[i], dact[i]);
                        let s = 1.0 / (1.0 + exp(-g));
                        dup[i] = d * (g * s);
                        dgate[i] = d * up[i] * (s * (1.0 + g * (1.0 - s)));
                    }
                }
            });
        });
    }
    host::tensor(out, &[t, 2 * f])
}

fn sizes(gate_up_T2F: &Tensor) -> Result<(usize, usize)> {
    let (t, f2) = gate_up_T2F.dims2()?;
    if f2 % 2 != 0 {
        bail!("swiglu: width {f2} is not a gate and an up half");
    }
    Ok((t, f2 / 2))
}

/// The kernels of `swiglu.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use crate::kernels::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, launch, require, require_aligned, tiles};

    const THREADS: u32 = 256;

    /// Addresses: gate_up `[T, 2F]` with rows `stride` elements apart, act `[T, F]` contiguous. Backward, act is dact.
    #[derive(Clone, Copy, Debug)]
    pub struct Rows {
        pub gate_up: u64,
        pub act: u64,
        pub rows: usize,
        /// F.
        pub columns: usize,
        pub stride: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        gate_up: u64,
        act: u64,
        stride: i64,
        columns: i32,
        tiles: i32,
    }

    /// As [`super::fwd`].
    ///
    /// # Errors
    /// When the width, the stride or an address is no multiple of 16 bytes, or the launch fails.
    pub fn fwd(executor: &dyn Executor, dtype: KernelDtype, rows: &Rows) -> Result<(), LaunchError> {
        start(executor, "fwd", dtype, rows)
    }

    /// As [`super::bwd`], in place: gate_up becomes dgate_up.
    ///
    /// # Errors
    /// As [`fwd`].
    pub fn bwd_(executor: &dyn Executor, dtype: KernelDtype, rows: &Rows) -> Result<(), LaunchError> {
        start(executor, "bwd", dtype, rows)
    }

    /// Of [`fwd`].
    pub fn fwd_bytes(dtype: KernelDtype, rows: usize, columns: usize) -> Bytes {
        let values = (rows * columns * dtype.num_bytes()) as u64;
        Bytes { read: 2 * values, written: values }
    }

    /// Of [`bwd_`].
    pub fn bwd_bytes(dtype: KernelDtype, rows: usize, columns: usize) -> Bytes {
        let values = (rows * columns * dtype.num_bytes()) as u64;
        Bytes { read: 3 * values, written: 2 * values }
    }

    fn start(executor: &dyn Executor, pass: &str, dtype: KernelDtype, rows: &Rows) -> Result<(), LaunchError> {
        let &Rows { gate_up, act, rows, columns, stride } = rows;
        let name = format!("swiglu_{pass}_{}", dtype.suffix());
        let tiles = tiles(&name, dtype, columns, THREADS)?;
        require(stride >= 2 * columns && stride.is_multiple_of(dtype.wide()), &name, || {
            format!("rows {stride} values apart, expected a multiple of {} from {} on", dtype.wide(), 2 * columns)
        })?;
        require_aligned(&name, &[gate_up, act])?;
        let args = Args { gate_up, act, stride: stride as i64, columns: columns as i32, tiles: tiles as i32 };
        launch(executor, &name, Launch::row(rows * tiles, THREADS, 0), &args)
    }
}
