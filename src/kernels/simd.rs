//! Vector arithmetic in plain Rust, compiled for the machine's widest instruction set by [`vectorize`].
//!
//! Each function does the same operations in the same order whatever the width, and no fused multiply-add, so the bits do not hang on the
//! instruction set.

use pulp::Arch;

/// Lanes of the running sums: wide enough for two 8-float registers.
pub const LANES: usize = 16;

/// Runs `f` compiled for the best instruction set of this machine.
pub fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(f)
}

/// e^x with a relative error below 2 ulp for x <= 88; 0 below -87.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Cephes expf: x = n ln 2 + r, e^r by a polynomial, times 2^n through the exponent bits.
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * LOG2E + ROUND; // its low mantissa bits hold n
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { y * scale }
}

#[inline(always)]
fn fold(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            half[i] = f(half[i], half[i + width]);
        }
        width /= 2;
    }
    half[0]
}

/// Sum of `f(i)` over a slice pair in lanes, folded in a fixed order.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    for (i, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += x * y;
    }
    fold(lanes, |x, y| x + y)
}

/// The largest value; negative infinity for an empty slice. NaNs are passed over, so callers check sums, not maxima.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        lanes[i] = if x > lanes[i] { x } else { lanes[i] };
    }
    fold(lanes, |x, y| if x > y { x } else { y })
}

/// Replaces each x by e^(x - shift) and returns their sum.
#[inline(always)]
pub fn exp_sum(a: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let mut chunks = a.chunks_exact_mut(LANES);
    for x in &mut chunks {
        for i in 0..LANES {
            x[i] = exp(x[i] - shift);
            lanes[i] += x[i];
        }
    }
    for (i, x) in chunks.into_remainder().iter_mut().enumerate() {
        *x = exp(*x - shift);
        lanes[i] += *x;
    }
    fold(lanes, |x, y| x + y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_over_its_range_is_within_two_ulp() {
        let mut worst = 0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "worst relative error {worst:e}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn exp_of_nan_is_nan() {
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_at_odd_lengths_match_plain_sums() {
        for n in [0, 1, 15, 16, 17, 31, 33, 100] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let exact: f64 = a.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let mut e = a.clone();
            let sum = vectorize(|| exp_sum(&mut e, 0.5));
            let exact_exp: f64 = a.iter().map(|&x| (f64::from(x) - 0.5).exp()).sum();
            assert!((f64::from(vectorize(|| dot(&a, &a))) - exact).abs() < 1e-5);
            assert!((f64::from(sum) - exact_exp).abs() < 1e-5);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
