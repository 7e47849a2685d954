//! A whole training run, from a plan to an adapter.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;

use super::adapters::{Ranks, Tokenizer};
use super::evaluate::{Evaluation, evaluate};
use super::optimizer::Optimizer;
use super::state::{self, Progress, Saver};
use super::step::{StepOutcome, StepSettings, Trainer};
use super::{TrainError, dump};
use crate::checkpoint::{self, Claim, Disk, Identity};
use crate::config::Plan;
use crate::config::plan::{Duration, Resume};
use crate::data::load::{CacheRequest, CacheUse, LoadRequest};
use crate::data::loader::{Division, training_batches};
use crate::data::record::Columns;
use crate::data::sampler::{Sampler, slot_positions};
use crate::data::tokenize::Limits;
use crate::data::{self, Dataset};
use crate::dist::{self, ProcessGroup};
use crate::model::weights::WeightSource;
use crate::model::{ChatGlm2, ModelConfig};
use crate::optim::{AdamWConfig, Schedule};
use crate::peft::{self, PeftMethod};
use crate::telemetry::{Console, EvalRecord, Phase, PhaseTimer, RunLog, StepClock, StepRecord, peak_rss_bytes};
use crate::tokenizer::GlmTokenizer;

/// How dialogues become text; part of a checkpoint's identity.
const TEMPLATE: &str = "chatglm2";

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Summary {
    pub steps: u64,
    pub first_loss: f64,
    pub last_loss: f64,
    pub evaluation: Option<Evaluation>,
    pub checkpoint: PathBuf,
    pub adapter: PathBuf,
}

/// Trains as `plan` says. Every rank calls it with the same plan.
///
/// # Errors
/// What the user gave is at fault, a value is not finite, or a rank or the disk failed; see [`TrainError`].
pub fn run(plan: &Plan, group: &dyn ProcessGroup, disk: &dyn Disk, console: &Console) -> Result<Summary, TrainError> {
    let job = Job::load(plan, group, disk)?;
    job.train(disk, console)
}

/// Everything that is loaded before the first step.
struct Job<'a> {
    plan: &'a Plan,
    group: &'a dyn ProcessGroup,
    model: ChatGlm2,
    method: Box<dyn PeftMethod>,
    optimizer: Optimizer<'a>,
    identity: Identity,
    train: Arc<Dataset>,
    validation: Option<Dataset>,
    progress: Progress,
    total_steps: u64,
}

impl<'a> Job<'a> {
    fn load(plan: &'a Plan, group: &'a dyn ProcessGroup, disk: &dyn Disk) -> Result<Self, TrainError> {
        let claim = match (&plan.run.resume, plan.run.overwrite_output_dir) {
            (Resume::No, true) => Claim::Overwrite,
            (Resume::No, false) => Claim::Start,
            _ => Claim::Resume,
        };
        together(group, || if group.rank() == 0 { Ok(checkpoint::claim(disk, &plan.run.output_dir, claim)?) } else { Ok(()) })?;

        let dir = &plan.model.model_name_or_path;
        let (tokenizer, config) = together(group, || {
            let config = ModelConfig::load(dir)?;
            let tokenizer = GlmTokenizer::from_file(&dir.join("tokenizer.model"))?;
            tokenizer.check_fits(config.padded_vocab_size)?;
            Ok((tokenizer, config))
        })?;
        let (train, validation) = load_data(plan, &tokenizer, group)?;
        let (mut model, fingerprint) = together(group, || {
            let source = WeightSource::open(dir)?;
            // One rank of each machine reads every byte: the others have the same files.
            let fingerprint = if group.local_rank() == 0 { source.fingerprint(&config.parameter_shapes())? } else { String::new() };
            Ok((ChatGlm2::load(config.clone(), &source, plan.model.rope_table, &Device::Cpu)?, fingerprint))
        })?;
        let base_fingerprint = same_base(group, &fingerprint)?;
        let mut method = together(group, || Ok(peft::create(&plan.method, &model, plan.run.seed)?))?;
        let o = &plan.optim;
        let adamw = AdamWConfig { beta1: o.adam_beta1, beta2: o.adam_beta2, epsilon: o.adam_epsilon, weight_decay: o.weight_decay };
        let num_elements = method.params().layout().num_elements();
        let mut optimizer = if o.shard_optimizer {
            Optimizer::sharded(adamw, num_elements, model.device(), group)?
        } else {
            Optimizer::replicated(adamw, num_elements, model.device())?
        };

        let mut identity = Identity {
            method: method.name().to_owned(),
            sizes: method.sizes(),
            base_fingerprint,
            tokenizer_sha256: tokenizer.sha256().to_owned(),
            template: TEMPLATE.to_owned(),
        };
        // What decides the order of the rows: a run goes on only where it stopped.
        identity.sizes.insert("seed".to_owned(), plan.run.seed.into());
        identity.sizes.insert("train_rows".to_owned(), train.num_samples().into());
        identity.sizes.insert("train_tokens".to_owned(), train.num_tokens().into());

        let total_steps = total_steps(plan, train.num_samples());
        let progress = together(group, || {
            let Some(checkpoint) = state::find(disk, &plan.run.output_dir, &plan.run.resume)? else { return Ok(Progress::default()) };
            let path = checkpoint.path.clone();
            let progress = state::restore(checkpoint, &identity, &mut *method, &mut optimizer)?;
            if progress.step >= total_steps {
                return Err(TrainError::AlreadyDone { path, step: progress.step, total: total_steps });
            }
            tracing::info!(
                "goes on from {}: step {}, row {} of the training stream",
                path.display(),
                progress.step,
                progress.consumed_rows
            );
            Ok(progress)
        })?;
        model.replace_weights(&method.trained_base_weights()?)?;
        tracing::info!(
            "{}: {} layers, hidden {}, {} trainable parameters ({})",
            config.name,
            config.num_layers,
            config.hidden_size,
            num_elements,
            method.name()
        );
        Ok(Self { plan, group, model, method, optimizer, identity, train: Arc::new(train), validation, progress, total_steps })
    }

