//! What a bit-equal resume needs, to and from a checkpoint: parameters, moments, and the place in the training stream.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};

use super::TrainError;
use super::optimizer::Optimizer;
use crate::checkpoint::{self, Checkpoint, Disk, Header, Identity};
use crate::config::Plan;
use crate::config::plan::{Resume, WeightDtype};
use crate::model::ModelConfig;
use crate::peft::{ExportContext, PeftMethod};

const PARAMETER: &str = "parameter.";

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Rows of the training stream consumed.
    pub consumed_rows: u64,
}

/// The checkpoint that `resume` names; none to start anew.
///
/// # Errors
/// When it names nothing that is complete.
pub fn find(disk: &dyn Disk, output_dir: &Path, resume: &Resume) -> Result<Option<Checkpoint>, TrainError> {
    match resume {
        Resume::No => Ok(None),
        Resume::Path(path) => Ok(Some(checkpoint::load(disk, path)?)),
        Resume::Latest => {
            let Some(latest) = checkpoint::latest(disk, output_dir)? else {
                return Err(TrainError::NothingToResume { path: output_dir.to_owned() });
            };
            for skipped in &latest.skipped {
                tracing::warn!("{} is passed over: {}", skipped.path.display(), skipped.reason);
            }
            Ok(Some(latest.checkpoint))
        }
    }
}

/// Puts a checkpoint's values into a fresh method and optimizer.
///
/// # Errors
/// When the checkpoint belongs to another base, method, size, tokenizer or data order, with both values.
pub fn restore(
    checkpoint: Checkpoint,
    identity: &Identity,
    method: &mut dyn PeftMethod,
    optimizer: &mut Optimizer,
) -> Result<Progress, TrainError> {
    let Checkpoint { path, manifest, tensors } = checkpoint;
    let mismatches = checkpoint::compare(&manifest, identity);
    if !mismatches.is_empty() {
        return Err(TrainError::Mismatch { path, mismatches });
    }
    let (parameters, moments): (BTreeMap<_, _>, BTreeMap<_, _>) = tensors.into_iter().partition(|(name, _)| name.starts_with(PARAMETER));
    let parameters = parameters.into_iter().map(|(name, tensor)| (name[PARAMETER.len()..].to_owned(), tensor)).collect();
    method.params_mut().load(&parameters)?;
    method.refresh()?;
    optimizer.import(method.params().layout(), &moments, manifest.header.step)?;
    Ok(Progress { step: manifest.header.step, consumed_rows: manifest.header.consumed_rows })
}

/// What rank 0 writes and where.
pub struct Saver<'a> {
    pub disk: &'a dyn Disk,
    pub plan: &'a Plan,
    pub config: &'a ModelConfig,
    pub identity: Identity,
}

impl Saver<'_> {
    /// Writes `checkpoint-{step}`: the training state, `moments` as [`Optimizer::export`] gave them, and the adapter in both public formats;
    /// then deletes what is beyond the limit.
    ///
    /// # Errors
    /// When the disk fails; what was saved before stays.
    pub fn save(&self, progress: Progress, method: &dyn PeftMethod, moments: BTreeMap<String, Tensor>) -> Result<PathBuf, TrainError> {
        let header = Header {
            step: progress.step,
            consumed_rows: progress.consumed_rows,
            world_size: self.plan.batch.world_size.get(),
            identity: self.identity.clone(),
            plan: serde_json::to_value(self.plan).unwrap_or_default(),
        };
        let mut tensors: BTreeMap<String, Tensor> =
            method.params().tensors()?.into_iter().map(|(name, tensor)| (format!("{PARAMETER}{name}"), tensor)).collect();
        tensors.extend(moments);
        let output_dir = &self.plan.run.output_dir;
        // What a method that trains the base exports is a whole model: the state above has all of it that can change.
        let adapter = if method.trained_base_weights()?.is_empty() { self.adapter_files(method)? } else { Vec::new() };
        let path = checkpoint::save(self.disk, output_dir, &header, &tensors, &adapter)?;
        if let Some(limit) = self.plan.run.save_total_limit {
            checkpoint::retention(self.disk, output_dir, limit)?;
        }
        Ok(path)
    }

    /// Writes the adapter alone into `output_dir/adapter`.
    ///
    /// # Errors
    /// When the disk fails; an adapter that was there before stays.
    pub fn export(&self, method: &dyn PeftMethod) -> Result<PathBuf, TrainError> {
        let path = self.plan.run.output_dir.join("adapter");
        let files = self.adapter_files(method)?;
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        checkpoint::publish(self.disk, &path, &files)?;
        Ok(path)
    }

    fn adapter_files(&self, method: &dyn PeftMethod) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
        let about = serde_json::to_value(&self.identity).unwrap_or_default();
        let (model_dir, dtype) = (&self.plan.model.model_name_or_path, self.plan.model.torch_dtype);
        let dtype = (dtype == WeightDtype::Bfloat16).then_some(DType::BF16);
        Ok(method.export(&ExportContext { model_dir, config: self.config, dtype, about: &about })?)
    }
}
