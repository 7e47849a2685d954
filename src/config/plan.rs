//! The resolved run. Later code sees this and never the raw configuration; a `Plan` cannot hold a zero batch.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::values::{DeviceChoice, MemoryLimit, Span, TimeLimit};
pub use crate::data::prompt::Truncation;
use crate::data::record::Columns;
pub use crate::data::record::OnBadRow;
pub use crate::dist::Reduction;
pub use crate::model::{ComputeDtype, Recompute, RopeTable, WeightDtype};
pub use crate::optim::{SchedulerType, Warmup};
pub use crate::peft::MethodPlan;

/// Everything a training run needs, validated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub model: ModelPlan,
    pub data: DataPlan,
    pub batch: BatchPlan,
    pub method: MethodPlan,
    pub optim: OptimPlan,
    pub run: RunPlan,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelPlan {
    /// Folder as the hub has it: config.json, weights, tokenizer.model.
    pub model_name_or_path: PathBuf,
    pub recompute: Recompute,
    pub rope_table: RopeTable,
    /// Where it is bfloat16, weights of the base are trained, and the optimizer holds their f32 masters.
    pub torch_dtype: WeightDtype,
    /// A checkpoint has what it was; those of earlier versions do not, and were computed on a CPU.
    #[serde(default = "cpu")]
    pub device: DeviceChoice,
    /// `None`: what suits the device.
    #[serde(default)]
    pub compute_dtype: Option<ComputeDtype>,
}

fn cpu() -> DeviceChoice {
    DeviceChoice::Cpu
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataPlan {
    pub train_file: PathBuf,
    pub validation_file: Option<PathBuf>,
    pub prompt_column: String,
    pub input_column: Option<String>,
    pub response_column: String,
    pub history_column: Option<String>,
    /// Tokens of the prompt, `[gMASK] sop` included.
    pub max_source_length: usize,
    /// Tokens of the answer; eos comes on top.
    pub max_target_length: usize,
    pub truncation: Truncation,
    pub on_bad_row: OnBadRow,
    pub max_train_samples: Option<usize>,
    pub max_eval_samples: Option<usize>,
    /// Where tokenized rows are kept between runs; none: not kept.
    pub cache_dir: Option<PathBuf>,
    pub overwrite_cache: bool,
}

impl DataPlan {
    /// Which columns hold what.
    pub fn columns(&self) -> Columns {
        Columns {
            prompt: self.prompt_column.clone(),
            input: self.input_column.clone(),
            response: self.response_column.clone(),
            history: self.history_column.clone(),
        }
    }
}

/// A global batch is `slots_per_step` slots of `rows_per_slot` rows; each slot is computed by one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchPlan {
    /// Rows of one micro-batch (`per_device_train_batch_size`).
    pub rows_per_slot: NonZeroUsize,
    /// Micro-batches of one optimizer step over all ranks; a multiple of the world size.
    pub slots_per_step: NonZeroUsize,
    pub eval_rows_per_slot: NonZeroUsize,
    pub world_size: NonZeroUsize,
}

impl BatchPlan {
    /// Rows of one optimizer step.
    pub fn rows_per_step(&self) -> usize {
        self.rows_per_slot.get() * self.slots_per_step.get()
    }

    pub fn accumulation_steps(&self) -> usize {
        self.slots_per_step.get() / self.world_size.get()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimPlan {
    pub learning_rate: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    pub weight_decay: f64,
    /// Clip the global gradient norm to this; none: no clipping.
    pub max_grad_norm: Option<f64>,
    pub lr_scheduler_type: SchedulerType,
    pub warmup: Warmup,
    pub loss_mean: LossMean,
    pub reduction: Reduction,
    /// Each rank holds the moments of its own shard of the trained parameters only (ZeRO-1); it changes no bit.
    pub shard_optimizer: bool,
}

/// How token losses become the loss of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossMean {
    /// Sum over all target tokens of the global batch / their number.
    Token,
    /// Mean over micro-batches of each one's token mean (THUDM's Trainer with DDP).
    MicroBatch,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunPlan {
    pub output_dir: PathBuf,
    pub overwrite_output_dir: bool,
    pub duration: Duration,
    pub seed: u64,
    pub logging_steps: NonZeroUsize,
    /// Save every so many steps; none: only at the end.
    pub save_steps: Option<NonZeroUsize>,
    /// Keep so many whole checkpoints, the newest; none: all.
    pub save_total_limit: Option<NonZeroUsize>,
    /// Beyond that, keep the one with the lowest held-out loss.
    pub save_best: bool,
    /// Beyond that, keep those of each so many steps.
    pub save_keep_every: Option<NonZeroUsize>,
    pub on_save_error: OnSaveError,
    pub eval_steps: Option<NonZeroUsize>,
    pub resume: Resume,
    /// Save and stop in time for this; none: only at the last step.
    pub save_before_timeout: Option<TimeLimit>,
    /// Compare the ranks' state every so many steps and before each checkpoint; none: never.
    pub audit_steps: Option<NonZeroUsize>,
    /// How long ranks wait for another before the run ends; none: for ever.
    pub stall_timeout: Option<Span>,
    /// Threads of this rank; none: cores of the machine / ranks on it.
    pub threads: Option<NonZeroUsize>,
    /// What the ranks of a machine may take together; `None`: what is free. Checkpoints of earlier versions do not have it.
    #[serde(default)]
    pub memory_limit: Option<MemoryLimit>,
    /// Write the rows of every micro-batch to this file, one JSON line each.
    pub dump_batches: Option<PathBuf>,
    /// Write the parameters before the first step to this safetensors file.
    pub dump_initial: Option<PathBuf>,
}

/// What a checkpoint that cannot be saved does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSaveError {
    /// Ends the run.
    Stop,
    /// Is warned of and counted; the run goes on without it.
    Warn,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duration {
    Steps(u64),
    Epochs(f64),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resume {
    /// Start anew.
    No,
    /// The newest checkpoint of `output_dir`.
    Latest,
    Path(PathBuf),
}
