//! Matrix products, counted.
//!
//! `nt`: y = x Wᵀ, the forward of a linear layer whose weight is `[out, in]`. `nn`: dx = dy W, its backward towards the input. `tn`: dyᵀ x, its
//! backward towards the weight.
//! On a CPU they run `gemm.rs`; a row's result depends neither on the other rows nor on the number of threads.
#![allow(unsafe_code, reason = "products are written to memory that nobody cleared first")]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};

use super::gemm::{self, Source, Target};
use super::host::{self, F32View};
use candle_core::{Result, Tensor, bail};

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
    let ((m, k), (n, k2)) = (x.dims2()?, w.dims2()?);
    if k != k2 {
        bail!("matmul: x is [{m}, {k}] and w is [{n}, {k2}]: the inner sizes differ");
    }
    host::check(x, "matmul")?;
    let out = {
        let (x, w) = (F32View::new(x)?, F32View::new(w)?);
        fresh_product(Mat::rows(&x, k), Mat::rows(&w, k).t(), (m, n, k))
    };
    host::tensor(out, &[m, n])
}

/// dy `[m, n]`, w `[n, k]` -> dy w `[m, k]`.
///
/// # Errors
/// When the inner sizes differ or the tensors are not on a supported device.
pub fn nn(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((m, n), (n2, k)) = (dy.dims2()?, w.dims2()?);
    if n != n2 {
        bail!("matmul: dy is [{m}, {n}] and w is [{n2}, {k}]: the inner sizes differ");
    }
    host::check(dy, "matmul")?;
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
    let ((k, m), (k2, n)) = (a.dims2()?, b.dims2()?);
    if k != k2 {
        bail!("matmul: a is [{k}, {m}] and b is [{k2}, {n}]: the numbers of rows differ");
    }
    host::check(a, "matmul")?;
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
    let ((k, m), (k2, n)) = (a.dims2()?, b.dims2()?);
    if k != k2 || out.dims() != [m, n] {
        bail!("matmul: a is [{k}, {m}], b is [{k2}, {n}] and the sum {:?}", out.dims());
    }
    host::check(out, "matmul")?;
    let (a, b) = (F32View::new(a)?, F32View::new(b)?);
    let threads = rayon::current_num_threads();
    host::with_f32_mut(out, "matmul", |out| {
        run(Mat::rows(&a, m).t(), Mat::rows(&b, n), MatMut::rows(out, n), (m, n, k), Write::Add, threads);
    })
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
    FLOPS.fetch_add(2 * (m * n * k) as u64, Ordering::Relaxed);
    let source = |x: Mat| Source { start: x.data.as_ptr(), row_stride: x.row_stride, col_stride: x.col_stride };
    let target = Target { start: out.data.as_mut_ptr().cast(), row_stride: out.row_stride };
    // SAFETY: the three asserts above keep every element inside its slice; `out` is borrowed mutably, so nothing aliases it; and where it is
    // read (`Write::Add`), it was made from initialised floats: `fresh_product` overwrites.
    unsafe { gemm::gemm(source(a), source(b), target, (m, n, k), write == Write::Add, threads) };
}
