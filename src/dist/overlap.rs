//! Summing over ranks while the last slot's gradient is still being computed.
//!
//! A backward pass finishes the gradient from the head down. What is final is cut into buckets, and a thread beside the computation takes them
//! in one order that all ranks know: it adds a bucket to this rank's sums, each rank receives a piece of every rank's sums and adds them in the
//! order of the tree, and the piece's sum goes to the rank whose shard it lies in. A bucket mostly lies in one shard: dealt out in pieces first, no
//! rank has to receive all ranks' sums of it at once. Every element is added in the order of [`super::reduce_scatter`], so that the bits are the same.

use std::cell::Cell;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use candle_core::{DType, Tensor};

use super::accumulate::{Fold, Partial};
use super::reduce::{Source, check_shards, sources};
use super::shards::Shards;
use super::{DistError, ProcessGroup, SlotAccumulator, host};

/// What all ranks know of a sum before its slots are computed.
#[derive(Clone, Debug)]
pub struct OverlapPlan {
    shards: Shards,
    /// Parts of the gradient in the order in which they become final.
    stages: Vec<Vec<Range<usize>>>,
    sources: Vec<Source>,
}

impl OverlapPlan {
    /// `sums` is this rank's, with all its slots still to come or not; `stages`, the same on all ranks, are parts of the gradient in the order in
    /// which they become final, which together are all of it. Collective.
    ///
    /// # Errors
    /// On all ranks alike when their slots do not cover the tree, or `shards` or `stages` are of another size.
    pub fn agree(
        group: &dyn ProcessGroup,
        sums: &SlotAccumulator,
        shards: Shards,
        stages: Vec<Vec<Range<usize>>>,
    ) -> Result<Self, DistError> {
        check_shards(group, sums, &shards)?;
        let mut ranges: Vec<&Range<usize>> = stages.iter().flatten().filter(|range| !range.is_empty()).collect();
        ranges.sort_by_key(|range| range.start);
        let end = ranges.iter().try_fold(0, |end, range| if range.start == end { Ok(range.end) } else { Err(range.start) });
        if end != Ok(sums.num_elements) {
            return Err(DistError::Argument {
                collective: "an overlapped sum",
                expected: format!("stages that are, together, {} elements", sums.num_elements),
                found: format!("{stages:?}"),
            });
        }
        let ranges = sums.gather_ranges_ahead(group)?;
        Ok(Self { shards, stages, sources: sources(sums.fold.reduction, &sums.fold.tree, &ranges) })
    }

    /// The elements of a stage, so many at a time as are exchanged at once.
    fn buckets(&self, stage: usize) -> impl Iterator<Item = Range<usize>> {
        let bucket = self.shards.bucket;
        self.stages[stage].iter().flat_map(move |range| range.clone().step_by(bucket).map(move |at| at..range.end.min(at + bucket)))
    }

    /// Which part of a bucket each rank sums.
    fn pieces(&self, bucket: &Range<usize>) -> Vec<Range<usize>> {
        let world_size = self.shards.world_size();
        let cut = |rank: usize| match self.sources.as_slice() {
            // Nothing to add: one rank has it.
            [only] => {
                if rank > only.rank {
                    bucket.end
                } else {
                    bucket.start
                }
            }
            _ => bucket.start + rank * bucket.len() / world_size,
        };
        (0..world_size).map(|rank| cut(rank)..cut(rank + 1)).collect()
    }
}

/// A thread that moves sums between ranks beside the computation, one at a time.
#[derive(Debug)]
pub struct CommThread {
    rank: usize,
    world_size: usize,
    /// None once it has to end.
    tasks: Option<Sender<Task>>,
    sums: Receiver<Result<Tensor, DistError>>,
    thread: Option<JoinHandle<()>>,
    is_busy: Cell<bool>,
}

