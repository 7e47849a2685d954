//! A whole training run, from a plan to an adapter.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::audit::{self, Fingerprints};
use super::base::{Base, RunData};
use super::evaluate::{Evaluation, evaluate};
use super::optimizer::Optimizer;
use super::requests::{Limits, Listener, Stop, TRIGGER_FILE};
use super::resume_report::{ResumeReport, Resumed};
use super::save::{SaveContext, Saver};
use super::state::{self, Progress};
use super::step::{StepOutcome, StepSettings, Trainer, gradient_sum};
use super::together::together;
use super::{TrainError, dump, finite, probe};
use crate::checkpoint::{self, Claim, Disk, Identity};
use crate::config::Plan;
use crate::config::arithmetic::total_steps;
use crate::config::plan::{Resume, WeightDtype};
use crate::data::Dataset;
use crate::data::loader::{Division, training_batches};
use crate::data::sampler::{Sampler, slot_positions};
use crate::dist::{Collectives, GradientSum, ProcessGroup, Watched};
use crate::model::ChatGlm2;
use crate::optim::{AdamWConfig, Schedule};
use crate::peft::{self, PeftMethod};
use crate::telemetry::{Console, EvalRecord, Phase, PhaseTimer, RunLog, StepClock, StepRecord, peak_rss_bytes};

/// How dialogues become text; part of a checkpoint's identity.
const TEMPLATE: &str = "chatglm2";

/// Where the ranks say what they do, below the output folder.
pub const STATUS_DIR: &str = ".status";

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Summary {
    pub steps: u64,
    pub first_loss: f64,
    pub last_loss: f64,
    pub evaluation: Option<Evaluation>,
    /// The newest that is durable; none where no save succeeded.
    pub checkpoint: Option<PathBuf>,
    /// Saves that failed where the plan says to go on.
    pub failed_saves: u64,
    pub ending: Ending,
}

#[derive(Clone, Debug)]
pub enum Ending {
    /// All steps are done, and the adapter is written here.
    Done { adapter: PathBuf },
    /// Asked to, the run has saved and stopped; it can go on.
    Stopped { by: Stop, total_steps: u64 },
}

/// A run that has ended: what it came to, and the tuned model.
pub struct Outcome {
    pub summary: Summary,
    pub model: ChatGlm2,
    pub method: Box<dyn PeftMethod>,
}

/// Trains as `plan` says. Every rank calls it with the same plan.
///
/// # Errors
/// What the user gave is at fault, a value is not finite, or a rank or the disk failed; see [`TrainError`].
pub fn run(plan: &Plan, tensors: &dyn Collectives, disk: &dyn Disk, console: &Console, limits: &Limits) -> Result<Summary, TrainError> {
    claim(plan, tensors.group(), disk)?;
    let ranks = watched(plan, tensors)?;
    let data = RunData::load(plan, &ranks)?;
    let plan = &data.device.of(plan);
    warn(&ranks, &data.surprises(plan));
    data.expect_room("the run", plan, &ranks)?;
    let base = data.into_base(plan, &ranks)?;
    let job = Job::new(plan, base, &ranks, disk)?;
    together(&ranks, || job.refuse_if_done())?;
    Ok(job.train(disk, console, limits)?.summary)
}

/// Says `lines` once, on the first rank.
pub fn warn(group: &dyn ProcessGroup, lines: &[String]) {
    for line in lines.iter().filter(|_| group.rank() == 0) {
        tracing::warn!("{line}");
    }
}

/// The same ranks, whose waits end as `plan` says.
///
/// # Errors
/// When the ranks cannot meet.
pub fn watched<'a>(plan: &Plan, tensors: &'a dyn Collectives) -> Result<Watched<'a>, TrainError> {
    Ok(Watched::start(tensors, &plan.run.output_dir.join(STATUS_DIR), plan.run.stall_timeout.map(|limit| limit.0))?)
}

/// As [`run`], on a base that is loaded, and with ranks that are watched where they are to be. A run whose checkpoint is at its last step is
/// not trained again: it comes back as it ended, without losses.
///
/// # Errors
/// As [`run`].
pub fn run_on(
    base: &Base,
    plan: &Plan,
    tensors: &dyn Collectives,
    disk: &dyn Disk,
    console: &Console,
    limits: &Limits,
) -> Result<Outcome, TrainError> {
    claim(plan, tensors.group(), disk)?;
    Job::new(&base.device.of(plan), base.clone(), tensors, disk)?.train(disk, console, limits)
}

