//! Summing slots' gradients over ranks.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::accumulate::{Fold, Partial, SlotAccumulator, Slots};
use super::shards::{Shards, Wire, all_gather_shards};
use super::slots::{Node, SlotTree};
use super::{Collectives, DistError, ProcessGroup, Reduction, host};
use crate::kernels::elementwise;

/// The sum `[n]` over all slots, on every rank.
///
/// With [`Reduction::SlotTree`] its bits depend on the slots' gradients alone, not on how the slots are divided among ranks. A rank that
/// has one subtree sends about 2n values, as a ring all-reduce does.
///
/// # Errors
/// On all ranks alike when the ranges do not cover the tree or differ in size.
pub(super) fn reduce(tensors: &dyn Collectives, accumulator: SlotAccumulator) -> Result<Tensor, DistError> {
    let group = tensors.group();
    let parts = Parts::agree(group, accumulator)?;
    if let Some(root) = parts.root {
        return tensors.broadcast(&parts.own_sum()?, root);
    }
    if parts.fold.reduction == Reduction::AllReduce {
        return tensors.all_reduce(&parts.own_sum()?);
    }
    let whole = elementwise::zeros(parts.num_elements, &parts.device)?;
    let shards = Shards::new(parts.num_elements, group.world_size(), 1);
    let shard = parts.reduce_scatter(tensors, &shards)?;
    host::put(&whole, shards.range(group.rank()).start, &shard)?;
    all_gather_shards(tensors, &whole, &shards, Wire::F32)?;
    Ok(whole)
}

/// This rank's shard of the sum over all slots, `[shards.range(rank).len()]`; `shards` is for sums of this size on these ranks.
///
/// With [`Reduction::SlotTree`] the bits are those that [`reduce`] gives; with [`Reduction::AllReduce`] the ranks' sums are added in the
/// order of the slots. A rank that has one subtree sends about n values, and beyond its gradient and its shard needs a bucket of memory.
///
/// # Errors
/// On all ranks alike when the ranges do not cover the tree or differ in size.
pub(super) fn reduce_scatter(tensors: &dyn Collectives, accumulator: SlotAccumulator, shards: &Shards) -> Result<Tensor, DistError> {
    let parts = Parts::agree(tensors.group(), accumulator)?;
    let Some(root) = parts.root else { return parts.reduce_scatter(tensors, shards) };
    let own = shards.range(tensors.group().rank());
    let shard = tensors.broadcast(&parts.own_sum()?, root)?.narrow(0, own.start, own.len())?;
    // A copy where the rest of the sum is not this rank's, so that its memory is given back.
    Ok(if own.len() < shards.num_elements() { shard.force_contiguous()? } else { shard })
}

/// What this rank brings, and what the others do.
struct Parts {
    /// This rank's sums, and the order in which all are added.
    fold: Fold,
    sources: Vec<Source>,
    /// The rank that has computed all slots, if one has: nothing needs to be added.
    root: Option<usize>,
    /// Of a sum.
    num_elements: usize,
    device: Device,
}

/// A sum that some rank holds.
#[derive(Clone, Debug)]
pub(super) struct Source {
    node: Node,
    pub(super) rank: usize,
    /// Its place among that rank's sums.
    place: usize,
}

/// All ranks' sums in the order in which they are added.
pub(super) fn sources(reduction: Reduction, tree: &SlotTree, ranges: &[Range<usize>]) -> Vec<Source> {
    let nodes = |range: &Range<usize>| match reduction {
        Reduction::SlotTree => tree.cover(range),
        Reduction::AllReduce if range.is_empty() => Vec::new(),
        Reduction::AllReduce => vec![Node { lo: range.start, hi: range.end }],
    };
    let of_rank = |(rank, range)| nodes(range).into_iter().enumerate().map(move |(place, node)| Source { node, rank, place });
    let mut sources: Vec<Source> = ranges.iter().enumerate().flat_map(of_rank).collect();
    sources.sort_by_key(|s| s.node.lo);
    sources
}

impl Parts {
    /// Collective.
    fn agree(group: &dyn ProcessGroup, accumulator: SlotAccumulator) -> Result<Self, DistError> {
        let ranges = accumulator.gather_ranges(group, Slots::Computed)?;
        let SlotAccumulator { num_elements, device, fold, .. } = accumulator;
        let sources = sources(fold.reduction, &fold.tree, &ranges);
        let root = ranges.iter().position(|r| r.len() == fold.tree.num_slots());
        Ok(Self { fold, sources, root, num_elements, device })
    }

    /// The sum of a rank that has one, and zeros of one that computed no slot.
    fn own_sum(mut self) -> Result<Tensor, DistError> {
        match self.fold.partials.pop() {
            Some(partial) => Ok(partial.sum),
            None => Ok(elementwise::zeros(self.num_elements, &self.device)?),
        }
    }

