//! Additions and scalings, in place where the name ends in `_`.
//!
//! Sums over rows run in the rows' order, whatever the number of threads.
//!
//! On a device there is no `add_bias_`: biases are added by the epilogue of the GEMM before them, which saves a pass over memory. Sums over rows
//! are in `column_sums`.

use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::column_sums;
use super::host::{F32View, tensor, with_f32_mut};
use super::on_gpu::on_gpu;

/// Elements a task works on.
const CHUNK: usize = 1 << 14;
/// Columns whose sums a task computes.
const COLUMNS: usize = 64;

/// acc += x, elementwise; same shape. `acc` is in f32, or in x's type.
///
/// # Errors
/// When the shapes differ.
pub fn add_(acc: &Tensor, x: &Tensor) -> Result<()> {
    if acc.dims() != x.dims() {
        bail!("add: shapes {:?} and {:?} differ", acc.dims(), x.dims());
    }
    if let Some(gpu) = on_gpu(x)? {
        let n = x.elem_count();
        // A part of a buffer may begin anywhere, and the kernel reads 16 bytes at a time.
        let x = if gpu.at(x)?.is_multiple_of(16) { x.clone() } else { x.force_contiguous()? };
        let (sum, x) = (gpu.at_sum(acc)?, gpu.at(&x)?);
        return gpu.run(|e, dtype| match acc.dtype() {
            DType::F32 => device::add_(e, dtype, sum, x, n),
            _ => device::add_same_(e, dtype, sum, x, n),
        });
    }
    let x = F32View::new(x)?;
    with_f32_mut(acc, "add", |acc| {
        acc.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(acc, x)| acc.iter_mut().zip(x).for_each(|(a, b)| *a += b));
    })
}

/// a + b, elementwise, in new memory; same shape, both f32.
///
/// # Errors
/// When the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() {
        bail!("add: shapes {:?} and {:?} differ", a.dims(), b.dims());
    }
    if let Some(gpu) = on_gpu(a)? {
        let sum = gpu.result_of(a.shape(), DType::F32)?;
        gpu.copy(a, &sum)?;
        add_(&sum, b)?;
        return Ok(sum);
    }
    let (a_values, b_values) = (F32View::new(a)?, F32View::new(b)?);
    let mut sum = Vec::new();
    a_values.par_iter().with_min_len(CHUNK).zip(&*b_values).map(|(a, b)| a + b).collect_into_vec(&mut sum);
    tensor(sum, a.dims())
}

/// x `[T, n]` += bias `[n]` on each row.
///
/// # Errors
/// When the widths differ.
pub fn add_bias_(x_TN: &Tensor, bias_N: &Tensor) -> Result<()> {
    let (_, n) = x_TN.dims2()?;
    if bias_N.dims() != [n] {
        bail!("add_bias: rows have {n} values, bias {:?}", bias_N.dims());
    }
    let bias = F32View::new(bias_N)?;
    with_f32_mut(x_TN, "add_bias", |x| {
        x.par_chunks_mut(n).with_min_len(CHUNK.div_ceil(n)).for_each(|row| row.iter_mut().zip(bias.iter()).for_each(|(a, b)| *a += b));
    })
}

/// sum `[n]` += the rows of x `[T, n]`.
///
/// # Errors
/// When the widths differ.
pub fn add_row_sum_(sum_N: &Tensor, x_TN: &Tensor) -> Result<()> {
    let (rows, n) = x_TN.dims2()?;
    if sum_N.dims() != [n] {
        bail!("add_row_sum: rows have {n} values, their sum {:?}", sum_N.dims());
    }
    if let Some(gpu) = on_gpu(x_TN)? {
        let partials = gpu.result_of(column_sums::num_partials(rows, n), DType::F32)?;
        let (sums, partials) = (gpu.at_of(sum_N, DType::F32)?, gpu.at_of(&partials, DType::F32)?);
        let (sums, x) = (column_sums::Sums { sums, partials, rows, columns: n }, gpu.at(x_TN)?);
        return gpu.run(|e, dtype| column_sums::add_row_sum_(e, dtype, &sums, x));
    }
    let x = F32View::new(x_TN)?;
    with_f32_mut(sum_N, "add_row_sum", |sum| {
        sum.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sum)| {
            let (first, width) = (i * COLUMNS, sum.len());
            x.chunks_exact(n).for_each(|row| sum.iter_mut().zip(&row[first..first + width]).for_each(|(a, b)| *a += b));
        });
    })
}

/// x `[T, n]` times `factors` `[n]`, column by column, in new memory.
///
/// # Errors
/// When the widths differ.
pub fn scale_columns(x_TN: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let (t, n) = x_TN.dims2()?;
    if factors.len() != n {
        bail!("scale_columns: rows have {n} values, and there are {} factors", factors.len());
    }
    let mut y = vec![0f32; t * n];
    {
        let x = F32View::new(x_TN)?;
        let rows = y.par_chunks_mut(n).zip(x.par_chunks(n)).with_min_len(CHUNK.div_ceil(n));
        rows.for_each(|(y, x)| y.iter_mut().zip(x).zip(factors).for_each(|((y, x), f)| *y = x * f));
    }
    tensor(y, &[t, n])
}