/// Takes the output folder for this run.
pub(super) fn claim(plan: &Plan, group: &dyn ProcessGroup, disk: &dyn Disk) -> Result<(), TrainError> {
    let claim = match (&plan.run.resume, plan.run.overwrite_output_dir) {
        (Resume::No, true) => Claim::Overwrite,
        (Resume::No, false) => Claim::Start,
        _ => Claim::Resume,
    };
    together(group, || {
        if group.rank() > 0 {
            return Ok(());
        }
        let output_dir = &plan.run.output_dir;
        let find = || match &plan.run.resume {
            Resume::Path(path) => checkpoint::to_resume(disk, output_dir, path).map(drop),
            _ => Ok(()),
        };
        // A checkpoint that is not there is reported before anything is made or loaded; the claim may give one its name back.
        if disk.list(output_dir).is_err() {
            find()?;
        }
        checkpoint::claim(disk, output_dir, claim)?;
        Ok(find()?)
    })
}

/// Everything that is there before the first step.
pub(super) struct Job<'a> {
    plan: &'a Plan,
    group: &'a dyn ProcessGroup,
    pub model: ChatGlm2,
    pub method: Box<dyn PeftMethod>,
    pub optimizer: Optimizer<'a>,
    sum: GradientSum<'a>,
    pub identity: Identity,
    pub train: Arc<Dataset>,
    validation: Option<Arc<Dataset>>,
    pub progress: Progress,
    resumed_from: Option<PathBuf>,
    total_steps: u64,
}

impl<'a> Job<'a> {
    /// A method and an optimizer on `base`: fresh, or as the checkpoint has them that `plan` goes on from.
    pub fn new(plan: &'a Plan, base: Base, tensors: &'a dyn Collectives, disk: &dyn Disk) -> Result<Self, TrainError> {
        let group = tensors.group();
        let Base { mut model, device, train, validation, fingerprint, tokenizer_sha256 } = base;
        let config = model.config.clone();
        let mut method = together(group, || Ok(peft::create(&plan.method, &model, plan.run.seed)?))?;
        let o = &plan.optim;
        let adamw = AdamWConfig { beta1: o.adam_beta1, beta2: o.adam_beta2, epsilon: o.adam_epsilon, weight_decay: o.weight_decay };
        let num_elements = method.params().layout().num_elements();
        let optimizer = if o.shard_optimizer {
            Optimizer::sharded(adamw, num_elements, model.device(), tensors)?
        } else {
            Optimizer::replicated(adamw, num_elements, model.device())?
        };
        let mut optimizer = match plan.model.torch_dtype {
            WeightDtype::Float32 => optimizer,
            WeightDtype::Bfloat16 => optimizer.with_masters(method.params().flat())?,
        };
        let sum = gradient_sum(tensors, o.reduction, plan.batch.slots_per_step.get(), &*method, &optimizer)?;

        let mut identity = Identity {
            method: method.name().to_owned(),
            sizes: method.sizes(),
            base_fingerprint: fingerprint,
            tokenizer_sha256,
            template: TEMPLATE.to_owned(),
        };
        // What decides the rows and their order: a run goes on only where it stopped.
        identity.sizes.insert("seed".to_owned(), plan.run.seed.into());
        identity.sizes.insert("train_rows".to_owned(), train.num_samples().into());
        identity.sizes.insert("train_tokens".to_owned(), train.num_tokens().into());
        identity.sizes.insert("train_sha256".to_owned(), train.sha256().into());
        // Masters are in a checkpoint or not.
        if plan.model.torch_dtype != WeightDtype::Float32 {
            identity.sizes.insert("torch_dtype".to_owned(), serde_json::to_value(plan.model.torch_dtype).unwrap_or_default());
        }

        let total_steps = total_steps(plan, train.num_samples() as u64);
        let (output_dir, resume) = (&plan.run.output_dir, &plan.run.resume);
        let resumed = state::resume(disk, group, output_dir, resume, &identity, &mut *method, &mut optimizer)?;
        together(group, || {
            let base = peft::Base { model: &model, fingerprint: &identity.base_fingerprint, tokenizer_sha256: &identity.tokenizer_sha256 };
            Ok(plan.method.settings().adapters().iter().try_for_each(|adapter| peft::read::expect_base(adapter, base))?)
        })?;
        model.replace_weights(&method.trained_base_weights()?)?;
        if let Some(resumed) = &resumed {
            together(group, || replay(resumed, &model, &*method, group))?;
            if resumed.progress.step < total_steps {
                tracing::info!("{}", ResumeReport::new(resumed, plan));
            }
        }
        let (progress, resumed_from) = resumed.map_or((Progress::default(), None), |resumed| (resumed.progress, Some(resumed.path)));
        tracing::info!(
            "{}: {} layers, hidden {}, {} trainable parameters ({}), on {}",
            config.name,
            config.num_layers,
            config.hidden_size,
            num_elements,
            method.name(),
            device.name
        );
        Ok(Self { plan, group, model, method, optimizer, sum, identity, train, validation, progress, resumed_from, total_steps })
    }

