//! [`RunConfig`] -> [`Plan`]: defaults, derived values, and everything that can be checked without opening a file.
//!
//! The defaults are the published recipe for P-Tuning v2 (THUDM/ChatGLM2-6B `ptuning/train.sh`), with three differences: the loss is the
//! mean over tokens, `答：` is never cut off, and a step has 16 rows whatever the number of ranks.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::plan::*;
use super::{ConfigError, Place, RunConfig, Source, Sources};
use crate::data::record::{PROMPT_COLUMN, RESPONSE_COLUMN};
use crate::peft::FinetuningType;
use crate::peft::keys::KeyError;

/// Longest prompt or answer (tokens), and most rows of a micro-batch: far beyond use, and their products stay within 64 bits.
const MAX_LENGTH: usize = 1 << 20;
const MAX_ROWS_PER_SLOT: usize = 1 << 16;
const ROWS_PER_STEP: usize = 16;
const MAX_STEPS: u64 = 3000;
pub(super) const SAVE_STEPS: usize = 1000;
pub(super) const LOGGING_STEPS: usize = 10;
pub(super) const MAX_GRAD_NORM: f64 = 1.0;
pub(super) const ADAM_EPSILON: f64 = 1e-8;
const AUDIT_STEPS: usize = 100;
const STALL_TIMEOUT: Span = Span(std::time::Duration::from_secs(600));

impl RunConfig {
    /// The plan for `world_size` ranks (0 counts as 1); `sources` says where each key stood.
    ///
    /// # Errors
    /// When a needed key is absent, a value is out of its range, or the batch does not fit the ranks.
    pub fn resolve(&self, world_size: usize, sources: &Sources) -> Result<Plan, ConfigError> {
        let resolver = Resolver { config: self, sources, world_size: NonZeroUsize::new(world_size).unwrap_or(NonZeroUsize::MIN) };
        let (model, data, batch, method) = (resolver.model()?, resolver.data()?, resolver.batch()?, resolver.method()?);
        resolver.refuse_rounding_for(&method)?;
        let optim = resolver.optim(&method)?;
        Ok(Plan { model, data, batch, method, optim, run: resolver.run()? })
    }
}

struct Resolver<'a> {
    config: &'a RunConfig,
    sources: &'a Sources,
    world_size: NonZeroUsize,
}

