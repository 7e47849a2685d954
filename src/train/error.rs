//! Why a run stops.

use std::path::PathBuf;

use super::device::NotOnGpu;
use super::room::TooLarge;
use crate::checkpoint::{CheckpointError, Mismatch};
use crate::data::DataError;
use crate::dist::{AgreedError, DistError};
use crate::formats::text_of;
use crate::kernels::cuda::CudaError;
use crate::model::ModelError;
use crate::optim::{NonFinite, OptimError};
use crate::peft::MethodError;
use crate::peft::export::ExportError;
use crate::telemetry::TelemetryError;
use crate::tokenizer::TokenizerError;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("a value is not finite: {what}")]
    NotFinite {
        what: String,
        /// Slots of the step whose loss or gradient is not finite; empty when the fault is in the summed gradient.
        slots: Vec<usize>,
    },
    #[error("step {step}: {what} is not finite; stopped before the update{}", named(rows))]
    StepNotFinite { step: u64, what: String, rows: Vec<String> },
    /// On held-out rows, where nothing is updated.
    #[error("{}the {what} of held-out rows is not finite{}", at_step(*step), named(rows))]
    HeldOutNotFinite {
        /// Steps done; `None` outside of a run.
        step: Option<u64>,
        /// Loss or drift.
        what: &'static str,
        /// Those of the first micro-batch that has such a value.
        rows: Vec<String>,
    },
    #[error("step {step}: the update made element {} of `{}` {}; this state was not saved", found.index, found.name, text_of(found.value.into()))]
    UpdateNotFinite { step: u64, found: NonFinite },
    #[error("{}: element {} of `{}` is {}, expected finite numbers", path.display(), found.index, found.name, text_of(found.value.into()))]
    CheckpointNotFinite { path: PathBuf, found: NonFinite },
    #[error("no token of this step is in the loss")]
    NoTargets,
    #[error("{} was made by another run: {}", path.display(), list(mismatches))]
    Mismatch { path: PathBuf, mismatches: Vec<Mismatch> },
    #[error("{} is of {method}, which exports a whole model: the base's weights are needed as well", path.display())]
    ExportNeedsBase { path: PathBuf, method: String },
    #[error("{}: the tuned model does not give what it gave when it was saved: {what} of the probe was {then} and is {now}", path.display())]
    ProbeDiffers { path: PathBuf, what: String, then: f64, now: f64 },
    #[error("{} has no complete checkpoint", path.display())]
    NothingToResume { path: PathBuf },
    #[error("{} is at step {step}, and the run ends after {total} steps", path.display())]
    AlreadyDone { path: PathBuf, step: u64, total: u64 },
    #[error("the ranks loaded different base models: rank {rank} has fingerprint {found}, rank 0 {expected}")]
    BaseDiffers { rank: usize, expected: String, found: String },
    #[error("the ranks have diverged, seen after step {step}: in {part}, {verdict}{}", and_others(*others))]
    RanksDiverged {
        step: u64,
        /// The ranks that are wrong, as far as that can be told.
        verdict: String,
        /// The first part of the state that differs.
        part: String,
        /// Parts behind it that differ as well.
        others: usize,
    },
    #[error("compute_dtype is bfloat16, and a CPU computes in float32")]
    DtypeOnCpu,
    #[error("{ranks_here} ranks of this machine want a GPU each, and the NVIDIA driver finds {gpus}")]
    TooFewGpus { ranks_here: usize, gpus: usize },
    #[error(transparent)]
    NotOnGpu(#[from] NotOnGpu),
    #[error(transparent)]
    Cuda(Box<CudaError>),
    #[error(transparent)]
    TooLarge(Box<TooLarge>),
    #[error("cannot write {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Agreed(#[from] AgreedError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Dist(#[from] DistError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Method(#[from] MethodError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Optim(#[from] OptimError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl From<CudaError> for TrainError {
    fn from(error: CudaError) -> Self {
        Self::Cuda(Box::new(error))
    }
}

impl From<TooLarge> for TrainError {
    fn from(error: TooLarge) -> Self {
        Self::TooLarge(Box::new(error))
    }
}

