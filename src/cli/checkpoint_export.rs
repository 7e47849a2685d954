//! `glmddp checkpoint export`: the adapter, or the model, that a checkpoint is.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{checkpoint::one, report};
use crate::checkpoint::RealDisk;
use crate::model::hub_files::HubFiles;
use crate::model::init::expect_free;
use crate::train::adopt;

/// Write what the run would have exported at a checkpoint: an adapter, or the model of a method that trains the base
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct ExportArgs {
    /// A checkpoint, or an output_dir for the newest in it
    #[arg(value_name = "CHECKPOINT")]
    pub path: PathBuf,
    /// Folder to write to; it must not be there, or be empty
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    /// Folder of the base: needed where the method trains weights of it (full, freeze)
    #[arg(long, value_name = "DIR")]
    pub model_name_or_path: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &ExportArgs) -> anyhow::Result<()> {
    expect_free(&args.output_dir)?;
    let checkpoint = one(&args.path)?;
    let files = adopt::export(&RealDisk, &checkpoint, args.model_name_or_path.as_deref())?;
    adopt::write_export(&RealDisk, &args.output_dir, &files)?;
    if let (Some(model_dir), true) = (&args.model_name_or_path, checkpoint.manifest.files.is_empty()) {
        report::warn(&HubFiles::of(model_dir)?.notes);
    }
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    let header = &checkpoint.manifest.header;
    let text = if args.json {
        format!("{}\n", json!({ "output_dir": args.output_dir, "step": header.step, "method": header.identity.method, "files": names }))
    } else {
        format!("{}: {} after step {} ({})\n", args.output_dir.display(), header.identity.method, header.step, names.join(", "))
    };
    report::print(&text)?;
    Ok(())
}
