//! Matrix products, counted.
//!
//! `nt`: y = x Wᵀ, the forward of a linear layer whose weight is `[out, in]`. `nn`: dx = dy W, its backward towards the input. `tn`: dyᵀ x, its
//! backward towards the weight.
//! On a CPU they run `gemm.rs`; a row's result depends neither on the other rows nor on the number of threads.
#![allow(unsafe_code, reason = "products are written to memory that nobody cleared first")]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Result, Tensor, bail};

use super::elementwise;
use super::gemm::{self, Source, Target};
use super::gpu::{Operands, Product};
use super::host::{self, F32View};
use super::launch::KernelDtype;
use super::on_gpu::{OnGpu, on_gpu};

/// Columns of a sum that leave most of a register unused.
const NARROW: usize = 16;

static FLOPS: AtomicU64 = AtomicU64::new(0);

/// Floating point operations (2 m n k a product) of all matrix products of this process so far.
pub fn flops() -> u64 {
    FLOPS.load(Ordering::Relaxed)
}

/// x `[m, k]`, w `[n, k]` -> x wᵀ `[m, n]`.
///
/// # Errors
/// When the inner sizes differ or the tensors are not on a supported device.
pub fn nt(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let [m, n, k] = nt_sizes(x, w)?;
    if let Some(gpu) = on_gpu(x)? {
        return fresh_on_gpu(&gpu, Operands::Nt, [m, n, k], [x, w], None);
    }
    let out = {
        let (x, w) = (F32View::new(x)?, F32View::new(w)?);
        fresh_product(Mat::rows(&x, k), Mat::rows(&w, k).t(), (m, n, k))
    };
    host::tensor(out, &[m, n])
}

/// As [`nt`], + bias `[n]` on each row.
///
/// # Errors
/// As [`nt`], or when the bias has another width.
pub fn nt_bias(x: &Tensor, w: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let [m, n, k] = nt_sizes(x, w)?;
    expect_dims("bias", bias, &[n])?;
    if let Some(gpu) = on_gpu(x)? {
        return fresh_on_gpu(&gpu, Operands::Nt, [m, n, k], [x, w], Some(bias));
    }
    let y = nt(x, w)?;
    elementwise::add_bias_(&y, bias)?;
    Ok(y)
}

/// As [`nt`], + bias `[n]` on each row, + residual `[m, n]`; on a GPU rounded once.
///
/// # Errors
/// As [`nt`], or when the bias or the residual has another size.
pub fn nt_onto(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, residual: &Tensor) -> Result<Tensor> {
    let [m, n, k] = nt_sizes(x, w)?;
    expect_dims("residual", residual, &[m, n])?;
    bias.map_or(Ok(()), |bias| expect_dims("bias", bias, &[n]))?;
    let Some(gpu) = on_gpu(x)? else {
        let y = bias.map_or_else(|| nt(x, w), |bias| nt_bias(x, w, bias))?;
        elementwise::add_(&y, residual)?;
        return Ok(y);
    };
    let y = gpu.result((m, n))?;
    let bias = bias.map(|bias| gpu.at(bias)).transpose()?;
    queue(&gpu, Operands::Nt, [m, n, k], [x, w], &y, bias, Some(gpu.at(residual)?))?;
    Ok(y)
}

/// As [`nt`], with the product in f32 whatever the operands' type.
///
/// # Errors
/// As [`nt`].
pub fn nt_f32(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let [m, n, k] = nt_sizes(x, w)?;
    let Some(gpu) = on_gpu(x)? else { return nt(x, w) };
    let d = gpu.result_of((m, n), DType::F32)?;
    queue(&gpu, Operands::Nt, [m, n, k], [x, w], &d, None, None)?;
    Ok(d)
}

/// y `[m, n]` += x wᵀ, of x `[m, k]` and w `[n, k]`.
///
/// # Errors
/// As [`nt`].
pub fn nt_add_(y: &Tensor, x: &Tensor, w: &Tensor) -> Result<()> {
    let [m, n, k] = nt_sizes(x, w)?;
    expect_dims("sum", y, &[m, n])?;
    if let Some(gpu) = on_gpu(x)? {
        return add_on_gpu(&gpu, Operands::Nt, [m, n, k], [x, w], y);
    }
    elementwise::add_(y, &nt(x, w)?)
}