    fn refuse_if_done(&self) -> Result<(), TrainError> {
        match &self.resumed_from {
            Some(path) if self.progress.step >= self.total_steps => {
                Err(TrainError::AlreadyDone { path: path.clone(), step: self.progress.step, total: self.total_steps })
            }
            _ => Ok(()),
        }
    }

    fn train(self, disk: &dyn Disk, console: &Console, limits: &Limits) -> Result<Outcome, TrainError> {
        let (plan, group, config, identity) = (self.plan, self.group, self.model.config.clone(), self.identity.clone());
        let probe_rows = probe::rows(&self.train);
        let context = SaveContext { disk, group, plan, config: &config, identity: &identity, probe_rows: &probe_rows };
        std::thread::scope(|scope| {
            let mut saver = Saver::new(scope, context);
            let outcome = self.steps(&mut saver, &context, console, limits);
            if let Err(error) = &outcome
                && (error.is_everyones() || group.world_size() == 1)
            {
                // What stops the run is no reason to lose what was being saved before; nor is a save that fails too a reason to hide it.
                if let Err(of_the_save) = saver.drain() {
                    tracing::error!("what was being saved when the run stopped is lost: {of_the_save}");
                }
            }
            outcome
        })
    }

    fn steps(mut self, saver: &mut Saver, context: &SaveContext, console: &Console, limits: &Limits) -> Result<Outcome, TrainError> {
        let (plan, group) = (self.plan, self.group);
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
        let settings =
            StepSettings { recompute: plan.model.recompute, loss_mean: plan.optim.loss_mean, max_grad_norm: plan.optim.max_grad_norm };
        let listener = Listener::new(limits, &plan.run.output_dir, group.rank());
        let (mut clock, timer) = (StepClock::new(self.progress.step, self.total_steps), PhaseTimer::default());
        let mut first_loss = None;
        let (mut last_loss, mut evaluation) = (f64::NAN, None);
        let mut total_tokens = 0;
        let mut stopped = None;
        self.audit(&mut sampler)?;
        while self.progress.step < self.total_steps {
            let started = Instant::now();
            let step = self.progress.step;
            let Some(batch) = timer.time(Phase::Data, || batches.next()).transpose()? else { break };
            group.now_at(step + 1, "training");
            let lr = schedule.lr(step);
            dump.write(step, &batch.slots, &self.train)?;
            let (model, method, optimizer, sum) = (&self.model, &mut *self.method, &mut self.optimizer, &self.sum);
            let mut trainer = Trainer { model, method, optimizer, sum, settings, wish: &|| listener.wish() };
            let outcome = trainer.step(&batch.slots, lr, &timer).map_err(|e| self.name_rows(e, step, batch.start, &mut sampler))?;
            self.progress = Progress { step: step + 1, consumed_rows: batch.start + division.rows_per_step() };
            let tokens = self.tokens(batch.start..self.progress.consumed_rows, &mut sampler);
            total_tokens += tokens;

            first_loss.get_or_insert(outcome.loss);
            last_loss = outcome.loss;
            let done = self.progress.step;
            let is_last = done == self.total_steps;
            let request = outcome.request;
            stopped = request.stop.filter(|_| !is_last);
            let took = started.elapsed();
            clock.step(took);
            if let Some(log) = &mut log {
                let record = self.record(outcome, lr, tokens, total_tokens, took, &timer, &clock, saver.take_waited());
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
                if stopped.is_none() {
                    group.now_at(done, "evaluation");
                    evaluation = self.evaluate(&timer, log.as_mut(), console)?.map(|evaluation| (done, evaluation));
                } else {
                    tracing::info!("step {done}: the evaluation is left out, the run was asked to stop");
                }
            }
            group.now_at(done, "saving");
            timer.time(Phase::Save, || saver.poll())?;
            let measures_a_save = plan.run.save_before_timeout.is_some() && !listener.has_measured_a_save();
            // Somebody waits for these, or the time that they take is wanted; others go on beside the steps.
            let waits_for_save = request.save || stopped.is_some() || measures_a_save;
            let saves = is_last || is_due(plan.run.save_steps, done) || waits_for_save;
            if saves {
                finite::after_update(done, self.method.params())?;
            }
            if saves || is_due(plan.run.audit_steps, done) {
                self.audit(&mut sampler)?;
            }
            let started_saving = Instant::now();
            if saves {
                group.now_at(done, "saving");
                let eval_loss = evaluation.filter(|(step, _)| *step == done).map(|(_, evaluation)| evaluation.loss);
                timer.time(Phase::Save, || saver.begin(self.progress, eval_loss, &self.model, &*self.method, &self.optimizer))?;
                if waits_for_save {
                    timer.time(Phase::Save, || saver.drain())?;
                }
            }
            listener.took(took, waits_for_save.then(|| started_saving.elapsed()));
            if request.save {
                together(group, || listener.honoured().map_err(|(path, source)| TrainError::Io { path, source }))?;
                if saver.durable_step() == Some(done) {
                    tracing::info!("step {done}: saved, as {TRIGGER_FILE} asked");
                } else {
                    tracing::warn!("step {done}: {TRIGGER_FILE} asked to save, which failed; it is removed, make it anew to try again");
                }
            }
            if stopped.is_some() {
                break;
            }
        }
        group.now_at(self.progress.step, "saving");
        saver.drain()?;
        let ending = match stopped {
            Some(by) => Ending::Stopped { by, total_steps: self.total_steps },
            None => {
                if let Some(reason) = self.method.without_effect()? {
                    warn(
                        group,
                        &[format!(
                            "the tuned model computes what its base does: {reason}; more steps, or a higher learning rate, change it"
                        )],
                    );
                }
                let export = || if group.rank() == 0 { context.export(&self.model, &*self.method) } else { Ok(PathBuf::new()) };
                Ending::Done { adapter: together(group, export)? }
            }
        };
        let summary = Summary {
            steps: self.progress.step,
            first_loss: first_loss.unwrap_or(f64::NAN),
            last_loss,
            evaluation: evaluation.map(|(_, evaluation)| evaluation),
            checkpoint: saver.durable().map(PathBuf::from).or(self.resumed_from),
            failed_saves: saver.num_failed(),
            ending,
        };
        Ok(Outcome { summary, model: self.model, method: self.method })
    }

