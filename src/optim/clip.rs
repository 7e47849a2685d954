//! The norm of the whole gradient, clipping to it, and the search for what is not finite.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::{CHUNK, slice, slice_mut};
use crate::params;

/// Calls `f` with the elements of a flat f32 buffer on the CPU.
fn with_elements<R>(flat: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = flat.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(slice(storage, layout)?)),
        _ => bail!("gradients are on {:?}, expected the CPU", flat.device().location()),
    }
}

/// The 2-norm of a flat f32 buffer, summed in f64 over fixed chunks.
pub fn global_norm(flat: &Tensor) -> Result<f64> {
    Ok(norm_of_chunks(chunk_square_sums(flat)?))
}

/// The sum of squares of each chunk of [`CHUNK`] elements. Those of shards that begin at multiples of it are, one shard behind the other,
/// those of the whole buffer.
pub fn chunk_square_sums(flat: &Tensor) -> Result<Vec<f64>> {
    with_elements(flat, |data| data.par_chunks(CHUNK).map(square_sum).collect())
}

/// The 2-norm of a buffer from the sums of its chunks, in their order.
pub fn norm_of_chunks(square_sums: impl IntoIterator<Item = f64>) -> f64 {
    square_sums.into_iter().sum::<f64>().sqrt()
}

/// Eight sums side by side, so that one addition need not wait for the one before.
fn square_sum(chunk: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (octets, rest) = chunk.as_chunks::<8>();
    for octet in octets {
        for (lane, &x) in lanes.iter_mut().zip(octet) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
}

/// Scales a flat gradient, or a shard of one, in place so that the norm of the whole, which is `norm` now, is at most `max_norm`.
///
/// # Source
/// torch's `clip_grad_norm_`: the factor is max_norm / (norm + 1e-6), at most 1.
pub fn clip_grad(grads: &Tensor, norm: f64, max_norm: f64) -> Result<()> {
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        grads.inplace_op1(&Scale(factor as f32))?;
    }
    Ok(())
}

struct Scale(f32);

impl InplaceOp1 for Scale {
    fn name(&self) -> &'static str {
        "clip_scale"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        slice_mut(storage, layout)?.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|x| *x *= self.0));
        Ok(())
    }
}

/// An element that is NaN or infinite.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    pub name: String,
    /// Place in the parameter's own elements, row-major.
    pub index: usize,
    pub value: f32,
}

impl NonFinite {
    /// Element `at` of a flat buffer, `value`, by the parameter that it belongs to.
    ///
    /// # Errors
    /// When it lies behind all parameters.
    pub fn locate(at: usize, value: f32, layout: &params::Layout) -> Result<Self> {
        match layout.iter().find(|(_, entry)| (entry.offset..entry.offset + entry.num_elements()).contains(&at)) {
            Some((name, entry)) => Ok(Self { name: name.to_owned(), index: at - entry.offset, value }),
            None => bail!("element {at} of a flat buffer lies behind its layout of {}", layout.num_elements()),
        }
    }
}

/// The first element of a flat buffer that is not finite: its place and value.
pub fn first_non_finite(flat: &Tensor) -> Result<Option<(usize, f32)>> {
    with_elements(flat, |data| {
        let chunk = data.par_chunks(CHUNK).position_first(|chunk| chunk.iter().any(|x| !x.is_finite()))?;
        let at = chunk * CHUNK + data[chunk * CHUNK..].iter().position(|x| !x.is_finite())?;
        Some((at, data[at]))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use candle_core::Device;

    fn tensor(data: Vec<f32>) -> Tensor {
        let n = data.len();
        Tensor::from_vec(data, n, &Device::Cpu).unwrap()
    }

    #[test]
    fn norm_of_known_vectors_is_exact() {
        assert_eq!(global_norm(&tensor(vec![3., -4., 12.])).unwrap(), 13.0);
        assert_eq!(global_norm(&tensor(vec![2.0; 4 * CHUNK])).unwrap(), 2.0 * (4.0 * CHUNK as f64).sqrt());
        assert_eq!(global_norm(&tensor(vec![])).unwrap(), 0.0);
    }

    #[test]
    fn norm_with_any_number_of_threads_has_the_same_bits() {
        let data = tensor((0..5 * CHUNK + 7).map(|i| ((i * 7919) % 1013) as f32 * 0.013 - 6.0).collect());
        let norm = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| global_norm(&data).unwrap().to_bits())
        };
        assert!((2..5).all(|threads| norm(threads) == norm(1)));
    }

    #[test]
    fn norm_from_the_chunks_of_aligned_shards_has_the_bits_of_the_whole() {
        let data = tensor((0..5 * CHUNK + 7).map(|i| ((i * 7919) % 1013) as f32 * 0.013 - 6.0).collect());
        let shard = |from: usize, to: usize| chunk_square_sums(&data.narrow(0, from, to - from).unwrap()).unwrap();
        let sums =
            [shard(0, 2 * CHUNK), shard(2 * CHUNK, 2 * CHUNK), shard(2 * CHUNK, 5 * CHUNK), shard(5 * CHUNK, 5 * CHUNK + 7)].concat();
        assert_eq!(norm_of_chunks(sums).to_bits(), global_norm(&data).unwrap().to_bits());
    }

    #[test]
    fn clip_above_the_limit_equals_torch() {
        let grads = tensor(vec![3., -4., 12., 0.5]);
        let norm = global_norm(&grads).unwrap();
        clip_grad(&grads, norm, 1.0).unwrap();
        assert!((norm - 169.25f64.sqrt()).abs() < 1e-12);
        let torch = [0x3e6c_2212, 0xbe9d_6c0c, 0x3f6c_2212, 0x3d1d_6c0c].map(f32::from_bits);
        for (x, t) in grads.to_vec1::<f32>().unwrap().into_iter().zip(torch) {
            assert!((x - t).abs() <= f32::EPSILON * t.abs(), "{x} {t}");
        }
    }

    #[test]
    fn clip_below_the_limit_changes_nothing() {
        let grads = tensor(vec![0.3, -0.4]);
        let norm = global_norm(&grads).unwrap();
        clip_grad(&grads, norm, 1.0).unwrap();
        assert!((norm - 0.5).abs() < 1e-7);
        assert_eq!(grads.to_vec1::<f32>().unwrap(), [0.3, -0.4]);
    }

    #[test]
    fn non_finite_elements_are_found_by_name_and_index() {
        let layout = params::Layout::new(BTreeMap::from([("a".into(), vec![CHUNK, 2]), ("b".into(), vec![2, 3])]));
        let first =
            |data: &[f32]| first_non_finite(&tensor(data.to_vec())).unwrap().map(|(at, x)| NonFinite::locate(at, x, &layout).unwrap());
        let mut data = vec![1.0; layout.num_elements()];
        assert_eq!(first(&data), None);
        data[2 * CHUNK + 4] = f32::NEG_INFINITY;
        assert_eq!(first(&data), Some(NonFinite { name: "b".into(), index: 4, value: f32::NEG_INFINITY }));
        data[CHUNK + 1] = f32::NAN;
        let found = first(&data).unwrap();
        assert!(found.name == "a" && found.index == CHUNK + 1 && found.value.is_nan());
        assert!(NonFinite::locate(layout.num_elements(), 0.0, &layout).is_err());
    }
}
