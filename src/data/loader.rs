//! Prepares the micro-batches of coming steps on a background thread.

use std::any::Any;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::collate::collate;
use super::sampler::{Sampler, slot_positions, slots_of_rank};
use super::{DataError, Dataset, MicroBatch};

/// Steps that wait ready while one is computed.
const DEPTH: usize = 2;

/// How the rows of a step are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    pub rows_per_slot: NonZeroUsize,
    pub slots_per_step: NonZeroUsize,
    pub world_size: NonZeroUsize,
    pub rank: usize,
}

impl Division {
    pub fn rows_per_step(&self) -> u64 {
        (self.rows_per_slot.get() * self.slots_per_step.get()) as u64
    }
}

/// One rank's part of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepBatches {
    /// Place of the step's first row in the training stream.
    pub start: u64,
    /// (slot, its rows), ascending; none where there are more ranks than slots.
    pub slots: Vec<(usize, MicroBatch)>,
}

/// Values made ahead of need by a thread of its own. Dropping it ends the thread.
pub struct Prefetch<T> {
    ready: Option<Receiver<Result<T, DataError>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Calls `make` until it gives none or an error, at most `depth` values ahead.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn spawn(depth: usize, mut make: impl FnMut() -> Result<Option<T>, DataError> + Send + 'static) -> Result<Self, DataError> {
        let (send, ready) = sync_channel(depth);
        let work = move || {
            while let Some(value) = make().transpose() {
                let last = value.is_err();
                if send.send(value).is_err() || last {
                    break;
                }
            }
        };
        let thread = Builder::new().name("loader".to_owned()).spawn(work).map_err(|e| DataError::Loader { message: e.to_string() })?;
        Ok(Self { ready: Some(ready), thread: Some(thread) })
    }
}

impl<T> Iterator for Prefetch<T> {
    type Item = Result<T, DataError>;

    /// The next value; none at the end. An error of `make`, or its panic, is the last item.
    fn next(&mut self) -> Option<Self::Item> {
        if let Some(Ok(value)) = self.ready.as_ref().map(Receiver::recv) {
            return Some(value);
        }
        self.ready = None;
        let panic = self.thread.take()?.join().err()?;
        Some(Err(DataError::Loader { message: panic_text(panic.as_ref()) }))
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        // A thread that waits to send wakes up once nobody can receive.
        self.ready = None;
        if let Some(thread) = self.thread.take() {
            // Nobody is left to hear of a panic.
            let _ = thread.join();
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "it panicked".to_owned())
}

/// The micro-batches of one rank, step by step, from the row at `start` of the training stream; ends after `num_steps`.
///
/// # Errors
/// When no thread can be started.
pub fn training_batches(
    data: Arc<Dataset>,
    mut sampler: Sampler,
    division: Division,
    start: u64,
    num_steps: u64,
) -> Result<Prefetch<StepBatches>, DataError> {
    let mut step = 0;
    Prefetch::spawn(DEPTH, move || {
        if step == num_steps {
            return Ok(None);
        }
        let start = start + step * division.rows_per_step();
        step += 1;
        let slots = slots_of_rank(division.slots_per_step.get(), division.world_size, division.rank);
        let slots = slots.map(|slot| {
            let rows = sampler.rows(slot_positions(start, slot, division.rows_per_slot));
            (slot, collate(&rows, &data))
        });
        Ok(Some(StepBatches { start, slots: slots.collect() }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sample;
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn nz(n: usize) -> NonZeroUsize {
        NonZeroUsize::new(n).unwrap()
    }

    fn data(n: usize) -> Arc<Dataset> {
        let mut set = Dataset::new(Path::new("x"));
        for i in 0..n {
            set.push(Sample { ids: vec![i as u32; 3 + i % 4], is_target: (0..3 + i % 4).map(|t| t > 1).collect() }.as_ref(), i + 1);
        }
        Arc::new(set)
    }

    fn steps(world_size: usize, rank: usize, start: u64, num_steps: u64) -> Vec<StepBatches> {
        let division = Division { rows_per_slot: nz(2), slots_per_step: nz(4), world_size: nz(world_size), rank };
        let sampler = Sampler::new(nz(11), 5);
        training_batches(data(11), sampler, division, start, num_steps).unwrap().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn loader_of_any_world_size_gives_the_slots_of_one_rank() {
        let alone = steps(1, 0, 0, 6);
        assert_eq!(alone.len(), 6);
        for world_size in 2..6 {
            let ranks: Vec<_> = (0..world_size).map(|rank| steps(world_size, rank, 0, 6)).collect();
            for (s, step) in alone.iter().enumerate() {
                let slots: Vec<_> = ranks.iter().flat_map(|r| r[s].slots.clone()).collect();
                assert_eq!(slots, step.slots, "{world_size} ranks, step {s}");
            }
        }
    }

    #[test]
    fn loader_started_mid_epoch_continues_the_stream() {
        let all = steps(2, 1, 0, 6);
        assert_eq!(steps(2, 1, 3 * 8, 3), all[3..]);
        assert_eq!(all[3].start, 24);
    }

    #[test]
    fn loader_dropped_early_ends_its_thread() {
        let made = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&made);
        let mut endless = Prefetch::spawn(2, move || Ok(Some(counter.fetch_add(1, Ordering::SeqCst)))).unwrap();
        assert_eq!(endless.next().unwrap().unwrap(), 0);
        drop(endless);
        assert_eq!(Arc::strong_count(&made), 1, "the closure, and so the thread, is gone");
        assert!(made.load(Ordering::SeqCst) <= 5, "at most depth values are made ahead");
    }

    #[test]
    fn loader_error_reaches_the_caller_after_the_good_values_and_ends_it() {
        let mut n = 0;
        let make = move || {
            n += 1;
            if n < 3 { Ok(Some(n)) } else { Err(DataError::Zero { key: "rows" }) }
        };
        let mut values = Prefetch::spawn(1, make).unwrap();
        assert_eq!((values.next().unwrap().unwrap(), values.next().unwrap().unwrap()), (1, 2));
        assert!(matches!(values.next(), Some(Err(DataError::Zero { key: "rows" }))));
        assert!(values.next().is_none() && values.next().is_none());
    }

    #[test]
    fn loader_panic_reaches_the_caller_with_its_text() {
        let mut n = 0;
        let make = move || {
            n += 1;
            assert!(n < 2, "row {n} is broken");
            Ok(Some(n))
        };
        let mut values = Prefetch::spawn(1, make).unwrap();
        assert_eq!(values.next().unwrap().unwrap(), 1);
        let error = values.next().unwrap().unwrap_err().to_string();
        assert_eq!(error, "the loader's thread ended: row 2 is broken");
        assert!(values.next().is_none());
    }
}
