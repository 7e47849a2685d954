//! The sum of a step's gradients over its slots, whichever rank computes them: made at the end, or on the way while the last slot's gradient
//! is still being computed. It has the same bits either way.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::accumulate::{SlotAccumulator, Slots};
use super::overlap::{CommThread, OverlappedSum};
use super::reduce::{Source, reduce, reduce_scatter, sources};
use super::{Collectives, DistError, ProcessGroup, Reduction, Shards, SlotTree};

/// What each rank gets of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of so many elements.
    Whole(usize),
    /// Its shard; as many as ranks.
    Shard(Shards),
}

/// Settings shared by the sums of all steps.
pub struct GradientSum<'g> {
    tensors: &'g dyn Collectives,
    reduction: Reduction,
    tree: SlotTree,
    part: Part,
    /// Moves what is final; none: all moves at the end.
    thread: Option<CommThread>,
    num_stages: usize,
    device: Device,
}

impl<'g> GradientSum<'g> {
    /// Sums of the flat f32 gradients of `num_slots` slots on `device`. Not collective.
    pub fn new(tensors: &'g dyn Collectives, reduction: Reduction, num_slots: usize, part: Part, device: &Device) -> Self {
        Self { tensors, reduction, tree: SlotTree::new(num_slots), part, thread: None, num_stages: 0, device: device.clone() }
    }

    /// The ranks that take part.
    pub fn group(&self) -> &'g dyn ProcessGroup {
        self.tensors.group()
    }

    /// With a thread that moves the parts `stages` of a rank's last gradient as they become final, where several ranks get shards. The stages
    /// are the same on all ranks, and together all of the gradient. Collective.
    ///
    /// # Errors
    /// When the stages are for another size, or the thread cannot be started.
    pub fn overlapped(mut self, stages: Vec<Vec<Range<usize>>>) -> Result<Self, DistError> {
        if let Part::Shard(shards) = self.part
            && shards.world_size() > 1
            && !stages.is_empty()
        {
            self.num_stages = stages.len();
            self.thread = Some(CommThread::start(self.tensors, shards, stages)?);
        }
        Ok(self)
    }

    /// The sum of a step of which this rank computes `slots`. Where parts move on the way it is collective.
    ///
    /// # Errors
    /// Where parts move on the way: on all ranks alike when their slots do not cover the step.
    pub fn begin(&self, slots: Range<usize>) -> Result<StepSum<'_>, DistError> {
        let num_elements = match self.part {
            Part::Whole(num_elements) => num_elements,
            Part::Shard(shards) => shards.num_elements(),
        };
        let sums = SlotAccumulator::new(self.reduction, self.tree, slots.clone(), num_elements, &self.device);
        let mut sum = StepSum { of: self, last: slots.clone().next_back(), sums: Some(sums), sources: Vec::new(), on_the_way: None };
        if let (Some(_), Some(sums)) = (&self.thread, &sum.sums) {
            sum.sources = sources(self.reduction, &self.tree, &sums.gather_ranges(self.tensors.group(), Slots::Ahead)?);
            if sum.last.is_none() {
                sum.move_on(None)?;
            }
        }
        Ok(sum)
    }
}

/// The sum of one step. Dropped before its end, this rank has failed, or all ranks throw it away.
pub struct StepSum<'s> {
    of: &'s GradientSum<'s>,
    /// This rank's last slot.
    last: Option<usize>,
    /// This rank's slots so far, until they are on their way.
    sums: Option<SlotAccumulator>,
    sources: Vec<Source>,
    on_the_way: Option<OverlappedSum<'s>>,
}

