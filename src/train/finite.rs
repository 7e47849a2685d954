//! The search for a value that is not finite where none was computed: in a state to be saved, and in one that is read.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::TrainError;
use super::state::PARAMETER;
use crate::checkpoint::{Checkpoint, Disk};
use crate::optim::{NonFinite, first_non_finite};
use crate::params::{Layout, ParamSet};

/// Tests the parameters that the update of `step` left. They are the same on every rank, so the result is as well.
///
/// # Errors
/// When one of them is NaN or infinite.
pub(super) fn after_update(step: u64, params: &ParamSet) -> Result<(), TrainError> {
    match search(params.flat(), params.layout())? {
        Some(found) => Err(TrainError::UpdateNotFinite { step, found }),
        None => Ok(()),
    }
}

/// Tests the parameters of the checkpoint in `path`: `values` `[num_elements]` in `layout`.
///
/// # Errors
/// When one of them is NaN or infinite.
pub(super) fn of_checkpoint(path: &Path, values: &Tensor, layout: &Layout) -> Result<(), TrainError> {
    match search(values, layout)? {
        Some(found) => Err(TrainError::CheckpointNotFinite { path: path.to_owned(), found }),
        None => Ok(()),
    }
}

/// As [`of_checkpoint`], with names, shapes and values as the checkpoint has them.
///
/// # Errors
/// As [`of_checkpoint`], or when a shard is missing or damaged.
pub(super) fn in_checkpoint(disk: &dyn Disk, checkpoint: &Checkpoint) -> Result<(), TrainError> {
    let parameters = checkpoint.manifest.tensors.iter().filter_map(|(name, entry)| {
        let (kind, name) = name.split_once('.')?;
        (kind == PARAMETER).then(|| (name.to_owned(), entry.shape.clone()))
    });
    let layout = Layout::new(parameters.collect::<BTreeMap<_, _>>());
    let values = checkpoint.kind(disk, PARAMETER, &layout)?;
    let len = values.len();
    of_checkpoint(&checkpoint.path, &Tensor::from_vec(values, len, &Device::Cpu)?, &layout)
}

fn search(flat: &Tensor, layout: &Layout) -> Result<Option<NonFinite>, TrainError> {
    Ok(first_non_finite(flat)?.map(|(at, value)| NonFinite::locate(at, value, layout)).transpose()?)
}
