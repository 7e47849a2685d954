//! Summing slots' gradients: within a rank as they come, then over ranks.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::slots::{Node, SlotTree};
use super::{DistError, ProcessGroup, Reduction, host};

/// Elements of the flat gradient that ranks exchange at a time; bounds the memory that the exchange takes beyond the gradient.
const BLOCK: usize = 1 << 22;

/// A subtree's sum.
#[derive(Debug)]
struct Partial {
    node: Node,
    sum: Tensor,
    /// The buffer is ours, so it may be added to in place.
    owned: bool,
}

/// Sums subtrees as soon as both children are there.
#[derive(Debug)]
struct Fold {
    tree: SlotTree,
    /// Disjoint and ascending, no two siblings.
    partials: Vec<Partial>,
}

impl Fold {
    fn new(tree: SlotTree) -> Self {
        Self { tree, partials: Vec::new() }
    }

    fn push(&mut self, mut right: Partial) -> candle_core::Result<()> {
        while let Some(node) = self.partials.last().and_then(|left| self.tree.parent(left.node, right.node)) {
            let Some(left) = self.partials.pop() else { break };
            let sum = match (left.owned, right.owned) {
                (true, _) => host::add_into(left.sum, &right.sum)?,
                (false, true) => host::add_into(right.sum, &left.sum)?,
                (false, false) => host::add(&left.sum, &right.sum)?,
            };
            right = Partial { node, sum, owned: true };
        }
        self.partials.push(right);
        Ok(())
    }
}

/// The gradients of a rank's contiguous share of a step's slots, summed as far as the tree allows.
///
/// Holds at most about 2 log2(number of slots) buffers.
#[derive(Debug)]
pub struct SlotAccumulator {
    reduction: Reduction,
    range: Range<usize>,
    /// The slot that comes next.
    next: usize,
    num_elements: usize,
    device: Device,
    fold: Fold,
}

impl SlotAccumulator {
    /// For the slots `range` of `tree`, in ascending order, with flat gradients of `[num_elements]` f32 on `device`.
    pub fn new(reduction: Reduction, tree: SlotTree, range: Range<usize>, num_elements: usize, device: &Device) -> Self {
        Self { reduction, next: range.start, range, num_elements, device: device.clone(), fold: Fold::new(tree) }
    }

    /// Adds the gradient `[num_elements]` of the next slot. It is not changed.
    ///
    /// # Errors
    /// When `slot` is not the next one of the range, or the gradient has another shape or dtype.
    pub fn push(&mut self, slot: usize, grad: Tensor) -> Result<(), DistError> {
        if slot != self.next || slot >= self.range.end {
            let expected = if self.next < self.range.end { format!("slot {}", self.next) } else { "no further slot".into() };
            return Err(DistError::Argument { collective: "the accumulator", expected, found: format!("slot {slot}") });
        }
        if grad.dims() != [self.num_elements] || grad.dtype() != DType::F32 {
            let expected = format!("F32 gradients of shape [{}]", self.num_elements);
            return Err(DistError::Argument {
                collective: "the accumulator",
                expected,
                found: format!("{:?} {:?}", grad.dtype(), grad.dims()),
            });
        }
        self.next += 1;
        let grad = grad.detach();
        match (self.reduction, self.fold.partials.pop()) {
            (Reduction::AllReduce, Some(Partial { node, sum, owned })) => {
                let sum = if owned { host::add_into(sum, &grad)? } else { host::add(&sum, &grad)? };
                self.fold.partials.push(Partial { node: Node { lo: node.lo, hi: slot + 1 }, sum, owned: true });
            }
            (_, last) => {
                self.fold.partials.extend(last);
                self.fold.push(Partial { node: Node { lo: slot, hi: slot + 1 }, sum: grad, owned: false })?;
            }
        }
        Ok(())
    }

    /// Buffers that are alive.
    pub fn num_buffers(&self) -> usize {
        self.fold.partials.len()
    }

