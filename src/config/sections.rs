//! The keys of a run, as THUDM's scripts and the Hugging Face Trainer name them.
//!
//! One definition serves the configuration file (serde) and the command line (clap): a field's name is its key in the file and its
//! `--key`, its doc comment the help text, its struct the section of the file. Nothing here has a default: `None` means "not given".

#![allow(rustdoc::broken_intra_doc_links, reason = "help texts say [required]")]

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::plan::{ComputeDtype, LossMean, OnBadRow, OnSaveError, Recompute, Reduction, RopeTable, SchedulerType, Truncation, WeightDtype};
use super::values::{DeviceChoice, MemoryLimit, ResumeFrom, Span, TimeLimit, named};
pub use crate::peft::keys::MethodKeys as MethodConfig;

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Model", rename_all = "snake_case")]
pub struct ModelConfig {
    /// Folder of the base model as the hub has it: config.json, weights, tokenizer.model [required]
    #[arg(long, value_name = "DIR")]
    pub model_name_or_path: Option<PathBuf>,
    /// What the backward pass computes again instead of keeping [default: none]
    #[arg(long, value_name = "WHAT", value_parser = named::<Recompute>(&["none", "block"]))]
    pub recompute: Option<Recompute>,
    /// The Trainer's name for `--recompute`: true is block, false is none
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub gradient_checkpointing: Option<bool>,
    /// In which arithmetic the rotary angles are computed [default: exact]
    #[arg(long, value_name = "WHICH", value_parser = named::<RopeTable>(&["exact", "published"]))]
    pub rope_table: Option<RopeTable>,
    /// Precision of the model's weights where they are trained (freeze, full): bfloat16 rounds them, and AdamW steps f32 masters of
    /// them, dealt to the ranks with its moments; a CPU holds the rounded weights as f32 still [default: float32]
    #[arg(long, value_name = "TYPE", value_parser = named::<WeightDtype>(&["float32", "bfloat16"]))]
    pub torch_dtype: Option<WeightDtype>,
    /// What to compute on: auto takes a GPU where there is one that the method runs on, else the CPU; cuda takes the GPU of a rank's number
    /// on its machine, cuda:N GPU N [default: auto]
    #[arg(long, value_name = "auto|cpu|cuda[:N]")]
    pub device: Option<DeviceChoice>,
    /// The type of values in the model's computation; sums are f32, and so are the trained parameters [default: bfloat16 on a GPU, float32
    /// on a CPU]
    #[arg(long, value_name = "TYPE", value_parser = named::<ComputeDtype>(&["float32", "bfloat16"]))]
    pub compute_dtype: Option<ComputeDtype>,
}

/// `[data]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Data", rename_all = "snake_case")]
pub struct DataConfig {
    /// Training rows: JSON lines, a JSON array, or CSV [required]
    #[arg(long, value_name = "FILE")]
    pub train_file: Option<PathBuf>,
    /// Held-out rows for the evaluation loss
    #[arg(long, value_name = "FILE")]
    pub validation_file: Option<PathBuf>,
    /// Column with the question [default: content]
    #[arg(long, value_name = "NAME")]
    pub prompt_column: Option<String>,
    /// Column with more of the question, appended on a new line where it is not empty (alpaca's `input`)
    #[arg(long, value_name = "NAME")]
    pub input_column: Option<String>,
    /// Column with the answer [default: summary]
    #[arg(long, value_name = "NAME")]
    pub response_column: Option<String>,
    /// Column with the earlier rounds, a list of [question, answer]; a row without it has none
    #[arg(long, value_name = "NAME")]
    pub history_column: Option<String>,
    /// Tokens of the prompt, `[gMASK] sop` included [default: 64]
    #[arg(long, value_name = "TOKENS")]
    pub max_source_length: Option<usize>,
    /// Tokens of the answer; eos comes on top [default: 128]
    #[arg(long, value_name = "TOKENS")]
    pub max_target_length: Option<usize>,
    /// Where a prompt that is too long is cut [default: keep_answer_mark]
    #[arg(long, value_name = "HOW", value_parser = named::<Truncation>(&["keep_answer_mark", "published"]))]
    pub truncation: Option<Truncation>,
    /// What a row that cannot be read does [default: stop]
    #[arg(long, value_name = "WHAT", value_parser = named::<OnBadRow>(&["stop", "skip"]))]
    pub on_bad_row: Option<OnBadRow>,
    /// Use the first so many training rows only
    #[arg(long, value_name = "ROWS")]
    pub max_train_samples: Option<usize>,
    /// Use the first so many held-out rows only
    #[arg(long, value_name = "ROWS")]
    pub max_eval_samples: Option<usize>,
    /// Keep tokenized rows here between runs
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Tokenize anew even if `cache_dir` has the rows
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub overwrite_cache: Option<bool>,
}

