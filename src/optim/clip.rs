//! The norm of the whole gradient, clipping to it, and the search for what is not finite.

use candle_core::{Result, Tensor, bail};

use crate::kernels::adamw::clip_factor;
pub use crate::kernels::adamw::{chunk_square_sums, norm_of_chunks};
use crate::kernels::elementwise;
pub use crate::kernels::non_finite::first_non_finite;
use crate::params;

/// The 2-norm of a flat f32 buffer, summed in f64 over fixed chunks.
pub fn global_norm(flat: &Tensor) -> Result<f64> {
    Ok(norm_of_chunks(chunk_square_sums(flat)?))
}

/// Scales a flat gradient, or a shard of one, in place so that the norm of the whole, which is `norm` now, is at most `max_norm`.
///
/// # Errors
/// When the gradient is not contiguous f32 on the CPU.
pub fn clip_grad(grads: &Tensor, norm: f64, max_norm: f64) -> Result<()> {
    let factor = clip_factor(norm, max_norm);
    if factor < 1.0 { elementwise::scale_(grads, factor) } else { Ok(()) }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::optim::CHUNK;
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
