//! `glmddp checkpoint verify`: every byte against the manifest.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::report;
use super::text::columns;
use crate::checkpoint::{self, Checkpoint, CheckpointError, Named, RealDisk};
use crate::telemetry::Console;
use crate::telemetry::bytes;

/// Hold every byte of checkpoints against their manifests; exit code 1 where anything is damaged
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct VerifyArgs {
    /// A checkpoint, or the output_dir of a run: all in it
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Verified {
    path: PathBuf,
    /// What is wrong; nothing: it is whole.
    damages: Vec<String>,
    /// Bytes of content that were to be looked at.
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    checkpoints: Vec<Verified>,
    /// What a killed save or deletion left.
    leftovers: Vec<PathBuf>,
    /// Where `--resume_from_checkpoint latest` goes on: of an output folder.
    latest: Option<PathBuf>,
}

pub fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let named = checkpoint::named(&RealDisk, &args.path)?;
    let (paths, is_output_dir) = match named {
        Named::Checkpoint(path) => (vec![path], false),
        Named::OutputDir(all) => (all, true),
    };
    let opened: Vec<_> = paths.iter().map(|path| (path.as_path(), checkpoint::open(&RealDisk, path))).collect();
    let total = opened.iter().filter_map(|(_, opened)| opened.as_ref().ok()).map(Checkpoint::num_bytes).sum();
    let bar = Console::stderr().byte_bar(total);
    let checkpoints: Vec<Verified> = opened.into_iter().map(|(path, opened)| verified(path, opened, &|bytes| bar.advance(bytes))).collect();
    drop(bar);
    let report = Report {
        leftovers: if is_output_dir { checkpoint::leftovers(&RealDisk, &args.path)? } else { Vec::new() },
        latest: checkpoints.iter().find(|found| is_output_dir && found.damages.is_empty()).map(|found| found.path.clone()),
        checkpoints,
    };
    let text = if args.json { format!("{}\n", serde_json::to_string(&report)?) } else { text(&report, is_output_dir) };
    report::print(&text)?;
    let is_whole = report.checkpoints.iter().all(|found| found.damages.is_empty());
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn verified(path: &Path, opened: Result<Checkpoint, CheckpointError>, progress: &(dyn Fn(u64) + Sync)) -> Verified {
    let (damages, bytes) = match opened {
        Ok(checkpoint) => (checkpoint.damages(&RealDisk, progress), checkpoint.num_bytes()),
        Err(error) => (vec![error], 0),
    };
    Verified { path: path.to_owned(), damages: damages.iter().map(said).collect(), bytes }
}

/// The message without the folder, which stands before it.
fn said(error: &CheckpointError) -> String {
    match error {
        CheckpointError::Damaged { what, expected, found, .. } => format!("{what}: expected {expected}, found {found}"),
        CheckpointError::Incomplete { reason, .. } => format!("incomplete: {reason}"),
        other => other.to_string(),
    }
}

fn text(report: &Report, is_output_dir: bool) -> String {
    let rows: Vec<(String, String)> = report
        .checkpoints
        .iter()
        .map(|found| {
            let state = match found.damages.len() {
                0 => format!("whole, {} of content", bytes(found.bytes)),
                _ => format!("DAMAGED\n{}", found.damages.join("\n")),
            };
            (found.path.display().to_string(), state)
        })
        .collect();
    let mut text = columns(&rows);
    for path in &report.leftovers {
        let _ = writeln!(text, "left over from a killed save or deletion: {} (the next start of the run cleans up)", path.display());
    }
    if is_output_dir {
        let _ = match &report.latest {
            Some(path) => writeln!(text, "--resume_from_checkpoint latest goes on from {}", path.display()),
            None => writeln!(text, "--resume_from_checkpoint latest finds nothing to go on from"),
        };
    }
    text
}
