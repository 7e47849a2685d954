//! The command line: one file a subcommand. The only place that prints to stdout, exits and reads the environment.

pub mod allocator;
pub mod argv;
pub mod base_warnings;
pub mod bench;
pub mod bench_checkpoint;
pub mod checkpoint;
pub mod checkpoint_diff;
pub mod checkpoint_export;
pub mod checkpoint_import;
pub mod checkpoint_inspect;
pub mod checkpoint_prune;
pub mod checkpoint_verify;
pub mod compare;
pub mod completions;
pub mod demo_data;
pub mod doctor;
pub mod environment;
pub mod evaluate;
pub mod export;
pub mod generate;
pub mod hint;
pub mod init_model;
pub mod kernels;
pub mod kernels_check;
pub mod man;
pub mod plan;
pub mod ranks;
pub mod report;
pub mod restart;
pub mod run_args;
pub mod signals;
pub mod text;
pub mod tokenize;
pub mod train;
pub mod tuned_args;
pub mod usage;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Fine-tunes ChatGLM2 on one or many devices, data-parallel, without Python
#[derive(Debug, Parser)]
#[command(
    name = "glmddp",
    version,
    propagate_version = true,
    args_override_self = true,
    max_term_width = 110,
    after_help = "Options work with `_` or `-`."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Train(Box<train::TrainArgs>),
    Evaluate(Box<evaluate::EvaluateArgs>),
    Generate(Box<generate::GenerateArgs>),
    Export(Box<export::ExportArgs>),
    Compare(Box<compare::CompareArgs>),
    Checkpoint(checkpoint::CheckpointArgs),
    Plan(Box<plan::PlanArgs>),
    Tokenize(Box<tokenize::TokenizeArgs>),
    InitModel(init_model::InitModelArgs),
    DemoData(demo_data::DemoDataArgs),
    Bench(Box<bench::BenchArgs>),
    Kernels(kernels::KernelsArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

impl Command {
    /// Whether one process does all of it. `plan` counts the ranks of its launcher, `doctor` looks at each process.
    fn is_for_one(&self) -> bool {
        match self {
            Self::Train(_) | Self::Evaluate(_) | Self::Compare(_) | Self::Plan(_) | Self::Doctor(_) => false,
            Self::Bench(args) => !matches!(args.what, bench::What::Step(_)),
            Self::Generate(_) | Self::Export(_) | Self::Checkpoint(_) | Self::Tokenize(_) | Self::InitModel(_) => true,
            Self::DemoData(_) | Self::Kernels(_) | Self::Completions(_) | Self::Man(_) => true,
        }
    }
}

/// The whole program: parses the process's arguments, runs the subcommand, reports its error once.
///
/// The exit code is 0, or 2 where the user can mend it, or 1 where only we can.
pub fn main() -> ExitCode {
    match run(std::env::args_os().collect()) {
        Ok(code) => code,
        Err(error) => report::exit(&error),
    }
}

fn run(args: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let argv::Argv { args, warnings } = argv::normalise(args, Cli::command(), &environment::variable)?;
    report::warn(&warnings);
    let command = Cli::try_parse_from(args).map_err(usage::in_plain_words)?.command;
    if matches!(command, Command::Train(_) | Command::Evaluate(_) | Command::Compare(_) | Command::Bench(_)) {
        allocator::keep_memory();
    }
    if command.is_for_one() && !ranks::has_turn()? {
        return Ok(ExitCode::SUCCESS);
    }
    match command {
        Command::Train(args) => return train::run(&args),
        Command::Evaluate(args) => return evaluate::run(&args),
        Command::Generate(args) => generate::run(&args)?,
        Command::Export(args) => export::run(&args)?,
        Command::Compare(args) => return compare::run(&args),
        Command::Checkpoint(args) => return checkpoint::run(&args),
        Command::Plan(args) => plan::run(&args)?,
        Command::Tokenize(args) => tokenize::run(&args)?,
        Command::InitModel(args) => init_model::run(&args)?,
        Command::DemoData(args) => demo_data::run(&args)?,
        Command::Bench(args) => bench::run(&args)?,
        Command::Kernels(args) => return kernels::run(&args),
        Command::Doctor(args) => doctor::run(&args)?,
        Command::Completions(args) => completions::run(&args)?,
        Command::Man(args) => man::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
