//! A step sends what is final of its gradient while the rest is computed, and ends as one that sends all of it at the end.
#![allow(clippy::result_large_err, reason = "what a rank returns once")]

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use candle_core::{Result, Tensor};
use glmddp::config::plan::LossMean;
use glmddp::data::MicroBatch;
use glmddp::dist::{Collectives, DistError, Duplicate, GradientSum, Part, ProcessGroup, Reduction, local};
use glmddp::model::hooks::{BaseWeight, Hooks, Reach};
use glmddp::model::{ChatGlm2, Recompute};
use glmddp::optim::AdamWConfig;
use glmddp::params::ParamSet;
use glmddp::peft::export::{ExportError, Files};
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::{ExportContext, FinetuningType, MethodPlan, PeftMethod, RowContext, TrainHooks, create};
use glmddp::telemetry::PhaseTimer;
use glmddp::train::TrainError;
use glmddp::train::optimizer::Optimizer;
use glmddp::train::requests::Wish;
use glmddp::train::step::{StepSettings, Trainer, gradient_sum};

use crate::golden::cases;
use crate::golden_model::model;
use crate::golden_train::micro_batch;

const ADAMW: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
/// What does not happen within this time never will.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    /// The communication thread has exchanged parts of a gradient with the other ranks.
    Sent,
    /// The backward pass is about to add to the gradient of the lowest layer's first norm.
    LowestLayer,
}

/// What happened on a rank, in order.
#[derive(Default)]
struct Record {
    events: Mutex<Vec<Event>>,
    changed: Condvar,
}

impl Record {
    fn add(&self, event: Event) {
        self.events.lock().unwrap().push(event);
        self.changed.notify_all();
    }

    fn wait_for(&self, event: Event) {
        let events = self.events.lock().unwrap();
        let is_late = self.changed.wait_timeout_while(events, PATIENCE, |events| !events.contains(&event)).unwrap().1.timed_out();
        assert!(!is_late, "{event:?} did not happen before the lowest layer's gradient");
    }
}

/// Collectives whose duplicates record what they send.
struct Recorded<G> {
    inner: G,
    record: Arc<Record>,
    is_duplicate: bool,
}

impl<G: Deref<Target: Collectives>> Collectives for Recorded<G> {
    fn group(&self) -> &dyn ProcessGroup {
        self.inner.group()
    }

    fn all_gather(&self, mine: &Tensor) -> std::result::Result<Tensor, DistError> {
        self.inner.all_gather(mine)
    }

    fn all_to_all_v(&self, parts: &Tensor, send: &[usize], receive: &[usize]) -> std::result::Result<Tensor, DistError> {
        let received = self.inner.all_to_all_v(parts, send, receive);
        if self.is_duplicate {
            self.record.add(Event::Sent);
        }
        received
    }

    fn all_reduce(&self, mine: &Tensor) -> std::result::Result<Tensor, DistError> {
        self.inner.all_reduce(mine)
    }

    fn broadcast(&self, mine: &Tensor, root: usize) -> std::result::Result<Tensor, DistError> {
        self.inner.broadcast(mine, root)
    }

    fn duplicate(&self) -> Duplicate {
        let (duplicate, record) = (self.inner.duplicate(), self.record.clone());
        Box::new(move || Box::new(Recorded { inner: duplicate(), record, is_duplicate: true }))
    }

    fn finish(self: Box<Self>) {}
}

/// What happens when a backward pass comes to the lowest layer's first norm.
#[derive(Clone)]
enum AtLowestLayer {
    /// It goes on once something was sent.
    WaitForSent(Arc<Record>),
    Fail,
    Nothing,
}

/// Full tuning that looks at where a backward pass is.
struct Watched {
    inner: Box<dyn PeftMethod>,
    at_lowest: AtLowestLayer,
}

