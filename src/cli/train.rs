//! `glmddp train`.

use std::fs::DirEntry;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Args;

use super::ranks::{self, MessageArgs};
use super::restart::{self, GoesOn};
use super::run_args::RunArgs;
use super::{base_warnings, report, signals};
use crate::checkpoint::RealDisk;
use crate::config::Plan;
use crate::dist::Collectives;
use crate::model::hub_files::HubFiles;
use crate::train::requests::{Cause, Signals, Stop};
use crate::train::run::{self, Ending};

/// Fine-tune a model; under mpirun, one process a device
#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub messages: MessageArgs,
}

pub fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let signals = signals::listen()?;
    ranks::run(|tensors| train(args, tensors, &signals, started))
}

fn train(args: &TrainArgs, tensors: &dyn Collectives, signals: &Signals, started: Instant) -> anyhow::Result<()> {
    let group = tensors.group();
    let console = ranks::console(group, &args.messages)?;
    let loaded = args.run.load()?;
    let plan = loaded.resolve(group.world_size())?;
    base_warnings::of_template(&plan.model.model_name_or_path, group)?;
    base_warnings::of_names(&plan.model.model_name_or_path, plan.method.settings().adapters().iter().map(PathBuf::as_path), group)?;
    ranks::take_threads(group, &plan)?;
    let limits = signals::limits(signals, &plan, started, group)?;
    let summary = run::run(&plan, tensors, &RealDisk, &console, &limits)?;
    if group.rank() == 0 {
        keep_arguments(&plan)?;
        let checkpoint = summary.checkpoint.as_ref().map_or("none was saved".to_owned(), |path| path.display().to_string());
        if summary.failed_saves > 0 {
            report::warn(&[format!("{} checkpoints could not be saved; the newest that was: {checkpoint}", summary.failed_saves)]);
        }
        match &summary.ending {
            Ending::Done { adapter } => close(&plan, &summary, adapter, &checkpoint)?,
            &Ending::Stopped { by, total_steps } => {
                let mut text = format!("{}\ncheckpoint: {checkpoint}\n", stopped(by, summary.steps, total_steps, group.world_size()));
                if summary.checkpoint.is_some() {
                    text += &format!("to go on: {}\n", restart::command(GoesOn::FromLatest));
                }
                report::print(&text)?;
            }
        }
    }
    Ok(())
}

/// `stopped after step 12 of 3000: SIGTERM on rank 1`.
pub fn stopped(by: Stop, step: u64, total_steps: u64, world_size: usize) -> String {
    let place = if world_size > 1 && by.cause != Cause::TimeLimit { format!(" on rank {}", by.rank) } else { String::new() };
    format!("stopped after step {step} of {total_steps}: {}{place}", by.cause)
}

/// The resolved configuration beside the checkpoints.
fn keep_arguments(plan: &Plan) -> anyhow::Result<()> {
    let path = plan.run.output_dir.join("training_args.toml");
    std::fs::write(&path, plan.to_toml()?).with_context(|| format!("while writing {}", path.display()))
}

fn close(plan: &Plan, summary: &run::Summary, adapter: &Path, checkpoint: &str) -> anyhow::Result<()> {
    let held_out = summary.evaluation.map_or(String::new(), |e| format!(", held-out loss {:.4}", e.loss));
    let what = if plan.method.settings().trains_base_weights() { "model" } else { "adapter" };
    let holds = if what == "model" { "a whole model, for --model_name_or_path".to_owned() } else { entries(adapter)?.join(", ") };
    let text = format!(
        "done: {} steps, loss {:.4} -> {:.4}{held_out}\n\
         {what}: {} ({holds})\n\
         checkpoint: {checkpoint}\n\
         to go on: the same command with --resume_from_checkpoint latest and a larger --max_steps than {}\n",
        summary.steps,
        summary.first_loss,
        summary.last_loss,
        adapter.display(),
        summary.steps,
    );
    report::print(&text)?;
    if what == "model" {
        report::warn(&HubFiles::of(&plan.model.model_name_or_path)?.notes);
    }
    Ok(())
}

/// The names in a folder, sorted; folders end in `/`.
fn entries(dir: &Path) -> anyhow::Result<Vec<String>> {
    let name = |entry: std::io::Result<DirEntry>| {
        let entry = entry?;
        let end = if entry.file_type()?.is_dir() { "/" } else { "" };
        Ok(format!("{}{end}", entry.file_name().display()))
    };
    let names: std::io::Result<Vec<String>> = std::fs::read_dir(dir).and_then(|entries| entries.map(name).collect());
    let mut names = names.with_context(|| format!("while listing {}", dir.display()))?;
    names.sort();
    Ok(names)
}