impl CommThread {
    /// Collective.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(group: &dyn ProcessGroup) -> Result<Self, DistError> {
        let duplicate = group.duplicate();
        let (tasks, todo) = channel::<Task>();
        let (done, sums) = channel();
        let (ready, is_ready) = channel();
        let thread = std::thread::Builder::new().name("communication".to_owned()).spawn(move || {
            let group = duplicate();
            // Nobody listens any more where its owner has left.
            let _ = ready.send(());
            for task in todo {
                let _ = done.send(task.run(&*group));
            }
        });
        let thread = thread.map_err(|e| DistError::ThreadPool { threads: 1, reason: e.to_string() })?;
        let (rank, world_size) = (group.rank(), group.world_size());
        let this = Self { rank, world_size, tasks: Some(tasks), sums, thread: Some(thread), is_busy: Cell::new(false) };
        is_ready.recv().map_err(|_| this.has_ended())?;
        Ok(this)
    }

    /// Begins the sum that `plan` is for. `sums` has this rank's slots but the last, `last`, whose gradient comes with
    /// [`OverlappedSum::advance`]; none on a rank without slots.
    ///
    /// # Errors
    /// When other slots are missing, or the sum before is not finished.
    pub fn begin(&self, plan: OverlapPlan, sums: SlotAccumulator, last: Option<usize>) -> Result<OverlappedSum<'_>, DistError> {
        let missing = sums.missing();
        if !missing.clone().eq(last) {
            return Err(DistError::Slots { rank: self.rank, problem: format!("slots {missing:?} of the step were not computed") });
        }
        if self.is_busy.replace(true) {
            let (expected, found) = ("one sum at a time".to_owned(), "another before its end".to_owned());
            return Err(DistError::Argument { collective: "the communication thread", expected, found });
        }
        let (num_stages, (news, finals)) = (plan.stages.len(), channel());
        let task = Task { plan, sums, last: None, finals };
        if self.tasks.as_ref().is_none_or(|tasks| tasks.send(task).is_err()) {
            return Err(self.has_ended());
        }
        let mut sum = OverlappedSum { thread: self, finals: news, num_stages, num_final: 0 };
        if last.is_none() {
            sum.announce(Final { num_stages, last: None });
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

/// How much of a rank's last slot is final.
#[derive(Debug)]
struct Final {
    num_stages: usize,
    /// The slot, and the buffer of its gradient.
    last: Option<(usize, Tensor)>,
}

/// A sum that the ranks' threads are working on.
///
/// Dropped before its last stage is final, this rank has failed, and the sum stays unfinished on all; dropped after it, the sum is waited for and
/// thrown away.
#[derive(Debug)]
pub struct OverlappedSum<'t> {
    thread: &'t CommThread,
    finals: Sender<Final>,
    num_stages: usize,
    num_final: usize,
}

impl OverlappedSum<'_> {
    /// Says that the first `num_stages` stages of the last slot's gradient `grad` `[n]` are final: nothing changes them from now on.
    pub fn advance(&mut self, num_stages: usize, slot: usize, grad: &Tensor) {
        if num_stages > self.num_final {
            self.announce(Final { num_stages, last: Some((slot, grad.clone())) });
        }
    }

    fn announce(&mut self, news: Final) {
        self.num_final = news.num_stages;
        // A thread that has ended has left its error, which `finish` returns.
        let _ = self.finals.send(news);
    }

    /// This rank's shard of the sum over all slots, with the bits of [`super::reduce_scatter`]. All ranks of `group` call it.
    ///
    /// # Errors
    /// When not all stages are final, or a collective failed.
    pub fn finish(self, group: &dyn ProcessGroup) -> Result<Tensor, DistError> {
        if self.num_final < self.num_stages {
            let problem = format!("{} of {} stages of its last slot are final", self.num_final, self.num_stages);
            return Err(DistError::Slots { rank: self.thread.rank, problem });
        }
        let mut sum = Err(self.thread.has_ended());
        group.wait("overlapped reduce_scatter", &mut || sum = self.thread.take());
        sum
    }
}