    /// All ranks' ranges; every rank finds the same fault if there is one.
    fn gather_ranges(&self, group: &dyn ProcessGroup) -> Result<Vec<Range<usize>>, DistError> {
        let num_slots = self.fold.tree.num_slots();
        let mine = [
            usize::from(self.reduction == Reduction::AllReduce),
            num_slots,
            self.num_elements,
            self.range.start,
            self.range.end,
            self.next,
        ];
        let bytes: Vec<u8> = mine.iter().flat_map(|&v| (v as u64).to_le_bytes()).collect();
        let mut ranges = Vec::with_capacity(group.world_size());
        let mut first: Option<[usize; 3]> = None;
        for (rank, bytes) in group.all_gather_bytes(&bytes)?.iter().enumerate() {
            let (words, _) = bytes.as_chunks::<8>();
            let Ok([reduction, slots, elements, lo, hi, next]) =
                <[usize; 6]>::try_from(words.iter().map(|w| u64::from_le_bytes(*w) as usize).collect::<Vec<_>>())
            else {
                return Err(DistError::Message { rank, what: "its slots", expected: "48".into(), found: bytes.len() });
            };
            let common = [reduction, slots, elements];
            let expected = *first.get_or_insert(common);
            if common != expected {
                let name = |[_, s, n]: [usize; 3]| format!("reduce of {s} slots of {n} elements");
                return Err(DistError::Diverged { rank, expected: name(expected), found: name(common) });
            }
            if next < hi {
                return Err(DistError::Slots { rank, problem: format!("slots {next}..{hi} of the step were not computed") });
            }
            ranges.push(lo..hi.max(lo));
        }
        let mut order: Vec<(usize, &Range<usize>)> = ranges.iter().enumerate().filter(|(_, r)| !r.is_empty()).collect();
        order.sort_by_key(|(_, r)| r.start);
        let mut next = 0;
        for (rank, range) in order {
            if range.start != next {
                return Err(DistError::Slots { rank, problem: format!("computed slots {range:?}, but slot {next} was to come") });
            }
            next = range.end;
        }
        if next != num_slots {
            return Err(DistError::Slots { rank: 0, problem: format!("all ranks together computed {next} of {num_slots} slots") });
        }
        Ok(ranges)
    }
}

/// The sum `[n]` over all slots, on every rank.
///
/// With [`Reduction::SlotTree`] its bits depend on the slots' gradients alone, not on how the slots are divided among ranks. Ranks bring
/// their partial sums together chunk by chunk: rank r receives chunk r of every partial sum (all-to-all), adds them in tree order, and
/// all gather the summed chunks. A rank that has one subtree sends about 2n values, as a ring all-reduce does.
///
/// # Errors
/// On all ranks alike when the ranges do not cover the tree or differ in size.
pub fn reduce(group: &dyn ProcessGroup, accumulator: SlotAccumulator) -> Result<Tensor, DistError> {
    let ranges = accumulator.gather_ranges(group)?;
    let SlotAccumulator { reduction, num_elements, device, fold: Fold { tree, mut partials }, .. } = accumulator;
    let sum_or_zeros = |last: Option<Partial>| last.map_or_else(|| Tensor::zeros(num_elements, DType::F32, &device), |p| Ok(p.sum));
    if reduction == Reduction::AllReduce {
        return group.all_reduce(&sum_or_zeros(partials.pop())?);
    }
    // Whoever holds the whole sum needs no exchange.
    if let Some(root) = ranges.iter().position(|r| r.len() == tree.num_slots()) {
        return group.broadcast(&sum_or_zeros(partials.pop())?, root);
    }
    let exchange =
        Exchange { group, tree, sources: sources(&tree, &ranges), depth: ranges.iter().map(|r| tree.cover(r).len()).max().unwrap_or(0) };
    let mut blocks = Vec::new();
    for start in (0..num_elements).step_by(BLOCK) {
        let len = BLOCK.min(num_elements - start);
        let mut mine = partials.iter().map(|p| p.sum.narrow(0, start, len)).collect::<candle_core::Result<Vec<_>>>()?;
        while mine.len() < exchange.depth {
            mine.push(Tensor::zeros(len, DType::F32, &device)?);
        }
        blocks.push(exchange.block(&mine, len)?);
    }
    match blocks.as_slice() {
        [] => Ok(sum_or_zeros(None)?),
        [block] => Ok(block.clone()),
        blocks => Ok(Tensor::cat(blocks, 0)?),
    }
}