/// For each column of a and b `[T, n]` the sum over rows, in their order, of their products: `[n]`.
///
/// # Errors
/// When the shapes differ.
pub fn column_dots(a_TN: &Tensor, b_TN: &Tensor) -> Result<Vec<f32>> {
    let (_, n) = a_TN.dims2()?;
    if a_TN.dims() != b_TN.dims() {
        bail!("column_dots: shapes {:?} and {:?} differ", a_TN.dims(), b_TN.dims());
    }
    let mut sums = vec![0f32; n];
    let (a, b) = (F32View::new(a_TN)?, F32View::new(b_TN)?);
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sums)| {
        let (first, width) = (i * COLUMNS, sums.len());
        for (a, b) in a.chunks_exact(n).zip(b.chunks_exact(n)) {
            let (a, b) = (&a[first..first + width], &b[first..first + width]);
            sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
        }
    });
    Ok(sums)
}

/// x *= factor.
///
/// # Errors
/// When the tensor is not on a supported device.
pub fn scale_(x: &Tensor, factor: f32) -> Result<()> {
    if let Some(gpu) = on_gpu(x)? {
        let (at, n) = (gpu.at(x)?, x.elem_count());
        return gpu.run(|e, dtype| device::scale_(e, dtype, at, n, factor));
    }
    with_f32_mut(x, "scale", |x| x.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|v| *v *= factor)))
}

/// to becomes x; same shape and type. Every view of that memory sees it.
///
/// # Errors
/// When shapes, types or devices differ.
pub fn assign_(to: &Tensor, x: &Tensor) -> Result<()> {
    if to.dims() != x.dims() || to.dtype() != x.dtype() {
        bail!("assign: {:?} {:?} to {:?} {:?}", x.dtype(), x.dims(), to.dtype(), to.dims());
    }
    match on_gpu(x)? {
        Some(gpu) => gpu.copy(x, to),
        None => to.slice_set(x, 0, 0),
    }
}

/// Tensors of one type one behind the other, along their first dimension, in new memory.
///
/// # Errors
/// When there is none, or their other dimensions differ.
pub fn cat(parts: &[Tensor]) -> Result<Tensor> {
    let Some(first) = parts.first() else { bail!("cat: of nothing") };
    let Some(gpu) = on_gpu(first)? else { return Tensor::cat(parts, 0) };
    let mut dims = first.dims().to_vec();
    if let Some(other) = parts.iter().find(|part| part.dims().get(1..) != dims.get(1..)) {
        bail!("cat: shapes {:?} and {dims:?} differ", other.dims());
    }
    dims[0] = parts.iter().map(|part| part.dims()[0]).sum();
    let whole = gpu.result(dims)?;
    let mut at = 0;
    for part in parts.iter().filter(|part| part.elem_count() > 0) {
        let len = part.dim(0)?;
        gpu.copy(part, &whole.narrow(0, at, len)?)?;
        at += len;
    }
    Ok(whole)
}

/// `[len]` f32 zeros. A GPU has no memory of 0 bytes, and where ranks share a buffer a part may be empty.
///
/// # Errors
/// When there is not enough memory.
pub fn zeros(len: usize, device: &Device) -> Result<Tensor> {
    Tensor::zeros(len.max(1), DType::F32, device)?.narrow(0, 0, len)
}

/// x `[n]` f32 with zeros behind it, `[len]`; x itself if that is its length.
///
/// # Errors
/// When x is longer.
pub fn padded(x: &Tensor, len: usize) -> Result<Tensor> {
    let n = x.dims1()?;
    if n > len {
        bail!("padded: {n} values are more than {len}");
    }
    if n == len {
        return Ok(x.clone());
    }
    let whole = zeros(len, x.device())?;
    if n > 0 {
        assign_(&whole.narrow(0, 0, n)?, x)?;
    }
    Ok(whole)
}

/// x, f32, rounded to `dtype`; x itself if that is f32.
///
/// # Errors
/// When the tensor is not on a supported device, or a CPU is asked for another type: it computes in f32.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if dtype == DType::F32 && x.dtype() == DType::F32 {
        return Ok(x.clone());
    }
    let Some(gpu) = on_gpu(x)? else { bail!("cast: a CPU computes in f32, found {dtype:?}") };
    let y = gpu.result_of(x.shape(), dtype)?;
    let Some(of_y) = on_gpu(&y)? else { bail!("cast: {dtype:?} on another device") };
    let (at, n) = ([gpu.at_of(x, DType::F32)?, of_y.at(&y)?], x.elem_count());
    of_y.run(|e, dtype| device::cast(e, dtype, at, n))?;
    Ok(y)
}

