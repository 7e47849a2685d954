//! The norm of the whole gradient, what it is clipped by, and where it is not finite.

use candle_core::{Result, bail};

pub use crate::kernels::adamw::{Norm, chunk_square_sums};
pub use crate::kernels::non_finite::first_non_finite;
use crate::params;

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
    use candle_core::{Device, Tensor};

    fn norm_of(square_sums: &Tensor, max_norm: Option<f64>) -> (f64, f32) {
        let norm = Norm::new(square_sums, max_norm).unwrap();
        (Norm::value(&norm.words().to_vec1::<f32>().unwrap()), norm.factor().to_vec1::<f32>().unwrap()[0])
    }

    fn global_norm(flat: &Tensor) -> f64 {
        norm_of(&chunk_square_sums(flat).unwrap(), None).0
    }

    fn tensor(data: Vec<f32>) -> Tensor {
        let n = data.len();
        Tensor::from_vec(data, n, &Device::Cpu).unwrap()
    }

    #[test]
    fn norm_of_known_vectors_is_exact() {
        assert_eq!(global_norm(&tensor(vec![3., -4., 12.])), 13.0);
        assert_eq!(global_norm(&tensor(vec![2.0; 4 * CHUNK])), 2.0 * (4.0 * CHUNK as f64).sqrt());
        assert_eq!(global_norm(&tensor(vec![])), 0.0);
    }

    #[test]
    fn norm_with_any_number_of_threads_has_the_same_bits() {
        let data = tensor((0..5 * CHUNK + 7).map(|i| ((i * 7919) % 1013) as f32 * 0.013 - 6.0).collect());
        let norm = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| global_norm(&data).to_bits());
        assert!((2..5).all(|threads| norm(threads) == norm(1)));
    }

    #[test]
    fn norm_from_the_chunks_of_aligned_shards_has_the_bits_of_the_whole() {
        let data = tensor((0..5 * CHUNK + 7).map(|i| ((i * 7919) % 1013) as f32 * 0.013 - 6.0).collect());
        let shard = |from: usize, to: usize| {
            let sums = chunk_square_sums(&data.narrow(0, from, to - from).unwrap()).unwrap();
            // As ranks exchange them.
            sums.pad_with_zeros(0, 0, 10 - sums.elem_count()).unwrap()
        };
        let shards = [shard(0, 2 * CHUNK), shard(2 * CHUNK, 2 * CHUNK), shard(2 * CHUNK, 5 * CHUNK), shard(5 * CHUNK, 5 * CHUNK + 7)];
        let (norm, _) = norm_of(&Tensor::cat(&shards, 0).unwrap(), None);
        assert_eq!(norm.to_bits(), global_norm(&data).to_bits());
    }

    #[test]
    fn factor_above_the_limit_equals_torch() {
        let (norm, factor) = norm_of(&chunk_square_sums(&tensor(vec![3., -4., 12., 0.5])).unwrap(), Some(1.0));
        assert!((norm - 169.25f64.sqrt()).abs() < 1e-12);
        let torch = [0x3e6c_2212, 0xbe9d_6c0c, 0x3f6c_2212, 0x3d1d_6c0c].map(f32::from_bits);
        for (x, t) in [3., -4., 12., 0.5].into_iter().zip(torch) {
            let x: f32 = x * factor;
            assert!((x - t).abs() <= f32::EPSILON * t.abs(), "{x} {t}");
        }
    }

    #[test]
    fn factor_is_one_below_the_limit_and_nan_where_a_norm_is_not_finite() {
        let (norm, factor) = norm_of(&chunk_square_sums(&tensor(vec![0.3, -0.4])).unwrap(), Some(1.0));
        assert!((norm - 0.5).abs() < 1e-7 && factor == 1.0);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for max_norm in [None, Some(1.0)] {
                let (norm, factor) = norm_of(&chunk_square_sums(&tensor(vec![0.3, bad])).unwrap(), max_norm);
                assert!(!norm.is_finite() && factor.is_nan(), "{bad}");
            }
        }
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
