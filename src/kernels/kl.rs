//! Kullback-Leibler divergence between the softmaxes of two sets of logits.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::host::F32View;

/// KL(softmax(a) || softmax(b)) = sum over v of p_a (a - b) - lse(a) + lse(b) of each row in f64, nats, `[N]`; exactly 0 where a and b are equal.
///
/// # Shapes
/// a and b `[N, V]`.
///
/// # Errors
/// When the shapes differ, V is 0, or the tensors are not contiguous f32 on the CPU.
pub fn rows(a_NV: &Tensor, b_NV: &Tensor) -> Result<Vec<f64>> {
    let (_, v) = a_NV.dims2()?;
    if a_NV.dims() != b_NV.dims() || v == 0 {
        bail!("kl: logits of shape {:?} and {:?}", a_NV.dims(), b_NV.dims());
    }
    let (a, b) = (F32View::new(a_NV)?, F32View::new(b_NV)?);
    let (a, b): (&[f32], &[f32]) = (&a, &b);
    Ok(a.par_chunks(v).zip(b.par_chunks(v)).map(|(a, b)| row(a, b)).collect())
}

fn row(a: &[f32], b: &[f32]) -> f64 {
    let (shift_a, shift_b) = (max(a), max(b));
    let (mut sum_a, mut sum_b, mut weighted) = (0.0, 0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a), f64::from(b));
        let p = (a - shift_a).exp();
        sum_a += p;
        sum_b += (b - shift_b).exp();
        weighted += p * (a - b);
    }
    let kl = weighted / sum_a - (shift_a + sum_a.ln()) + (shift_b + sum_b.ln());
    // Rounding may leave a hair below 0; a NaN stays one.
    if kl < 0.0 { 0.0 } else { kl }
}

/// Negative infinity for NaNs alone, which the sums then carry on.
fn max(a: &[f32]) -> f64 {
    f64::from(a.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}
