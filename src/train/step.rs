//! One optimizer step.

use std::ops::Range;

use candle_core::Tensor;

use super::TrainError;
use super::backprop;
use super::optimizer::Optimizer;
use super::requests::{Request, Wish};
use crate::config::plan::LossMean;
use crate::data::MicroBatch;
use crate::dist::{self, Collectives, GradientSum, Part, Reduction, SlotScalars, StepSum};
use crate::formats::text_of;
use crate::kernels::elementwise::scale_;
use crate::model::{ChatGlm2, Recompute};
use crate::optim;
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
    /// What the ranks were asked for up to the middle of this step.
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
    /// What this rank is asked for; called once a step, when its gradients are there.
    pub wish: &'a dyn Fn() -> Wish,
}

/// What the slots of all ranks say together.
struct Losses {
    loss: f64,
    /// What the summed gradient is divided by.
    denominator: f64,
    num_targets: u64,
}

impl Trainer<'_, '_> {
    /// Computes this rank's slots, sums over all, and updates the parameters.
    ///
    /// # Errors
    /// The same on every rank, before the update, when a loss or a gradient is not finite or no token is in the loss.
    pub fn step(&mut self, slots: &[(usize, MicroBatch)], lr: f64, timer: &PhaseTimer) -> Result<StepOutcome, TrainError> {
        let mut sum = timer.time(Phase::Comm, || self.sum.begin(range(slots)))?;
        let scalars = timer.time(Phase::ForwardBackward, || self.sum_slots(slots, &mut sum))?;
        let note = (self.wish)().to_byte();
        let (all, notes) = timer.time(Phase::Comm, || dist::gather_slots_and_notes(self.sum.group(), &scalars, note))?;
        let Losses { loss, denominator, num_targets } = self.losses(&all)?;

        let site_grad = timer.time(Phase::Comm, || sum.finish())?;
        let grad_norm = timer.time(Phase::Optim, || {
            let grad = self.mean(site_grad, denominator)?;
            let norm = self.finite_norm(&grad)?;
            if let Some(max_norm) = self.settings.max_grad_norm {
                optim::clip_grad(&grad, norm, max_norm)?;
            }
            self.optimizer.step(self.method.params().flat(), &grad, lr)?;
            Ok::<_, TrainError>(norm)
        })?;
        timer.time(Phase::Comm, || self.optimizer.gather(self.method.params().flat()))?;
        timer.time(Phase::Optim, || self.method.refresh())?;
        Ok(StepOutcome { loss, grad_norm, num_targets, request: Request::of(&notes) })
    }

    /// Adds this rank's slots to `sum`; what is final of one's gradient before the whole is may move at once.
    fn sum_slots(&self, slots: &[(usize, MicroBatch)], sum: &mut StepSum) -> Result<Vec<SlotScalars>, TrainError> {
        let scalars = slots.iter().map(|(slot, batch)| {
            let num_targets = batch.targets.len() as u64;
            let (nll_sum, grad) = self.slot(*slot, batch, sum)?;
            let finite = nll_sum.is_finite() && optim::global_norm(&grad)?.is_finite();
            sum.slot(*slot, grad)?;
            Ok(SlotScalars { slot: *slot, nll_sum, num_targets, finite })
        });
        scalars.collect()
    }

    /// One slot -> (the sum of its losses, its share of the site gradient's sum).
    fn slot(&self, slot: usize, batch: &MicroBatch, sum: &mut StepSum) -> Result<(f64, Tensor), TrainError> {
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
        Ok((pass.nll_sum(), pass.site_grad))
    }

    /// Loss and denominator of the step, where every slot's loss and gradient are finite.
    fn losses(&self, slots: &[SlotScalars]) -> Result<Losses, TrainError> {
        let bad: Vec<usize> = slots.iter().filter(|s| !s.finite).map(|s| s.slot).collect();
        if !bad.is_empty() {
            return Err(TrainError::NotFinite { what: "loss or gradient".to_owned(), slots: bad });
        }
        let num_targets: u64 = slots.iter().map(|s| s.num_targets).sum();
        if num_targets == 0 {
            return Err(TrainError::NoTargets);
        }
        let (sum, denominator) = match self.settings.loss_mean {
            LossMean::Token => (slots.iter().map(|s| s.nll_sum).sum::<f64>(), num_targets as f64),
            LossMean::MicroBatch => {
                let means = slots.iter().filter(|s| s.num_targets > 0).map(|s| s.nll_sum / s.num_targets as f64);
                (means.sum::<f64>(), slots.len() as f64)
            }
        };
        Ok(Losses { loss: sum / denominator, denominator, num_targets })
    }

    /// The summed gradient at the sites, divided -> this rank's shard of the parameters' gradient.
    fn mean(&self, site_grad: Tensor, denominator: f64) -> Result<Tensor, TrainError> {
        scale_(&site_grad, (1.0 / denominator) as f32)?;
        if self.method.site_is_parameters() {
            return Ok(site_grad);
        }
        self.optimizer.shard_of(&self.method.param_grad(&site_grad)?)
    }

    /// The norm of the whole gradient, from each rank's shard of it. A collective of the optimizer's ranks.
    fn finite_norm(&self, grad: &Tensor) -> Result<f64, TrainError> {
        let norm = self.optimizer.global_norm(grad)?;
        // Squares of f32 values cannot overflow a sum in f64: a norm that is finite vouches for every element.
        if !norm.is_finite()
            && let Some(bad) = self.optimizer.first_non_finite(grad, self.method.params().layout())?
        {
            let what = format!("element {} of the gradient of `{}` ({})", bad.index, bad.name, text_of(bad.value.into()));
            return Err(TrainError::NotFinite { what, slots: Vec::new() });
        }
        Ok(norm)
    }
}

/// The slots of a rank's share, which are neighbours.
fn range(slots: &[(usize, MicroBatch)]) -> Range<usize> {
    slots.first().map_or(0, |s| s.0)..slots.last().map_or(0, |s| s.0 + 1)
}
