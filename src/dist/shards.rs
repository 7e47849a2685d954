//! A flat buffer dealt to the ranks: who owns which elements, and how they come together again.

use std::ops::Range;

use candle_core::Tensor;
use half::bf16;

use super::{Collectives, DistError, ProcessGroup, host};
use crate::kernels::elementwise;

/// Elements that one exchange moves to or from a rank, for each buffer taking part; bounds the memory it takes beyond the buffers.
const BUCKET: usize = 1 << 22;

/// A flat buffer of `num_elements`, cut into one contiguous shard a rank. A pure function of three numbers: no rank has to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shards {
    num_elements: usize,
    world_size: usize,
    /// Shards begin at multiples of it.
    align: usize,
    pub(super) bucket: usize,
}

impl Shards {
    /// Shards that differ by at most `align` elements; where there are fewer than `world_size` times `align`, some are empty.
    pub fn new(num_elements: usize, world_size: usize, align: usize) -> Self {
        Self { num_elements, world_size: world_size.max(1), align: align.max(1), bucket: BUCKET }
    }

    pub fn num_elements(&self) -> usize {
        self.num_elements
    }

    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// The elements of `rank`'s shard. Shards ascend with the rank and cover the buffer.
    pub fn range(&self, rank: usize) -> Range<usize> {
        let num_units = self.num_elements.div_ceil(self.align);
        let start = |rank: usize| (rank * num_units / self.world_size * self.align).min(self.num_elements);
        start(rank)..start(rank + 1)
    }

    /// Elements of the longest shard.
    pub fn longest(&self) -> usize {
        (0..self.world_size).map(|rank| self.range(rank).len()).max().unwrap_or(0)
    }

    /// What the ranks exchange at a time: the next piece of each rank's shard, by rank. A short shard's are empty towards the end.
    pub(super) fn buckets(&self) -> impl Iterator<Item = Vec<Range<usize>>> + '_ {
        let piece = (self.bucket / self.world_size).max(1);
        (0..self.longest()).step_by(piece).map(move |at| {
            let of = |shard: Range<usize>| (shard.start + at).min(shard.end)..(shard.start + at + piece).min(shard.end);
            (0..self.world_size).map(|rank| of(self.range(rank))).collect()
        })
    }

    /// `group` has as many ranks as there are shards, and `what` is `[expected]`.
    pub(super) fn check(&self, group: &dyn ProcessGroup, what: &'static str, tensor: &Tensor, expected: usize) -> Result<(), DistError> {
        if group.world_size() != self.world_size {
            let expected = format!("{} ranks, as there are shards", self.world_size);
            return Err(DistError::Argument { collective: what, expected, found: group.world_size().to_string() });
        }
        if tensor.dims() != [expected] {
            let expected = format!("shape [{expected}]");
            return Err(DistError::Argument { collective: what, expected, found: format!("{:?}", tensor.dims()) });
        }
        Ok(())
    }
}

/// How elements of a buffer travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    F32,
    /// In half the bytes; for values that bfloat16 has.
    Bf16,
}

impl Wire {
    /// `piece`, at most `[len]`, in as many words for each piece of this length.
    fn encode(self, piece: &Tensor, len: usize) -> Result<Tensor, DistError> {
        match self {
            Self::F32 => Ok(elementwise::padded(piece, len)?),
            Self::Bf16 => {
                let word = |pair: &[f32]| {
                    let bits = |i: usize| pair.get(i).map_or(0, |&x| u32::from(bf16::from_f32(x).to_bits()));
                    f32::from_bits(bits(0) | bits(1) << 16)
                };
                let mut words: Vec<f32> = host::with_slice("all_gather_shards", piece, |piece| piece.chunks(2).map(word).collect())?;
                words.resize(len.div_ceil(2), 0.0);
                host::tensor(words, len.div_ceil(2), piece.device())
            }
        }
    }

    /// The first `len` elements of what [`Self::encode`] gave.
    fn decode(self, words: &Tensor, len: usize) -> Result<Tensor, DistError> {
        match self {
            Self::F32 => Ok(words.narrow(0, 0, len)?),
            Self::Bf16 => {
                let element = |bits: u32| bf16::from_bits(bits as u16).to_f32();
                let pair = |word: &f32| [element(word.to_bits()), element(word.to_bits() >> 16)];
                let elements: Vec<f32> =
                    host::with_slice("all_gather_shards", words, |words| words.iter().flat_map(pair).take(len).collect())?;
                host::tensor(elements, len, words.device())
            }
        }
    }
}