impl PeftMethod for Watched {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn params(&self) -> &ParamSet {
        self.inner.params()
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        self.inner.params_mut()
    }

    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        Ok(Box::new(WatchedHooks { inner: self.inner.hooks(rows)?, at_lowest: &self.at_lowest }))
    }

    fn site_is_parameters(&self) -> bool {
        self.inner.site_is_parameters()
    }

    fn site_stages(&self) -> Vec<Vec<Range<usize>>> {
        self.inner.site_stages()
    }

    fn trained_base_weights(&self) -> Result<BTreeMap<BaseWeight, Tensor>> {
        self.inner.trained_base_weights()
    }

    fn sizes(&self) -> BTreeMap<String, serde_json::Value> {
        self.inner.sizes()
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        self.inner.export(context)
    }
}

struct WatchedHooks<'a> {
    inner: Box<dyn TrainHooks + 'a>,
    at_lowest: &'a AtLowestLayer,
}

impl Hooks for WatchedHooks<'_> {
    fn weight_grad(&mut self, weight: BaseWeight) -> Result<Option<Tensor>> {
        if weight == BaseWeight::InputLayernorm(0) {
            match self.at_lowest {
                AtLowestLayer::WaitForSent(record) => {
                    record.wait_for(Event::Sent);
                    record.add(Event::LowestLayer);
                }
                AtLowestLayer::Fail => candle_core::bail!("the lowest layer is broken"),
                AtLowestLayer::Nothing => {}
            }
        }
        self.inner.weight_grad(weight)
    }

    fn reach(&self, layer: usize) -> Reach {
        self.inner.reach(layer)
    }
}

impl TrainHooks for WatchedHooks<'_> {
    fn running_site_grad(&self) -> Option<Tensor> {
        self.inner.running_site_grad()
    }

    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        self.inner.into_site_grad()
    }
}

fn full(model: &ChatGlm2) -> Box<dyn PeftMethod> {
    create(&MethodPlan::resolve(FinetuningType::Full, &MethodKeys::default()).unwrap(), model, 7).unwrap()
}

/// A model and three micro-batches.
fn model_and_slots() -> (ChatGlm2, Vec<MicroBatch>) {
    let case = cases().remove(0);
    let inputs = case.tensors("inputs").unwrap();
    let (ids, labels) = (inputs["tr_ids"].get(0).unwrap(), inputs["tr_labels"].get(0).unwrap());
    let part = |start, len| micro_batch(&ids.narrow(0, start, len).unwrap(), &labels.narrow(0, start, len).unwrap());
    (model(&case), vec![part(0, 1), part(1, 1), part(0, 2)])
}

#[derive(Clone, Copy)]
struct Setting {
    loss_mean: LossMean,
    reduction: Reduction,
    is_overlapped: bool,
}

/// Two steps -> bits of losses, norms and parameters.
fn train(
    tensors: &dyn Collectives,
    (model, slots): (&ChatGlm2, &[MicroBatch]),
    setting: Setting,
    at_lowest: AtLowestLayer,
) -> std::result::Result<(Vec<u64>, Vec<u32>), TrainError> {
    let mut model = model.clone();
    let mut method = Watched { inner: full(&model), at_lowest };
    model.replace_weights(&method.trained_base_weights()?)?;
    let n = method.params().layout().num_elements();
    let mut optimizer = Optimizer::sharded(ADAMW, n, model.device(), tensors)?;
    let sum = if setting.is_overlapped {
        gradient_sum(tensors, setting.reduction, slots.len(), &method, &optimizer)?
    } else {
        GradientSum::new(tensors, setting.reduction, slots.len(), Part::Shard(optimizer.shards()), model.device())
    };
    let settings = StepSettings { recompute: Recompute::None, loss_mean: setting.loss_mean, max_grad_norm: Some(1.0) };
    let group = tensors.group();
    // The last rank of four has none.
    let mine = (group.rank() * slots.len()).div_ceil(group.world_size())..((group.rank() + 1) * slots.len()).div_ceil(group.world_size());
    let mine: Vec<_> = mine.map(|slot| (slot, slots[slot].clone())).collect();
    let mut numbers = Vec::new();
    for _ in 0..2 {
        let (model, method, optimizer, sum) = (&model, &mut method, &mut optimizer, &sum);
        let mut trainer = Trainer { model, method, optimizer, sum, settings, wish: &Wish::default };
        let outcome = trainer.step(&mine, 1e-3, &PhaseTimer::default())?;
        numbers.extend([outcome.loss.to_bits(), outcome.grad_norm.to_bits()]);
    }
    Ok((numbers, method.params().flat().to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect()))
}

