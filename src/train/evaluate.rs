//! Loss on held-out rows.

use std::num::NonZeroUsize;

use super::TrainError;
use super::backprop;
use crate::data::collate::collate;
use crate::data::sampler::{eval_slot, num_eval_slots, slots_of_rank};
use crate::data::{Dataset, MicroBatch};
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
/// The same on every rank: when a collective fails, no token is in the loss, or a loss is NaN or infinite.
pub fn evaluate(
    model: &ChatGlm2,
    method: Option<&dyn PeftMethod>,
    group: &dyn ProcessGroup,
    data: &Dataset,
    rows_per_slot: NonZeroUsize,
) -> Result<Evaluation, TrainError> {
    mean_over_rows("loss", group, data, data.num_samples(), rows_per_slot, |batch| backprop::forward(model, method, batch))
}

/// The mean over target tokens of what `sum_of` gives for a slot's, over the first `num_rows` rows of `data`; `what` names it in an error.
pub(super) fn mean_over_rows(
    what: &'static str,
    group: &dyn ProcessGroup,
    data: &Dataset,
    num_rows: usize,
    rows_per_slot: NonZeroUsize,
    sum_of: impl Fn(&MicroBatch) -> candle_core::Result<f64>,
) -> Result<Evaluation, TrainError> {
    let num_rows = num_rows.min(data.num_samples());
    let num_slots = num_eval_slots(num_rows, rows_per_slot);
    let world_size = NonZeroUsize::new(group.world_size()).unwrap_or(NonZeroUsize::MIN);
    let mut mine = Vec::new();
    for slot in slots_of_rank(num_slots, world_size, group.rank()) {
        let rows: Vec<(u64, usize)> = eval_slot(slot, num_rows, rows_per_slot).map(|row| (row as u64, row)).collect();
        let batch = collate(&rows, data);
        let sum = sum_of(&batch)?;
        mine.push(SlotScalars { slot, nll_sum: sum, num_targets: batch.targets.len() as u64, finite: sum.is_finite() });
    }
    let all = dist::gather_slots(group, &mine)?;
    let num_targets = all.iter().map(|s| s.num_targets).sum::<u64>();
    if num_targets == 0 {
        return Err(TrainError::NoTargets);
    }
    if let Some(bad) = all.iter().find(|s| !s.finite) {
        let origins = eval_slot(bad.slot, num_rows, rows_per_slot).map(|row| data.origin(row));
        let rows = origins.map(|origin| format!("{}:{}", origin.file.display(), origin.row)).collect();
        return Err(TrainError::HeldOutNotFinite { step: None, what, rows });
    }
    let loss = all.iter().map(|s| s.nll_sum).sum::<f64>() / num_targets as f64;
    Ok(Evaluation { loss, num_rows: num_rows as u64, num_targets })
}