/// Fills `flat` `[num_elements]` in place, bucket by bucket: each rank's own shard of it is what it gives to the others.
///
/// # Errors
/// When `flat` has another length, or a collective fails.
pub fn all_gather_shards(tensors: &dyn Collectives, flat: &Tensor, shards: &Shards, wire: Wire) -> Result<(), DistError> {
    let group = tensors.group();
    shards.check(group, "all_gather_shards", flat, shards.num_elements)?;
    for pieces in shards.buckets() {
        let len = pieces.iter().map(Range::len).max().unwrap_or(0);
        let own = &pieces[group.rank()];
        let rows = tensors.all_gather(&wire.encode(&flat.narrow(0, own.start, own.len())?, len)?)?;
        // What is its own is in its place.
        for (rank, piece) in pieces.iter().enumerate().filter(|(rank, piece)| *rank != group.rank() && !piece.is_empty()) {
            host::put(flat, piece.start, &wire.decode(&rows.get(rank)?, piece.len())?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Solo, local};
    use super::*;
    use candle_core::{DType, Device};

    fn ramp(range: Range<usize>) -> Tensor {
        Tensor::from_iter(range.map(|i| i as f32 + 0.5), &Device::Cpu).unwrap()
    }

    #[test]
    fn shards_of_any_size_tile_the_buffer_at_aligned_places() {
        for world_size in 1..=5 {
            for align in [1, 4, 64] {
                for n in [0, 1, 3, 4, 5, 63, 64, 65, 257] {
                    let shards = Shards::new(n, world_size, align);
                    let ranges: Vec<_> = (0..world_size).map(|rank| shards.range(rank)).collect();
                    assert!(ranges[0].start == 0 && ranges[world_size - 1].end == n);
                    assert!(ranges.windows(2).all(|w| w[0].end == w[1].start && (w[0].end.is_multiple_of(align) || w[0].end == n)));
                    let units = ranges.iter().map(|r| r.len().div_ceil(align));
                    assert!(units.clone().max().unwrap() <= units.min().unwrap() + 1, "{n} elements as {ranges:?}");
                }
            }
        }
        assert_eq!(Shards::new(10, 4, 16).range(0), 0..0);
        assert_eq!(Shards::new(10, 4, 16).range(3), 0..10);
    }

    #[test]
    fn buckets_of_any_size_give_each_element_once() {
        for (world_size, bucket) in [(1, 1), (3, 7), (4, 3), (5, 100)] {
            let shards = Shards { bucket, ..Shards::new(41, world_size, 4) };
            let mut seen = vec![Vec::new(); world_size];
            for pieces in shards.buckets() {
                let len = pieces.iter().map(Range::len).max().unwrap();
                assert!(len > 0 && len * world_size <= bucket.max(world_size));
                pieces.into_iter().enumerate().for_each(|(rank, piece)| seen[rank].extend(piece));
            }
            assert!((0..world_size).all(|rank| seen[rank] == shards.range(rank).collect::<Vec<_>>()));
        }
    }

    #[test]
    fn gathers_of_any_world_size_and_bucket_give_the_whole_buffer() {
        for world_size in 1..=5 {
            for (n, align, bucket) in [(0, 4, 4), (3, 16, 1 << 22), (41, 4, 7), (64, 16, 1 << 22)] {
                let shards = Shards { bucket, ..Shards::new(n, world_size, align) };
                let all = local::run(world_size, |g| {
                    let own = shards.range(g.rank());
                    let flat = Tensor::zeros(n, DType::F32, &Device::Cpu)?;
                    host::put(&flat, own.start, &ramp(own.clone()))?;
                    let view = flat.reshape((n, 1))?;
                    all_gather_shards(g, &flat, &shards, Wire::F32)?;
                    // Below 128, halves are bf16's.
                    let half = Tensor::zeros(n, DType::F32, &Device::Cpu)?;
                    host::put(&half, own.start, &ramp(own.clone()))?;
                    all_gather_shards(g, &half, &shards, Wire::Bf16)?;
                    assert_eq!(half.to_vec1::<f32>()?, flat.to_vec1::<f32>()?);
                    Ok::<_, DistError>(view.flatten_all()?.to_vec1::<f32>()?)
                });
                let expected = ramp(0..n).to_vec1::<f32>().unwrap();
                for flat in all {
                    assert_eq!(flat.unwrap(), expected, "{n} elements on {world_size} ranks: a view of the buffer sees them all");
                }
            }
        }
    }

    #[test]
    fn shards_for_another_world_size_or_length_are_refused() {
        let shards = Shards::new(4, 2, 1);
        let text = all_gather_shards(&Solo, &ramp(0..4), &shards, Wire::F32).unwrap_err().to_string();
        assert_eq!(text, "all_gather_shards takes 2 ranks, as there are shards, found 1");
        let text = all_gather_shards(&Solo, &ramp(0..3), &Shards::new(4, 1, 1), Wire::F32).unwrap_err().to_string();
        assert_eq!(text, "all_gather_shards takes shape [4], found [3]");
    }
}
