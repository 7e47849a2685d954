//! Additions and scalings, in place where the name ends in `_`.
//!
//! Sums over rows run in the rows' order, whatever the number of threads.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{F32View, tensor, with_f32_mut};

/// Elements a task works on.
const CHUNK: usize = 1 << 14;
/// Columns whose sums a task computes.
const COLUMNS: usize = 64;

/// acc += x, elementwise; same shape.
///
/// # Errors
/// When the shapes differ.
pub fn add_(acc: &Tensor, x: &Tensor) -> Result<()> {
    if acc.dims() != x.dims() {
        bail!("add: shapes {:?} and {:?} differ", acc.dims(), x.dims());
    }
    let x = F32View::new(x)?;
    with_f32_mut(acc, "add", |acc| {
        acc.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(acc, x)| acc.iter_mut().zip(x).for_each(|(a, b)| *a += b));
    })
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
    let (_, n) = x_TN.dims2()?;
    if sum_N.dims() != [n] {
        bail!("add_row_sum: rows have {n} values, their sum {:?}", sum_N.dims());
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

/// table `[V, H]`: row `ids[t]` += row t of x `[T, H]`, in the order of t.
///
/// # Errors
/// When the sizes differ or an id is not below V.
pub fn scatter_add_rows_(table_VH: &Tensor, ids: &[u32], x_TH: &Tensor) -> Result<()> {
    let ((v, h), (t, width)) = (table_VH.dims2()?, x_TH.dims2()?);
    if h != width || ids.len() != t {
        bail!("scatter_add_rows: table [{v}, {h}], {} ids, rows [{t}, {width}]", ids.len());
    }
    if let Some(&bad) = ids.iter().find(|&&id| id as usize >= v) {
        bail!("scatter_add_rows: id {bad} is not below {v}");
    }
    let x = F32View::new(x_TH)?;
    with_f32_mut(table_VH, "scatter_add_rows", |table| {
        for (&id, row) in ids.iter().zip(x.chunks_exact(h)) {
            table[id as usize * h..][..h].iter_mut().zip(row).for_each(|(a, b)| *a += b);
        }
    })
}

/// x *= factor.
///
/// # Errors
/// When the tensor is not on a supported device.
pub fn scale_(x: &Tensor, factor: f32) -> Result<()> {
    with_f32_mut(x, "scale", |x| x.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|v| *v *= factor)))
}
