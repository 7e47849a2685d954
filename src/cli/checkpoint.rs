//! `glmddp checkpoint`: looking at checkpoints, and handling them without a run.

use std::path::Path;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{checkpoint_diff, checkpoint_export, checkpoint_import, checkpoint_inspect, checkpoint_prune, checkpoint_verify};
use crate::checkpoint::{self, Checkpoint, CheckpointError, Named, RealDisk};

/// Verify, inspect, compare, export, import and prune checkpoints
#[derive(Clone, Debug, Args)]
pub struct CheckpointArgs {
    #[command(subcommand)]
    pub command: CheckpointCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum CheckpointCommand {
    Verify(checkpoint_verify::VerifyArgs),
    Inspect(checkpoint_inspect::InspectArgs),
    Diff(checkpoint_diff::DiffArgs),
    Export(checkpoint_export::ExportArgs),
    Import(Box<checkpoint_import::ImportArgs>),
    Prune(checkpoint_prune::PruneArgs),
}

pub fn run(args: &CheckpointArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        CheckpointCommand::Verify(args) => return checkpoint_verify::run(args),
        CheckpointCommand::Inspect(args) => checkpoint_inspect::run(args)?,
        CheckpointCommand::Diff(args) => checkpoint_diff::run(args)?,
        CheckpointCommand::Export(args) => checkpoint_export::run(args)?,
        CheckpointCommand::Import(args) => checkpoint_import::run(args)?,
        CheckpointCommand::Prune(args) => checkpoint_prune::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The one checkpoint that `path` names: itself, or of an output folder the newest that can be opened.
///
/// # Errors
/// When it names none, or none that can be opened.
pub(super) fn one(path: &Path) -> Result<Checkpoint, CheckpointError> {
    match checkpoint::named(&RealDisk, path)? {
        Named::Checkpoint(path) => checkpoint::open(&RealDisk, &path),
        Named::OutputDir(all) => {
            let opened: Vec<_> = all.iter().map(|path| checkpoint::open(&RealDisk, path)).collect();
            let num = opened.len();
            let mut newest = None;
            for result in opened {
                match result {
                    Ok(checkpoint) => return Ok(checkpoint),
                    Err(error) => newest = newest.or(Some(error.to_string())),
                }
            }
            let path = path.to_owned();
            Err(newest.map_or(CheckpointError::NoCheckpoints { path: path.clone() }, |newest| CheckpointError::NoneGood {
                path,
                num,
                newest,
            }))
        }
    }
}
