//! Packs rows into a [`MicroBatch`]: one behind the other, no padding.

use super::{Dataset, MicroBatch};

/// The rows `(place in the stream, sample index)` as one micro-batch; see [`MicroBatch`] for what its fields hold.
pub fn collate(rows: &[(u64, usize)], data: &Dataset) -> MicroBatch {
    let num_tokens = rows.iter().map(|&(_, i)| data.sample(i).ids.len().saturating_sub(1)).sum();
    let mut batch = MicroBatch {
        ids: Vec::with_capacity(num_tokens),
        positions: Vec::with_capacity(num_tokens),
        row_bounds: vec![0],
        ..Default::default()
    };
    for &(position, index) in rows {
        let sample = data.sample(index);
        let start = batch.ids.len() as u32;
        let inputs = sample.ids.split_last().map_or(&[][..], |(_, inputs)| inputs);
        batch.ids.extend_from_slice(inputs);
        batch.positions.extend(0..inputs.len() as u32);
        batch.row_bounds.push(batch.ids.len());
        let next = sample.ids.iter().zip(sample.is_target).skip(1);
        batch.targets.extend((start..).zip(next).filter(|(_, (_, target))| **target).map(|(from, (&id, _))| (from, id)));
        batch.stream_positions.push(position);
        batch.sample_indices.push(index);
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sample;
    use crate::rng::{KeyedRng, Stream};
    use std::path::Path;

    fn random_set(seed: u64, num_samples: usize) -> Dataset {
        let mut set = Dataset::new(Path::new("x"));
        for row in 0..num_samples {
            let rng = KeyedRng::new(seed, Stream::DemoData, row as u64);
            let n = 2 + rng.below(0, 30) as usize;
            let prompt = rng.below(1, n as u32) as usize;
            let ids = (0..n).map(|i| rng.below(2 + i as u64, 1000)).collect();
            let is_target = (0..n).map(|i| i >= prompt && rng.below(100 + i as u64, 10) > 0).collect();
            set.push(Sample { ids, is_target }.as_ref(), row + 1);
        }
        set
    }

    #[test]
    fn collated_random_rows_can_be_taken_apart_again() {
        for seed in 0..50 {
            let set = random_set(seed, 12);
            let rng = KeyedRng::new(seed, Stream::Shuffle, 0);
            let rows: Vec<(u64, usize)> = (0..u64::from(rng.below(0, 9))).map(|i| (1000 + i, rng.below(1 + i, 12) as usize)).collect();
            let batch = collate(&rows, &set);
            assert_eq!(batch.row_bounds.len(), rows.len() + 1);
            assert_eq!((batch.ids.len(), batch.positions.len()), (*batch.row_bounds.last().unwrap(), batch.ids.len()));
            assert!(batch.targets.is_sorted_by(|a, b| a.0 < b.0));
            let mut num_targets = 0;
            for (r, &(position, index)) in rows.iter().enumerate() {
                let range = batch.row_bounds[r]..batch.row_bounds[r + 1];
                let sample = set.sample(index);
                assert_eq!(batch.ids[range.clone()], sample.ids[..sample.ids.len() - 1]);
                assert!(batch.positions[range.clone()].iter().enumerate().all(|(i, &p)| i == p as usize));
                for t in 1..sample.ids.len() {
                    let target = batch.targets.iter().find(|target| target.0 as usize == range.start + t - 1);
                    assert_eq!(target.map(|t| t.1), sample.is_target[t].then_some(sample.ids[t]), "seed {seed} row {r} token {t}");
                    num_targets += usize::from(sample.is_target[t]);
                }
                assert_eq!((batch.stream_positions[r], batch.sample_indices[r]), (position, index));
            }
            assert_eq!(batch.targets.len(), num_targets);
        }
    }

    #[test]
    fn collated_row_of_one_token_takes_no_place() {
        let mut set = Dataset::new(Path::new("x"));
        set.push(Sample { ids: vec![9], is_target: vec![true] }.as_ref(), 1);
        let batch = collate(&[(0, 0)], &set);
        assert_eq!((batch.ids.len(), batch.row_bounds, batch.targets.len()), (0, vec![0, 0], 0));
    }
}