impl Drop for OverlappedSum<'_> {
    fn drop(&mut self) {
        if self.num_final >= self.num_stages && self.thread.is_busy.get() {
            // Only the sum is not wanted: why there is an end is known to all ranks.
            let _ = self.thread.take();
        }
    }
}

/// One sum, as the thread sees it.
#[derive(Debug)]
struct Task {
    plan: OverlapPlan,
    /// Of all slots but the last.
    sums: SlotAccumulator,
    /// The last, once a part of it is final.
    last: Option<Partial>,
    finals: Receiver<Final>,
}

impl Task {
    fn run(mut self, group: &dyn ProcessGroup) -> Result<Tensor, DistError> {
        let own = self.plan.shards.range(group.rank());
        let shard = Tensor::zeros(own.len(), DType::F32, &self.sums.device)?;
        let mut num_final = 0;
        for stage in 0..self.plan.stages.len() {
            while num_final <= stage {
                let Ok(news) = self.finals.recv() else {
                    let (rank, world_size, message) = (group.rank(), group.world_size(), "it gave up the step".to_owned());
                    return Err(DistError::RankFailed { rank, world_size, message });
                };
                num_final = news.num_stages;
                if let (Some((slot, grad)), None) = (news.last, &self.last) {
                    self.last = Some(self.sums.take_next(slot, grad)?);
                }
            }
            for bucket in self.plan.buckets(stage) {
                let (at, sum) = self.bucket(group, bucket)?;
                if sum.elem_count() > 0 {
                    shard.slice_set(&sum, 0, at - own.start)?;
                }
            }
        }
        Ok(shard)
    }

    /// What of a bucket lies in this rank's shard, summed: its first element, and the sums.
    fn bucket(&self, group: &dyn ProcessGroup, bucket: Range<usize>) -> Result<(usize, Tensor), DistError> {
        let (rank, plan) = (group.rank(), &self.plan);
        let pieces = plan.pieces(&bucket);
        let mine = self.own_sums(&bucket)?;
        let num_sums = |rank: usize| plan.sources.iter().filter(|source| source.rank == rank).count();
        let mut parts = Vec::with_capacity(pieces.len() * mine.len());
        for piece in &pieces {
            for sum in &mine {
                parts.push(sum.narrow(0, piece.start - bucket.start, piece.len())?);
            }
        }
        let send: Vec<usize> = pieces.iter().map(|piece| mine.len() * piece.len()).collect();
        let receive: Vec<usize> = (0..pieces.len()).map(|from| num_sums(from) * pieces[rank].len()).collect();
        let received = group.all_to_all_v(&joined(parts, &self.sums)?, &send, &receive)?;
        drop(mine);

        let starts = host::starts(&receive);
        let mut fold = Fold::new(self.sums.fold.reduction, self.sums.fold.tree);
        for source in &plan.sources {
            let start = starts[source.rank] + source.place * pieces[rank].len();
            fold.push(Partial { node: source.node, sum: received.narrow(0, start, pieces[rank].len())?, owned: false })?;
        }
        // The ranges tile the step's slots, so that one sum remains.
        let sum = joined(fold.partials.into_iter().map(|partial| partial.sum).collect(), &self.sums)?;

        let within = |piece: &Range<usize>, shard: Range<usize>| piece.start.max(shard.start)..piece.end.min(shard.end);
        let send: Vec<usize> = (0..pieces.len()).map(|to| within(&pieces[rank], plan.shards.range(to)).len()).collect();
        let own = plan.shards.range(rank);
        let receive: Vec<usize> = pieces.iter().map(|piece| within(piece, own.clone()).len()).collect();
        Ok((within(&bucket, own).start, group.all_to_all_v(&sum, &send, &receive)?))
    }