    /// Where the plan asks for audits: all ranks are at the same place, with the same values.
    fn audit(&self, sampler: &mut Sampler) -> Result<(), TrainError> {
        if self.plan.run.audit_steps.is_none() {
            return Ok(());
        }
        let Progress { step, consumed_rows } = self.progress;
        let mut mine = Fingerprints::default();
        mine.push_numbers("the seed of the random numbers", &[self.plan.run.seed]);
        mine.push_numbers("the place in the training rows", &[step, consumed_rows, self.total_steps]);
        let next = consumed_rows..consumed_rows + self.plan.batch.rows_per_step() as u64;
        let rows: Vec<u64> = sampler.rows(next).into_iter().map(|(_, sample)| sample as u64).collect();
        mine.push_numbers("the order of the training rows", &rows);
        let params = self.method.params();
        mine.push_tensors("parameter", &params.host_tensors()?)?;
        mine.push_tensors("moment", &self.optimizer.common(params.layout())?)?;
        self.group.now_at(step, "audit");
        audit::audit(self.group, step, &mine)
    }

    fn evaluate(&self, timer: &PhaseTimer, log: Option<&mut RunLog>, console: &Console) -> Result<Option<Evaluation>, TrainError> {
        let Some(rows) = &self.validation else { return Ok(None) };
        let started = Instant::now();
        let rows_per_slot = self.plan.batch.eval_rows_per_slot;
        let evaluation = timer.time(Phase::Eval, || evaluate(&self.model, Some(&*self.method), self.group, rows, rows_per_slot));
        let evaluation = evaluation.map_err(|error| match error {
            TrainError::HeldOutNotFinite { what, rows, .. } => TrainError::HeldOutNotFinite { step: Some(self.progress.step), what, rows },
            other => other,
        })?;
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
        save_wait: std::time::Duration,
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
            save_wait_ms: save_wait.as_secs_f64() * 1e3,
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

/// Tests on the first rank that what was restored gives what it gave when it was saved.
fn replay(resumed: &Resumed, model: &ChatGlm2, method: &dyn PeftMethod, group: &dyn ProcessGroup) -> Result<(), TrainError> {
    let Some(probe) = resumed.header.probe.as_ref().filter(|_| group.rank() == 0) else { return Ok(()) };
    match probe::replay(model, method, probe)? {
        Some((what, then, now)) => Err(TrainError::ProbeDiffers { path: resumed.path.clone(), what, then, now }),
        None => Ok(()),
    }
}

fn is_due(every: Option<NonZeroUsize>, step: u64) -> bool {
    every.is_some_and(|every| step.is_multiple_of(every.get() as u64))
}

fn open_log(plan: &Plan, step: u64) -> Result<RunLog, TrainError> {
    let mut log = RunLog::open(&plan.run.output_dir)?;
    let dropped = log.truncate_after(step)?;
    if dropped.dropped > 0 {
        tracing::info!("{}: {} records behind step {step} are dropped", log.path().display(), dropped.dropped);
    }
    Ok(log)
}
