//! `glmddp train`.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use super::run_args::RunArgs;
use super::{environment, plan, ranks, report};
use crate::checkpoint::RealDisk;
use crate::config::Plan;
use crate::dist::{self, ProcessGroup};
use crate::telemetry::{self, Verbosity};
use crate::train::run;

/// Fine-tune a model; under mpirun, one process a device
#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Say more; twice: everything
    #[arg(long, short, action = clap::ArgAction::Count, help_heading = "Messages")]
    pub verbose: u8,
    /// Say only what is wrong
    #[arg(long, short, conflicts_with = "verbose", help_heading = "Messages")]
    pub quiet: bool,
}

pub fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    ranks::run(|group| train(args, group))
}

fn train(args: &TrainArgs, group: &dyn ProcessGroup) -> anyhow::Result<()> {
    let verbosity = match (args.quiet, args.verbose) {
        (true, _) => Verbosity::Quiet,
        (false, 0) => Verbosity::Normal,
        (false, 1) => Verbosity::Debug,
        (false, _) => Verbosity::Trace,
    };
    let console = telemetry::init(group.rank(), group.world_size(), verbosity, environment::variable("RUST_LOG").as_deref())?;
    let loaded = args.run.load()?;
    let plan = loaded.resolve(group.world_size())?;
    let threads = dist::plan_threads(group, plan.run.threads)?;
    dist::install_thread_pool(threads.count)?;
    if let (0, Some(hint)) = (group.rank(), threads.hint()) {
        tracing::warn!("{hint}");
    }
    tracing::info!("{} ranks x {} threads; {}", group.world_size(), threads.count, plan::batch_line(&plan.batch));
    let summary = run::run(&plan, group, &RealDisk, &console)?;
    if group.rank() == 0 {
        keep_arguments(&plan)?;
        close(&summary)?;
    }
    Ok(())
}

/// The resolved configuration beside the checkpoints.
fn keep_arguments(plan: &Plan) -> anyhow::Result<()> {
    let path = plan.run.output_dir.join("training_args.toml");
    std::fs::write(&path, plan.to_toml()?).with_context(|| format!("while writing {}", path.display()))
}

fn close(summary: &run::Summary) -> anyhow::Result<()> {
    let held_out = summary.evaluation.map_or(String::new(), |e| format!(", held-out loss {:.4}", e.loss));
    let text = format!(
        "done: {} steps, loss {:.4} -> {:.4}{held_out}\n\
         adapter: {} (PEFT: adapter_config.json, adapter_model.safetensors; THUDM: config.json, pytorch_model.bin)\n\
         checkpoint: {}\n\
         to go on: the same command with --resume_from_checkpoint latest and a larger --max_steps than {}\n",
        summary.steps,
        summary.first_loss,
        summary.last_loss,
        summary.adapter.display(),
        summary.checkpoint.display(),
        summary.steps,
    );
    report::print(&text)?;
    Ok(())
}
