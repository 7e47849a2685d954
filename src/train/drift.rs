//! How far tuning has moved the model from its base.

use std::num::NonZeroUsize;

use super::evaluate::mean_over_rows;
use super::{TrainError, backprop};
use crate::data::Dataset;
use crate::dist::ProcessGroup;
use crate::model::ChatGlm2;
use crate::peft::PeftMethod;

/// The same on every rank and at any world size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drift {
    /// Mean of KL(base || tuned) over target positions, in nats.
    pub kl: f64,
    pub num_rows: u64,
    pub num_targets: u64,
}

/// The drift of `model` under `method` from `base` on the first `num_rows` rows of `data`, dealt to the ranks in slots of `rows_per_slot`.
///
/// # Errors
/// The same on every rank: when a collective fails, the rows have no target, or a divergence is NaN or infinite.
pub fn drift(
    base: &ChatGlm2,
    model: &ChatGlm2,
    method: &dyn PeftMethod,
    group: &dyn ProcessGroup,
    data: &Dataset,
    num_rows: NonZeroUsize,
    rows_per_slot: NonZeroUsize,
) -> Result<Drift, TrainError> {
    let sum_of = |batch: &_| backprop::divergence(base, model, method, batch);
    let mean = mean_over_rows("drift", group, data, num_rows.get(), rows_per_slot, sum_of)?;
    Ok(Drift { kl: mean.loss, num_rows: mean.num_rows, num_targets: mean.num_targets })
}
