//! Summing over ranks while the last slot's gradient is still being computed.
//!
//! A backward pass finishes the gradient from the head down. What is final is cut into buckets, and a thread beside the computation takes them
//! in one order that all ranks know: it adds a bucket to this rank's sums, each rank receives a piece of every rank's sums and adds them in the
//! order of the tree, and the piece's sum goes to the rank whose shard it lies in. A bucket mostly lies in one shard: dealt out in pieces first, no
//! rank has to receive all ranks' sums of it at once. Every element is added in the order of [`super::reduce`], so that the bits are the same.

use std::cell::Cell;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use candle_core::Tensor;

use super::accumulate::{Fold, Partial, SlotAccumulator};
use super::reduce::{Source, sum_pieces};
use super::shards::Shards;
use super::{Collectives, DistError, ProcessGroup, host};
use crate::kernels::elementwise;

/// A thread that moves sums between ranks beside the computation, one at a time.
#[derive(Debug)]
pub(super) struct CommThread {
    rank: usize,
    world_size: usize,
    num_stages: usize,
    /// None once it has to end.
    tasks: Option<Sender<Task>>,
    sums: Receiver<Result<Tensor, DistError>>,
    thread: Option<JoinHandle<()>>,
    is_busy: Cell<bool>,
}

impl CommThread {
    /// For gradients of which each rank gets its shard, and whose parts `stages`, the same on all ranks and together all of it, become final one
    /// after the other. Collective.
    ///
    /// # Errors
    /// When the stages are for another size, or the thread cannot be started.
    pub(super) fn start(tensors: &dyn Collectives, shards: Shards, stages: Vec<Vec<Range<usize>>>) -> Result<Self, DistError> {
        let mut ranges: Vec<&Range<usize>> = stages.iter().flatten().filter(|range| !range.is_empty()).collect();
        ranges.sort_by_key(|range| range.start);
        let end = ranges.iter().try_fold(0, |end, range| if range.start == end { Ok(range.end) } else { Err(range.start) });
        if end != Ok(shards.num_elements()) {
            return Err(DistError::Argument {
                collective: "an overlapped sum",
                expected: format!("stages that are, together, {} elements", shards.num_elements()),
                found: format!("{stages:?}"),
            });
        }
        let (group, duplicate) = (tensors.group(), tensors.duplicate());
        let num_stages = stages.len();
        let (tasks, todo) = channel::<Task>();
        let (done, sums) = channel();
        let (ready, is_ready) = channel();
        let thread = std::thread::Builder::new().name("communication".to_owned()).spawn(move || {
            let tensors = duplicate();
            // Nobody listens any more where its owner has left.
            let _ = ready.send(());
            for task in todo {
                let _ = done.send(task.run(&*tensors, &shards, &stages));
            }
        });
        let thread = thread.map_err(|e| DistError::ThreadPool { threads: 1, reason: e.to_string() })?;
        let (rank, world_size) = (group.rank(), group.world_size());
        let this = Self { rank, world_size, num_stages, tasks: Some(tasks), sums, thread: Some(thread), is_busy: Cell::new(false) };
        is_ready.recv().map_err(|_| this.has_ended())?;
        Ok(this)
    }

    /// Begins a sum of all ranks' `sources`. `sums` has this rank's slots but the last, whose gradient is `last`: of that nothing has to be final
    /// yet. Without it, a rank without slots, all is.
    ///
    /// # Errors
    /// When other slots are missing, or the sum before is not finished.
    pub(super) fn begin(
        &self,
        mut sums: SlotAccumulator,
        sources: Vec<Source>,
        last: Option<(usize, &Tensor)>,
    ) -> Result<OverlappedSum<'_>, DistError> {
        if !sums.missing().eq(last.map(|(slot, _)| slot)) {
            return Err(sums.not_computed(self.rank));
        }
        let last = last.map(|(slot, grad)| sums.take_next(slot, grad.clone())).transpose()?;
        if self.is_busy.replace(true) {
            let (expected, found) = ("one sum at a time".to_owned(), "another before its end".to_owned());
            return Err(DistError::Argument { collective: "the communication thread", expected, found });
        }
        let (news, finals) = channel();
        let mut sum = OverlappedSum { thread: self, finals: news, num_final: 0 };
        if last.is_none() {
            sum.advance(self.num_stages);
        }
        let task = Task { sums, sources, last, finals };
        if self.tasks.as_ref().is_none_or(|tasks| tasks.send(task).is_err()) {
            return Err(self.has_ended());
        }
        Ok(sum)
    }

    fn take(&self) -> Result<Tensor, DistError> {
        let sum = self.sums.recv().unwrap_or_else(|_| Err(self.has_ended()));
        self.is_busy.set(false);
        sum
    }

    fn has_ended(&self) -> DistError {
        let message = "its communication thread has ended".to_owned();
        DistError::RankFailed { rank: self.rank, world_size: self.world_size, message }
    }
}

impl Drop for CommThread {
    /// A thread with an unfinished sum is left alone: it may wait for a rank that waits for this one to end.
    fn drop(&mut self) {
        drop(self.tasks.take());
        if let (Some(thread), false) = (self.thread.take(), self.is_busy.get()) {
            // It has panicked, and the panic hook has said so, or it is at its end.
            let _ = thread.join();
        }
    }
}

