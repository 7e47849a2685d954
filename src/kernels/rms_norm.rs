//! RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): y = x / sqrt(mean(x²) + eps) * w, all in f32.

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{self, F32View, with_f32_mut};
use super::on_gpu::on_gpu;
use super::simd::{dot, vectorize};

/// Rows a task works on.
const ROWS: usize = 8;
/// Columns whose sums a task computes.
const COLUMNS: usize = 64;

/// x `[T, H]`, w `[H]` -> (y `[T, H]`, 1 / rms `[T]`).
///
/// # Errors
/// When the sizes differ.
///
/// # Source
/// THUDM modeling_chatglm.py, RMSNorm.forward: the weight product too is in f32, with one cast at the end.
pub fn fwd(x_TH: &Tensor, w_H: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (t, h) = sizes(x_TH, w_H)?;
    if let Some(gpu) = on_gpu(x_TH)? {
        let (y_TH, rstd_T) = (gpu.result((t, h))?, gpu.result_of(t, DType::F32)?);
        let rows = device::Rows {
            x: gpu.at(x_TH)?,
            w: gpu.at(w_H)?,
            y: gpu.at(&y_TH)?,
            rstd: gpu.at_of(&rstd_T, DType::F32)?,
            rows: t,
            columns: h,
        };
        gpu.run(|e, dtype| device::fwd(e, dtype, &rows, eps))?;
        return Ok((y_TH, rstd_T));
    }
    let (mut y, mut rstd) = (vec![0f32; t * h], vec![0f32; t]);
    {
        let (x, w) = (F32View::new(x_TH)?, F32View::new(w_H)?);
        y.par_chunks_mut(ROWS * h).zip(rstd.par_chunks_mut(ROWS)).zip(x.par_chunks(ROWS * h)).for_each(|((y, rstd), x)| {
            vectorize(|| {
                for ((y, r), x) in y.chunks_exact_mut(h).zip(rstd).zip(x.chunks_exact(h)) {
                    *r = (1.0 / (f64::from(dot(x, x)) / h as f64 + eps).sqrt()) as f32;
                    for ((y, x), w) in y.iter_mut().zip(x).zip(w.iter()) {
                        *y = w * (x * *r);
                    }
                }
            });
        });
    }
    Ok((host::tensor(y, &[t, h])?, host::tensor(rstd, &[t])?))
}

/// Adds the gradient towards x to `dx`: dx += rstd * (w dy - x rstd² mean(x w dy)).
///
/// # Shapes
/// dy, x, dx `[T, H]`, w `[H]`, rstd `[T]`. `dx` usually holds the residual branch's gradient already.
///
/// # Errors
/// When the sizes differ.
pub fn bwd_add_(dx_TH: &Tensor, dy_TH: &Tensor, x_TH: &Tensor, rstd_T: &Tensor, w_H: &Tensor) -> Result<()> {
    let (t, h) = sizes(x_TH, w_H)?;
    if dx_TH.dims() != x_TH.dims() || dy_TH.dims() != x_TH.dims() {
        bail!("rms_norm: dx {:?}, dy {:?} and x {:?} differ", dx_TH.dims(), dy_TH.dims(), x_TH.dims());
    }
    if let Some(gpu) = on_gpu(x_TH)? {
        let (dy, rstd) = (gpu.at(dy_TH)?, gpu.at_of(rstd_T, DType::F32)?);
        let rows = device::Rows { x: gpu.at(x_TH)?, w: gpu.at(w_H)?, y: gpu.at(dx_TH)?, rstd, rows: t, columns: h };
        return gpu.run(|e, dtype| device::bwd_add(e, dtype, &rows, dy));
    }
    let (dy, x, rstd, w) = (F32View::new(dy_TH)?, F32View::new(x_TH)?, F32View::new(rstd_T)?, F32View::new(w_H)?);
    with_f32_mut(dx_TH, "rms_norm_bwd", |dx| {
        let rows = dx.par_chunks_mut(ROWS * h).zip(dy.par_chunks(ROWS * h)).zip(x.par_chunks(ROWS * h)).zip(rstd.par_chunks(ROWS));
        rows.for_each(|(((dx, dy), x), rstd)| {
            let mut wdy = vec![0f32; h];
            vectorize(|| {
                for (((dx, dy), x), &r) in dx.chunks_exact_mut(h).zip(dy.chunks_exact(h)).zip(x.chunks_exact(h)).zip(rstd) {
                    for ((g, dy), w) in wdy.iter_mut().zip(dy).zip(w.iter()) {
                        *g = w * dy;
                    }
                    let c = r * r * r * (dot(x, &wdy) / h as f32);
                    for ((dx, g), x) in dx.iter_mut().zip(&wdy).zip(x) {
                        *dx += r * g - x * c;
                    }
                }
            });
        });
    })
}

/// Adds the gradient towards w to `dw` `[H]`: dw += sum over rows, in their order, of dy x rstd.
///
/// # Shapes
/// dy, x `[T, H]`, rstd `[T]`.
///
/// # Errors
/// When the sizes differ.
pub fn bwd_weight_add_(dw_H: &Tensor, dy_TH: &Tensor, x_TH: &Tensor, rstd_T: &Tensor) -> Result<()> {
    let (_, h) = sizes(x_TH, dw_H)?;
    if dy_TH.dims() != x_TH.dims() {
        bail!("rms_norm: dy {:?} and x {:?} differ", dy_TH.dims(), x_TH.dims());
    }
    let (dy, x, rstd) = (F32View::new(dy_TH)?, F32View::new(x_TH)?, F32View::new(rstd_T)?);
    with_f32_mut(dw_H, "rms_norm_bwd_weight", |dw| {
        dw.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, dw)| {
            let (first, width) = (i * COLUMNS, dw.len());
            for ((dy, x), r) in dy.chunks_exact(h).zip(x.chunks_exact(h)).zip(rstd.iter()) {
                let (dy, x) = (&dy[first..first + width], &x[first..first + width]);
                dw.iter_mut().zip(dy).zip(x).for_each(|((dw, dy), x)| *dw += dy * (x * r));
            }
        });
    })
}