impl StepSum<'_> {
    /// Says that the first `num_stages` stages of the gradient `grad` `[num_elements]` of `slot` are final: nothing changes them from now on.
    ///
    /// # Errors
    /// When slots before this rank's last are missing, or the gradient has another shape or dtype.
    pub fn stage(&mut self, slot: usize, num_stages: usize, grad: &Tensor) -> Result<(), DistError> {
        if self.last != Some(slot) {
            return Ok(());
        }
        self.move_on(Some((slot, grad)))?;
        if let Some(sum) = &mut self.on_the_way {
            sum.advance(num_stages);
        }
        Ok(())
    }

    /// Adds the whole gradient `[num_elements]` of this rank's next slot. It is not changed.
    ///
    /// # Errors
    /// When `slot` is not the next one, or the gradient has another shape or dtype.
    pub fn slot(&mut self, slot: usize, grad: Tensor) -> Result<(), DistError> {
        self.stage(slot, self.of.num_stages, &grad)?;
        self.sums.as_mut().map_or(Ok(()), |sums| sums.push(slot, grad))
    }

    /// The sum over all slots, or this rank's shard of it. Collective.
    ///
    /// # Errors
    /// On all ranks alike when not all slots were computed; when a collective failed.
    pub fn finish(self) -> Result<Tensor, DistError> {
        let (tensors, of) = (self.of.tensors, self.of);
        let rank = tensors.group().rank();
        match (self.on_the_way, self.sums, &of.part) {
            (Some(sum), ..) => sum.finish(tensors.group()),
            (None, Some(sums), _) if of.thread.is_some() => Err(sums.not_computed(rank)),
            (None, Some(sums), Part::Shard(shards)) => reduce_scatter(tensors, sums, shards),
            (None, Some(sums), Part::Whole(_)) => reduce(tensors, sums),
            (None, None, _) => Err(DistError::Slots { rank, problem: "its sum of the step could not begin".to_owned() }),
        }
    }

    /// Gives this rank's sums to the thread, if there is one and it does not have them.
    fn move_on(&mut self, last: Option<(usize, &Tensor)>) -> Result<(), DistError> {
        if let (Some(thread), Some(sums)) = (&self.of.thread, self.sums.take_if(|_| self.of.thread.is_some())) {
            self.on_the_way = Some(thread.begin(sums, std::mem::take(&mut self.sources), last)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::accumulate::tests::{bits, grad};
    use super::super::reduce::tests::split;
    use super::super::{Solo, host, local};
    use super::*;

    /// `n` elements as the stages of a model of two layers: the head's are at both ends, and a stage has none.
    fn stages(n: usize) -> Vec<Vec<Range<usize>>> {
        let at = |part: usize| part * n / 5;
        vec![vec![at(4)..n, at(0)..at(1)], vec![at(2)..at(4)], vec![], vec![at(1)..at(2)]]
    }

    /// With a thread even where a rank is alone.
    fn overlapped<'g>(tensors: &'g dyn Collectives, reduction: Reduction, num_slots: usize, shards: Shards) -> GradientSum<'g> {
        let sum = GradientSum::new(tensors, reduction, num_slots, Part::Shard(shards), &Device::Cpu);
        let stages = stages(shards.num_elements());
        GradientSum { num_stages: stages.len(), thread: Some(CommThread::start(tensors, shards, stages).unwrap()), ..sum }
    }

    /// Computes the slots `range`, the last one stage by stage; what is not final yet is NaN.
    fn compute<'s>(sums: &'s GradientSum, n: usize, range: Range<usize>) -> Result<StepSum<'s>, DistError> {
        let mut sum = sums.begin(range.clone())?;
        for slot in range {
            let running = Tensor::full(f32::NAN, n, &Device::Cpu)?;
            for (i, stage) in stages(n).into_iter().enumerate() {
                for part in stage.into_iter().filter(|part| !part.is_empty()) {
                    host::put(&running, part.start, &grad(slot, n).narrow(0, part.start, part.len())?.force_contiguous()?)?;
                }
                sum.stage(slot, i + 1, &running)?;
            }
            sum.slot(slot, running)?;
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
                    for reduction in [Reduction::SlotTree, Reduction::AllReduce] {
                        let on_the_way = overlapped(g, reduction, num_slots, shards);
                        let at_the_end = GradientSum::new(g, reduction, num_slots, Part::Shard(shards), &Device::Cpu);
                        for seed in 0..3 {
                            let ranges = split(num_slots, world_size, seed);
                            let range = ranges[g.group().rank()].clone();
                            let expected = compute(&at_the_end, n, range.clone())?.finish()?;
                            let sum = compute(&on_the_way, n, range)?.finish()?;
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
        let all = local::run(3, |g| {
            let shards = Shards::new(70, 3, 16);
            let (sums, rank) = (overlapped(g, Reduction::SlotTree, 3, shards), g.group().rank());
            drop(compute(&sums, 70, rank..rank + 1)?);
            let at_the_end = GradientSum::new(g, Reduction::SlotTree, 3, Part::Shard(shards), &Device::Cpu);
            let expected = compute(&at_the_end, 70, rank..rank + 1)?.finish()?;
            Ok::<_, DistError>(bits(&compute(&sums, 70, rank..rank + 1)?.finish()?) == bits(&expected))
        });
        assert!(all.into_iter().all(Result::unwrap));
    }

    /// Those that fail may be several, and wait for nobody.
    #[test]
    fn ranks_that_fail_between_two_stages_end_all_by_name() {
        for (failing, panics) in [(vec![1], false), (vec![2], true), (vec![0, 1], false), (vec![0, 1, 2], false)] {
            let all = local::run(3, |g| {
                let (sums, rank) = (overlapped(g, Reduction::SlotTree, 3, Shards::new(70, 3, 16)), g.group().rank());
                if !failing.contains(&rank) {
                    return compute(&sums, 70, rank..rank + 1)?.finish().map(|_| ());
                }
                let mut sum = sums.begin(rank..rank + 1)?;
                sum.stage(rank, 1, &grad(rank, 70))?;
                assert!(!panics, "boom");
                Err(DistError::Slots { rank, problem: "boom".into() })
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
        let start = |stages| CommThread::start(&Solo, shards, stages).map(|_| ()).unwrap_err().to_string();
        let parts = |text: &str| format!("an overlapped sum takes stages that are, together, 70 elements, found {text}");
        assert_eq!(start(vec![vec![0..70], vec![60..70]]), parts("[[0..70], [60..70]]"));
        assert_eq!(start(vec![vec![1..70]]), parts("[[1..70]]"));
        let sums = overlapped(&Solo, Reduction::SlotTree, 3, shards);
        let none = "rank 0: slots 0..3 of the step were not computed";
        assert_eq!(sums.begin(0..3).unwrap().finish().unwrap_err().to_string(), none);
        let mut sum = sums.begin(0..3).unwrap();
        assert_eq!(sum.stage(2, 1, &grad(2, 70)).unwrap_err().to_string(), none);
        assert_eq!(sum.finish().unwrap_err().to_string(), "rank 0: its sum of the step could not begin");
        let two = || {
            let mut sum = sums.begin(0..3).unwrap();
            (0..2).for_each(|slot| sum.slot(slot, grad(slot, 70)).unwrap());
            sum
        };
        let mut sum = two();
        sum.stage(2, 2, &grad(2, 70)).unwrap();
        let text = two().stage(2, 1, &grad(2, 70)).unwrap_err().to_string();
        assert_eq!(text, "the communication thread takes one sum at a time, found another before its end");
        assert_eq!(sum.finish().unwrap_err().to_string(), "rank 0: 2 of 4 stages of its last slot are final");
    }
}
