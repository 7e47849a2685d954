//! `glmddp man`

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};

use super::{Cli, report};

/// Print the man page, or write those of all subcommands to a folder
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case", after_help = "To read it: glmddp man | man -l -")]
pub struct ManArgs {
    /// Write glmddp.1, glmddp-plan.1, ... here
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
}

pub fn run(args: &ManArgs) -> anyhow::Result<()> {
    if let Some(dir) = &args.output_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("while making {}", dir.display()))?;
        return clap_mangen::generate_to(Cli::command(), dir).with_context(|| format!("while writing to {}", dir.display()));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page)?;
    report::print(&String::from_utf8(page)?)?;
    Ok(())
}