/// A sum that the ranks' threads are working on.
///
/// Dropped before its last stage is final, this rank has failed, and the sum stays unfinished on all; dropped after it, the sum is waited for and
/// thrown away.
#[derive(Debug)]
pub(super) struct OverlappedSum<'t> {
    thread: &'t CommThread,
    finals: Sender<usize>,
    num_final: usize,
}

impl OverlappedSum<'_> {
    /// Says that the first `num_stages` stages of the last slot's gradient are final: nothing changes them from now on.
    pub(super) fn advance(&mut self, num_stages: usize) {
        if num_stages > self.num_final {
            self.num_final = num_stages;
            // A thread that has ended has left its error, which `finish` returns.
            let _ = self.finals.send(num_stages);
        }
    }

    /// This rank's shard of the sum over all slots, with the bits of [`super::reduce::reduce_scatter`]. All ranks of `group` call it.
    ///
    /// # Errors
    /// When not all stages are final, or a collective failed.
    pub(super) fn finish(self, group: &dyn ProcessGroup) -> Result<Tensor, DistError> {
        let (num_final, num_stages) = (self.num_final, self.thread.num_stages);
        if num_final < num_stages {
            let problem = format!("{num_final} of {num_stages} stages of its last slot are final");
            return Err(DistError::Slots { rank: self.thread.rank, problem });
        }
        let mut sum = Err(self.thread.has_ended());
        group.wait("overlapped reduce_scatter", &mut || sum = self.thread.take());
        sum
    }
}

impl Drop for OverlappedSum<'_> {
    fn drop(&mut self) {
        if self.num_final >= self.thread.num_stages && self.thread.is_busy.get() {
            // Only the sum is not wanted: why there is an end is known to all ranks.
            let _ = self.thread.take();
        }
    }
}

/// One sum, as the thread sees it.
#[derive(Debug)]
struct Task {
    /// Of all slots but the last.
    sums: SlotAccumulator,
    sources: Vec<Source>,
    last: Option<Partial>,
    /// How many stages of the last are final.
    finals: Receiver<usize>,
}

impl Task {
    fn run(&self, tensors: &dyn Collectives, shards: &Shards, stages: &[Vec<Range<usize>>]) -> Result<Tensor, DistError> {
        let group = tensors.group();
        let own = shards.range(group.rank());
        let shard = elementwise::zeros(own.len(), &self.sums.device)?;
        let mut num_final = 0;
        for (i, stage) in stages.iter().enumerate() {
            while num_final <= i {
                let Ok(news) = self.finals.recv() else {
                    let (rank, world_size, message) = (group.rank(), group.world_size(), "it gave up the step".to_owned());
                    return Err(DistError::RankFailed { rank, world_size, message });
                };
                num_final = news;
            }
            for range in stage {
                for at in range.clone().step_by(shards.bucket) {
                    let (at, sum) = self.bucket(tensors, shards, at..range.end.min(at + shards.bucket))?;
                    host::put(&shard, at - own.start, &sum)?;
                }
            }
        }
        Ok(shard)
    }

    /// What of a bucket lies in this rank's shard, summed: its first element, and the sums.
    fn bucket(&self, tensors: &dyn Collectives, shards: &Shards, bucket: Range<usize>) -> Result<(usize, Tensor), DistError> {
        let rank = tensors.group().rank();
        let pieces = self.pieces(bucket.len(), shards.world_size());
        let sum = sum_pieces(tensors, &self.own_sums(&bucket)?, &pieces, &self.sources, &self.sums.device)?;

        let within = |piece: &Range<usize>, shard: Range<usize>| {
            (bucket.start + piece.start).max(shard.start)..(bucket.start + piece.end).min(shard.end)
        };
        let send: Vec<usize> = (0..pieces.len()).map(|to| within(&pieces[rank], shards.range(to)).len()).collect();
        let own = shards.range(rank);
        let receive: Vec<usize> = pieces.iter().map(|piece| within(piece, own.clone()).len()).collect();
        Ok((bucket.start.max(own.start), tensors.all_to_all_v(&sum, &send, &receive)?))
    }

    /// Which part of a bucket of `len` elements each rank sums.
    fn pieces(&self, len: usize, world_size: usize) -> Vec<Range<usize>> {
        let cut = |rank: usize| match self.sources.as_slice() {
            // Nothing to add: one rank has it.
            [only] if rank > only.rank => len,
            [_] => 0,
            _ => rank * len / world_size,
        };
        (0..world_size).map(|rank| cut(rank)..cut(rank + 1)).collect()
    }

    /// This rank's sums of a bucket, the last slot's gradient among them.
    fn own_sums(&self, bucket: &Range<usize>) -> Result<Fold, DistError> {
        let part = |tensor: &Tensor| tensor.narrow(0, bucket.start, bucket.len());
        let mut fold = Fold::new(self.sums.fold.reduction, self.sums.fold.tree);
        for partial in &self.sums.fold.partials {
            // Each part of a buffer is taken once, so that what may be added to in place still may.
            fold.partials.push(Partial { node: partial.node, sum: part(&partial.sum)?, owned: partial.owned });
        }
        if let Some(last) = &self.last {
            // A copy: the backward pass must not wait for a lock while the pool's threads add.
            fold.push(Partial { node: last.node, sum: part(&last.sum)?.force_contiguous()?, owned: true })?;
        }
        Ok(fold)
    }
}