impl TrainError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        if self.to_string().contains(OUT_OF_GPU_MEMORY) {
            return Some(
                "the GPU has too little memory: for training use `recompute = block`, or a smaller per_device_train_batch_size (global_batch_size \
                 alone decides what is learnt); `device = cpu` needs none"
                    .to_owned(),
            );
        }
        match self {
            Self::StepNotFinite { .. } => {
                Some("a lower learning_rate is the usual cure; `glmddp tokenize` with the same configuration and `--row LINE` shows a row".to_owned())
            }
            Self::UpdateNotFinite { .. } | Self::HeldOutNotFinite { step: Some(_), .. } => {
                Some("a lower learning_rate is the usual cure; a checkpoint of this run, if there is one, is from before this step".to_owned())
            }
            Self::HeldOutNotFinite { .. } => Some(
                "all weights are finite, so a sum overflowed: evaluate the base alone to see whether it or the adapter is at fault"
                    .to_owned(),
            ),
            Self::CheckpointNotFinite { .. } => Some("the run had diverged when it was saved: use an earlier checkpoint".to_owned()),
            Self::NoTargets => Some("raise max_target_length; `glmddp tokenize` with the same configuration shows the rows".to_owned()),
            Self::Mismatch { .. } => Some("resume with the settings of the checkpoint, or start anew in another output_dir".to_owned()),
            Self::ProbeDiffers { .. } => Some(
                "nothing was changed; use the program, the base, the `device`, the `compute_dtype` and the `rope_table` that it was saved with, or an \
                 earlier checkpoint"
                    .to_owned(),
            ),
            Self::ExportNeedsBase { .. } => Some("give `--model_name_or_path`, the folder of the base that the run started from".to_owned()),
            Self::NothingToResume { .. } => Some("start without resume_from_checkpoint, or name a checkpoint folder".to_owned()),
            Self::AlreadyDone { .. } => Some("raise max_steps or num_train_epochs to go on".to_owned()),
            Self::BaseDiffers { .. } => Some("put the same model folder on every machine".to_owned()),
            Self::RanksDiverged { .. } => Some(
                "no checkpoint was written from this state; start all ranks with the same program and arguments, look for faulty memory or \
                 processors on the machine of the named rank, and go on from the newest checkpoint before this step"
                    .to_owned(),
            ),
            Self::DtypeOnCpu => Some("leave compute_dtype out, or compute on a GPU".to_owned()),
            Self::TooFewGpus { gpus, .. } => Some(format!(
                "start {gpus} ranks a machine, as `mpirun -n {gpus}`, or widen CUDA_VISIBLE_DEVICES; where each rank sees a GPU of its own alone, \
                 use `device = cuda:0`; `device = cpu` needs none"
            )),
            Self::NotOnGpu(_) => Some("use `device = cpu`".to_owned()),
            Self::Cuda(e) => Some(e.hint().map_or_else(|| "or use `device = cpu`".to_owned(), |hint| format!("{hint}; or use `device = cpu`"))),
            Self::TooLarge(e) => Some(e.hint()),
            Self::Checkpoint(e) => e.hint(),
            Self::Data(e) => e.hint(),
            Self::Dist(e) => e.hint(),
            Self::Export(e) => e.hint(),
            Self::Method(e) => e.hint(),
            Self::Model(e) => e.hint(),
            Self::Telemetry(e) => e.hint(),
            Self::Tokenizer(e) => e.hint(),
            _ => None,
        }
    }

    /// Whether every rank returns this error, so that all can leave in good order.
    pub fn is_everyones(&self) -> bool {
        matches!(
            self,
            Self::Agreed(AgreedError::Rank { .. })
                | Self::StepNotFinite { .. }
                | Self::NotFinite { .. }
                | Self::HeldOutNotFinite { .. }
                | Self::UpdateNotFinite { .. }
                | Self::NoTargets
                | Self::BaseDiffers { .. }
                | Self::RanksDiverged { .. }
        )
    }

    /// Whether a run has stopped because it computed a value that is not finite: it would do so again.
    pub fn is_not_finite(&self) -> bool {
        matches!(self, Self::StepNotFinite { .. } | Self::HeldOutNotFinite { .. } | Self::UpdateNotFinite { .. })
    }

    /// Whether what the user gave is at fault (exit code 2), not the program or the machine (1).
    pub fn is_users(&self) -> bool {
        match self {
            Self::Cuda(error) => !matches!(**error, CudaError::Call { .. } | CudaError::Tensors { .. }),
            Self::Dist(_)
            | Self::Optim(_)
            | Self::Tensor(_)
            | Self::StepNotFinite { .. }
            | Self::NotFinite { .. }
            | Self::HeldOutNotFinite { .. }
            | Self::UpdateNotFinite { .. }
            | Self::RanksDiverged { .. } => false,
            Self::Agreed(AgreedError::Rank { .. }) => true,
            Self::Agreed(AgreedError::Dist(_)) => false,
            _ => true,
        }
    }
}

/// The driver's name of it, which errors of tensors and of kernels have in their texts.
const OUT_OF_GPU_MEMORY: &str = "CUDA_ERROR_OUT_OF_MEMORY";

fn at_step(step: Option<u64>) -> String {
    step.map_or(String::new(), |step| format!("step {step}: "))
}

fn named(rows: &[String]) -> String {
    if rows.is_empty() { String::new() } else { format!("\n  rows: {}", rows.join(", ")) }
}

fn and_others(num: usize) -> String {
    match num {
        0 => String::new(),
        1 => " (and in 1 other part)".to_owned(),
        n => format!(" (and in {n} other parts)"),
    }
}

fn list(mismatches: &[Mismatch]) -> String {
    mismatches.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