    /// Bucket by bucket, each rank sums its piece.
    fn reduce_scatter(self, tensors: &dyn Collectives, shards: &Shards) -> Result<Tensor, DistError> {
        let own = shards.range(tensors.group().rank());
        let shard = elementwise::zeros(own.len(), &self.device)?;
        for pieces in shards.buckets() {
            let at = pieces[tensors.group().rank()].start;
            let sum = sum_pieces(tensors, &self.fold, &pieces, &self.sources, &self.device)?;
            host::put(&shard, at - own.start, &sum)?;
        }
        Ok(shard)
    }
}

/// This rank's piece of the sum: each rank receives its piece of every sum that `sources` lists, and adds them in that order. `mine` has this
/// rank's sums.
pub(super) fn sum_pieces(
    tensors: &dyn Collectives,
    mine: &Fold,
    pieces: &[Range<usize>],
    sources: &[Source],
    device: &Device,
) -> Result<Tensor, DistError> {
    let own = pieces[tensors.group().rank()].len();
    let num_sums = |rank: usize| sources.iter().filter(|source| source.rank == rank).count();
    let mut parts = Vec::with_capacity(pieces.len() * mine.partials.len());
    for piece in pieces {
        for partial in &mine.partials {
            parts.push(partial.sum.narrow(0, piece.start, piece.len())?);
        }
    }
    let send: Vec<usize> = pieces.iter().map(|piece| mine.partials.len() * piece.len()).collect();
    let receive: Vec<usize> = (0..pieces.len()).map(|from| num_sums(from) * own).collect();
    let received = tensors.all_to_all_v(&joined(parts, device)?, &send, &receive)?;

    let starts = host::starts(&receive);
    let mut fold = Fold::new(mine.reduction, mine.tree);
    for source in sources {
        let sum = received.narrow(0, starts[source.rank] + source.place * own, own)?;
        fold.push(Partial { node: source.node, sum, owned: false })?;
    }
    // The ranges tile the step's slots, so that one sum remains.
    joined(fold.partials.into_iter().map(|partial| partial.sum).collect(), device)
}