    fn train(mut self, disk: &dyn Disk, console: &Console) -> Result<Summary, TrainError> {
        let (plan, group) = (self.plan, self.group);
        let config = self.model.config.clone();
        let saver = Saver { disk, plan, config: &config, identity: self.identity.clone() };
        let mut log = if group.rank() == 0 { Some(open_log(plan, self.progress.step)?) } else { None };
        let bar = log.is_some().then(|| console.step_bar(self.progress.step, self.total_steps));
        let mut dump = dump::BatchDump::open(plan, group.rank())?;
        if let (true, Some(path)) = (group.rank() == 0, &plan.run.dump_initial) {
            dump::parameters(path, &*self.method)?;
        }
        let division = Division {
            rows_per_slot: plan.batch.rows_per_slot,
            slots_per_step: plan.batch.slots_per_step,
            world_size: plan.batch.world_size,
            rank: group.rank(),
        };
        let samples = NonZeroUsize::new(self.train.num_samples()).unwrap_or(NonZeroUsize::MIN);
        let mut sampler = Sampler::new(samples, plan.run.seed);
        let steps_left = self.total_steps - self.progress.step;
        let mut batches = training_batches(Arc::clone(&self.train), sampler.clone(), division, self.progress.consumed_rows, steps_left)?;
        let schedule = Schedule {
            kind: plan.optim.lr_scheduler_type,
            base_lr: plan.optim.learning_rate,
            warmup_steps: plan.optim.warmup.steps(self.total_steps),
            total_steps: self.total_steps,
        };
        let settings = StepSettings {
            num_slots: plan.batch.slots_per_step.get(),
            recompute: plan.model.recompute,
            loss_mean: plan.optim.loss_mean,
            reduction: plan.optim.reduction,
            max_grad_norm: plan.optim.max_grad_norm,
        };
        let (mut clock, timer) = (StepClock::new(self.progress.step, self.total_steps), PhaseTimer::default());
        let mut first_loss = None;
        let mut last = (f64::NAN, None, None);
        let mut total_tokens = 0;
        while self.progress.step < self.total_steps {
            let started = Instant::now();
            let step = self.progress.step;
            let Some(batch) = timer.time(Phase::Data, || batches.next()).transpose()? else { break };
            let lr = schedule.lr(step);
            dump.write(step, &batch.slots, &self.train)?;
            let mut trainer = Trainer { model: &self.model, method: &mut *self.method, optimizer: &mut self.optimizer, group, settings };
            let outcome = trainer.step(&batch.slots, lr, &timer).map_err(|e| self.name_rows(e, step, batch.start, &mut sampler))?;
            self.progress = Progress { step: step + 1, consumed_rows: batch.start + division.rows_per_step() };
            let tokens = self.tokens(batch.start..self.progress.consumed_rows, &mut sampler);
            total_tokens += tokens;

            first_loss.get_or_insert(outcome.loss);
            last.0 = outcome.loss;
            let done = self.progress.step;
            let is_last = done == self.total_steps;
            let took = started.elapsed();
            clock.step(took);
            if let Some(log) = &mut log {
                let record = self.record(outcome, lr, tokens, total_tokens, took, &timer, &clock);
                log.step(&record)?;
                if let Some(bar) = &bar {
                    bar.advance(done, clock.remaining());
                    if is_last || done.is_multiple_of(plan.run.logging_steps.get() as u64) || step == 0 {
                        bar.log(&record);
                    }
                }
            } else {
                timer.take();
            }
            if is_due(plan.run.eval_steps, done) || (is_last && self.validation.is_some()) {
                last.1 = self.evaluate(&timer, log.as_mut(), console)?;
            }
            if is_last || is_due(plan.run.save_steps, done) {
                last.2 = timer.time(Phase::Save, || self.save(&saver))?;
            }
        }
        let adapter = together(group, || if group.rank() == 0 { saver.export(&*self.method) } else { Ok(PathBuf::new()) })?;
        let (last_loss, evaluation, checkpoint) = last;
        Ok(Summary {
            steps: self.progress.step,
            first_loss: first_loss.unwrap_or(f64::NAN),
            last_loss,
            evaluation,
            checkpoint: checkpoint.unwrap_or_default(),
            adapter,
        })
    }

