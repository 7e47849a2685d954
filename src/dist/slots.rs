//! The fixed tree over the slots of a step, and what a slot yields beside its gradient.

use std::ops::Range;

use super::{DistError, ProcessGroup};

/// A subtree: the slots `lo..hi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    pub lo: usize,
    pub hi: usize,
}

impl Node {
    pub(super) fn len(self) -> usize {
        self.hi - self.lo
    }

    /// Where an inner node parts: the largest power of two below its length, from `lo` on. None for a leaf.
    fn split(self) -> Option<usize> {
        (self.len() > 1).then(|| self.lo + (self.len().next_power_of_two() >> 1))
    }
}

/// The order in which slots are summed: a binary tree that depends on the number of slots alone, not on ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotTree {
    num_slots: usize,
}

impl SlotTree {
    pub fn new(num_slots: usize) -> Self {
        Self { num_slots }
    }

    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// The maximal subtrees inside `range`, ascending: what a rank that computed these slots holds.
    pub fn cover(&self, range: &Range<usize>) -> Vec<Node> {
        let mut nodes = Vec::new();
        let mut open = vec![Node { lo: 0, hi: self.num_slots }];
        while let Some(node) = open.pop() {
            if range.end <= node.lo || node.hi <= range.start || node.len() == 0 {
                continue;
            }
            match node.split() {
                Some(middle) if node.lo < range.start || range.end < node.hi => {
                    open.extend([Node { lo: middle, hi: node.hi }, Node { lo: node.lo, hi: middle }]);
                }
                _ => nodes.push(node),
            }
        }
        nodes
    }

    /// The node whose children are `left` and `right`, if they are siblings.
    pub(super) fn parent(&self, left: Node, right: Node) -> Option<Node> {
        let wanted = Node { lo: left.lo, hi: right.hi };
        let mut node = Node { lo: 0, hi: self.num_slots };
        while node != wanted {
            let middle = node.split()?;
            node = if wanted.lo >= middle { Node { lo: middle, hi: node.hi } } else { Node { lo: node.lo, hi: middle } };
        }
        (left.hi == right.lo && node.split() == Some(right.lo)).then_some(node)
    }
}

/// A slot's share of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotScalars {
    pub slot: usize,
    /// Sum of the target tokens' negative log-likelihoods.
    pub nll_sum: f64,
    pub num_targets: u64,
    /// Loss and gradient of the slot hold no NaN and no infinity.
    pub finite: bool,
}

const SCALARS_BYTES: usize = 25;

impl SlotScalars {
    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend((self.slot as u64).to_le_bytes());
        bytes.extend(self.nll_sum.to_bits().to_le_bytes());
        bytes.extend(self.num_targets.to_le_bytes());
        bytes.push(u8::from(self.finite));
    }

    fn decode(bytes: &[u8; SCALARS_BYTES]) -> Self {
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| bytes[8 * i + k]));
        Self { slot: word(0) as usize, nll_sum: f64::from_bits(word(1)), num_targets: word(2), finite: bytes[24] != 0 }
    }
}

/// All ranks' scalars, ordered by slot, with the bits they were given with.
///
/// # Errors
/// When two ranks give the same slot, or the collective fails.
pub fn gather_slots(group: &dyn ProcessGroup, mine: &[SlotScalars]) -> Result<Vec<SlotScalars>, DistError> {
    Ok(gather_slots_and_notes(group, mine, 0)?.0)
}

/// As [`gather_slots`], and in the same message a byte of the caller's from each rank, by rank.
///
/// # Errors
/// As [`gather_slots`].
pub fn gather_slots_and_notes(group: &dyn ProcessGroup, mine: &[SlotScalars], note: u8) -> Result<(Vec<SlotScalars>, Vec<u8>), DistError> {
    let mut bytes = Vec::with_capacity(1 + mine.len() * SCALARS_BYTES);
    bytes.push(note);
    mine.iter().for_each(|s| s.encode(&mut bytes));
    let (mut all, mut notes) = (Vec::new(), Vec::new());
    for (rank, bytes) in group.all_gather_bytes(&bytes)?.iter().enumerate() {
        let whole = bytes.split_first().map(|(note, records)| (note, records.as_chunks::<SCALARS_BYTES>()));
        let Some((note, (records, []))) = whole else {
            let expected = format!("1 and a multiple of {SCALARS_BYTES}");
            return Err(DistError::Message { rank, what: "slot scalars", expected, found: bytes.len() });
        };
        notes.push(*note);
        all.extend(records.iter().map(|record| (rank, SlotScalars::decode(record))));
    }
    all.sort_by_key(|(_, s)| s.slot);
    if let Some(pair) = all.windows(2).find(|pair| pair[0].1.slot == pair[1].1.slot) {
        return Err(DistError::Slots { rank: pair[1].0, problem: format!("slot {} was computed twice", pair[1].1.slot) });
    }
    Ok((all.into_iter().map(|(_, s)| s).collect(), notes))
}

#[cfg(test)]
mod tests {
    use super::super::local;
    use super::*;

    #[test]
    fn cover_of_seven_slots_is_the_maximal_subtrees() {
        let tree = SlotTree::new(7);
        let cover = |range: Range<usize>| tree.cover(&range).iter().map(|n| (n.lo, n.hi)).collect::<Vec<_>>();
        assert_eq!(cover(0..7), [(0, 7)]);
        assert_eq!(cover(0..4), [(0, 4)]);
        assert_eq!(cover(1..6), [(1, 2), (2, 4), (4, 6)]);
        assert_eq!(cover(6..7), [(6, 7)]);
        assert_eq!(cover(3..3), []);
        assert_eq!(SlotTree::new(0).cover(&(0..0)), []);
    }

    #[test]
    fn cover_of_every_range_tiles_it_with_maximal_subtrees() {
        for num_slots in 1..=33 {
            let tree = SlotTree::new(num_slots);
            for lo in 0..num_slots {
                for hi in lo + 1..=num_slots {
                    let nodes = tree.cover(&(lo..hi));
                    assert!(nodes[0].lo == lo && nodes[nodes.len() - 1].hi == hi);
                    assert!(nodes.windows(2).all(|w| w[0].hi == w[1].lo && tree.parent(w[0], w[1]).is_none()));
                }
            }
        }
    }

    #[test]
    fn scalars_of_uneven_ranks_come_back_sorted_with_their_bits() {
        let scalars =
            |slot: usize| SlotScalars { slot, nll_sum: 0.1 * slot as f64 + 1e-17, num_targets: u64::MAX - slot as u64, finite: slot != 3 };
        let all = local::run(3, |g| {
            let mine: Vec<_> = [vec![], vec![4, 2, 3], vec![0, 1]][g.rank()].iter().map(|&s| scalars(s)).collect();
            gather_slots_and_notes(g, &mine, 10 + g.rank() as u8)
        });
        for outcome in all {
            assert_eq!(outcome.unwrap(), ((0..5).map(scalars).collect::<Vec<_>>(), vec![10, 11, 12]));
        }
    }

    #[test]
    fn scalars_of_a_slot_given_twice_are_refused_with_the_rank() {
        let all = local::run(2, |g| gather_slots(g, &[SlotScalars { slot: 5, nll_sum: 0.0, num_targets: 0, finite: true }]));
        assert_eq!(all[0].as_ref().unwrap_err().to_string(), "rank 1: slot 5 was computed twice");
    }
}
