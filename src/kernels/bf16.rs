//! Values rounded to bfloat16 and held as f32: to the nearest, of two equally near ones the even. What is rounded already stays as it is.

use candle_core::{Result, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

use super::host::{F32View, with_f32_mut};

/// Elements a task works on.
const CHUNK: usize = 1 << 14;

fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// Rounds x in place.
///
/// # Errors
/// When the tensor is not a contiguous f32 tensor on the CPU.
pub fn round_(x: &Tensor) -> Result<()> {
    with_f32_mut(x, "round_to_bf16", |x| x.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|v| *v = rounded(*v))))
}

/// x = y, rounded; same shape, other memory.
///
/// # Errors
/// When the shapes differ.
pub fn round_into_(x: &Tensor, y: &Tensor) -> Result<()> {
    if x.dims() != y.dims() {
        bail!("round_to_bf16: shapes {:?} and {:?} differ", x.dims(), y.dims());
    }
    let y = F32View::new(y)?;
    with_f32_mut(x, "round_to_bf16", |x| {
        x.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x = rounded(*y)));
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// bfloat16 has 8 bits of precision: from 1 to 2 its values are 1/128 apart, and 1 + 1/256 lies between two.
    #[test]
    fn rounding_is_to_nearest_and_to_even_between() {
        let ulp = 1.0 / 128.0;
        let near = f32::EPSILON;
        let given =
            [1.0, 1.0 + ulp / 2.0, 1.0 + ulp / 2.0 + near, 1.0 + 1.5 * ulp, -(1.0 + ulp / 2.0 - near), 1e-40, f32::INFINITY, 3.4e38];
        let expected = [1.0, 1.0, 1.0 + ulp, 1.0 + 2.0 * ulp, -1.0, f32::from_bits(0x0001_0000), f32::INFINITY, f32::INFINITY];
        let x = Tensor::new(&given, &Device::Cpu).unwrap();
        let into = x.zeros_like().unwrap();
        round_into_(&into, &x).unwrap();
        assert_eq!(into.to_vec1::<f32>().unwrap(), expected);
        assert_eq!(x.to_vec1::<f32>().unwrap(), given);
        round_(&x).unwrap();
        assert_eq!(x.to_vec1::<f32>().unwrap(), expected);
        round_(&x).unwrap();
        assert_eq!(x.to_vec1::<f32>().unwrap(), expected, "rounded twice is rounded once");
        assert!(round_into_(&x, &into.narrow(0, 0, 3).unwrap()).is_err());
    }
}