/// dx `[m, k]` += dy w, of dy `[m, n]` and w `[n, k]`.
///
/// # Errors
/// As [`nn`].
pub fn nn_add_(dx: &Tensor, dy: &Tensor, w: &Tensor) -> Result<()> {
    let [m, n, k] = nn_sizes(dy, w)?;
    expect_dims("sum", dx, &[m, k])?;
    if let Some(gpu) = on_gpu(dy)? {
        return add_on_gpu(&gpu, Operands::Nn, [m, k, n], [dy, w], dx);
    }
    elementwise::add_(dx, &nn(dy, w)?)
}

/// dy `[m, n]`, w `[n, k]` -> dy w `[m, k]`.
///
/// # Errors
/// When the inner sizes differ or the tensors are not on a supported device.
pub fn nn(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let [m, n, k] = nn_sizes(dy, w)?;
    if let Some(gpu) = on_gpu(dy)? {
        return fresh_on_gpu(&gpu, Operands::Nn, [m, k, n], [dy, w], None);
    }
    let out = {
        let (dy, w) = (F32View::new(dy)?, F32View::new(w)?);
        fresh_product(Mat::rows(&dy, n), Mat::rows(&w, k), (m, k, n))
    };
    host::tensor(out, &[m, k])
}

/// a `[k, m]`, b `[k, n]` -> aᵀ b `[m, n]`: the gradient of a weight `[m, n]` from its output's gradient and its input.
///
/// # Errors
/// When the numbers of rows differ or the tensors are not on a supported device.
pub fn tn(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let [m, n, k] = tn_sizes(a, b)?;
    if let Some(gpu) = on_gpu(a)? {
        return fresh_on_gpu(&gpu, Operands::Tn, [m, n, k], [a, b], None);
    }
    let out = {
        let (a, b) = (F32View::new(a)?, F32View::new(b)?);
        fresh_product(Mat::rows(&a, m).t(), Mat::rows(&b, n), (m, n, k))
    };
    host::tensor(out, &[m, n])
}

/// out `[m, n]` += aᵀ b, of a `[k, m]` and b `[k, n]`: [`tn`] into a gradient that is summed up.
///
/// # Errors
/// When the sizes do not fit or the tensors are not on a supported device.
pub fn tn_add_(out: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let [m, n, k] = tn_sizes(a, b)?;
    expect_dims("sum", out, &[m, n])?;
    if let Some(gpu) = on_gpu(a)? {
        return add_on_gpu(&gpu, Operands::Tn, [m, n, k], [a, b], out);
    }
    if n <= NARROW && n < m {
        // The other way round its rows are long, as the CPU's product wants them. The sums are the same.
        let transposed = tn(b, a)?;
        let transposed = F32View::new(&transposed)?;
        return host::with_f32_mut(out, "matmul", |out| {
            for (i, row) in out.chunks_exact_mut(n).enumerate() {
                row.iter_mut().enumerate().for_each(|(j, sum)| *sum += transposed[j * m + i]);
            }
        });
    }
    let (a, b) = (F32View::new(a)?, F32View::new(b)?);
    let threads = rayon::current_num_threads();
    host::with_f32_mut(out, "matmul", |out| {
        run(Mat::rows(&a, m).t(), Mat::rows(&b, n), MatMut::rows(out, n), (m, n, k), Write::Add, threads);
    })
}

/// M, N, K of x `[m, k]` wᵀ, w `[n, k]`.
fn nt_sizes(x: &Tensor, w: &Tensor) -> Result<[usize; 3]> {
    let ((m, k), (n, k2)) = (x.dims2()?, w.dims2()?);
    if k != k2 {
        bail!("matmul: x is [{m}, {k}] and w is [{n}, {k2}]: the inner sizes differ");
    }
    Ok([m, n, k])
}

/// m, n, k of dy `[m, n]` w, w `[n, k]`.
fn nn_sizes(dy: &Tensor, w: &Tensor) -> Result<[usize; 3]> {
    let ((m, n), (n2, k)) = (dy.dims2()?, w.dims2()?);
    if n != n2 {
        bail!("matmul: dy is [{m}, {n}] and w is [{n2}, {k}]: the inner sizes differ");
    }
    Ok([m, n, k])
}

/// M, N, K of aᵀ b, a `[k, m]`, b `[k, n]`.
fn tn_sizes(a: &Tensor, b: &Tensor) -> Result<[usize; 3]> {
    let ((k, m), (k2, n)) = (a.dims2()?, b.dims2()?);
    if k != k2 {
        bail!("matmul: a is [{k}, {m}] and b is [{k2}, {n}]: the numbers of rows differ");
    }
    Ok([m, n, k])
}

fn expect_dims(what: &str, x: &Tensor, dims: &[usize]) -> Result<()> {
    if x.dims() != dims {
        bail!("matmul: the {what} is {:?}, expected {dims:?}", x.dims());
    }
    Ok(())
}