/// The kernels of `elementwise.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use crate::kernels::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, launch, require_aligned, tiles};

    const THREADS: u32 = 256;

    /// Also those of `add_same` and, as x and y, of `cast`.
    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct AddArgs {
        sum: u64,
        x: u64,
        n: i64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct ScaleArgs {
        x: u64,
        n: i64,
        factor: f32,
        padding: i32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct ScaleColumnsArgs {
        x: u64,
        factors: u64,
        y: u64,
        columns: i32,
        tiles: i32,
    }

    /// As [`super::add_`]: `sum` `[n]` f32, x `[n]` of `dtype`, any n.
    ///
    /// # Errors
    /// When an address is no multiple of 16 bytes, or the launch fails.
    pub fn add_(executor: &dyn Executor, dtype: KernelDtype, sum: u64, x: u64, n: usize) -> Result<(), LaunchError> {
        let name = format!("add_{}", dtype.suffix());
        require_aligned(&name, &[sum, x])?;
        flat(executor, &name, n.div_ceil(dtype.wide()), &AddArgs { sum, x, n: n as i64 })
    }

    /// Of [`add_`].
    pub fn add_bytes(dtype: KernelDtype, n: usize) -> Bytes {
        Bytes { read: (n * (4 + dtype.num_bytes())) as u64, written: 4 * n as u64 }
    }

    /// As [`super::add_`], rounded once: `sum` and x `[n]` of `dtype`, bf16 or f16, any n.
    ///
    /// # Errors
    /// As [`add_`].
    pub fn add_same_(executor: &dyn Executor, dtype: KernelDtype, sum: u64, x: u64, n: usize) -> Result<(), LaunchError> {
        let name = format!("add_same_{}", dtype.suffix());
        require_aligned(&name, &[sum, x])?;
        flat(executor, &name, n.div_ceil(dtype.wide()), &AddArgs { sum, x, n: n as i64 })
    }

    /// Of [`add_same_`].
    pub fn add_same_bytes(dtype: KernelDtype, n: usize) -> Bytes {
        let values = (n * dtype.num_bytes()) as u64;
        Bytes { read: 2 * values, written: values }
    }

    /// As [`super::scale_`]: x `[n]` of `dtype`, any n.
    ///
    /// # Errors
    /// As [`add_`].
    pub fn scale_(executor: &dyn Executor, dtype: KernelDtype, x: u64, n: usize, factor: f32) -> Result<(), LaunchError> {
        let name = format!("scale_{}", dtype.suffix());
        require_aligned(&name, &[x])?;
        flat(executor, &name, n.div_ceil(dtype.wide()), &ScaleArgs { x, n: n as i64, factor, padding: 0 })
    }

    /// Of [`scale_`].
    pub fn scale_bytes(dtype: KernelDtype, n: usize) -> Bytes {
        let values = (n * dtype.num_bytes()) as u64;
        Bytes { read: values, written: values }
    }

    /// As [`super::cast`]: x `[n]` f32 to y `[n]` of `dtype`, bf16 or f16, any n.
    ///
    /// # Errors
    /// As [`add_`].
    pub fn cast(executor: &dyn Executor, dtype: KernelDtype, [x, y]: [u64; 2], n: usize) -> Result<(), LaunchError> {
        let name = format!("cast_{}", dtype.suffix());
        require_aligned(&name, &[x, y])?;
        flat(executor, &name, n.div_ceil(dtype.wide()), &AddArgs { sum: x, x: y, n: n as i64 })
    }

    /// Of [`cast`].
    pub fn cast_bytes(dtype: KernelDtype, n: usize) -> Bytes {
        Bytes { read: 4 * n as u64, written: (n * dtype.num_bytes()) as u64 }
    }

    /// As [`super::scale_columns`]: x and y `[rows, columns]` of `dtype`, which may be the same, factors `[columns]` f32.
    ///
    /// # Errors
    /// When the width or an address is no multiple of 16 bytes, or the launch fails.
    pub fn scale_columns(
        executor: &dyn Executor,
        dtype: KernelDtype,
        [x, factors, y]: [u64; 3],
        rows: usize,
        columns: usize,
    ) -> Result<(), LaunchError> {
        let name = format!("scale_columns_{}", dtype.suffix());
        let tiles = tiles(&name, dtype, columns, THREADS)?;
        require_aligned(&name, &[x, factors, y])?;
        let args = ScaleColumnsArgs { x, factors, y, columns: columns as i32, tiles: tiles as i32 };
        launch(executor, &name, Launch::row(rows * tiles, THREADS, 0), &args)
    }

    /// Of [`scale_columns`].
    pub fn scale_columns_bytes(dtype: KernelDtype, rows: usize, columns: usize) -> Bytes {
        let (n, s) = (rows * columns, dtype.num_bytes());
        Bytes { read: (n * (s + 4)) as u64, written: (n * s) as u64 }
    }

    /// A thread for each of `num_threads` parts of a buffer.
    fn flat<A: NoUninit>(executor: &dyn Executor, name: &str, num_threads: usize, args: &A) -> Result<(), LaunchError> {
        launch(executor, name, Launch::row(num_threads.div_ceil(THREADS as usize), THREADS, 0), args)
    }
}
