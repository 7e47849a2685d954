//! Ranks as threads of one process, for tests.

use std::any::Any;
use std::cell::Cell;
use std::fmt::Display;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};

use super::abort::payload_text;
use super::{Aborter, Collectives, DistError, Duplicate, ProcessGroup, host};
use crate::kernels::elementwise;

/// Runs `rank_main` on `world_size` threads, each with its own rank; results are ordered by rank.
///
/// When a rank returns an error, panics, aborts, or returns while others wait for it, the others' pending and later collectives return
/// an error that names it.
pub fn run<T, E, F>(world_size: usize, rank_main: F) -> Vec<Result<T, E>>
where
    T: Send,
    E: From<DistError> + Display + Send,
    F: Fn(&Local) -> Result<T, E> + Sync,
{
    let shared = Arc::new(Shared::new(world_size, None, vec![false; world_size]));
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..world_size)
            .map(|rank| {
                let group = Local::new(rank, shared.clone());
                let rank_main = &rank_main;
                scope.spawn(move || group.live(rank_main))
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    })
}

/// One rank of [`run`].
pub struct Local {
    rank: usize,
    shared: Arc<Shared>,
    num_duplicates: Cell<usize>,
}

struct Shared {
    world_size: usize,
    state: Mutex<State>,
    changed: Condvar,
    /// In the order in which the ranks asked for them.
    duplicates: Mutex<Vec<Arc<Shared>>>,
}

/// A rank that failed, and why.
type Failure = Option<(usize, String)>;

impl Shared {
    fn new(world_size: usize, failure: Failure, ended: Vec<bool>) -> Self {
        let state = State { round: 0, given: vec![None; world_size], last: Arc::default(), failure, ended };
        Self { world_size, state: Mutex::new(state), changed: Condvar::new(), duplicates: Mutex::default() }
    }

    /// Tells who waits, here and in the duplicates, that `rank` has ended, with an error or without.
    fn end(&self, rank: usize, error: Option<&str>) {
        let duplicates = lock(&self.duplicates);
        let mut state = lock(&self.state);
        state.ended[rank] = true;
        if let (Some(error), None) = (error, &state.failure) {
            state.failure = Some((rank, error.to_owned()));
        }
        drop(state);
        self.changed.notify_all();
        duplicates.iter().for_each(|duplicate| duplicate.end(rank, error));
    }

    /// The duplicate that a rank gets that has `index` already.
    fn duplicate(&self, index: usize) -> Arc<Self> {
        let mut duplicates = lock(&self.duplicates);
        if index == duplicates.len() {
            let state = lock(&self.state);
            duplicates.push(Arc::new(Self::new(self.world_size, state.failure.clone(), state.ended.clone())));
        }
        duplicates[index].clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct State {
    /// Number of finished exchanges.
    round: u64,
    /// What the ranks have given to the exchange in progress.
    given: Vec<Option<Gift>>,
    /// The last finished exchange. It stays until all ranks gave to the next one, so each rank sees it in time.
    last: Arc<Vec<Gift>>,
    /// The first rank that failed.
    failure: Failure,
    ended: Vec<bool>,
}

#[derive(Clone)]
struct Gift {
    collective: &'static str,
    payload: Payload,
}

#[derive(Clone)]
enum Payload {
    Bytes(Vec<u8>),
    Tensor(Tensor),
    /// One for each rank.
    Parts(Vec<Vec<f32>>),
}

/// What [`Local::abort`] unwinds with.
struct Abort(String);

impl Local {
    fn new(rank: usize, shared: Arc<Shared>) -> Self {
        Self { rank, shared, num_duplicates: Cell::new(0) }
    }

    /// Runs this rank to its end and tells the others how it ended.
    fn live<T, E: From<DistError> + Display>(&self, rank_main: &impl Fn(&Local) -> Result<T, E>) -> Result<T, E> {
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| rank_main(self)));
        let outcome = outcome.unwrap_or_else(|payload| {
            let message = panic_text(payload.as_ref());
            Err(DistError::RankFailed { rank: self.rank, world_size: self.shared.world_size, message }.into())
        });
        let text = outcome.as_ref().err().map(ToString::to_string);
        let own = format!("rank {} of {} failed: ", self.rank, self.shared.world_size);
        self.shared.end(self.rank, text.as_deref().map(|text| text.strip_prefix(&own).unwrap_or(text)));
        outcome
    }

