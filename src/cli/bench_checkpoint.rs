//! `glmddp bench checkpoint`: what a checkpoint costs.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::report;
use crate::bench::checkpoint::{BenchState, Compression, SaveTimes, compressions, save_and_load};
use crate::checkpoint::{RealDisk, ZSTD_LEVEL};
use crate::paths;

#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct CheckpointArgs {
    /// What to save and to load: parameters as ChatGLM2-6B's methods have them, and AdamW's moments
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [State::Prefix, State::Projection, State::TwoGb])]
    pub states: Vec<State>,
    /// Folder to save in; what is saved is removed again
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Instead, compress the tensors of this checkpoint at several levels, as they are and in byte planes
    #[arg(long, value_name = "DIR")]
    pub compress: Option<PathBuf>,
    /// Levels of zstd for that
    #[arg(long, value_delimiter = ',', default_values_t = [-1, 1, 3, 6, 9], allow_negative_numbers = true, requires = "compress")]
    pub levels: Vec<i32>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum State {
    /// Table of 128 virtual tokens: 7 MB
    Prefix,
    /// The same behind a projection: 477 MB
    Projection,
    /// 2 GB with moments
    TwoGb,
    /// 5 GB with moments; needs 11 GB of memory
    FiveGb,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::Projection => "projection",
            Self::TwoGb => "two_gb",
            Self::FiveGb => "five_gb",
        }
    }
}

pub fn run(args: &CheckpointArgs) -> anyhow::Result<()> {
    let text = match &args.compress {
        Some(path) => {
            paths::expect_folder(path)?;
            compression_text(&compressions(&RealDisk, path, &args.levels)?, args.json)?
        }
        None => {
            let mut rows = Vec::new();
            for state in &args.states {
                let which = match state {
                    State::Prefix => BenchState::Prefix,
                    State::Projection => BenchState::Projection,
                    State::TwoGb => BenchState::TwoGigabytes,
                    State::FiveGb => BenchState::FiveGigabytes,
                };
                rows.push((state.name(), save_and_load(&RealDisk, &args.dir, which)?));
            }
            times_text(&rows, args.json)
        }
    };
    report::print(&text)?;
    Ok(())
}

fn times_text(rows: &[(&str, SaveTimes)], json: bool) -> String {
    if json {
        let rows = rows.iter().map(|(name, times)| serde_json::json!({ "state": name, "level": ZSTD_LEVEL, "times": times }));
        return format!("{}\n", serde_json::Value::Array(rows.collect()));
    }
    let mut text = format!("zstd level {ZSTD_LEVEL}, one rank, one thread\n");
    for (name, t) in rows {
        let _ = writeln!(
            text,
            "{name:<10} {:>8.1} MB in {:>8.1} MB, ratio {:.3} | snapshot {:>7.1} ms, first {:>7.1} | save {:>5.0} MB/s | load {:>5.0} MB/s | \
             verify {:>5.0} MB/s, file hash alone {:>5.0}",
            t.state_bytes as f64 / 1e6,
            t.stored_bytes as f64 / 1e6,
            t.ratio(),
            t.snapshot_ms,
            t.first_snapshot_ms,
            t.megabytes_s(t.save_ms),
            t.megabytes_s(t.load_ms),
            t.megabytes_s(t.verify_ms),
            t.megabytes_s(t.hash_ms)
        );
    }
    text
}

fn compression_text(rows: &[Compression], json: bool) -> anyhow::Result<String> {
    if json {
        return Ok(format!("{}\n", serde_json::to_string(rows)?));
    }
    let mut text = String::from("| tensors | MB | bytes as | level | ratio | compress MB/s | decompress MB/s |\n");
    text.push_str("| --- | ---: | --- | ---: | ---: | ---: | ---: |\n");
    for row in rows {
        let order = if row.byte_planes { "planes" } else { "they are" };
        let (mb, level, ratio) = (row.bytes as f64 / 1e6, row.level, row.ratio);
        let (fast, back) = (row.compress_megabytes_s, row.decompress_megabytes_s);
        let _ = writeln!(text, "| {} | {mb:.1} | {order} | {level} | {ratio:.3} | {fast:.0} | {back:.0} |", row.kind);
    }
    Ok(text)
}
