//! The comparison's loop: one run after the other, on one base.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use super::figures::{Logged, weight_bytes};
use super::report::identity;
use super::{CompareError, Entry, Figures, REPORT_FILE, Report, RunResult, Shared, picture, table};
use crate::checkpoint::{self, Claim, Disk};
use crate::config::Plan;
use crate::config::arithmetic::total_steps;
use crate::config::plan::{Duration, Resume};
use crate::data::Dataset;
use crate::data::sampler::Sampler;
use crate::dist::{Collectives, ProcessGroup};
use crate::telemetry::{Console, reset_peak_rss};
use crate::train::TrainError;
use crate::train::base::{Base, RunData};
use crate::train::drift::drift;
use crate::train::evaluate::evaluate;
use crate::train::requests::{Limits, Stop};
use crate::train::run::{self, Ending, Outcome};
use crate::train::together::together;

/// One method of the comparison. All contenders have the same plan but for `method` and `optim`.
#[derive(Clone, Debug)]
pub struct Contender {
    /// The folder of its run below the comparison's.
    pub label: String,
    pub plan: Plan,
}

impl Contender {
    /// The same for `steps` steps.
    fn with_steps(&self, steps: u64) -> Self {
        let mut contender = self.clone();
        contender.plan.run.duration = Duration::Steps(steps);
        contender
    }
}

#[derive(Clone, Copy)]
pub struct Options<'a> {
    pub output_dir: &'a Path,
    /// Start anew where another comparison stands.
    pub overwrite: bool,
    /// Train each method on at least so many tokens; none: as long as the plans say.
    pub max_tokens: Option<NonZeroU64>,
    /// Drift is measured on so many held-out rows, the first ones.
    pub drift_rows: NonZeroUsize,
    /// Gives memory that an earlier run left free back to the system, so that it does not count for the next.
    pub free_memory: &'a dyn Fn(),
}

/// What every part of a comparison needs.
struct Scene<'a> {
    base: Base,
    options: Options<'a>,
    tensors: &'a dyn Collectives,
    group: &'a dyn ProcessGroup,
    disk: &'a dyn Disk,
    console: &'a Console,
    limits: &'a Limits,
    steps: u64,
}

/// How far a comparison has come.
pub struct Compared {
    pub report: Report,
    /// The run that was asked to stop, and has saved; the same comparison goes on with it.
    pub stopped: Option<StoppedRun>,
}

pub struct StoppedRun {
    pub label: String,
    pub step: u64,
    pub total_steps: u64,
    pub by: Stop,
}

