//! `glmddp checkpoint diff`: what two checkpoints differ in.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;

use super::text::columns;
use super::{checkpoint::one, report};
use crate::checkpoint::{self, Change, Difference, Measure, RealDisk};

/// Compare two checkpoints: progress, plan, identity and tensors
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct DiffArgs {
    /// A checkpoint, or an output_dir for the newest in it
    #[arg(value_name = "A")]
    pub first: PathBuf,
    /// The other
    #[arg(value_name = "B")]
    pub second: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &DiffArgs) -> anyhow::Result<()> {
    let (first, second) = (one(&args.first)?, one(&args.second)?);
    let difference = checkpoint::difference(&RealDisk, &first, &second)?;
    let text = if args.json {
        format!("{}\n", serde_json::to_string(&difference)?)
    } else {
        format!("{} -> {}\n{}", first.path.display(), second.path.display(), text(&difference))
    };
    report::print(&text)?;
    Ok(())
}

fn text(found: &Difference) -> String {
    let mut text = String::new();
    let mut section = |name: &str, changes: &[Change]| {
        let _ = match changes {
            [] => writeln!(text, "{name}: the same"),
            changes => writeln!(text, "{name}:\n  {}", changes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  ")),
        };
    };
    section("progress", &found.progress);
    section("identity", &found.identity);
    section("plan", &found.plan);
    let changed: Vec<(String, String)> = found
        .tensors
        .iter()
        .filter_map(|(name, measure)| {
            let what = match measure {
                Measure::Equal => return None,
                Measure::Values { max_abs, relative_norm } => format!("max abs {max_abs:.3e}, relative norm {relative_norm:.3e}"),
                Measure::Shape { from, to } => format!("{from} -> {to}"),
                Measure::OnlyInFirst => "only in the first".to_owned(),
                Measure::OnlyInSecond => "only in the second".to_owned(),
            };
            Some((format!("  {name}"), what))
        })
        .collect();
    let num_equal = found.tensors.len() - changed.len();
    let _ = writeln!(text, "tensors: {num_equal} of {} equal", found.tensors.len());
    text.push_str(&columns(&changed));
    text
}