fn sizes(x_TH: &Tensor, w_H: &Tensor) -> Result<(usize, usize)> {
    let (t, h) = x_TH.dims2()?;
    if w_H.dims() != [h] {
        bail!("rms_norm: x is [{t}, {h}], weight {:?}", w_H.dims());
    }
    Ok((t, h))
}

/// The kernels of `rms_norm.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use crate::kernels::column_sums::{self, Sums, add_partials_, partials_launch};
    use crate::kernels::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, WARP, launch, require_aligned};

    const THREADS: u32 = 256;
    /// Loads of 16 bytes that a thread keeps.
    const LOADS: usize = 8;

    /// Addresses, contiguous: x and y `[T, H]`, w `[H]`, rstd `[T]` f32. Backward, y is dx.
    #[derive(Clone, Copy, Debug)]
    pub struct Rows {
        pub x: u64,
        pub w: u64,
        pub y: u64,
        pub rstd: u64,
        pub rows: usize,
        pub columns: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        x: u64,
        w: u64,
        y: u64,
        rstd: u64,
        dy: u64,
        columns: i64,
        eps: f32,
        padding: i32,
    }

    /// As [`super::fwd`].
    ///
    /// # Errors
    /// When the width or an address is no multiple of 16 bytes, a row is wider than a block can keep, or the launch fails.
    pub fn fwd(executor: &dyn Executor, dtype: KernelDtype, rows: &Rows, eps: f64) -> Result<(), LaunchError> {
        start(executor, "fwd", dtype, rows, 0, eps as f32)
    }

    /// As [`super::bwd_add_`]; `dy` `[T, H]`.
    ///
    /// # Errors
    /// As [`fwd`].
    pub fn bwd_add(executor: &dyn Executor, dtype: KernelDtype, rows: &Rows, dy: u64) -> Result<(), LaunchError> {
        start(executor, "bwd", dtype, rows, dy, 0.0)
    }

    fn start(executor: &dyn Executor, pass: &str, dtype: KernelDtype, rows: &Rows, dy: u64, eps: f32) -> Result<(), LaunchError> {
        let &Rows { x, w, y, rstd, rows, columns } = rows;
        let name = format!("rms_norm_{pass}_{}", dtype.suffix());
        let (wide, most) = (16 / dtype.num_bytes(), THREADS as usize * LOADS * 16 / dtype.num_bytes());
        if columns == 0 || !columns.is_multiple_of(wide) || columns > most {
            let reason = format!("rows of {columns} values, expected a multiple of {wide} up to {most}");
            return Err(LaunchError::Kernel { kernel: name, reason });
        }
        require_aligned(&name, &[x, w, y, dy])?;
        let shared_bytes = THREADS / WARP * 4;
        let args = Args { x, w, y, rstd, dy, columns: columns as i64, eps, padding: 0 };
        launch(executor, &name, Launch::row(rows, THREADS, shared_bytes), &args)
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct WeightArgs {
        x: u64,
        dy: u64,
        rstd: u64,
        partials: u64,
        rows: i64,
        columns: i32,
        tiles: i32,
    }

    /// As [`super::bwd_weight_add_`]: `dw` is where the sums go; dy, x `[T, H]`, rstd `[T]` f32.
    ///
    /// # Errors
    /// When the width or an address is no multiple of 16 bytes, or a launch fails.
    pub fn bwd_weight_add(executor: &dyn Executor, dtype: KernelDtype, dw: &Sums, [dy, x, rstd]: [u64; 3]) -> Result<(), LaunchError> {
        let name = format!("rms_norm_weight_{}", dtype.suffix());
        require_aligned(&name, &[dy, x])?;
        let (launch_of, tiles) = partials_launch(&name, dtype, dw)?;
        let (rows, columns) = (dw.rows as i64, dw.columns as i32);
        let args = WeightArgs { x, dy, rstd, partials: dw.partials, rows, columns, tiles: tiles as i32 };
        launch(executor, &name, launch_of, &args)?;
        add_partials_(executor, dw)
    }

    /// Of [`fwd`].
    pub fn fwd_bytes(dtype: KernelDtype, rows: usize, columns: usize) -> Bytes {
        let row = columns * dtype.num_bytes();
        Bytes { read: (rows * 2 * row) as u64, written: (rows * (row + 4)) as u64 }
    }

    /// Of [`bwd_add`].
    pub fn bwd_bytes(dtype: KernelDtype, rows: usize, columns: usize) -> Bytes {
        let row = columns * dtype.num_bytes();
        Bytes { read: (rows * (5 * row + THREADS as usize * 4)) as u64, written: (rows * row) as u64 }
    }

    /// Of [`bwd_weight_add`]: each thread asks for its rows' rstd.
    pub fn bwd_weight_bytes(dtype: KernelDtype, rows: usize, columns: usize) -> Bytes {
        let sums = column_sums::bytes(dtype, rows, columns, 2);
        Bytes { read: sums.read + (rows * columns / dtype.wide() * 4) as u64, ..sums }
    }
}
