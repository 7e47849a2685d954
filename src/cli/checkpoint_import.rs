//! `glmddp checkpoint import`: an adapter as the first checkpoint of a run.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::run_args::RunArgs;
use super::{base_warnings, report};
use crate::checkpoint::RealDisk;
use crate::dist::Solo;
use crate::train::adopt;

/// Make an adapter the start of a run: checkpoint-0, from which `train --resume_from_checkpoint latest` goes on
///
/// It takes the arguments of that run: what a checkpoint is held against when a run goes on from it (base, tokenizer, rows, sizes) is known from
/// them alone.
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct ImportArgs {
    /// Folder of an adapter in PEFT's format, the adapters library's, or THUDM's (config.json with pre_seq_len, and model.safetensors or
    /// pytorch_model.bin)
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

pub fn run(args: &ImportArgs) -> anyhow::Result<()> {
    let plan = args.run.load()?.resolve(1)?;
    base_warnings::of_template(&plan.model.model_name_or_path, &Solo)?;
    base_warnings::of_names(&plan.model.model_name_or_path, [args.adapter.as_path()], &Solo)?;
    let checkpoint = adopt::import(&args.adapter, &plan, &Solo, &RealDisk)?;
    let text = if args.json {
        format!("{}\n", json!({ "checkpoint": checkpoint, "adapter": args.adapter }))
    } else {
        format!(
            "{}: the values of {}, and fresh moments\nto train on from it: `glmddp train` with the same arguments and --resume_from_checkpoint latest\n",
            checkpoint.display(),
            args.adapter.display()
        )
    };
    report::print(&text)?;
    Ok(())
}
