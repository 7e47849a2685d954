//! One optimizer step.

use std::ops::Range;

use candle_core::Tensor;

use super::TrainError;
use super::backprop::{self, SlotPass};
use super::optimizer::Optimizer;
use super::requests::{Request, Wish};
use crate::config::plan::LossMean;
use crate::data::MicroBatch;
use crate::dist::{self, Collectives, GradientSum, Part, Reduction, SlotScalars, StepSum};
use crate::formats::text_of;
use crate::kernels::elementwise::scale_;
use crate::kernels::{host, non_finite};
use crate::model::{ChatGlm2, Recompute};
use crate::optim::Norm;
use crate::peft::PeftMethod;
use crate::telemetry::{Phase, PhaseTimer};

/// What does not change between steps.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    pub recompute: Recompute,
    pub loss_mean: LossMean,
    /// Clip the global gradient norm to this; none: no clipping.
    pub max_grad_norm: Option<f64>,
}

/// The same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Before the update.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub num_targets: u64,
    /// What the ranks were asked for up to the end of this step.
    pub request: Request,
}

/// The sum over `num_slots` slots of the gradients at a method's sites. Where the sites are the parameters, each rank gets the shard of it that
/// `optimizer` takes, and what is final of it moves on the way where ranks share the optimizer's state. A collective.
///
/// # Errors
/// When the thread that moves it cannot be started.
pub fn gradient_sum<'g>(
    tensors: &'g dyn Collectives,
    reduction: Reduction,
    num_slots: usize,
    method: &dyn PeftMethod,
    optimizer: &Optimizer,
) -> Result<GradientSum<'g>, TrainError> {
    let shards = optimizer.shards();
    let is_dealt = method.site_is_parameters() && shards.world_size() == tensors.group().world_size();
    let part = if is_dealt { Part::Shard(shards) } else { Part::Whole(method.site_len()) };
    let sum = GradientSum::new(tensors, reduction, num_slots, part, method.params().flat().device());
    Ok(sum.overlapped(method.site_stages())?)
}

/// One rank's share of a training run.
pub struct Trainer<'a, 'g> {
    pub model: &'a ChatGlm2,
    pub method: &'a mut dyn PeftMethod,
    pub optimizer: &'a mut Optimizer<'g>,
    pub sum: &'a GradientSum<'a>,
    pub settings: StepSettings,
    /// What this rank is asked for; called once a step, when it is done.
    pub wish: &'a dyn Fn() -> Wish,
}

/// What a slot leaves on the device.
struct Computed {
    slot: usize,
    num_targets: u64,
    nll: Vec<Tensor>,
    /// Where its gradient is not finite, as [`non_finite::search`] has it.
    bad: Tensor,
}

impl Trainer<'_, '_> {
    /// Computes this rank's slots, sums over all, and updates the parameters. The host queues all of it and then waits once for the device (and
    /// for collectives that go through the host), so what stands for a step that must not be taken is the norm of its gradient: where that is not
    /// finite an update changes nothing.
    ///
    /// # Errors
    /// The same on every rank, with parameters as they were, when a loss or a gradient is not finite or no token is in the loss.
    pub fn step(&mut self, slots: &[(usize, MicroBatch)], lr: f64, timer: &PhaseTimer) -> Result<StepOutcome, TrainError> {
        let denominator = timer.time(Phase::Comm, || self.denominator(slots))?;
        let mut sum = timer.time(Phase::Comm, || self.sum.begin(range(slots)))?;
        let computed = timer.time(Phase::ForwardBackward, || self.sum_slots(slots, &mut sum))?;
        let site_grad = timer.time(Phase::Comm, || sum.finish())?;
        let (grad, norm) = timer.time(Phase::Optim, || {
            let grad = self.mean(site_grad, denominator)?;
            let norm = self.optimizer.norm(&grad, self.settings.max_grad_norm)?;
            self.optimizer.step(self.method.params().flat(), &grad, &norm, lr)?;
            Ok::<_, TrainError>((grad, norm))
        })?;
        timer.time(Phase::Comm, || self.optimizer.gather(self.method.params().flat()))?;
        timer.time(Phase::Optim, || self.method.refresh())?;

        let (scalars, grad_norm) = timer.time(Phase::ForwardBackward, || read(&computed, &norm))?;
        let note = (self.wish)().to_byte();
        let (all, notes) = timer.time(Phase::Comm, || dist::gather_slots_and_notes(self.sum.group(), &scalars, note))?;
        let loss = self.loss(&all, denominator)?;
        if !grad_norm.is_finite() {
            return Err(self.not_finite(&grad, grad_norm)?);
        }
        Ok(StepOutcome { loss, grad_norm, num_targets: all.iter().map(|s| s.num_targets).sum(), request: Request::of(&notes) })
    }

    /// What the sum of all slots' gradients is divided by. A collective.
    fn denominator(&self, slots: &[(usize, MicroBatch)]) -> Result<f64, TrainError> {
        let mine: Vec<u64> = slots.iter().map(|(_, batch)| batch.targets.len() as u64).collect();
        let all = dist::gather_words(self.sum.group(), "the number of its targets", &mine)?.concat();
        let num_targets: u64 = all.iter().sum();
        match self.settings.loss_mean {
            _ if num_targets == 0 => Err(TrainError::NoTargets),
            LossMean::Token => Ok(num_targets as f64),
            LossMean::MicroBatch => Ok(all.len() as f64),
        }
    }