/// A product `[M, N]` in the operands' type.
fn fresh_on_gpu(gpu: &OnGpu, operands: Operands, sizes: [usize; 3], factors: [&Tensor; 2], bias: Option<&Tensor>) -> Result<Tensor> {
    let d = gpu.result((sizes[0], sizes[1]))?;
    let bias = bias.map(|bias| gpu.at(bias)).transpose()?;
    queue(gpu, operands, sizes, factors, &d, bias, None)?;
    Ok(d)
}

/// sum `[M, N]`, in the operands' type or f32, += the product.
fn add_on_gpu(gpu: &OnGpu, operands: Operands, sizes: [usize; 3], factors: [&Tensor; 2], sum: &Tensor) -> Result<()> {
    let residual = gpu.at_sum(sum)?;
    queue(gpu, operands, sizes, factors, sum, None, Some(residual))
}

/// d `[M, N]`, in the operands' type or f32, becomes the product, + bias and residual of its type.
fn queue(
    gpu: &OnGpu,
    operands: Operands,
    sizes: [usize; 3],
    [a, b]: [&Tensor; 2],
    d: &Tensor,
    bias: Option<u64>,
    residual: Option<u64>,
) -> Result<()> {
    let out_dtype = if d.dtype() == DType::F32 { KernelDtype::F32 } else { gpu.dtype };
    count(sizes);
    let (a, b, d) = (gpu.at(a)?, gpu.at(b)?, gpu.at_sum(d)?);
    gpu.product(&Product { operands, sizes, a, b, d, dtype: gpu.dtype, out_dtype, bias, residual })
}

fn count(sizes: [usize; 3]) {
    FLOPS.fetch_add(2 * sizes.iter().product::<usize>() as u64, Ordering::Relaxed);
}

/// A matrix in a slice: element (i, j) is at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Rows that start `stride` elements apart.
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, col_stride: 1 }
    }

    pub(crate) fn t(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }
}

/// A matrix to write to: row i starts at `i * row_stride`.
pub(crate) struct MatMut<'a> {
    data: &'a mut [MaybeUninit<f32>],
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    pub(crate) fn rows(data: &'a mut [f32], stride: usize) -> Self {
        // SAFETY: both have one layout, and `product` writes only floats through it.
        let data = unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), data.len()) };
        Self { data, row_stride: stride }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    Overwrite,
    Add,
}

/// a `[m, k]` b `[k, n]`, on all threads, into memory that nobody cleared first.
fn fresh_product(a: Mat, b: Mat, (m, n, k): (usize, usize, usize)) -> Vec<f32> {
    if k == 0 {
        return vec![0.0; m * n];
    }
    let mut out = Vec::with_capacity(m * n);
    let threads = rayon::current_num_threads();
    run(a, b, MatMut { data: &mut out.spare_capacity_mut()[..m * n], row_stride: n }, (m, n, k), Write::Overwrite, threads);
    // SAFETY: with k above 0 the product wrote each of the m * n elements.
    unsafe { out.set_len(m * n) };
    out
}

/// out `[m, n]` (+)= a `[m, k]` b `[k, n]`, on the caller's thread: it is one of many tasks.
pub(crate) fn product(a: Mat, b: Mat, out: MatMut, sizes: (usize, usize, usize), write: Write) {
    run(a, b, out, sizes, write, 1);
}

fn run(a: Mat, b: Mat, out: MatMut, (m, n, k): (usize, usize, usize), write: Write, threads: usize) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let extent = |rows: usize, cols: usize, rs: usize, cs: usize| (rows - 1) * rs + (cols - 1) * cs + 1;
    assert!(a.data.len() >= extent(m, k, a.row_stride, a.col_stride), "matmul: left operand is too short");
    assert!(b.data.len() >= extent(k, n, b.row_stride, b.col_stride), "matmul: right operand is too short");
    assert!(out.row_stride >= n && out.data.len() >= extent(m, n, out.row_stride, 1), "matmul: result is too short");
    count([m, n, k]);
    let source = |x: Mat| Source { start: x.data.as_ptr(), row_stride: x.row_stride, col_stride: x.col_stride };
    let target = Target { start: out.data.as_mut_ptr().cast(), row_stride: out.row_stride };
    // SAFETY: the three asserts above keep every element inside its slice; `out` is borrowed mutably, so nothing aliases it; and where it is
    // read (`Write::Add`), it was made from initialised floats: `fresh_product` overwrites.
    unsafe { gemm::gemm(source(a), source(b), target, (m, n, k), write == Write::Add, threads) };
}