/// Trains the contenders one after the other and writes [`REPORT_FILE`], a table and a picture after each. Every rank calls it with the same
/// contenders, of which there is at least one, and gets the same report.
///
/// # Errors
/// When a run fails (but one that stops at a value that is not finite is a result), or the folder holds a comparison of other settings.
pub fn run(
    contenders: &[Contender],
    options: Options,
    tensors: &dyn Collectives,
    disk: &dyn Disk,
    console: &Console,
    limits: &Limits,
) -> Result<Compared, CompareError> {
    let Some(Contender { plan, .. }) = contenders.first() else { return Err(CompareError::NoHeldOutRows) };
    let path = options.output_dir.join(REPORT_FILE);
    let tensors: &dyn Collectives = &run::watched(plan, tensors)?;
    let group = tensors.group();
    let methods: Vec<_> = contenders.iter().map(|contender| &contender.plan.method).collect();
    let data = RunData::load_for(plan, &methods, group)?;
    let steps = steps_and_tokens(&data.train, plan, &options);
    // A budget in tokens makes all runs of so many steps.
    let of_budget = |contender: &Contender| if options.max_tokens.is_some() { contender.with_steps(steps.0) } else { contender.clone() };
    let planned: Vec<Contender> = contenders.iter().map(of_budget).collect();
    run::warn(group, &surprises(&data, &planned));
    for Contender { label, plan } in &planned {
        data.expect_room(&format!("the run of {label}"), plan, group)?;
    }
    let base = data.into_base(plan, group)?;
    let shared = shared(&base, plan, &options, steps)?;
    let scene = Scene { base, options, tensors, group, disk, console, limits, steps: shared.steps };
    tracing::info!("{} methods, {} steps each: {} tokens", contenders.len(), shared.steps, shared.budget_tokens);
    let mut report = scene.read_report(&path)?.unwrap_or_else(|| Report::new(shared.clone()));
    report.check_shared(&path, &shared)?;
    for contender in contenders {
        report.check_entry(&path, &contender.label, &identity(&contender.plan))?;
    }
    if report.base_held_out_loss.is_none() {
        let evaluation = evaluate(&scene.base.model, None, group, scene.held_out()?, plan.batch.eval_rows_per_slot)?;
        report.base_held_out_loss = Some(evaluation.loss);
        scene.write_report(&path, &report)?;
    }
    for (i, contender) in contenders.iter().enumerate() {
        let label = &contender.label;
        if report.entry(label).is_some_and(|entry| entry.result.is_some()) {
            tracing::info!("{label}: done before");
            continue;
        }
        tracing::info!("{label}: {} of {}", i + 1, contenders.len());
        let mut entry = Entry { label: label.clone(), plan: identity(&contender.plan), result: None };
        report.put(entry.clone());
        scene.write_report(&path, &report)?;
        entry.result = match scene.compete(contender)? {
            Competed::Measured(result) => Some(result),
            Competed::Stopped(stopped) => return Ok(Compared { report, stopped: Some(stopped) }),
        };
        report.put(entry);
        scene.write_report(&path, &report)?;
    }
    Ok(Compared { report, stopped: None })
}

enum Competed {
    Measured(RunResult),
    Stopped(StoppedRun),
}