#[test]
fn overlapped_steps_have_the_bits_of_those_that_sum_at_the_end() {
    let (model, slots) = model_and_slots();
    for (loss_mean, reduction) in
        [(LossMean::Token, Reduction::SlotTree), (LossMean::MicroBatch, Reduction::SlotTree), (LossMean::Token, Reduction::AllReduce)]
    {
        let on = |world_size, is_overlapped| {
            let setting = Setting { loss_mean, reduction, is_overlapped };
            let all = local::run(world_size, |g| train(g, (&model, &slots), setting, AtLowestLayer::Nothing));
            all.into_iter().map(std::result::Result::unwrap).collect::<Vec<_>>()
        };
        let solo = on(1, false).remove(0);
        for world_size in 1..=4 {
            let plain = on(world_size, false);
            assert!(on(world_size, true) == plain, "{loss_mean:?}, {reduction:?}, {world_size} ranks");
            assert!(reduction == Reduction::AllReduce || plain.iter().all(|rank| *rank == solo), "{loss_mean:?}, {world_size} ranks");
        }
    }
}

#[test]
fn overlapped_step_has_sent_a_part_before_the_lowest_layer_has_its_gradient() {
    let (model, slots) = model_and_slots();
    let all = local::run(3, |g| {
        let record = Arc::new(Record::default());
        let group = Recorded { inner: g, record: record.clone(), is_duplicate: false };
        let setting = Setting { loss_mean: LossMean::Token, reduction: Reduction::SlotTree, is_overlapped: true };
        train(&group, (&model, &slots), setting, AtLowestLayer::WaitForSent(record.clone()))?;
        let events = record.events.lock().unwrap().clone();
        Ok::<_, TrainError>(events)
    });
    for events in all {
        let events = events.unwrap();
        assert_eq!(events.iter().find(|event| **event != Event::Sent), Some(&Event::LowestLayer));
        assert_eq!((events.first(), events.last()), (Some(&Event::Sent), Some(&Event::Sent)), "some before it, some behind it");
    }
}

#[test]
fn overlapped_step_with_a_rank_that_fails_in_its_backward_pass_ends_all_ranks() {
    let (model, slots) = model_and_slots();
    for failing in [vec![1], vec![0, 2], vec![0, 1, 2]] {
        let all = local::run(3, |g| {
            let setting = Setting { loss_mean: LossMean::Token, reduction: Reduction::SlotTree, is_overlapped: true };
            let at_lowest = if failing.contains(&g.rank()) { AtLowestLayer::Fail } else { AtLowestLayer::Nothing };
            train(g, (&model, &slots), setting, at_lowest).map(|_| ())
        });
        for (rank, outcome) in all.into_iter().enumerate() {
            let text = outcome.unwrap_err().to_string();
            assert!(text.contains("the lowest layer is broken"), "rank {rank}, {failing:?} fail: {text}");
        }
    }
}

/// The parts that were sent are dropped, on all ranks, with the same error.
#[test]
fn overlapped_step_with_a_slot_that_is_not_finite_ends_all_ranks_alike() {
    let (mut model, slots) = model_and_slots();
    let norm = model.weight(BaseWeight::FinalLayernorm).unwrap();
    let bad = (norm * f64::INFINITY).unwrap();
    model.replace_weights(&BTreeMap::from([(BaseWeight::FinalLayernorm, bad)])).unwrap();
    let all = local::run(4, |g| {
        let setting = Setting { loss_mean: LossMean::Token, reduction: Reduction::SlotTree, is_overlapped: true };
        train(g, (&model, &slots), setting, AtLowestLayer::Nothing).map(|_| ())
    });
    for outcome in all {
        assert!(matches!(outcome, Err(TrainError::NotFinite { slots, .. }) if slots == [0, 1, 2]));
    }
}