/// `[batch]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Batch", rename_all = "snake_case")]
pub struct BatchConfig {
    /// Rows of one micro-batch [default: 1]
    #[arg(long, value_name = "ROWS")]
    pub per_device_train_batch_size: Option<usize>,
    /// Rows of one micro-batch of the evaluation [default: as in training]
    #[arg(long, value_name = "ROWS")]
    pub per_device_eval_batch_size: Option<usize>,
    /// Micro-batches of a step on each rank; with it, more ranks make a larger step
    #[arg(long, value_name = "N")]
    pub gradient_accumulation_steps: Option<usize>,
    /// Rows of a step over all ranks; the accumulation follows from it, and any number of ranks trains alike [default: 16]
    #[arg(long, value_name = "ROWS")]
    pub global_batch_size: Option<usize>,
}

/// `[optim]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Optimizer", rename_all = "snake_case")]
pub struct OptimConfig {
    /// Peak learning rate [default: 2e-2 for ptuning_v2, 1e-2 for prefix_tuning, 1e-3 for p_tuning, 3e-2 for prompt_tuning, 5e-4
    /// for lora, 1e-4 for adapter, 5e-5 for adapter_fusion, 1e-4 for freeze, 1e-4 for full, 3e-3 for ia3]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    pub learning_rate: Option<f64>,
    /// AdamW's decay of the first moment [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    pub adam_beta1: Option<f64>,
    /// AdamW's decay of the second moment [default: 0.999]
    #[arg(long, value_name = "SHARE")]
    pub adam_beta2: Option<f64>,
    /// AdamW's epsilon [default: 1e-8]
    #[arg(long, value_name = "VALUE")]
    pub adam_epsilon: Option<f64>,
    /// AdamW's decoupled weight decay [default: 0]
    #[arg(long, value_name = "RATE")]
    pub weight_decay: Option<f64>,
    /// Clip the gradient's global norm to this; 0 does not clip [default: 1.0]
    #[arg(long, value_name = "NORM")]
    pub max_grad_norm: Option<f64>,
    /// How the learning rate moves after the warm-up [default: linear]
    #[arg(long, value_name = "SHAPE", value_parser = named::<SchedulerType>(&["linear", "cosine", "constant"]))]
    pub lr_scheduler_type: Option<SchedulerType>,
    /// Steps in which the learning rate rises from 0 [default: 0]
    #[arg(long, value_name = "STEPS")]
    pub warmup_steps: Option<u64>,
    /// The same as a share of all steps; `warmup_steps` above 0 takes precedence
    #[arg(long, value_name = "SHARE")]
    pub warmup_ratio: Option<f64>,
    /// How the losses of tokens become the loss of a step [default: token]
    #[arg(long, value_name = "MEAN", value_parser = named::<LossMean>(&["token", "micro_batch"]))]
    pub loss_mean: Option<LossMean>,
    /// How gradients are summed over ranks [default: slot_tree]
    #[arg(long, value_name = "HOW", value_parser = named::<Reduction>(&["slot_tree", "all_reduce"]))]
    pub reduction: Option<Reduction>,
    /// Deal AdamW's moments to the ranks (ZeRO-1): less memory on each, the same result [default: true where weights of the base are trained, else false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub shard_optimizer: Option<bool>,
}

