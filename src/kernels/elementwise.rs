//! Additions in place.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{F32View, with_f32_mut};

/// Elements a task works on.
const CHUNK: usize = 1 << 14;

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

/// x *= factor.
///
/// # Errors
/// When the tensor is not on a supported device.
pub fn scale_(x: &Tensor, factor: f32) -> Result<()> {
    with_f32_mut(x, "scale", |x| x.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|v| *v *= factor)))
}