impl Resolver<'_> {
    fn model(&self) -> Result<ModelPlan, ConfigError> {
        let model = &self.config.model;
        let from_checkpointing = model.gradient_checkpointing.map(|on| if on { Recompute::Block } else { Recompute::None });
        let recompute = match (model.recompute, from_checkpointing) {
            (Some(a), Some(b)) if a != b => {
                let reason = "they ask for different recomputation".to_owned();
                return Err(ConfigError::Contradiction {
                    other: "model.gradient_checkpointing",
                    reason,
                    place: self.place("model.recompute"),
                });
            }
            (a, b) => a.or(b).unwrap_or(Recompute::None),
        };
        Ok(ModelPlan {
            model_name_or_path: required("model_name_or_path", model.model_name_or_path.as_ref())?,
            recompute,
            rope_table: model.rope_table.unwrap_or(RopeTable::Exact),
            torch_dtype: model.torch_dtype.unwrap_or_default(),
            device: model.device.unwrap_or_default(),
            compute_dtype: model.compute_dtype,
        })
    }

    fn data(&self) -> Result<DataPlan, ConfigError> {
        let data = &self.config.data;
        let max_source_length = data.max_source_length.unwrap_or(64);
        if max_source_length < 3 {
            return Err(self.value("data.max_source_length", max_source_length, "3 or more: `[gMASK] sop` and a token of text"));
        }
        let max_target_length = self.positive("data.max_target_length", data.max_target_length.unwrap_or(128))?.get();
        for (key, length) in [("data.max_source_length", max_source_length), ("data.max_target_length", max_target_length)] {
            self.at_most(key, length, MAX_LENGTH, "at most 1048576")?;
        }
        let rows = |key, value: Option<usize>| value.map(|n| self.positive(key, n).map(NonZeroUsize::get)).transpose();
        let plan = DataPlan {
            train_file: required("train_file", data.train_file.as_ref())?,
            validation_file: data.validation_file.clone(),
            prompt_column: data.prompt_column.clone().unwrap_or_else(|| PROMPT_COLUMN.to_owned()),
            input_column: data.input_column.clone(),
            response_column: data.response_column.clone().unwrap_or_else(|| RESPONSE_COLUMN.to_owned()),
            history_column: data.history_column.clone(),
            max_source_length,
            max_target_length,
            truncation: data.truncation.unwrap_or(Truncation::KeepAnswerMark),
            on_bad_row: data.on_bad_row.unwrap_or(OnBadRow::Stop),
            max_train_samples: rows("data.max_train_samples", data.max_train_samples)?,
            max_eval_samples: rows("data.max_eval_samples", data.max_eval_samples)?,
            cache_dir: data.cache_dir.clone(),
            overwrite_cache: data.overwrite_cache.unwrap_or(false),
        };
        if let Some((first, second, column)) = plan.columns().shared() {
            let (first, second) = (format!("data.{first}_column"), format!("data.{second}_column"));
            // The one that was given, if the other is a default.
            let is_given = self.place(&second).source != Source::Default;
            let (key, other) = if is_given { (second, first) } else { (first, second) };
            return Err(ConfigError::SharedColumn { other, column: column.to_owned(), place: self.place(&key) });
        }
        Ok(plan)
    }

    fn batch(&self) -> Result<BatchPlan, ConfigError> {
        let batch = &self.config.batch;
        let world_size = self.world_size.get();
        let rows_per_slot = self.positive("batch.per_device_train_batch_size", batch.per_device_train_batch_size.unwrap_or(1))?;
        let eval_rows = batch.per_device_eval_batch_size.unwrap_or(rows_per_slot.get());
        let eval_rows_per_slot = self.positive("batch.per_device_eval_batch_size", eval_rows)?;
        let micro = rows_per_slot.get();
        for (key, rows) in [("batch.per_device_train_batch_size", micro), ("batch.per_device_eval_batch_size", eval_rows)] {
            self.at_most(key, rows, MAX_ROWS_PER_SLOT, "at most 65536")?;
        }

        let accumulation = batch
            .gradient_accumulation_steps
            .map(|n| self.positive("batch.gradient_accumulation_steps", n))
            .transpose()?
            .map(NonZeroUsize::get);
        let place = self.place("batch.global_batch_size");
        let accumulated = accumulation.map(|accumulation| {
            let rows =
                micro.checked_mul(accumulation).and_then(|rows| rows.checked_mul(world_size)).filter(|&rows| u32::try_from(rows).is_ok());
            let expected = "so many slots that a step has less than 2^32 rows";
            rows.map(|rows| (accumulation, rows)).ok_or_else(|| self.value("batch.gradient_accumulation_steps", accumulation, expected))
        });
        let rows = match (batch.global_batch_size, accumulated.transpose()?) {
            (None, Some((_, accumulated))) => accumulated,
            (Some(rows), Some((accumulation, accumulated))) if rows != accumulated => {
                let reason =
                    format!("{micro} rows x {accumulation} accumulation x {world_size} ranks = {accumulated} rows a step, not {rows}");
                return Err(ConfigError::Contradiction { other: "batch.gradient_accumulation_steps", reason, place });
            }
            (rows, _) => self.positive("batch.global_batch_size", rows.unwrap_or(ROWS_PER_STEP))?.get(),
        };
        self.at_most("batch.global_batch_size", rows, u32::MAX as usize, "less than 2^32 rows")?;
        if rows.is_multiple_of(micro) && rows / micro < world_size {
            return Err(ConfigError::TooManyRanks { rows, world_size, micro, place });
        }
        if !rows.is_multiple_of(micro * world_size) {
            return Err(ConfigError::NotDivisible { rows, world_size, micro, place });
        }
        let slots_per_step = self.positive("batch.global_batch_size", rows / micro)?;
        Ok(BatchPlan { rows_per_slot, slots_per_step, eval_rows_per_slot, world_size: self.world_size })
    }

    fn method(&self) -> Result<MethodPlan, ConfigError> {
        let keys = &self.config.method;
        let kind = keys.finetuning_type.unwrap_or(FinetuningType::PtuningV2);
        self.refuse_keys_of_other_methods(kind)?;
        MethodPlan::resolve(kind, keys).map_err(|KeyError { key, found, expected }| self.value(&format!("method.{key}"), found, expected))
    }

    /// Where no weight of the base is trained, rounding would only tell the base apart from the one that the adapter is used with.
    fn refuse_rounding_for(&self, method: &MethodPlan) -> Result<(), ConfigError> {
        if self.config.model.torch_dtype != Some(WeightDtype::Bfloat16) || method.settings().trains_base_weights() {
            return Ok(());
        }
        let reason = format!("bfloat16 is for methods that train weights of the base, and {} trains none", method.kind().name());
        Err(ConfigError::Contradiction { other: "method.finetuning_type", reason, place: self.place("model.torch_dtype") })
    }

    /// A key that the chosen method does not read would be silently without effect.
    fn refuse_keys_of_other_methods(&self, kind: FinetuningType) -> Result<(), ConfigError> {
        let given = toml::Table::try_from(&self.config.method).map_err(|e| ConfigError::NotText { message: e.to_string() })?;
        let read = |key: &str, by: FinetuningType| key == "finetuning_type" || by.keys().contains(&key);
        let Some(key) = given.keys().find(|key| !read(key, kind)) else { return Ok(()) };
        let owners: Vec<_> = FinetuningType::ALL.iter().filter(|&&other| read(key, other)).map(|other| other.name()).collect();
        let reason = format!("it belongs to {}, and the method is {}", owners.join(" and "), kind.name());
        Err(ConfigError::Contradiction { other: "method.finetuning_type", reason, place: self.place(&format!("method.{key}")) })
    }

    fn optim(&self, method: &MethodPlan) -> Result<OptimPlan, ConfigError> {
        let optim = &self.config.optim;
        let not_negative = |key, x: f64| self.within(key, x, x >= 0.0, "a number of 0 or more");
        let max_grad_norm = not_negative("optim.max_grad_norm", optim.max_grad_norm.unwrap_or(MAX_GRAD_NORM))?;
        let warmup = match (optim.warmup_steps.unwrap_or(0), optim.warmup_ratio) {
            (0, Some(ratio)) => {
                Warmup::Ratio(self.within("optim.warmup_ratio", ratio, (0.0..=1.0).contains(&ratio), "a share from 0 to 1")?)
            }
            (steps, _) => Warmup::Steps(steps),
        };
        let learning_rate = optim.learning_rate.unwrap_or(method.settings().learning_rate());
        let learning_rate = self.within("optim.learning_rate", learning_rate, learning_rate > 0.0, "a number above 0")?;
        let weight_decay = not_negative("optim.weight_decay", optim.weight_decay.unwrap_or(0.0))?;
        if learning_rate * weight_decay >= 1.0 {
            return Err(ConfigError::TooMuchDecay { learning_rate, weight_decay, place: self.place("optim.weight_decay") });
        }
        let adam_epsilon = optim.adam_epsilon.unwrap_or(ADAM_EPSILON);
        Ok(OptimPlan {
            learning_rate,
            adam_beta1: self.share_below_one("optim.adam_beta1", optim.adam_beta1.unwrap_or(0.9))?,
            adam_beta2: self.share_below_one("optim.adam_beta2", optim.adam_beta2.unwrap_or(0.999))?,
            adam_epsilon: self.within("optim.adam_epsilon", adam_epsilon, adam_epsilon > 0.0, "a number above 0")?,
            weight_decay,
            max_grad_norm: (max_grad_norm > 0.0).then_some(max_grad_norm),
            lr_scheduler_type: optim.lr_scheduler_type.unwrap_or(SchedulerType::Linear),
            warmup,
            loss_mean: optim.loss_mean.unwrap_or(LossMean::Token),
            reduction: optim.reduction.unwrap_or(Reduction::SlotTree),
            shard_optimizer: optim.shard_optimizer.unwrap_or(method.settings().trains_base_weights()),
        })
    }

    fn run(&self) -> Result<RunPlan, ConfigError> {
        let run = &self.config.run;
        let eval_steps = run.eval_steps.and_then(NonZeroUsize::new);
        if eval_steps.is_some() && self.config.data.validation_file.is_none() {
            return Err(ConfigError::Needs { needs: "data.validation_file", place: self.place("run.eval_steps") });
        }
        let save_steps = NonZeroUsize::new(run.save_steps.unwrap_or(SAVE_STEPS));
        let save_best = run.save_best.unwrap_or(false);
        for (key, is_given) in [("run.save_best", save_best), ("run.save_keep_every", run.save_keep_every.is_some())] {
            if is_given && run.save_total_limit.is_none() {
                return Err(ConfigError::Needs { needs: "run.save_total_limit", place: self.place(key) });
            }
        }
        if save_best && self.config.data.validation_file.is_none() {
            return Err(ConfigError::Needs { needs: "data.validation_file", place: self.place("run.save_best") });
        }
        // As the Trainer has it: a checkpoint whose loss nobody computed cannot be the best.
        if let (true, Some(save)) = (save_best, save_steps) {
            let Some(eval) = eval_steps else {
                return Err(ConfigError::Needs { needs: "run.eval_steps", place: self.place("run.save_best") });
            };
            if !save.get().is_multiple_of(eval.get()) {
                return Err(self.value(
                    "run.save_steps",
                    save,
                    "a multiple of `run.eval_steps`, since `run.save_best` needs each checkpoint's loss",
                ));
            }
        }
        Ok(RunPlan {
            output_dir: required("output_dir", run.output_dir.as_ref())?,
            overwrite_output_dir: run.overwrite_output_dir.unwrap_or(false),
            duration: self.duration()?,
            seed: run.seed.unwrap_or(42),
            logging_steps: self.positive("run.logging_steps", run.logging_steps.unwrap_or(LOGGING_STEPS))?,
            save_steps,
            save_total_limit: run.save_total_limit.map(|n| self.positive("run.save_total_limit", n)).transpose()?,
            save_best,
            save_keep_every: run.save_keep_every.map(|n| self.positive("run.save_keep_every", n)).transpose()?,
            on_save_error: run.on_save_error.unwrap_or(OnSaveError::Stop),
            eval_steps,
            resume: run.resume_from_checkpoint.as_ref().map_or(Resume::No, |r| r.0.clone()),
            save_before_timeout: run.save_before_timeout,
            audit_steps: NonZeroUsize::new(run.audit_steps.unwrap_or(AUDIT_STEPS)),
            stall_timeout: Some(run.stall_timeout.unwrap_or(STALL_TIMEOUT)).filter(|limit| !limit.0.is_zero()),
            threads: run.threads.map(|n| self.positive("run.threads", n)).transpose()?,
            memory_limit: run.memory_limit,
            dump_batches: run.dump_batches.clone(),
            dump_initial: run.dump_initial.clone(),
        })
    }

    /// As the Trainer has it: `max_steps` above 0 goes first, -1 stands for "not given".
    fn duration(&self) -> Result<Duration, ConfigError> {
        let run = &self.config.run;
        match (run.max_steps.filter(|&n| n != -1), run.num_train_epochs) {
            (Some(steps), _) => match u64::try_from(steps) {
                Ok(steps) if steps > 0 => Ok(Duration::Steps(steps)),
                _ => Err(self.value("run.max_steps", steps, "1 or more, or -1 for `num_train_epochs`")),
            },
            (None, Some(epochs)) => Ok(Duration::Epochs(self.within("run.num_train_epochs", epochs, epochs > 0.0, "a number above 0")?)),
            (None, None) => Ok(Duration::Steps(MAX_STEPS)),
        }
    }

    fn place(&self, key: &str) -> Place {
        self.sources.place(key)
    }

    fn value(&self, key: &str, value: impl ToString, expected: &'static str) -> ConfigError {
        ConfigError::Value { value: value.to_string(), expected, place: self.place(key) }
    }

    fn positive(&self, key: &str, value: usize) -> Result<NonZeroUsize, ConfigError> {
        NonZeroUsize::new(value).ok_or_else(|| self.value(key, value, "1 or more"))
    }

    fn at_most(&self, key: &str, value: usize, limit: usize, expected: &'static str) -> Result<(), ConfigError> {
        if value <= limit { Ok(()) } else { Err(self.value(key, value, expected)) }
    }

    fn within(&self, key: &str, value: f64, holds: bool, expected: &'static str) -> Result<f64, ConfigError> {
        if holds && value.is_finite() { Ok(value) } else { Err(self.value(key, value, expected)) }
    }

    fn share_below_one(&self, key: &str, value: f64) -> Result<f64, ConfigError> {
        self.within(key, value, (0.0..1.0).contains(&value), "a share of at least 0 and below 1")
    }
}

fn required(key: &'static str, path: Option<&PathBuf>) -> Result<PathBuf, ConfigError> {
    path.filter(|p| !p.as_os_str().is_empty()).cloned().ok_or(ConfigError::Missing { key })
}