/// A node that some rank holds.
struct Source {
    node: Node,
    rank: usize,
    /// Its place among that rank's nodes.
    place: usize,
}

/// All ranks' nodes in the order in which they are summed.
fn sources(tree: &SlotTree, ranges: &[Range<usize>]) -> Vec<Source> {
    let mut sources: Vec<Source> = ranges
        .iter()
        .enumerate()
        .flat_map(|(rank, range)| tree.cover(range).into_iter().enumerate().map(move |(place, node)| Source { node, rank, place }))
        .collect();
    sources.sort_by_key(|s| s.node.lo);
    sources
}

/// How the ranks bring their partial sums together.
struct Exchange<'a> {
    group: &'a dyn ProcessGroup,
    tree: SlotTree,
    sources: Vec<Source>,
    /// The largest number of partial sums on a rank.
    depth: usize,
}

impl Exchange<'_> {
    /// Sums a block `[len]` of all ranks' partial sums, of which `mine` are this rank's, filled up to `depth`.
    fn block(&self, mine: &[Tensor], len: usize) -> Result<Tensor, DistError> {
        let (world_size, depth) = (self.group.world_size(), self.depth);
        let chunk = len.div_ceil(world_size);
        let rows = mine
            .iter()
            .map(|partial| partial.pad_with_zeros(0, 0, world_size * chunk - len)?.reshape((world_size, 1, chunk)))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let rows = Tensor::cat(&rows, 1)?.reshape((world_size, depth * chunk))?;
        let received = self.group.all_to_all(&rows)?.reshape((world_size, depth, chunk))?;
        let mut fold = Fold::new(self.tree);
        for source in &self.sources {
            fold.push(Partial { node: source.node, sum: received.get(source.rank)?.get(source.place)?, owned: false })?;
        }
        // The ranges tile the tree, so that its root is what remains.
        let sums = fold.partials.into_iter().map(|p| p.sum).collect::<Vec<_>>();
        Ok(self.group.all_gather(&Tensor::cat(&sums, 0)?)?.flatten_all()?.narrow(0, 0, len)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Solo, local};
    use super::*;
    use crate::rng::{KeyedRng, Stream};

    /// Values over many magnitudes, so that another order of summation shows.
    fn grad(slot: usize, n: usize) -> Tensor {
        let rng = KeyedRng::new(11, Stream::ParameterInit, slot as u64);
        let values = rng.normal(n).into_iter().enumerate().map(|(i, v)| v * 10f32.powi((i % 7) as i32 - 3));
        Tensor::from_iter(values, &Device::Cpu).unwrap()
    }

    fn accumulate(reduction: Reduction, num_slots: usize, range: Range<usize>, n: usize) -> SlotAccumulator {
        let mut accumulator = SlotAccumulator::new(reduction, SlotTree::new(num_slots), range.clone(), n, &Device::Cpu);
        for slot in range {
            accumulator.push(slot, grad(slot, n)).unwrap();
        }
        accumulator
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        t.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
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
    fn split(num_slots: usize, world_size: usize, seed: u64) -> Vec<Range<usize>> {
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
    fn slot_tree_of_more_than_one_block_gives_the_same_bits() {
        let n = 2 * BLOCK + 3;
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

    #[test]
    fn accumulator_of_aligned_slots_holds_few_buffers_and_leaves_gradients_alone() {
        let mut accumulator = SlotAccumulator::new(Reduction::SlotTree, SlotTree::new(33), 0..33, 5, &Device::Cpu);
        let same = grad(0, 5);
        for slot in 0..33 {
            accumulator.push(slot, same.clone()).unwrap();
            assert!(accumulator.num_buffers() <= 6);
        }
        assert_eq!(accumulator.num_buffers(), 1);
        assert_eq!(bits(&same), bits(&grad(0, 5)));
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

    #[test]
    fn push_of_a_wrong_slot_or_shape_is_refused() {
        let mut accumulator = SlotAccumulator::new(Reduction::SlotTree, SlotTree::new(4), 1..3, 2, &Device::Cpu);
        assert!(accumulator.push(0, grad(0, 2)).unwrap_err().to_string().contains("takes slot 1, found slot 0"));
        assert!(accumulator.push(1, grad(1, 3)).unwrap_err().to_string().contains("shape [2], found F32 [3]"));
    }
}
