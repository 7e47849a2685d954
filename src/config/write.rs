//! A resolved plan as a configuration file, so that a run can be repeated from what it left behind.

use toml::Value;

use super::plan::*;
use super::sections::*;
use super::values::ResumeFrom;
use super::{ConfigError, KeyTable, RunConfig};
use crate::paths;

impl From<&Plan> for RunConfig {
    /// Every key that `plan` fixes. The accumulation is left to follow from the rows of a step, so another number of ranks trains alike.
    fn from(plan: &Plan) -> Self {
        let Plan { model, data, batch, method, optim, run } = plan;
        let (warmup_steps, warmup_ratio) = match optim.warmup {
            Warmup::Steps(steps) => (Some(steps), None),
            Warmup::Ratio(ratio) => (None, Some(ratio)),
        };
        let (max_steps, num_train_epochs) = match run.duration {
            Duration::Steps(steps) => (i64::try_from(steps).ok(), None),
            Duration::Epochs(epochs) => (None, Some(epochs)),
        };
        Self {
            model: ModelConfig {
                model_name_or_path: Some(model.model_name_or_path.clone()),
                recompute: Some(model.recompute),
                gradient_checkpointing: None,
                rope_table: Some(model.rope_table),
                torch_dtype: Some(model.torch_dtype),
                device: Some(model.device),
                compute_dtype: model.compute_dtype,
            },
            data: DataConfig {
                train_file: Some(data.train_file.clone()),
                validation_file: data.validation_file.clone(),
                prompt_column: Some(data.prompt_column.clone()),
                input_column: data.input_column.clone(),
                response_column: Some(data.response_column.clone()),
                history_column: data.history_column.clone(),
                max_source_length: Some(data.max_source_length),
                max_target_length: Some(data.max_target_length),
                truncation: Some(data.truncation),
                on_bad_row: Some(data.on_bad_row),
                max_train_samples: data.max_train_samples,
                max_eval_samples: data.max_eval_samples,
                cache_dir: data.cache_dir.clone(),
                overwrite_cache: Some(data.overwrite_cache),
            },
            batch: BatchConfig {
                per_device_train_batch_size: Some(batch.rows_per_slot.get()),
                per_device_eval_batch_size: Some(batch.eval_rows_per_slot.get()),
                gradient_accumulation_steps: None,
                global_batch_size: Some(batch.rows_per_step()),
            },
            method: method.settings().keys(),
            optim: OptimConfig {
                learning_rate: Some(optim.learning_rate),
                adam_beta1: Some(optim.adam_beta1),
                adam_beta2: Some(optim.adam_beta2),
                adam_epsilon: Some(optim.adam_epsilon),
                weight_decay: Some(optim.weight_decay),
                max_grad_norm: Some(optim.max_grad_norm.unwrap_or(0.0)),
                lr_scheduler_type: Some(optim.lr_scheduler_type),
                warmup_steps,
                warmup_ratio,
                loss_mean: Some(optim.loss_mean),
                reduction: Some(optim.reduction),
                shard_optimizer: Some(optim.shard_optimizer),
            },
            run: ScheduleConfig {
                output_dir: Some(run.output_dir.clone()),
                overwrite_output_dir: Some(run.overwrite_output_dir),
                max_steps,
                num_train_epochs,
                seed: Some(run.seed),
                logging_steps: Some(run.logging_steps.get()),
                save_steps: Some(run.save_steps.map_or(0, |n| n.get())),
                save_total_limit: run.save_total_limit.map(|n| n.get()),
                save_best: Some(run.save_best),
                save_keep_every: run.save_keep_every.map(|n| n.get()),
                on_save_error: Some(run.on_save_error),
                eval_steps: Some(run.eval_steps.map_or(0, |n| n.get())),
                resume_from_checkpoint: Some(ResumeFrom(run.resume.clone())),
                save_before_timeout: run.save_before_timeout,
                audit_steps: Some(run.audit_steps.map_or(0, |n| n.get())),
                stall_timeout: Some(run.stall_timeout.unwrap_or(Span(std::time::Duration::ZERO))),
                threads: run.threads.map(|n| n.get()),
                memory_limit: run.memory_limit,
                dump_batches: run.dump_batches.clone(),
                dump_initial: run.dump_initial.clone(),
            },
        }
    }
}

impl Plan {
    /// The text of `training_args.toml`: a configuration file that resolves to this plan again.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let not_text = |message: String| ConfigError::NotText { message };
        let mut table = toml::Table::try_from(RunConfig::from(self)).map_err(|e| not_text(e.to_string()))?;
        // Paths are expanded when the file is read.
        let keys = KeyTable::new();
        let values = table.iter_mut().filter_map(|(_, section)| section.as_table_mut()).flatten();
        for (name, value) in values {
            let Some(key) = keys.get(name).filter(|key| key.is_path) else { continue };
            if let Value::String(text) = value {
                *text = if key.is_list { text.split(',').map(paths::escape).collect::<Vec<_>>().join(",") } else { paths::escape(text) };
            }
        }
        toml::to_string(&table).map_err(|e| not_text(e.to_string()))
    }
}