impl Scene<'_> {
    fn held_out(&self) -> Result<&crate::data::Dataset, CompareError> {
        self.base.validation.as_deref().ok_or(CompareError::NoHeldOutRows)
    }

    /// Trains one contender to its end and measures it, unless it is asked to stop.
    fn compete(&self, contender: &Contender) -> Result<Competed, CompareError> {
        let plan = self.plan_of(contender)?;
        (self.options.free_memory)();
        let peak_is_of_this_run = reset_peak_rss();
        let Outcome { summary, model, method } = match run::run_on(&self.base, &plan, self.tensors, self.disk, self.console, self.limits) {
            Ok(outcome) => outcome,
            Err(error) => return stopped_or(error),
        };
        let adapter = match &summary.ending {
            Ending::Done { adapter } => adapter,
            &Ending::Stopped { by, total_steps } => {
                let label = contender.label.clone();
                return Ok(Competed::Stopped(StoppedRun { label, step: summary.steps, total_steps, by }));
            }
        };
        self.group.now_at(summary.steps, "measuring");
        let (held_out, rows_per_slot) = (self.held_out()?, plan.batch.eval_rows_per_slot);
        let evaluation = match summary.evaluation {
            Some(evaluation) => Ok(evaluation),
            None => evaluate(&model, Some(&*method), self.group, held_out, rows_per_slot),
        };
        let drift = || drift(&self.base.model, &model, &*method, self.group, held_out, self.options.drift_rows, rows_per_slot);
        let (evaluation, drift) = match evaluation.and_then(|evaluation| Ok((evaluation, drift()?))) {
            Ok(measured) => measured,
            Err(error) => return stopped_or(error),
        };
        // The first rank has the log and the adapter; all need its figures, to have the same report.
        let mine = together(self.group, || {
            if self.group.rank() != 0 {
                return Ok(Vec::new());
            }
            let logged = Logged::read(&plan.run.output_dir)?;
            let figures = Figures {
                trainable_parameters: method.params().layout().num_elements() as u64,
                peak_rss_bytes: logged.peak_rss_bytes,
                peak_is_of_this_run,
                tokens_per_second: logged.tokens_per_second.and_then(finite),
                train_loss: logged.train_loss,
                held_out_loss: Some(evaluation.loss),
                drift_kl: Some(drift.kl),
                weight_bytes: weight_bytes(adapter)?,
                steps: summary.steps,
                seconds: logged.seconds,
                world_size: self.group.world_size(),
            };
            as_json(&figures, &plan.run.output_dir)
        })?;
        let all = self.group.all_gather_bytes(&mine)?;
        let unreadable = |e: serde_json::Error| CompareError::Unreadable { path: plan.run.output_dir.clone(), reason: e.to_string() };
        Ok(Competed::Measured(RunResult::Trained(serde_json::from_slice(&all[0]).map_err(unreadable)?)))
    }

    /// The contender's plan in its own folder, from its newest checkpoint where it has one.
    fn plan_of(&self, contender: &Contender) -> Result<Plan, CompareError> {
        let Contender { mut plan, .. } = contender.with_steps(self.steps);
        plan.run.output_dir = self.options.output_dir.join(&contender.label);
        // A stopped run needs its newest checkpoint; a finished one is in the report.
        plan.run.save_total_limit = plan.run.save_total_limit.or(Some(NonZeroUsize::MIN));
        let mine = together(self.group, || {
            if self.group.rank() != 0 || self.options.overwrite {
                return Ok(Vec::new());
            }
            checkpoint::claim(self.disk, &plan.run.output_dir, Claim::Resume)?;
            Ok(checkpoint::newest_step(self.disk, &plan.run.output_dir)?.map_or(Vec::new(), |step| step.to_le_bytes().to_vec()))
        })?;
        let has_checkpoint = self.group.all_gather_bytes(&mine)?.iter().any(|step| !step.is_empty());
        // Without a checkpoint nothing is worth keeping, such as the log of a run that was killed before its first.
        plan.run.overwrite_output_dir = !has_checkpoint;
        plan.run.resume = if has_checkpoint { Resume::Latest } else { Resume::No };
        Ok(plan)
    }

    /// The first rank's report, on every rank; none where there is none to go on from.
    fn read_report(&self, path: &Path) -> Result<Option<Report>, CompareError> {
        let mine = together(self.group, || {
            if self.group.rank() != 0 || self.options.overwrite {
                return Ok(Vec::new());
            }
            match self.disk.read(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
                read => read.map_err(|source| TrainError::Io { path: path.to_owned(), source }),
            }
        })?;
        match self.group.all_gather_bytes(&mine)?.first() {
            Some(text) if !text.is_empty() => Report::parse(path, text).map(Some),
            _ => Ok(None),
        }
    }

    /// Writes the report, and the table and the picture of what is finished.
    fn write_report(&self, path: &Path, report: &Report) -> Result<(), CompareError> {
        together(self.group, || {
            if self.group.rank() != 0 {
                return Ok(());
            }
            self.disk
                .create_dir(self.options.output_dir)
                .map_err(|source| TrainError::Io { path: self.options.output_dir.to_owned(), source })?;
            let write = |name: &str, bytes: &[u8]| checkpoint::publish_file(self.disk, &self.options.output_dir.join(name), bytes);
            write(REPORT_FILE, &as_json(report, path)?)?;
            write(table::FILE, table::page(report).as_bytes())?;
            Ok(write(picture::FILE, picture::svg(report).as_bytes())?)
        })?;
        Ok(())
    }
}

/// A run that stopped at a value that is not finite is a result; another error is one.
fn stopped_or(error: TrainError) -> Result<Competed, CompareError> {
    if error.is_not_finite() { Ok(Competed::Measured(RunResult::Stopped { reason: error.to_string() })) } else { Err(error.into()) }
}

