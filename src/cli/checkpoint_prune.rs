//! `glmddp checkpoint prune`: the retention rules by hand.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::report;
use super::text::columns;
use crate::checkpoint::{self, CheckpointError, Fate, Keep, Named, RealDisk};

/// Delete the checkpoints of a run that the rules do not keep; never the newest whole one, which is read and verified first
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct PruneArgs {
    /// The output_dir of a run that is not running
    #[arg(value_name = "OUTPUT_DIR")]
    pub output_dir: PathBuf,
    /// Keep so many whole checkpoints, the newest
    #[arg(long, value_name = "N")]
    pub save_total_limit: NonZeroUsize,
    /// Keep the one with the lowest held-out loss as well
    #[arg(long)]
    pub save_best: bool,
    /// Keep those of each so many steps as well
    #[arg(long, value_name = "STEPS")]
    pub save_keep_every: Option<NonZeroU64>,
    /// Show what would go, and delete nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &PruneArgs) -> anyhow::Result<()> {
    let Named::OutputDir(all) = checkpoint::named(&RealDisk, &args.output_dir)? else {
        return Err(CheckpointError::NotAnOutputDir { path: args.output_dir.clone() }.into());
    };
    let keep = Keep { newest: args.save_total_limit, best: args.save_best, every: args.save_keep_every };
    let mut damages = Vec::new();
    let good = all.iter().find_map(|path| {
        let verified = checkpoint::open(&RealDisk, path).and_then(|checkpoint| checkpoint.verify(&RealDisk).map(|()| checkpoint));
        verified.map_err(|error| damages.push(error.to_string())).ok()
    });
    let Some(good) = good else {
        let newest = damages.into_iter().next().unwrap_or_default();
        return Err(CheckpointError::NoneGood { path: args.output_dir.clone(), num: all.len(), newest }.into());
    };
    let step = good.manifest.header.step;
    let fates = checkpoint::fates(&RealDisk, &args.output_dir, step, keep)?;
    let deleted = if args.dry_run { Vec::new() } else { checkpoint::retention(&RealDisk, &args.output_dir, step, keep)? };
    let text = if args.json {
        let rows = fates.iter().map(|(path, fate)| json!({ "path": path, "fate": fate, "deleted": deleted.contains(path) }));
        format!("{}\n", serde_json::Value::Array(rows.collect()))
    } else {
        let rows: Vec<_> = fates.iter().map(|(path, fate)| (path.display().to_string(), said(*fate, args.dry_run).to_owned())).collect();
        columns(&rows)
    };
    report::print(&text)?;
    Ok(())
}

fn said(fate: Fate, dry_run: bool) -> &'static str {
    match fate {
        Fate::Newest => "stays: among the newest whole ones",
        Fate::Best => "stays: the lowest held-out loss",
        Fate::Every => "stays: a step that is kept for ever",
        Fate::NotWhole => "stays, not whole: `glmddp checkpoint verify` says what is damaged",
        Fate::Later => "stays, damaged: newer than the newest whole one, which was verified",
        Fate::Goes if dry_run => "would go",
        Fate::Goes => "deleted",
    }
}