/// `[run]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Run", rename_all = "snake_case")]
pub struct ScheduleConfig {
    /// Where checkpoints, adapter and logs go [required]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Start anew in an `output_dir` that holds another run
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub overwrite_output_dir: Option<bool>,
    /// Optimizer steps [default: 3000, unless `num_train_epochs` is given]
    #[arg(long, value_name = "STEPS", allow_negative_numbers = true)]
    pub max_steps: Option<i64>,
    /// Passes over the training rows; `max_steps` takes precedence
    #[arg(long, value_name = "EPOCHS")]
    pub num_train_epochs: Option<f64>,
    /// Seed of shuffling, dropout and the method's first values [default: 42]
    #[arg(long, value_name = "SEED", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,
    /// Log every so many steps [default: 10]
    #[arg(long, value_name = "STEPS")]
    pub logging_steps: Option<usize>,
    /// Save a checkpoint every so many steps; 0 saves at the end only [default: 1000]
    #[arg(long, value_name = "STEPS")]
    pub save_steps: Option<usize>,
    /// Keep the newest so many checkpoints [default: all]
    #[arg(long, value_name = "N")]
    pub save_total_limit: Option<usize>,
    /// Beyond `save_total_limit`, keep the checkpoint with the lowest loss on `validation_file`
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub save_best: Option<bool>,
    /// Beyond `save_total_limit`, keep the checkpoints of each so many steps
    #[arg(long, value_name = "STEPS")]
    pub save_keep_every: Option<usize>,
    /// What a checkpoint that cannot be saved does [default: stop]
    #[arg(long, value_name = "WHAT", value_parser = named::<OnSaveError>(&["stop", "warn"]))]
    pub on_save_error: Option<OnSaveError>,
    /// Compute the loss of `validation_file` every so many steps; 0 does so at the end only [default: 0]
    #[arg(long, value_name = "STEPS")]
    pub eval_steps: Option<usize>,
    /// Go on from this checkpoint; `latest` or `true` takes the newest of `output_dir`
    #[arg(long, value_name = "DIR|latest", value_hint = clap::ValueHint::DirPath)]
    pub resume_from_checkpoint: Option<ResumeFrom>,
    /// Save and stop before this time is over: a duration from the start (3h55m, 03:55:00), or slurm for the end of the job's time limit
    #[arg(long, value_name = "TIME|slurm")]
    pub save_before_timeout: Option<TimeLimit>,
    /// Compare the ranks' parameters, moments, seed and place in the data every so many steps and before each checkpoint; 0 never does
    /// [default: 100]
    #[arg(long, value_name = "STEPS")]
    pub audit_steps: Option<usize>,
    /// End the run, naming the rank that does not come, when others wait for it so long; 0s waits for ever [default: 10m]
    #[arg(long, value_name = "TIME")]
    pub stall_timeout: Option<Span>,
    /// Threads of each rank [default: cores of the machine / ranks on it]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Memory that the ranks of a machine may take together, such as 20GiB: a run that needs more is refused before it loads the model;
    /// none does not look, and a GPU's memory is not held against it [default: what is free, with swap, under the limits of the container or job]
    #[arg(long, value_name = "SIZE|none")]
    pub memory_limit: Option<MemoryLimit>,
    /// Write the rows of every micro-batch to this file, one JSON line each
    #[arg(long, value_name = "FILE")]
    pub dump_batches: Option<PathBuf>,
    /// Write the parameters before the first step to this safetensors file
    #[arg(long, value_name = "FILE")]
    pub dump_initial: Option<PathBuf>,
}