fn as_json(value: &impl serde::Serialize, path: &Path) -> Result<Vec<u8>, TrainError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| TrainError::Io { path: PathBuf::from(path), source: e.into() })?;
    text.push(b'\n');
    Ok(text)
}

/// What the contenders' users should see before the first run; a line of some of them alone begins with their labels.
fn surprises(data: &RunData, contenders: &[Contender]) -> Vec<String> {
    let mut said: Vec<(String, Vec<&str>)> = Vec::new();
    for Contender { label, plan } in contenders {
        for line in data.surprises(plan) {
            match said.iter_mut().find(|(other, _)| *other == line) {
                Some((_, labels)) => labels.push(label),
                None => said.push((line, vec![label])),
            }
        }
    }
    let named = |(line, labels): (String, Vec<&str>)| {
        if labels.len() == contenders.len() { line } else { format!("{}: {line}", labels.join(", ")) }
    };
    said.into_iter().map(named).collect()
}

/// The budget of each run, in steps and in tokens.
fn steps_and_tokens(train: &Dataset, plan: &Plan, options: &Options) -> (u64, u64) {
    let rows_per_step = plan.batch.rows_per_step() as u64;
    let samples = NonZeroUsize::new(train.num_samples()).unwrap_or(NonZeroUsize::MIN);
    let mut sampler = Sampler::new(samples, plan.run.seed);
    let tokens_of = |position| train.sample(sampler.sample_at(position)).ids.len() as u64;
    match options.max_tokens {
        Some(max_tokens) => steps_for_tokens(max_tokens.get(), rows_per_step, tokens_of),
        None => {
            let steps = total_steps(plan, train.num_samples() as u64);
            (steps, (0..steps * rows_per_step).map(tokens_of).sum())
        }
    }
}

/// The inputs, and the budget.
fn shared(base: &Base, plan: &Plan, options: &Options, (steps, budget_tokens): (u64, u64)) -> Result<Shared, CompareError> {
    let held_out = base.validation.as_deref().ok_or(CompareError::NoHeldOutRows)?;
    let parameters = base.model.config.parameter_shapes();
    Ok(Shared {
        base_fingerprint: base.fingerprint.clone(),
        tokenizer_sha256: base.tokenizer_sha256.clone(),
        computed_on: base.device.kind(),
        base_parameters: parameters.values().map(|shape| shape.iter().product::<usize>() as u64).sum(),
        train_rows: base.train.num_samples() as u64,
        train_tokens: base.train.num_tokens() as u64,
        held_out_rows: held_out.num_samples() as u64,
        held_out_tokens: held_out.num_tokens() as u64,
        drift_rows: options.drift_rows.get().min(held_out.num_samples()) as u64,
        steps,
        rows_per_step: plan.batch.rows_per_step() as u64,
        budget_tokens,
    })
}

/// The number of steps after which at least `max_tokens` tokens were seen, and how many they are. The rows of a step are the same for each
/// method, so equal steps are equal tokens.
fn steps_for_tokens(max_tokens: u64, rows_per_step: u64, mut tokens_of: impl FnMut(u64) -> u64) -> (u64, u64) {
    let (mut steps, mut tokens) = (0, 0);
    while steps == 0 || tokens < max_tokens {
        tokens += (steps * rows_per_step..(steps + 1) * rows_per_step).map(&mut tokens_of).sum::<u64>();
        steps += 1;
    }
    (steps, tokens)
}

fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_of_tokens_ends_with_the_step_that_reaches_it() {
        let tokens_of = |position: u64| 1 + position % 3;
        // Steps of 4 rows: 1 2 3 1 | 2 3 1 2 | 3 1 2 3.
        assert_eq!(steps_for_tokens(1, 4, tokens_of), (1, 7));
        assert_eq!(steps_for_tokens(7, 4, tokens_of), (1, 7));
        assert_eq!(steps_for_tokens(8, 4, tokens_of), (2, 15));
        assert_eq!(steps_for_tokens(16, 4, tokens_of), (3, 24));
    }
}