    fn save(&self, saver: &Saver) -> Result<Option<PathBuf>, TrainError> {
        let moments = self.optimizer.export(self.method.params().layout())?;
        together(self.group, || match (self.group.rank(), moments) {
            (0, Some(moments)) => saver.save(self.progress, &*self.method, moments).map(Some),
            _ => Ok(None),
        })
    }

    fn evaluate(&self, timer: &PhaseTimer, log: Option<&mut RunLog>, console: &Console) -> Result<Option<Evaluation>, TrainError> {
        let Some(rows) = &self.validation else { return Ok(None) };
        let started = Instant::now();
        let rows_per_slot = self.plan.batch.eval_rows_per_slot;
        let evaluation = timer.time(Phase::Eval, || evaluate(&self.model, Some(&*self.method), self.group, rows, rows_per_slot))?;
        if let Some(log) = log {
            log.eval(&EvalRecord {
                current_steps: self.progress.step,
                total_steps: self.total_steps,
                eval_loss: evaluation.loss,
                epoch: self.epoch(),
                eval_rows: evaluation.num_rows,
                eval_target_tokens: evaluation.num_targets,
                eval_ms: started.elapsed().as_secs_f64() * 1e3,
            })?;
            console.line(&format!(
                "eval  {:>5}/{} | eval_loss {:.4} | {} rows",
                self.progress.step, self.total_steps, evaluation.loss, evaluation.num_rows
            ));
        }
        Ok(Some(evaluation))
    }

    fn epoch(&self) -> f64 {
        self.progress.consumed_rows as f64 / self.train.num_samples() as f64
    }

    /// Real tokens of the rows at these places of the training stream.
    fn tokens(&self, positions: std::ops::Range<u64>, sampler: &mut Sampler) -> u64 {
        sampler.rows(positions).into_iter().map(|(_, sample)| self.train.sample(sample).ids.len() as u64).sum()
    }

    fn record(
        &self,
        outcome: StepOutcome,
        lr: f64,
        tokens: u64,
        total_tokens: u64,
        took: std::time::Duration,
        timer: &PhaseTimer,
        clock: &StepClock,
    ) -> StepRecord {
        StepRecord {
            current_steps: self.progress.step,
            total_steps: self.total_steps,
            loss: outcome.loss,
            grad_norm: outcome.grad_norm,
            lr,
            epoch: self.epoch(),
            percentage: clock.percentage(),
            elapsed_time: clock.elapsed(),
            remaining_time: clock.remaining(),
            tokens_per_second: tokens as f64 / took.as_secs_f64(),
            step_ms: took.as_secs_f64() * 1e3,
            phases: timer.take().millis(),
            memory_bytes: peak_rss_bytes(),
            tokens,
            target_tokens: outcome.num_targets,
            total_tokens,
        }
    }

    /// Says which step and rows an error of [`Trainer::step`] is about.
    fn name_rows(&self, error: TrainError, step: u64, start: u64, sampler: &mut Sampler) -> TrainError {
        let TrainError::NotFinite { what, slots } = error else { return error };
        let mut rows = Vec::new();
        for slot in slots {
            for (_, sample) in sampler.rows(slot_positions(start, slot, self.plan.batch.rows_per_slot)) {
                let origin = self.train.origin(sample);
                rows.push(format!("{}:{}", origin.file.display(), origin.row));
            }
        }
        TrainError::StepNotFinite { step: step + 1, what, rows }
    }
}

