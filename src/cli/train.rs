//! `glmddp train`.

use std::fs::DirEntry;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use super::ranks::{self, MessageArgs};
use super::report;
use super::run_args::RunArgs;
use crate::checkpoint::RealDisk;
use crate::config::Plan;
use crate::dist::ProcessGroup;
use crate::train::run;

/// Fine-tune a model; under mpirun, one process a device
#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub messages: MessageArgs,
}

pub fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    ranks::run(|group| train(args, group))
}

fn train(args: &TrainArgs, group: &dyn ProcessGroup) -> anyhow::Result<()> {
    let console = ranks::console(group, &args.messages)?;
    let loaded = args.run.load()?;
    let plan = loaded.resolve(group.world_size())?;
    ranks::take_threads(group, &plan)?;
    let summary = run::run(&plan, group, &RealDisk, &console)?;
    if group.rank() == 0 {
        keep_arguments(&plan)?;
        close(&plan, &summary)?;
    }
    Ok(())
}

/// The resolved configuration beside the checkpoints.
fn keep_arguments(plan: &Plan) -> anyhow::Result<()> {
    let path = plan.run.output_dir.join("training_args.toml");
    std::fs::write(&path, plan.to_toml()?).with_context(|| format!("while writing {}", path.display()))
}

fn close(plan: &Plan, summary: &run::Summary) -> anyhow::Result<()> {
    let held_out = summary.evaluation.map_or(String::new(), |e| format!(", held-out loss {:.4}", e.loss));
    let (adapter, what) = (&summary.adapter, if plan.method.settings().trains_base_weights() { "model" } else { "adapter" });
    let holds = if what == "model" { "a whole model, for --model_name_or_path".to_owned() } else { entries(adapter)?.join(", ") };
    let text = format!(
        "done: {} steps, loss {:.4} -> {:.4}{held_out}\n\
         {what}: {} ({holds})\n\
         checkpoint: {}\n\
         to go on: the same command with --resume_from_checkpoint latest and a larger --max_steps than {}\n",
        summary.steps,
        summary.first_loss,
        summary.last_loss,
        adapter.display(),
        summary.checkpoint.display(),
        summary.steps,
    );
    report::print(&text)?;
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
