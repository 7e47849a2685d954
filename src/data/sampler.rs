//! Which rows a step takes. Pure: knows a rank as two integers, and the order is the same at any world size.
//!
//! The training rows form one endless stream: one permutation of all rows an epoch, one behind the other. A place in it is the number of
//! rows consumed before, by all ranks together; so a run may go on with another world size in the middle of an epoch.

use std::num::NonZeroUsize;
use std::ops::Range;

use super::load::share_of;
use crate::rng::{KeyedRng, Stream};

/// The endless stream of training rows.
#[derive(Clone, Debug)]
pub struct Sampler {
    num_samples: NonZeroUsize,
    seed: u64,
    /// Permutations of up to two epochs: a step may span the border between them.
    epochs: [Option<(u64, Vec<u32>)>; 2],
}

impl Sampler {
    pub fn new(num_samples: NonZeroUsize, seed: u64) -> Self {
        Self { num_samples, seed, epochs: [None, None] }
    }

    /// The sample at a place of the stream.
    pub fn sample_at(&mut self, position: u64) -> usize {
        let n = self.num_samples.get() as u64;
        let (epoch, place) = (position / n, (position % n) as usize);
        let cached = &mut self.epochs[(epoch % 2) as usize];
        let order = match cached {
            Some((of, order)) if *of == epoch => order,
            _ => {
                let order = KeyedRng::new(self.seed, Stream::Shuffle, epoch).permutation(self.num_samples.get());
                &mut cached.insert((epoch, order)).1
            }
        };
        order[place] as usize
    }

    /// `(place, sample)` for each place of a range, as [`super::collate::collate`] takes them.
    pub fn rows(&mut self, positions: Range<u64>) -> Vec<(u64, usize)> {
        positions.map(|position| (position, self.sample_at(position))).collect()
    }

    pub fn num_samples(&self) -> NonZeroUsize {
        self.num_samples
    }
}

/// The places of slot `slot` of a step whose first row is at `step_start`.
pub fn slot_positions(step_start: u64, slot: usize, rows_per_slot: NonZeroUsize) -> Range<u64> {
    let rows = rows_per_slot.get() as u64;
    let start = step_start + slot as u64 * rows;
    start..start + rows
}

/// The slots that `rank` computes: contiguous; the first ranks get one more where `world_size` does not divide `num_slots`.
pub fn slots_of_rank(num_slots: usize, world_size: NonZeroUsize, rank: usize) -> Range<usize> {
    share_of(num_slots, world_size.get(), rank)
}

/// Number of slots that hold `num_samples` evaluation rows; the last may be short.
pub fn num_eval_slots(num_samples: usize, rows_per_slot: NonZeroUsize) -> usize {
    num_samples.div_ceil(rows_per_slot.get())
}

/// The samples of an evaluation slot: file order, the last slot may be short.
pub fn eval_slot(slot: usize, num_samples: usize, rows_per_slot: NonZeroUsize) -> Range<usize> {
    let start = (slot * rows_per_slot.get()).min(num_samples);
    start..(start + rows_per_slot.get()).min(num_samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nz(n: usize) -> NonZeroUsize {
        NonZeroUsize::new(n).unwrap()
    }

    #[test]
    fn sampler_gives_each_row_once_an_epoch_and_another_order_each() {
        let mut sampler = Sampler::new(nz(7), 42);
        let epochs: Vec<Vec<usize>> = (0..3).map(|e| (e * 7..e * 7 + 7).map(|p| sampler.sample_at(p)).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
    }

    #[test]
    fn sampler_asked_in_any_order_answers_the_same() {
        let mut forward = Sampler::new(nz(5), 1);
        let expected: Vec<usize> = (0..40).map(|p| forward.sample_at(p)).collect();
        let mut backward = Sampler::new(nz(5), 1);
        for p in (0..40).rev() {
            assert_eq!(backward.sample_at(p), expected[p as usize]);
        }
        let far = Sampler::new(nz(5), 1).sample_at(u64::MAX - 5);
        assert!(far < 5);
    }

    #[test]
    fn ranks_of_any_world_size_cover_the_step_in_the_same_order() {
        let rows_per_slot = nz(3);
        for num_slots in 1..12 {
            for world_size in 1..6 {
                let places: Vec<u64> = (0..world_size)
                    .flat_map(|rank| slots_of_rank(num_slots, nz(world_size), rank))
                    .flat_map(|slot| slot_positions(100, slot, rows_per_slot))
                    .collect();
                assert_eq!(places, (100..100 + 3 * num_slots as u64).collect::<Vec<_>>(), "{num_slots} slots, {world_size} ranks");
                let counts: Vec<usize> = (0..world_size).map(|rank| slots_of_rank(num_slots, nz(world_size), rank).len()).collect();
                assert!(counts.is_sorted_by(|a, b| a >= b) && counts[0] - counts[world_size - 1] <= 1, "{counts:?}");
            }
        }
    }

    #[test]
    fn eval_slots_hold_each_row_once_and_only_the_last_is_short() {
        for n in 0..20 {
            for rows in 1..6 {
                let slots: Vec<Range<usize>> = (0..num_eval_slots(n, nz(rows))).map(|s| eval_slot(s, n, nz(rows))).collect();
                assert_eq!(slots.iter().cloned().flatten().collect::<Vec<_>>(), (0..n).collect::<Vec<_>>());
                assert!(slots.iter().rev().skip(1).all(|s| s.len() == rows) && slots.iter().all(|s| !s.is_empty()));
            }
        }
    }
}