/// Vectors one behind the other; without any, an empty one.
fn joined(parts: Vec<Tensor>, device: &Device) -> Result<Tensor, DistError> {
    if parts.is_empty() { Ok(elementwise::zeros(0, device)?) } else { Ok(elementwise::cat(&parts)?) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::accumulate::tests::{bits, grad};
    use super::super::{Solo, local};
    use super::*;
    use crate::rng::{KeyedRng, Stream};

    fn accumulate(reduction: Reduction, num_slots: usize, range: Range<usize>, n: usize) -> SlotAccumulator {
        let mut accumulator = SlotAccumulator::new(reduction, SlotTree::new(num_slots), range.clone(), n, &Device::Cpu);
        for slot in range {
            accumulator.push(slot, grad(slot, n)).unwrap();
        }
        accumulator
    }

    /// The sum by the definition of the tree.
    fn by_definition(node: Node, n: usize) -> Vec<f32> {
        match node.len() {
            1 => grad(node.lo, n).to_vec1().unwrap(),
            len => {
                let mut power = 1;
                while 2 * power < len {
                    power *= 2;
                }
                let left = by_definition(Node { lo: node.lo, hi: node.lo + power }, n);
                let right = by_definition(Node { lo: node.lo + power, hi: node.hi }, n);
                left.iter().zip(right).map(|(a, b)| a + b).collect()
            }
        }
    }

    /// An uneven, contiguous split that may leave ranks without a slot.
    pub fn split(num_slots: usize, world_size: usize, seed: u64) -> Vec<Range<usize>> {
        let rng = KeyedRng::new(seed, Stream::Shuffle, num_slots as u64);
        let mut cuts: Vec<usize> = (1..world_size).map(|i| rng.below(i as u64, num_slots as u32 + 1) as usize).collect();
        cuts.extend([0, num_slots]);
        cuts.sort_unstable();
        cuts.windows(2).map(|w| w[0]..w[1]).collect()
    }

    #[test]
    fn slot_tree_of_any_split_and_world_size_gives_the_same_bits() {
        for num_slots in 1..=33 {
            let n = [1, 3, 17, 64][num_slots % 4];
            let solo = bits(&reduce(&Solo, accumulate(Reduction::SlotTree, num_slots, 0..num_slots, n)).unwrap());
            let root = by_definition(Node { lo: 0, hi: num_slots }, n);
            assert_eq!(solo, root.into_iter().map(f32::to_bits).collect::<Vec<_>>(), "{num_slots} slots");
            for world_size in 1..=5 {
                for seed in 0..3 {
                    let mut ranges = split(num_slots, world_size, seed);
                    if seed == 2 {
                        ranges.reverse();
                    }
                    let all =
                        local::run(world_size, |g| reduce(g, accumulate(Reduction::SlotTree, num_slots, ranges[g.rank()].clone(), n)));
                    for outcome in all {
                        let sum = outcome.unwrap();
                        assert_eq!(sum.dims(), [n]);
                        assert_eq!(bits(&sum), solo, "{num_slots} slots as {ranges:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn slot_tree_of_more_than_one_bucket_gives_the_same_bits() {
        let n = (2 << 22) + 3;
        let grad = |slot: usize| Tensor::from_iter((0..n).map(|i| ((i * 31 + slot * 17) % 1009) as f32 * 0.37), &Device::Cpu).unwrap();
        let fill = |range: Range<usize>| {
            let mut accumulator = SlotAccumulator::new(Reduction::SlotTree, SlotTree::new(3), range.clone(), n, &Device::Cpu);
            range.into_iter().for_each(|slot| accumulator.push(slot, grad(slot)).unwrap());
            accumulator
        };
        let solo = bits(&reduce(&Solo, fill(0..3)).unwrap());
        let all = local::run(2, |g| reduce(g, fill([0..1, 1..3][g.rank()].clone())));
        assert!(all.into_iter().all(|outcome| bits(&outcome.unwrap()) == solo));
    }

    /// Every shard of every rank equals its part of the whole sum, down to shards without an element.
    #[test]
    fn reduce_scatter_of_any_split_size_and_bucket_gives_shards_of_the_whole_sums_bits() {
        for (num_slots, n, align, bucket) in
            [(1, 5, 16, 64), (2, 0, 4, 64), (7, 3, 4, 64), (12, 70, 16, 9), (13, 65, 16, 1 << 22), (33, 41, 4, 1)]
        {
            let whole = bits(&reduce(&Solo, accumulate(Reduction::SlotTree, num_slots, 0..num_slots, n)).unwrap());
            for world_size in 1..=5 {
                let mut shards = Shards::new(n, world_size, align);
                shards.bucket = bucket;
                for seed in 0..3 {
                    let ranges = split(num_slots, world_size, seed);
                    let scatter = |reduction| {
                        local::run(world_size, |g| {
                            reduce_scatter(g, accumulate(reduction, num_slots, ranges[g.rank()].clone(), n), &shards)
                        })
                    };
                    for (rank, outcome) in scatter(Reduction::SlotTree).into_iter().enumerate() {
                        assert_eq!(bits(&outcome.unwrap()), whole[shards.range(rank)], "{num_slots} slots as {ranges:?}, rank {rank}");
                    }
                    for (rank, outcome) in scatter(Reduction::AllReduce).into_iter().enumerate() {
                        let expected = whole[shards.range(rank)].iter().map(|&bits| f32::from_bits(bits));
                        let shard = outcome.unwrap().to_vec1::<f32>().unwrap();
                        assert_eq!(shard.len(), expected.len());
                        shard.iter().zip(expected).for_each(|(a, b)| assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{a} {b}"));
                    }
                }
            }
        }
    }

    #[test]
    fn all_reduce_of_any_split_gives_the_sum() {
        for world_size in 1..=4 {
            let ranges = split(9, world_size, 1);
            let all = local::run(world_size, |g| reduce(g, accumulate(Reduction::AllReduce, 9, ranges[g.rank()].clone(), 6)));
            let expected = by_definition(Node { lo: 0, hi: 9 }, 6);
            for outcome in all {
                for (a, b) in outcome.unwrap().to_vec1::<f32>().unwrap().into_iter().zip(&expected) {
                    assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn reduce_of_slots_that_do_not_cover_the_step_fails_on_all_ranks() {
        let text = |ranges: [Range<usize>; 2], drop_one: bool| {
            let all = local::run(2, |g| {
                let mut accumulator =
                    SlotAccumulator::new(Reduction::SlotTree, SlotTree::new(4), ranges[g.rank()].clone(), 2, &Device::Cpu);
                for slot in ranges[g.rank()].clone().skip(usize::from(drop_one && g.rank() == 1) * 9) {
                    accumulator.push(slot, grad(slot, 2))?;
                }
                reduce(g, accumulator)
            });
            let texts: Vec<String> = all.into_iter().map(|o| o.unwrap_err().to_string()).collect();
            assert_eq!(texts[0], texts[1]);
            texts[0].clone()
        };
        assert_eq!(text([0..2, 3..4], false), "rank 1: computed slots 3..4, but slot 2 was to come");
        assert_eq!(text([0..2, 2..3], false), "rank 0: all ranks together computed 3 of 4 slots");
        assert_eq!(text([0..2, 2..4], true), "rank 1: slots 2..4 of the step were not computed");
    }
}
