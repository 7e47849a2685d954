//! A run's state without its steps: a first checkpoint from an adapter, and an adapter from a checkpoint.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::TrainError;
use super::base::Base;
use super::finite;
use super::probe;
use super::run::{Job, claim};
use super::save::{SaveContext, Saver, about};
use super::state::PARAMETER;
use crate::checkpoint::{self, Checkpoint, CheckpointError, Disk, Mismatch};
use crate::config::Plan;
use crate::config::plan::WeightDtype;
use crate::dist::Collectives;
use crate::model::ChatGlm2;
use crate::peft::{self, ExportContext, bare};

/// Writes `checkpoint-0` of the run that `plan` describes: the values of the adapter in `dir`, no step done, fresh moments. The run then goes
/// on from it as from any other.
///
/// # Errors
/// When the adapter does not fit the base or the method, rows cannot be read, or `output_dir` holds another run.
pub fn import(dir: &Path, plan: &Plan, tensors: &dyn Collectives, disk: &dyn Disk) -> Result<PathBuf, TrainError> {
    let group = tensors.group();
    claim(plan, group, disk)?;
    let base = Base::load(plan, group)?;
    let plan = &base.device.of(plan);
    let mut job = Job::new(plan, base, tensors, disk)?;
    let identity = job.identity.clone();
    let base = peft::Base { model: &job.model, fingerprint: &identity.base_fingerprint, tokenizer_sha256: &identity.tokenizer_sha256 };
    peft::import(dir, base, &mut *job.method)?;
    let config = job.model.config.clone();
    let probe_rows = probe::rows(&job.train);
    let context = SaveContext { disk, group, plan, config: &config, identity: &identity, probe_rows: &probe_rows };
    std::thread::scope(|scope| {
        let mut saver = Saver::new(scope, context);
        saver.begin(job.progress, None, &job.model, &*job.method, &job.optimizer)?;
        saver.drain()?;
        Ok(saver.durable().map(Path::to_owned).unwrap_or_default())
    })
}

/// What the run would have exported at this checkpoint: its own files where it has them; else (methods that train the base's weights) a
/// model made of the base in `model_dir` and the state.
///
/// # Errors
/// When what is needed of the checkpoint is damaged, one of its parameters is NaN or infinite, a base is needed and not given, or it is another
/// one.
pub fn export(disk: &dyn Disk, checkpoint: &Checkpoint, model_dir: Option<&Path>) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
    let header = &checkpoint.manifest.header;
    let own = &checkpoint.manifest.files;
    if !own.is_empty() {
        finite::in_checkpoint(disk, checkpoint)?;
        return own.keys().map(|name| Ok((name.clone(), checkpoint.file(disk, name)?))).collect();
    }
    let path = || checkpoint.path.clone();
    let Some(model_dir) = model_dir else {
        return Err(TrainError::ExportNeedsBase { path: path(), method: header.identity.method.clone() });
    };
    let unreadable = |e: serde_json::Error| CheckpointError::Incomplete { path: path(), reason: format!("its plan cannot be read: {e}") };
    let plan: Plan = serde_json::from_value(header.plan.clone()).map_err(unreadable)?;
    let (config, source) = bare::open(model_dir)?;
    let fingerprint = source.fingerprint(&config.parameter_shapes())?;
    if fingerprint != header.identity.base_fingerprint {
        let (what, checkpoint) = ("base_fingerprint".to_owned(), header.identity.base_fingerprint.clone());
        return Err(TrainError::Mismatch { path: path(), mismatches: vec![Mismatch { what, checkpoint, run: fingerprint }] });
    }
    let model = ChatGlm2::load(config, &source, plan.model.rope_table, DType::F32, &Device::Cpu)?;
    let mut method = peft::create(&plan.method, &model, plan.run.seed)?;
    let layout = method.params().layout().clone();
    let values = checkpoint.kind(disk, PARAMETER, &layout)?;
    let values = Tensor::from_vec(values, layout.num_elements(), &Device::Cpu)?;
    finite::of_checkpoint(&checkpoint.path, &values, &layout)?;
    method.params_mut().load_flat(&values)?;
    method.refresh()?;
    let dtype = (plan.model.torch_dtype == WeightDtype::Bfloat16).then_some(DType::BF16);
    let about = about(&header.identity, header.probe.as_ref());
    Ok(method.export(&ExportContext { model_dir, config: &model.config, dtype, about: &about })?)
}

/// Writes [`export`] as a folder that is not there yet.
///
/// # Errors
/// When the disk fails.
pub fn write_export(disk: &dyn Disk, output_dir: &Path, files: &[(String, Vec<u8>)]) -> Result<(), TrainError> {
    Ok(checkpoint::publish(disk, output_dir, files)?)
}
