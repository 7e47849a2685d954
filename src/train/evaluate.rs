//! Loss on held-out rows.

use std::num::NonZeroUsize;

use super::TrainError;
use super::backprop;
use crate::data::Dataset;
use crate::data::collate::collate;
use crate::data::sampler::{eval_slot, num_eval_slots, slots_of_rank};
use crate::dist::{self, ProcessGroup, SlotScalars};
use crate::model::ChatGlm2;
use crate::peft::PeftMethod;

/// The same on every rank and at any world size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean over all target tokens.
    pub loss: f64,
    pub num_rows: u64,
    pub num_targets: u64,
}

/// Mean token loss over all rows of `data`, without dropout; of the base alone where there is no method. The rows are dealt to the ranks in slots of `rows_per_slot`.
///
/// # Errors
/// When a collective fails or no token is in the loss.
pub fn evaluate(
    model: &ChatGlm2,
    method: Option<&dyn PeftMethod>,
    group: &dyn ProcessGroup,
    data: &Dataset,
    rows_per_slot: NonZeroUsize,
) -> Result<Evaluation, TrainError> {
    let num_slots = num_eval_slots(data.num_samples(), rows_per_slot);
    let world_size = NonZeroUsize::new(group.world_size()).unwrap_or(NonZeroUsize::MIN);
    let mut mine = Vec::new();
    for slot in slots_of_rank(num_slots, world_size, group.rank()) {
        let rows: Vec<(u64, usize)> = eval_slot(slot, data.num_samples(), rows_per_slot).map(|row| (row as u64, row)).collect();
        let batch = collate(&rows, data);
        let nll_sum = backprop::forward(model, method, &batch)?;
        mine.push(SlotScalars { slot, nll_sum, num_targets: batch.targets.len() as u64, finite: nll_sum.is_finite() });
    }
    let all = dist::gather_slots(group, &mine)?;
    let num_targets = all.iter().map(|s| s.num_targets).sum::<u64>();
    if num_targets == 0 {
        return Err(TrainError::NoTargets);
    }
    let loss = all.iter().map(|s| s.nll_sum).sum::<f64>() / num_targets as f64;
    Ok(Evaluation { loss, num_rows: data.num_samples() as u64, num_targets })
}
