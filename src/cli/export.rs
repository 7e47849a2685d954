//! `glmddp export`: an adapter folded into its base's weights.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::bail;
use candle_core::Tensor;
use clap::Args;
use serde_json::json;

use super::report;
use super::tuned_args::TunedArgs;
use crate::checkpoint::{RealDisk, publish};
use crate::dist::Solo;
use crate::model::hub_files::HubFiles;
use crate::model::init::expect_free;
use crate::peft::export_model::model_files;
use crate::peft::{self, ExportContext, MethodError};
use crate::train::TrainError;

/// Write a model of its own from a base and its adapter
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct ExportArgs {
    /// Fold the adapter into the base's weights (LoRA, rsLoRA, DoRA, IA3); what a run exports by itself is the adapter alone
    #[arg(long, required = true, requires = "adapter")]
    pub merge: bool,
    /// Folder to write the model to, as the hub has it; it must not be there, or be empty
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    #[command(flatten)]
    pub tuned: TunedArgs,
}

pub fn run(args: &ExportArgs) -> anyhow::Result<()> {
    let (output_dir, model_dir) = (&args.output_dir, &args.tuned.model_name_or_path);
    let Some(adapter) = &args.tuned.adapter else { bail!("clap let the command pass without --adapter") };
    expect_free(output_dir)?;
    let tuned = args.tuned.load(&Solo)?;
    let Some(method) = &tuned.method else { bail!("an adapter was given and not read") };
    let about = peft::read::about(adapter).map_err(TrainError::from)?;
    let Some(merged) = method.merged_base_weights(&tuned.model)? else {
        // Several methods write one format: what computed a prefix is known only from what a run says of its export.
        let name = about.as_ref().and_then(|about| about.get("method")?.as_str()).unwrap_or(method.name()).to_owned();
        return Err(MethodError::NotMergeable { path: adapter.clone(), name }.into());
    };
    let merged: BTreeMap<String, Tensor> = merged.into_iter().map(|(weight, tensor)| (weight.name(), tensor)).collect();
    let about = json!({ "merged_adapter": about });
    let files = model_files(&ExportContext { model_dir, config: &tuned.model.config, dtype: None, about: &about }, &merged)
        .map_err(TrainError::from)?;
    publish(&RealDisk, output_dir, &files).map_err(TrainError::from)?;
    report::warn(&HubFiles::of(model_dir)?.notes);
    report::print(&format!(
        "{}: the model of {} with {} weights changed by {}\n",
        output_dir.display(),
        model_dir.display(),
        merged.len(),
        adapter.display()
    ))?;
    Ok(())
}