    /// Gives `payload` to all and takes what all gave, ordered by rank.
    fn exchange(&self, collective: &'static str, payload: Payload) -> Result<Arc<Vec<Gift>>, DistError> {
        let world_size = self.shared.world_size;
        let mut state = lock(&self.shared.state);
        let round = state.round;
        state.given[self.rank] = Some(Gift { collective, payload });
        if state.given.iter().all(Option::is_some) {
            let gifts: Vec<Gift> = state.given.iter_mut().filter_map(Option::take).collect();
            state.last = Arc::new(gifts);
            state.round += 1;
            self.shared.changed.notify_all();
        }
        while state.round == round {
            if let Some((rank, message)) = state.failure.clone() {
                return Err(DistError::RankFailed { rank, world_size, message });
            }
            if let Some(rank) = (0..world_size).find(|&r| state.ended[r] && state.given[r].is_none()) {
                state.failure = Some((rank, format!("it ended while other ranks wait for it in {collective}")));
                continue;
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let gifts = state.last.clone();
        drop(state);
        match gifts.iter().position(|g| g.collective != gifts[0].collective) {
            Some(rank) => Err(DistError::Diverged { rank, expected: gifts[0].collective.into(), found: gifts[rank].collective.into() }),
            None => Ok(gifts),
        }
    }

    /// All ranks' tensors, ordered by rank, in the host's memory; they are copies, so that a rank may change its own at once.
    fn exchange_tensors(&self, collective: &'static str, mine: &Tensor) -> Result<Vec<Tensor>, DistError> {
        let copy = host::with_slice(collective, mine, <[f32]>::to_vec)?;
        let gifts = self.exchange(collective, Payload::Tensor(host::tensor(copy, mine.dims(), &Device::Cpu)?))?;
        let tensors: Vec<Tensor> =
            gifts.iter().filter_map(|g| if let Payload::Tensor(t) = &g.payload { Some(t.clone()) } else { None }).collect();
        match tensors.iter().position(|t| t.dims() != tensors[0].dims()) {
            Some(rank) => Err(DistError::Diverged {
                rank,
                expected: format!("{collective} with shape {:?}", tensors[0].dims()),
                found: format!("{collective} with shape {:?}", tensors[rank].dims()),
            }),
            None => Ok(tensors),
        }
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(Abort(message)) = payload.downcast_ref() {
        return format!("aborted: {message}");
    }
    format!("panicked: {}", payload_text(payload))
}

impl ProcessGroup for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.world_size
    }

    fn local_rank(&self) -> usize {
        self.rank
    }

    fn local_size(&self) -> usize {
        self.shared.world_size
    }

    fn machine(&self) -> usize {
        0
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, DistError> {
        let gifts = self.exchange("all_gather_bytes", Payload::Bytes(mine.to_vec()))?;
        Ok(gifts.iter().filter_map(|g| if let Payload::Bytes(b) = &g.payload { Some(b.clone()) } else { None }).collect())
    }

    fn barrier(&self) -> Result<(), DistError> {
        self.exchange("barrier", Payload::Bytes(Vec::new())).map(|_| ())
    }

    fn abort(&self, message: &str) -> ! {
        std::panic::resume_unwind(Box::new(Abort(message.to_owned())))
    }

    fn aborter(&self) -> Option<Aborter> {
        None
    }
}

impl Collectives for Local {
    fn group(&self) -> &dyn ProcessGroup {
        self
    }

    fn all_gather(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        host::num_columns("all_gather", mine, None)?;
        Ok(Tensor::stack(&self.exchange_tensors("all_gather", mine)?, 0)?.to_device(mine.device())?)
    }

    fn all_to_all_v(&self, parts: &Tensor, send: &[usize], receive: &[usize]) -> Result<Tensor, DistError> {
        host::check_parts(parts, send, receive, self.world_size())?;
        let own = host::with_slice("all_to_all_v", parts, |parts| {
            host::starts(send).into_iter().zip(send).map(|(start, len)| parts[start..start + len].to_vec()).collect()
        })?;
        let gifts = self.exchange("all_to_all_v", Payload::Parts(own))?;
        let mut received = Vec::with_capacity(receive.iter().sum());
        for ((rank, gift), &len) in gifts.iter().enumerate().zip(receive) {
            let Payload::Parts(parts) = &gift.payload else { continue };
            if parts[self.rank].len() != len {
                let (expected, found) = (format!("{len} elements"), parts[self.rank].len() * size_of::<f32>());
                return Err(DistError::Message { rank, what: "its part", expected, found });
            }
            received.extend_from_slice(&parts[self.rank]);
        }
        let n = received.len();
        host::tensor(received, n, parts.device())
    }

    fn all_reduce(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        host::num_columns("all_reduce", mine, None)?;
        let all = self.exchange_tensors("all_reduce", mine)?;
        let sum = all[0].copy()?;
        all[1..].iter().try_for_each(|other| elementwise::add_(&sum, other))?;
        Ok(sum.to_device(mine.device())?)
    }

    fn broadcast(&self, mine: &Tensor, root: usize) -> Result<Tensor, DistError> {
        host::num_columns("broadcast", mine, None)?;
        host::check_root(root, self.world_size())?;
        Ok(self.exchange_tensors("broadcast", mine)?[root].copy()?.to_device(mine.device())?)
    }

    fn duplicate(&self) -> Duplicate {
        let (rank, index) = (self.rank, self.num_duplicates.get());
        self.num_duplicates.set(index + 1);
        let shared = self.shared.duplicate(index);
        Box::new(move || Box::new(Self::new(rank, shared)))
    }

    fn finish(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(n: usize, value: f32) -> Tensor {
        Tensor::full(value, n, &Device::Cpu).unwrap()
    }

    #[test]
    fn collectives_of_any_world_size_give_the_expected_values() {
        for world_size in 1..=5 {
            let all = run(world_size, |g| {
                let mine = filled(2, g.rank() as f32);
                let gathered = g.all_gather(&mine)?.to_vec2::<f32>()?;
                assert!(gathered.iter().enumerate().all(|(r, row)| row == &[r as f32; 2]) && gathered.len() == world_size);
                // Rank r has s elements for rank s, and expects as many from each as its own number.
                let (send, receive): (Vec<_>, Vec<_>) = (0..world_size).map(|other| (other, g.rank())).unzip();
                let parts = Tensor::from_iter(send.iter().flat_map(|&to| vec![(10 * g.rank() + to) as f32; to]), &Device::Cpu)?;
                let got = g.all_to_all_v(&parts, &send, &receive)?.to_vec1::<f32>()?;
                let expected = (0..world_size).flat_map(|from| vec![(10 * from + g.rank()) as f32; g.rank()]);
                assert_eq!(got, expected.collect::<Vec<_>>());
                let sum = (0..world_size).sum::<usize>() as f32;
                assert_eq!(g.all_reduce(&mine)?.to_vec1::<f32>()?, [sum; 2]);
                assert_eq!(g.broadcast(&mine, world_size - 1)?.to_vec1::<f32>()?, [(world_size - 1) as f32; 2]);
                let bytes = g.all_gather_bytes(&vec![g.rank() as u8; g.rank()])?;
                assert!(bytes.iter().enumerate().all(|(r, b)| b == &vec![r as u8; r]));
                g.barrier()
            });
            all.into_iter().for_each(|outcome| outcome.unwrap());
        }
    }

    #[test]
    fn collective_with_a_panicking_rank_fails_on_the_others_by_name() {
        let all: Vec<Result<(), DistError>> = run(3, |g| {
            assert!(g.rank() != 1, "boom");
            g.barrier()
        });
        for outcome in all {
            assert_eq!(outcome.unwrap_err().to_string(), "rank 1 of 3 failed: panicked: boom");
        }
    }

    #[test]
    fn collective_with_a_failing_or_aborting_rank_fails_on_the_others_by_name() {
        for aborts in [false, true] {
            let all: Vec<Result<(), DistError>> = run(3, |g| {
                g.barrier()?;
                if g.rank() == 2 {
                    if aborts {
                        g.abort("disk full");
                    }
                    return Err(DistError::Slots { rank: 2, problem: "disk full".into() });
                }
                g.barrier()
            });
            let text = all[0].as_ref().unwrap_err().to_string();
            assert!(text.starts_with("rank 2 of 3 failed: ") && text.ends_with("disk full"), "{text}");
        }
    }

    #[test]
    fn collective_after_a_rank_has_left_fails_by_name() {
        let all: Vec<Result<(), DistError>> = run(3, |g| if g.rank() == 0 { Ok(()) } else { g.barrier() });
        assert!(all[0].is_ok());
        assert!(all[1..].iter().all(|o| o.as_ref().unwrap_err().to_string().starts_with("rank 0 of 3")));
    }

    #[test]
    fn collectives_of_a_duplicate_do_not_meet_those_of_the_group() {
        let all = run(3, |g| {
            let duplicate = g.duplicate();
            let beside = std::thread::spawn(move || {
                let duplicate = duplicate();
                let g = duplicate.group();
                (0..20).map(|i| g.all_gather_bytes(&[i, g.rank() as u8])).collect::<Result<Vec<_>, DistError>>()
            });
            for i in 100..120 {
                assert_eq!(g.all_gather_bytes(&[i, g.rank() as u8])?, [[i, 0], [i, 1], [i, 2]]);
            }
            let beside = beside.join().unwrap()?;
            assert!(beside.iter().enumerate().all(|(i, all)| *all == [[i as u8, 0], [i as u8, 1], [i as u8, 2]]));
            Ok::<_, DistError>(())
        });
        all.into_iter().for_each(|outcome| outcome.unwrap());
    }

    #[test]
    fn duplicate_with_a_failing_rank_fails_on_the_others_by_name() {
        let all: Vec<Result<(), DistError>> = run(3, |g| {
            let duplicate = g.duplicate()();
            if g.rank() == 1 {
                return Err(DistError::Slots { rank: 1, problem: "disk full".into() });
            }
            duplicate.group().barrier()
        });
        for rank in [0, 2] {
            assert_eq!(all[rank].as_ref().unwrap_err().to_string(), "rank 1 of 3 failed: rank 1: disk full");
        }
    }

    #[test]
    fn collectives_that_differ_between_ranks_are_refused() {
        let all: Vec<Result<(), DistError>> = run(2, |g| {
            let n = 3 + g.rank();
            g.all_reduce(&filled(n, 1.0)).map(|_| ())
        });
        assert!(all.iter().all(|o| o.as_ref().unwrap_err().to_string().contains("all_reduce with shape [4]")));
        let all: Vec<Result<(), DistError>> = run(2, |g| if g.rank() == 0 { g.barrier() } else { g.all_gather_bytes(b"x").map(|_| ()) });
        assert!(all.iter().all(|o| o.as_ref().unwrap_err().to_string().contains("rank 1 calls all_gather_bytes, rank 0 calls barrier")));
    }

    #[test]
    fn result_of_a_collective_changed_in_place_leaves_other_ranks_alone() {
        let all = run(2, |g| {
            let sum = g.broadcast(&filled(4, 1.0), 0)?;
            elementwise::add_(&sum, &filled(4, g.rank() as f32))?;
            g.barrier()?;
            Ok::<_, DistError>(sum.to_vec1::<f32>()?)
        });
        assert_eq!(all.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [[1.0; 4], [2.0; 4]]);
    }
}