/// Runs `work` on every rank; if it fails on any, all fail with the lowest failing rank's message.
///
/// # Errors
/// The work's own on a single rank, else what the ranks agree on.
pub fn together<T>(group: &dyn ProcessGroup, work: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    match work() {
        Ok(value) => Ok(dist::agree(group, Ok(value))?),
        Err(error) if group.world_size() == 1 => Err(error),
        Err(error) => {
            let mut text = error.to_string();
            if let Some(hint) = error.hint() {
                let _ = write!(text, "\n\nhint: {hint}");
            }
            dist::agree(group, Err::<T, _>(text)).map_err(TrainError::from)
        }
    }
}

fn is_due(every: Option<NonZeroUsize>, step: u64) -> bool {
    every.is_some_and(|every| step.is_multiple_of(every.get() as u64))
}

fn total_steps(plan: &Plan, num_rows: usize) -> u64 {
    match plan.run.duration {
        Duration::Steps(steps) => steps,
        Duration::Epochs(epochs) => (num_rows as f64 * epochs / plan.batch.rows_per_step() as f64).ceil().max(1.0) as u64,
    }
}

fn open_log(plan: &Plan, step: u64) -> Result<RunLog, TrainError> {
    let mut log = RunLog::open(&plan.run.output_dir)?;
    let dropped = log.truncate_after(step)?;
    if dropped.dropped > 0 {
        tracing::info!("{}: {} records behind step {step} are dropped", log.path().display(), dropped.dropped);
    }
    Ok(log)
}

/// The ranks of each machine must have loaded the same base.
pub(super) fn same_base(group: &dyn ProcessGroup, mine: &str) -> Result<String, TrainError> {
    let all = group.all_gather_bytes(mine.as_bytes())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let expected = text(&all[0]);
    match all.iter().enumerate().find(|(_, f)| !f.is_empty() && **f != all[0]) {
        Some((rank, found)) => Err(TrainError::BaseDiffers { rank, expected, found: text(found) }),
        None => Ok(expected),
    }
}

fn load_data(plan: &Plan, tokenizer: &GlmTokenizer, group: &dyn ProcessGroup) -> Result<(Dataset, Option<Dataset>), TrainError> {
    let load = |file: &Path, max_samples| -> Result<Dataset, TrainError> {
        let (data, cache) =
            together(group, || Ok(data::load::load(&load_request(plan, file, max_samples), &Tokenizer(tokenizer), &Ranks(group))?))?;
        report(&data, &cache);
        Ok(data)
    };
    let train = load(&plan.data.train_file, plan.data.max_train_samples)?;
    let validation = plan.data.validation_file.as_ref().map(|file| load(file, plan.data.max_eval_samples)).transpose()?;
    Ok((train, validation))
}

/// The plan's part that decides how a file's rows become tokens.
pub fn load_request(plan: &Plan, file: &Path, max_samples: Option<usize>) -> LoadRequest {
    let d = &plan.data;
    LoadRequest {
        file: file.to_owned(),
        columns: Columns { prompt: d.prompt_column.clone(), response: d.response_column.clone(), history: d.history_column.clone() },
        limits: Limits { max_source_length: d.max_source_length, max_target_length: d.max_target_length, truncation: d.truncation },
        on_bad_row: d.on_bad_row,
        max_samples,
        cache: d.cache_dir.as_ref().map(|dir| CacheRequest { dir: dir.clone(), overwrite: d.overwrite_cache }),
    }
}

fn report(data: &Dataset, cache: &CacheUse) {
    let lengths = data.length_stats().map_or(String::new(), |l| format!(", {} to {} tokens, mean {:.0}", l.min, l.max, l.mean));
    tracing::info!("{}: {} rows{lengths}", data.file().display(), data.num_samples());
    for bad in &data.bad_rows.first {
        tracing::warn!("row left out: {bad}");
    }
    if data.bad_rows.total > data.bad_rows.first.len() {
        tracing::warn!("{} rows left out in all", data.bad_rows.total);
    }
    if data.num_cut_prompts + data.num_cut_answers > 0 {
        tracing::info!("{} prompts and {} answers were cut to their maximum", data.num_cut_prompts, data.num_cut_answers);
    }
    match cache {
        CacheUse::Rebuilt { path, reason } => tracing::warn!("{} was made anew: {reason}", path.display()),
        CacheUse::NotKept { path, reason } => tracing::warn!("tokenized rows could not be kept in {}: {reason}", path.display()),
        CacheUse::Hit(path) => tracing::info!("tokenized rows come from {}", path.display()),
        CacheUse::Off | CacheUse::Built(_) => {}
    }
}