    /// This rank's sums of a bucket, the last slot's gradient among them.
    fn own_sums(&self, bucket: &Range<usize>) -> Result<Vec<Tensor>, DistError> {
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
        Ok(fold.partials.into_iter().map(|partial| partial.sum).collect())
    }
}

/// Vectors one behind the other; without any, an empty one.
fn joined(parts: Vec<Tensor>, like: &SlotAccumulator) -> Result<Tensor, DistError> {
    if parts.is_empty() { Ok(Tensor::zeros(0, DType::F32, &like.device)?) } else { Ok(Tensor::cat(&parts, 0)?) }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::accumulate::tests::{bits, grad};
    use super::super::reduce::tests::split;
    use super::super::{Reduction, SlotTree, local, reduce_scatter};
    use super::*;

    /// `n` elements as the stages of a model of two layers: the head's are at both ends, and a stage has none.
    fn stages(n: usize) -> Vec<Vec<Range<usize>>> {
        let at = |part: usize| part * n / 5;
        vec![vec![at(4)..n, at(0)..at(1)], vec![at(2)..at(4)], vec![], vec![at(1)..at(2)]]
    }

    fn sums(reduction: Reduction, num_slots: usize, range: &Range<usize>, n: usize, computed: Range<usize>) -> SlotAccumulator {
        let mut sums = SlotAccumulator::new(reduction, SlotTree::new(num_slots), range.clone(), n, &Device::Cpu);
        computed.for_each(|slot| sums.push(slot, grad(slot, n)).unwrap());
        sums
    }

    /// Computes the slots `range`, the last one stage by stage; what is not final yet is NaN.
    fn overlapped<'t>(
        group: &dyn ProcessGroup,
        thread: &'t CommThread,
        shards: Shards,
        (reduction, num_slots): (Reduction, usize),
        range: &Range<usize>,
    ) -> Result<OverlappedSum<'t>, DistError> {
        let (n, stages) = (shards.num_elements(), stages(shards.num_elements()));
        let sums = sums(reduction, num_slots, range, n, range.start..range.end.max(range.start + 1) - 1);
        let plan = OverlapPlan::agree(group, &sums, shards, stages.clone())?;
        let last = range.clone().next_back();
        let mut sum = thread.begin(plan, sums, last)?;
        if let Some(slot) = last {
            let running = Tensor::full(f32::NAN, n, &Device::Cpu)?;
            for (i, stage) in stages.iter().enumerate() {
                for part in stage.iter().filter(|part| !part.is_empty()) {
                    running.slice_set(&grad(slot, n).narrow(0, part.start, part.len())?.force_contiguous()?, 0, part.start)?;
                }
                sum.advance(i + 1, slot, &running);
            }
        }
        Ok(sum)
    }

    #[test]
    fn overlapped_sum_of_any_split_size_and_bucket_has_the_bits_of_the_one_at_the_end() {
        for (num_slots, n, align, bucket) in
            [(1, 5, 16, 64), (2, 0, 4, 64), (7, 3, 4, 64), (12, 70, 16, 9), (13, 65, 16, 1 << 22), (33, 41, 4, 1)]
        {
            for world_size in 1..=5 {
                let mut shards = Shards::new(n, world_size, align);
                shards.bucket = bucket;
                let outcomes = local::run(world_size, |g| {
                    let thread = CommThread::start(g)?;
                    for seed in 0..3 {
                        let ranges = split(num_slots, world_size, seed);
                        let range = &ranges[g.rank()];
                        for reduction in [Reduction::SlotTree, Reduction::AllReduce] {
                            let expected = reduce_scatter(g, sums(reduction, num_slots, range, n, range.clone()), &shards)?;
                            let sum = overlapped(g, &thread, shards, (reduction, num_slots), range)?.finish(g)?;
                            assert_eq!(bits(&sum), bits(&expected), "{num_slots} slots as {ranges:?}, {reduction:?}");
                        }
                    }
                    Ok::<_, DistError>(())
                });
                outcomes.into_iter().for_each(|outcome| outcome.unwrap());
            }
        }
    }

    #[test]
    fn sum_thrown_away_on_all_ranks_leaves_the_thread_to_the_next() {
        let shards = Shards::new(70, 3, 16);
        let all = local::run(3, |g| {
            let (thread, range) = (CommThread::start(g)?, g.rank()..g.rank() + 1);
            drop(overlapped(g, &thread, shards, (Reduction::SlotTree, 3), &range)?);
            let sum = overlapped(g, &thread, shards, (Reduction::SlotTree, 3), &range)?.finish(g)?;
            Ok::<_, DistError>(bits(&sum) == bits(&reduce_scatter(g, sums(Reduction::SlotTree, 3, &range, 70, range.clone()), &shards)?))
        });
        assert!(all.into_iter().all(Result::unwrap));
    }

    /// Those that fail may be several, and wait for nobody.
    #[test]
    fn ranks_that_fail_between_two_stages_end_all_by_name() {
        for (failing, panics) in [(vec![1], false), (vec![2], true), (vec![0, 1], false), (vec![0, 1, 2], false)] {
            let all = local::run(3, |g| {
                let thread = CommThread::start(g)?;
                let (range, n) = (g.rank()..g.rank() + 1, 70);
                if !failing.contains(&g.rank()) {
                    let sum = overlapped(g, &thread, Shards::new(n, 3, 16), (Reduction::SlotTree, 3), &range)?;
                    return sum.finish(g).map(|_| ());
                }
                let sums = sums(Reduction::SlotTree, 3, &range, n, 0..0);
                let plan = OverlapPlan::agree(g, &sums, Shards::new(n, 3, 16), stages(n))?;
                let mut sum = thread.begin(plan, sums, Some(range.start))?;
                sum.advance(1, range.start, &grad(range.start, n));
                assert!(!panics, "boom");
                Err(DistError::Slots { rank: g.rank(), problem: "boom".into() })
            });
            for (rank, outcome) in all.into_iter().enumerate() {
                let text = outcome.unwrap_err().to_string();
                assert!(text.contains("boom"), "rank {rank}, {failing:?} fail: {text}");
            }
        }
    }

    #[test]
    fn sum_without_all_its_slots_or_stages_is_refused() {
        let shards = Shards::new(70, 1, 16);
        let fresh = || SlotAccumulator::new(Reduction::SlotTree, SlotTree::new(3), 0..3, 70, &Device::Cpu);
        let agree = |stages| OverlapPlan::agree(&super::super::Solo, &fresh(), shards, stages).map_err(|e| e.to_string());
        let parts = |text: &str| format!("an overlapped sum takes stages that are, together, 70 elements, found {text}");
        assert_eq!(agree(vec![vec![0..70], vec![60..70]]).unwrap_err(), parts("[[0..70], [60..70]]"));
        assert_eq!(agree(vec![vec![1..70]]).unwrap_err(), parts("[[1..70]]"));
        let plan = agree(stages(70)).unwrap();
        let thread = CommThread::start(&super::super::Solo).unwrap();
        let text = thread.begin(plan.clone(), fresh(), Some(2)).unwrap_err().to_string();
        assert_eq!(text, "rank 0: slots 0..3 of the step were not computed");
        let two = || sums(Reduction::SlotTree, 3, &(0..3), 70, 0..2);
        let mut sum = thread.begin(plan.clone(), two(), Some(2)).unwrap();
        let text = thread.begin(plan, two(), Some(2)).unwrap_err().to_string();
        assert_eq!(text, "the communication thread takes one sum at a time, found another before its end");
        sum.advance(2, 2, &grad(2, 70));
        assert_eq!(sum.finish(&super::super::Solo).unwrap_err().to_string(), "rank 0: 2 of 4 stages of its last slot are final");
    }
}