    /// Adds this rank's slots to `sum`; what is final of one's gradient before the whole is may move at once.
    fn sum_slots(&self, slots: &[(usize, MicroBatch)], sum: &mut StepSum) -> Result<Vec<Computed>, TrainError> {
        let computed = slots.iter().map(|(slot, batch)| {
            let SlotPass { nll, site_grad } = self.slot(*slot, batch, sum)?;
            let bad = non_finite::search(&site_grad)?;
            sum.slot(*slot, site_grad)?;
            Ok(Computed { slot: *slot, num_targets: batch.targets.len() as u64, nll, bad })
        });
        computed.collect()
    }

    /// One slot's losses, and its share of the site gradient's sum.
    fn slot(&self, slot: usize, batch: &MicroBatch, sum: &mut StepSum) -> Result<SlotPass, TrainError> {
        let factor = match (self.settings.loss_mean, batch.targets.len()) {
            (LossMean::MicroBatch, num_targets) if num_targets > 0 => Some((1.0 / num_targets as f64) as f32),
            _ => None,
        };
        let stages = self.method.site_stages();
        let mut num_scaled = 0;
        let pass = backprop::forward_backward_watched(self.model, self.method, batch, self.settings.recompute, &mut |grad, stage| {
            let num_final = stage.place(self.model.config.num_layers) + 1;
            if let Some(factor) = factor {
                for range in stages[num_scaled..num_final].iter().flatten() {
                    scale_(&grad.narrow(0, range.start, range.len())?, factor)?;
                }
            }
            num_scaled = num_final;
            sum.stage(slot, num_final, grad).map_err(candle_core::Error::wrap)
        })?;
        if let (Some(factor), 0) = (factor, num_scaled) {
            scale_(&pass.site_grad, factor)?;
        }
        Ok(pass)
    }

    /// The loss of the step, where every slot's loss and gradient are finite.
    fn loss(&self, slots: &[SlotScalars], denominator: f64) -> Result<f64, TrainError> {
        let bad: Vec<usize> = slots.iter().filter(|s| !s.finite).map(|s| s.slot).collect();
        if !bad.is_empty() {
            return Err(TrainError::NotFinite { what: "loss or gradient".to_owned(), slots: bad });
        }
        let sum: f64 = match self.settings.loss_mean {
            LossMean::Token => slots.iter().map(|s| s.nll_sum).sum(),
            LossMean::MicroBatch => slots.iter().filter(|s| s.num_targets > 0).map(|s| s.nll_sum / s.num_targets as f64).sum(),
        };
        Ok(sum / denominator)
    }

    /// The summed gradient at the sites, divided -> this rank's shard of the parameters' gradient.
    fn mean(&self, site_grad: Tensor, denominator: f64) -> Result<Tensor, TrainError> {
        scale_(&site_grad, (1.0 / denominator) as f32)?;
        if self.method.site_is_parameters() {
            return Ok(site_grad);
        }
        self.optimizer.shard_of(&self.method.param_grad(&site_grad)?)
    }

    /// The error that a gradient makes whose norm is not finite, though each slot's is. A collective of the optimizer's ranks.
    fn not_finite(&self, grad: &Tensor, norm: f64) -> Result<TrainError, TrainError> {
        // Squares of f32 values cannot overflow a sum in f64: an element is to blame.
        let what = match self.optimizer.first_non_finite(grad, self.method.params().layout())? {
            Some(bad) => format!("element {} of the gradient of `{}` ({})", bad.index, bad.name, text_of(bad.value.into())),
            None => format!("the norm of the gradient ({})", text_of(norm)),
        };
        Ok(TrainError::NotFinite { what, slots: Vec::new() })
    }
}

/// The step's one wait for the device.
fn read(computed: &[Computed], norm: &Norm) -> Result<(Vec<SlotScalars>, f64), TrainError> {
    let mut tensors = vec![norm.words()];
    for Computed { nll, bad, .. } in computed {
        tensors.push(bad);
        tensors.extend(nll);
    }
    let mut values = host::read(&tensors)?.into_iter();
    let mut next = || values.next().unwrap_or_default();
    let norm = Norm::value(&next());
    let scalars = computed.iter().map(|Computed { slot, num_targets, nll, .. }| {
        let is_finite = non_finite::place(&next()).is_none();
        let nll_sum = backprop::sum(&nll.iter().flat_map(|_| next()).collect::<Vec<_>>());
        SlotScalars { slot: *slot, nll_sum, num_targets: *num_targets, finite: nll_sum.is_finite() && is_finite }
    });
    Ok((scalars.collect(), norm))
}

/// The slots of a rank's share, which are neighbours.
fn range(slots: &[(usize, MicroBatch)]) -> Range<usize> {
    slots.first().map_or(0, |s| s.0)..slots.last().map_or(0, |s| s.0 + 1)
}
