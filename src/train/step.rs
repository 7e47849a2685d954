//! One optimizer step.

use candle_core::Tensor;

use super::TrainError;
use super::backprop;
use super::optimizer::Optimizer;
use super::requests::{Request, Wish};
use crate::config::plan::LossMean;
use crate::data::MicroBatch;
use crate::dist::{self, CommThread, OverlapPlan, OverlappedSum, ProcessGroup, Reduction, SlotAccumulator, SlotScalars, SlotTree};
use crate::kernels::elementwise::scale_;
use crate::model::{ChatGlm2, Recompute};
use crate::optim;
use crate::peft::PeftMethod;
use crate::telemetry::{Phase, PhaseTimer};

/// What does not change between steps.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    /// Micro-batches of a step over all ranks.
    pub num_slots: usize,
    pub recompute: Recompute,
    pub loss_mean: LossMean,
    pub reduction: Reduction,
    /// Clip the global gradient norm to this; none: no clipping.
    pub max_grad_norm: Option<f64>,
}

/// This rank's slots, summed.
enum Sums<'s> {
    /// They wait for the reduction.
    Here(SlotAccumulator),
    /// The reduction began while they were computed.
    OnTheWay(OverlappedSum<'s>),
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

/// One rank's share of a training run.
pub struct Trainer<'a, 'g> {
    pub model: &'a ChatGlm2,
    pub method: &'a mut dyn PeftMethod,
    pub optimizer: &'a mut Optimizer<'g>,
    pub group: &'a dyn ProcessGroup,
    pub settings: StepSettings,
    /// What this rank is asked for; called once a step, when its gradients are there.
    pub wish: &'a dyn Fn() -> Wish,
}

impl Trainer<'_, '_> {
    /// Computes this rank's slots, sums over all, and updates the parameters.
    ///
    /// # Errors
    /// On all ranks alike, before the update, when a loss or a gradient is not finite or no token is in the loss.
    pub fn step(&mut self, slots: &[(usize, MicroBatch)], lr: f64, timer: &PhaseTimer) -> Result<StepOutcome, TrainError> {
        let sums = self.empty_sums(slots);
        // Where the sum is made on the way, the ranks' parts in it are agreed upon first.
        let overlap = timer.time(Phase::Comm, || self.optimizer.plan_overlap(self.group, &sums, self.method.site_stages()))?;
        let (sums, scalars) = timer.time(Phase::ForwardBackward, || self.local_sums(slots, sums, overlap))?;

        let note = (self.wish)().to_byte();
        let (all, notes) = timer.time(Phase::Comm, || dist::gather_slots_and_notes(self.group, &scalars, note))?;
        let bad: Vec<usize> = all.iter().filter(|s| !s.finite).map(|s| s.slot).collect();
        if !bad.is_empty() {
            return Err(TrainError::NotFinite { what: "loss or gradient".to_owned(), slots: bad });
        }
        let (loss, denominator, num_targets) = self.mean_loss(&all)?;

        let grad = self.mean_gradient(sums, denominator, timer)?;
        let grad_norm = timer.time(Phase::Optim, || self.update(&grad, lr))?;
        timer.time(Phase::Comm, || self.optimizer.gather(self.method.params().flat()))?;
        timer.time(Phase::Optim, || self.method.refresh())?;
        Ok(StepOutcome { loss, grad_norm, num_targets, request: Request::of(&notes) })
    }

    fn empty_sums(&self, slots: &[(usize, MicroBatch)]) -> SlotAccumulator {
        let (start, end) = (slots.first().map_or(0, |s| s.0), slots.last().map_or(0, |s| s.0 + 1));
        let tree = SlotTree::new(self.settings.num_slots);
        SlotAccumulator::new(self.settings.reduction, tree, start..end, self.method.site_len(), self.model.device())
    }

    /// Computes this rank's slots; with `overlap`, the last one's gradient is on its way to its owners before it is complete.
    fn local_sums<'s>(
        &'s self,
        slots: &[(usize, MicroBatch)],
        mut sums: SlotAccumulator,
        overlap: Option<(&'s CommThread, OverlapPlan)>,
    ) -> Result<(Sums<'s>, Vec<SlotScalars>), TrainError> {
        let (first, last) = if overlap.is_some() { slots.split_at(slots.len().saturating_sub(1)) } else { (slots, &[][..]) };
        let mut scalars = Vec::with_capacity(slots.len());
        for (slot, batch) in first {
            let (of_slot, grad) = self.slot(*slot, batch, &mut |_, _| {})?;
            scalars.push(of_slot);
            sums.push(*slot, grad)?;
        }
        let Some((thread, plan)) = overlap else { return Ok((Sums::Here(sums), scalars)) };
        let mut sum = thread.begin(plan, sums, last.first().map(|(slot, _)| *slot))?;
        for (slot, batch) in last {
            scalars.push(self.slot(*slot, batch, &mut |grad, num_final| sum.advance(num_final, *slot, grad))?.0);
        }
        Ok((Sums::OnTheWay(sum), scalars))
    }

    /// One slot -> (its share of the loss, its site gradient). `watch` sees the gradient and how many of its stages are final.
    fn slot(&self, slot: usize, batch: &MicroBatch, watch: &mut dyn FnMut(&Tensor, usize)) -> Result<(SlotScalars, Tensor), TrainError> {
        let num_targets = batch.targets.len() as u64;
        let factor = match self.settings.loss_mean {
            LossMean::MicroBatch if num_targets > 0 => Some((1.0 / num_targets as f64) as f32),
            _ => None,
        };
        let stages = self.method.site_stages();
        let mut num_scaled = 0;
        let pass = backprop::forward_backward_watched(self.model, self.method, batch, self.settings.recompute, &mut |grad, num_final| {
            if let Some(factor) = factor {
                for range in stages[num_scaled..num_final].iter().flatten() {
                    scale_(&grad.narrow(0, range.start, range.len())?, factor)?;
                }
            }
            num_scaled = num_final;
            watch(grad, num_final);
            Ok(())
        })?;
        let nll_sum = pass.nll_sum();
        if let (Some(factor), 0) = (factor, num_scaled) {
            scale_(&pass.site_grad, factor)?;
        }
        let finite = nll_sum.is_finite() && optim::global_norm(&pass.site_grad)?.is_finite();
        Ok((SlotScalars { slot, nll_sum, num_targets, finite }, pass.site_grad))
    }

    /// -> (loss, what the summed gradient is divided by, target tokens).
    fn mean_loss(&self, slots: &[SlotScalars]) -> Result<(f64, f64, u64), TrainError> {
        let num_targets: u64 = slots.iter().map(|s| s.num_targets).sum();
        if num_targets == 0 {
            return Err(TrainError::NoTargets);
        }
        Ok(match self.settings.loss_mean {
            LossMean::Token => (slots.iter().map(|s| s.nll_sum).sum::<f64>() / num_targets as f64, num_targets as f64, num_targets),
            LossMean::MicroBatch => {
                let means = slots.iter().filter(|s| s.num_targets > 0).map(|s| s.nll_sum / s.num_targets as f64);
                (means.sum::<f64>() / slots.len() as f64, slots.len() as f64, num_targets)
            }
        })
    }

    /// -> this rank's shard of the parameters' gradient, summed over all slots and divided.
    fn mean_gradient(&self, sums: Sums, denominator: f64, timer: &PhaseTimer) -> Result<Tensor, TrainError> {
        let factor = (1.0 / denominator) as f32;
        let grad = match sums {
            Sums::OnTheWay(sum) => timer.time(Phase::Comm, || sum.finish(self.group))?,
            Sums::Here(sums) if self.method.site_is_parameters() => timer.time(Phase::Comm, || self.optimizer.reduce(self.group, sums))?,
            Sums::Here(sums) => {
                let site_grad = timer.time(Phase::Comm, || dist::reduce(self.group, sums))?;
                return timer.time(Phase::Optim, || {
                    scale_(&site_grad, factor)?;
                    self.optimizer.shard_of(&self.method.param_grad(&site_grad)?)
                });
            }
        };
        timer.time(Phase::Optim, || scale_(&grad, factor))?;
        Ok(grad)
    }

    /// Moves this rank's shard of the parameters along its shard of the gradient -> the whole gradient's norm before clipping.
    fn update(&mut self, grad: &Tensor, lr: f64) -> Result<f64, TrainError> {
        let grad_norm = self.optimizer.global_norm(grad)?;
        // Squares of f32 values cannot overflow a sum in f64: a norm that is finite vouches for every element.
        if !grad_norm.is_finite()
            && let Some(bad) = self.optimizer.first_non_finite(grad, self.method.params().layout())?
        {
            return Err(TrainError::NotFinite {
                what: format!("element {} of the gradient of `{}` ({})", bad.index, bad.name, bad.value),
                slots: Vec::new(),
            });
        }
        if let Some(max_norm) = self.settings.max_grad_norm {
            optim::clip_grad(grad, grad_norm, max_norm)?;
        }
        self.optimizer.step(self.method.params().flat(), grad, lr)?;
        Ok(grad_norm)
    }
}
