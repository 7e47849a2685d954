//! Summing slots' gradients within a rank, as they come.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::slots::{Node, SlotTree};
use super::{DistError, ProcessGroup, Reduction, gather_words};
use crate::kernels::elementwise;

/// The sum of some neighbouring slots.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) node: Node,
    pub(super) sum: Tensor,
    /// The buffer is ours, so it may be added to in place.
    pub(super) owned: bool,
}

/// Sums neighbours as soon as the order of summation allows.
#[derive(Debug)]
pub(super) struct Fold {
    pub(super) reduction: Reduction,
    pub(super) tree: SlotTree,
    /// Disjoint and ascending; no two may be added yet.
    pub(super) partials: Vec<Partial>,
}

impl Fold {
    pub(super) fn new(reduction: Reduction, tree: SlotTree) -> Self {
        Self { reduction, tree, partials: Vec::new() }
    }

    /// What `left` and `right` add up to, if they may be added: siblings of the tree, or any that come one after the other.
    fn joined(&self, left: Node, right: Node) -> Option<Node> {
        match self.reduction {
            Reduction::SlotTree => self.tree.parent(left, right),
            Reduction::AllReduce => Some(Node { lo: left.lo, hi: right.hi }),
        }
    }

    pub(super) fn push(&mut self, mut right: Partial) -> candle_core::Result<()> {
        while let Some(node) = self.partials.last().and_then(|left| self.joined(left.node, right.node)) {
            let Some(left) = self.partials.pop() else { break };
            let add_into = |sum: Tensor, other: &Tensor| elementwise::add_(&sum, other).map(|()| sum);
            let sum = match (left.owned, right.owned) {
                (true, _) => add_into(left.sum, &right.sum)?,
                (false, true) => add_into(right.sum, &left.sum)?,
                (false, false) => elementwise::add(&left.sum, &right.sum)?,
            };
            right = Partial { node, sum, owned: true };
        }
        self.partials.push(right);
        Ok(())
    }
}

/// Whether a rank's slots are computed when it tells the others which they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slots {
    Ahead,
    Computed,
}

/// The gradients of a rank's contiguous share of a step's slots, summed as far as the tree allows.
///
/// Holds at most about 2 log2(number of slots) buffers.
#[derive(Debug)]
pub(super) struct SlotAccumulator {
    range: Range<usize>,
    /// The slot that comes next.
    next: usize,
    pub(super) num_elements: usize,
    pub(super) device: Device,
    pub(super) fold: Fold,
}

impl SlotAccumulator {
    /// For the slots `range` of `tree`, in ascending order, with flat gradients of `[num_elements]` f32 on `device`.
    pub(super) fn new(reduction: Reduction, tree: SlotTree, range: Range<usize>, num_elements: usize, device: &Device) -> Self {
        Self { next: range.start, range, num_elements, device: device.clone(), fold: Fold::new(reduction, tree) }
    }

    /// Adds the gradient `[num_elements]` of the next slot. It is not changed.
    ///
    /// # Errors
    /// When `slot` is not the next one of the range, or the gradient has another shape or dtype.
    pub(super) fn push(&mut self, slot: usize, grad: Tensor) -> Result<(), DistError> {
        let partial = self.take_next(slot, grad)?;
        self.fold.push(partial)?;
        Ok(())
    }

    /// The next slot's gradient, checked, before it is added.
    pub(super) fn take_next(&mut self, slot: usize, grad: Tensor) -> Result<Partial, DistError> {
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
        Ok(Partial { node: Node { lo: slot, hi: slot + 1 }, sum: grad.detach(), owned: false })
    }

    /// The slots that are still to come.
    pub(super) fn missing(&self) -> Range<usize> {
        self.next..self.range.end.max(self.next)
    }

    /// What `rank` has to answer for where slots are missing.
    pub(super) fn not_computed(&self, rank: usize) -> DistError {
        not_computed(rank, self.missing())
    }

    /// All ranks' ranges; every rank finds the same fault if there is one.
    pub(super) fn gather_ranges(&self, group: &dyn ProcessGroup, slots: Slots) -> Result<Vec<Range<usize>>, DistError> {
        let next = if slots == Slots::Computed { self.next } else { self.range.end };
        let num_slots = self.fold.tree.num_slots();
        let mine = [
            usize::from(self.fold.reduction == Reduction::AllReduce),
            num_slots,
            self.num_elements,
            self.range.start,
            self.range.end,
            next,
        ];
        let mine = mine.map(|v| v as u64);
        let mut ranges = Vec::with_capacity(group.world_size());
        let mut first: Option<[usize; 3]> = None;
        for (rank, words) in gather_words(group, "its slots", &mine)?.into_iter().enumerate() {
            let Ok(words) = <[u64; 6]>::try_from(words.as_slice()) else {
                return Err(DistError::Message { rank, what: "its slots", expected: "48".into(), found: words.len() * 8 });
            };
            let [reduction, slots, elements, lo, hi, next] = words.map(|word| word as usize);
            let common = [reduction, slots, elements];
            let expected = *first.get_or_insert(common);
            if common != expected {
                let name = |[_, s, n]: [usize; 3]| format!("reduce of {s} slots of {n} elements");
                return Err(DistError::Diverged { rank, expected: name(expected), found: name(common) });
            }
            if next < hi {
                return Err(not_computed(rank, next..hi));
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

fn not_computed(rank: usize, slots: Range<usize>) -> DistError {
    DistError::Slots { rank, problem: format!("slots {slots:?} of the step were not computed") }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::rng::{KeyedRng, Stream};

    /// Values over many magnitudes, so that another order of summation shows.
    pub fn grad(slot: usize, n: usize) -> Tensor {
        let rng = KeyedRng::new(11, Stream::ParameterInit, slot as u64);
        let values = rng.normal(n).into_iter().enumerate().map(|(i, v)| v * 10f32.powi((i % 7) as i32 - 3));
        Tensor::from_iter(values, &Device::Cpu).unwrap()
    }

    pub fn bits(t: &Tensor) -> Vec<u32> {
        t.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn accumulator_of_aligned_slots_holds_few_buffers_and_leaves_gradients_alone() {
        let mut accumulator = SlotAccumulator::new(Reduction::SlotTree, SlotTree::new(33), 0..33, 5, &Device::Cpu);
        let same = grad(0, 5);
        for slot in 0..33 {
            accumulator.push(slot, same.clone()).unwrap();
            assert!(accumulator.fold.partials.len() <= 6);
        }
        assert_eq!(accumulator.fold.partials.len(), 1);
        assert_eq!(bits(&same), bits(&grad(0, 5)));
    }

    #[test]
    fn push_of_a_wrong_slot_or_shape_is_refused() {
        let mut accumulator = SlotAccumulator::new(Reduction::SlotTree, SlotTree::new(4), 1..3, 2, &Device::Cpu);
        assert!(accumulator.push(0, grad(0, 2)).unwrap_err().to_string().contains("takes slot 1, found slot 0"));
        assert!(accumulator.push(1, grad(1, 3)).unwrap_err().to_string().contains("shape [2], found F32 [3]"));
    }
}
