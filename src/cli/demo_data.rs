//! `glmddp demo-data`: made-up rows in AdvertiseGen's columns.

use std::path::PathBuf;

use clap::Args;

use super::report;
use crate::data::demo::{self, Overwrite};

/// Make up rows like AdvertiseGen's: train.jsonl and dev.jsonl
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct DemoDataArgs {
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    /// Rows of train.jsonl
    #[arg(long, default_value_t = 4000)]
    pub rows: usize,
    /// Rows of dev.jsonl, none of which is in train.jsonl
    #[arg(long, default_value_t = 100)]
    pub dev_rows: usize,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Replace files with other rows
    #[arg(long)]
    pub overwrite: bool,
}

pub fn run(args: &DemoDataArgs) -> anyhow::Result<()> {
    let overwrite = if args.overwrite { Overwrite::Yes } else { Overwrite::No };
    demo::write_demo(&args.output_dir, args.rows, args.dev_rows, args.seed, overwrite)?;
    let dir = args.output_dir.display();
    report::print(&format!("{dir}/train.jsonl: {} rows, {dir}/dev.jsonl: {} rows; columns content, summary\n", args.rows, args.dev_rows))?;
    Ok(())
}
