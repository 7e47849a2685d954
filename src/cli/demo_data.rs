//! `glmddp demo-data`: made-up rows in AdvertiseGen's columns.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::report;
use crate::data::demo::{self, DemoKind, Overwrite};

/// Make up rows like AdvertiseGen's: train.jsonl and dev.jsonl
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct DemoDataArgs {
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    /// What is written about an attribute list; the lists are the same for each
    #[arg(long, value_enum, default_value_t = Kind::Advert)]
    pub kind: Kind,
    /// Rows of train.jsonl
    #[arg(long, default_value = "4000")]
    pub rows: NonZeroUsize,
    /// Rows of dev.jsonl, none of which is in train.jsonl; 0 writes no dev.jsonl
    #[arg(long, default_value_t = 100)]
    pub dev_rows: usize,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Replace files with other rows
    #[arg(long)]
    pub overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A sentence an attribute: 这款长裤，宽松的版型穿着舒服，适合春季，值得拥有。
    Advert,
    /// Season and occasion alone, a shop's answer to the question when it is worn: 这款长裤，适合春季，约会时穿正合适。
    Answer,
}

pub fn run(args: &DemoDataArgs) -> anyhow::Result<()> {
    let overwrite = if args.overwrite { Overwrite::Yes } else { Overwrite::No };
    let kind = match args.kind {
        Kind::Advert => DemoKind::Advert,
        Kind::Answer => DemoKind::Answer,
    };
    demo::write_demo(&args.output_dir, kind, args.rows.get(), args.dev_rows, args.seed, overwrite)?;
    let dir = args.output_dir.display();
    let dev = if args.dev_rows > 0 { format!(", {dir}/dev.jsonl: {} rows", args.dev_rows) } else { String::new() };
    report::print(&format!("{dir}/train.jsonl: {} rows{dev}; columns content, summary\n", args.rows))?;
    Ok(())
}
