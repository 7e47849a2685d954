//! `glmddp completions SHELL`

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, report};

/// Print a completion script for a shell
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "bash: mkdir -p ~/.local/share/bash-completion/completions && glmddp completions bash > ~/.local/share/bash-completion/completions/glmddp"
)]
pub struct CompletionsArgs {
    pub shell: Shell,
}

pub fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "glmddp", &mut script);
    report::print(&String::from_utf8(script)?)?;
    Ok(())
}
