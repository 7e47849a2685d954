//! `glmddp compare`.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;

use super::ranks::{self, MessageArgs};
use super::restart::{self, GoesOn};
use super::train::stopped;
use super::{allocator, base_warnings, environment, report, signals};
use crate::checkpoint::RealDisk;
use crate::compare::{self, Compared, Contender, Options, REPORT_FILE, Report, StoppedRun, picture, table};
use crate::config::sections::{BatchConfig, DataConfig, ModelConfig, OptimConfig, ScheduleConfig};
use crate::config::{self, ConfigError, RunConfig};
use crate::dist::Collectives;
use crate::model::hub_files::HubFiles;
use crate::train::requests::Signals;

/// Train several methods on the same rows and show them side by side
///
/// Each method runs in OUTPUT_DIR/LABEL with the same data, batches, seed and number of steps. A comparison that was stopped goes on
/// with the same command. Methods are the tables [methods.LABEL] of the configuration file, or those of configs/compare.toml, which are
/// built in.
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct CompareArgs {
    /// Configuration file, TOML or JSON; keys given on the command line go over it
    #[arg(value_name = "FILE", conflicts_with = "config")]
    pub config_file: Option<PathBuf>,
    /// The same, as an option
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Labels separated by commas, or all
    #[arg(long, value_name = "LABELS", default_value = "all", help_heading = "Comparison")]
    pub methods: String,
    /// Train each method until it has seen so many tokens of training rows; the step that reaches them is the last
    #[arg(long, value_name = "TOKENS", conflicts_with_all = ["max_steps", "num_train_epochs"], help_heading = "Comparison")]
    pub max_tokens: Option<NonZeroU64>,
    /// Measure the drift from the base on the first so many held-out rows
    #[arg(long, value_name = "ROWS", default_value = "32", help_heading = "Comparison")]
    pub drift_rows: NonZeroUsize,
    /// Print JSON
    #[arg(long, help_heading = "Comparison")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelConfig,
    #[command(flatten)]
    pub data: DataConfig,
    #[command(flatten)]
    pub batch: BatchConfig,
    #[command(flatten)]
    pub optim: OptimConfig,
    #[command(flatten)]
    pub run: ScheduleConfig,
    #[command(flatten)]
    pub messages: MessageArgs,
}

pub fn run(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let signals = signals::listen()?;
    ranks::run(|tensors| run_on_rank(args, tensors, &signals, started))
}

fn run_on_rank(args: &CompareArgs, tensors: &dyn Collectives, signals: &Signals, started: Instant) -> anyhow::Result<()> {
    let group = tensors.group();
    let console = ranks::console(group, &args.messages)?;
    let contenders = contenders(args, group.world_size())?;
    let Some(Contender { plan, .. }) = contenders.first() else { return Ok(()) };
    base_warnings::of_template(&plan.model.model_name_or_path, group)?;
    let adapters = contenders.iter().flat_map(|contender| contender.plan.method.settings().adapters());
    base_warnings::of_names(&plan.model.model_name_or_path, adapters.map(PathBuf::as_path), group)?;
    ranks::take_threads(group, plan)?;
    let options = Options {
        output_dir: &plan.run.output_dir,
        overwrite: plan.run.overwrite_output_dir,
        max_tokens: args.max_tokens,
        drift_rows: args.drift_rows,
        free_memory: &allocator::give_memory_back,
    };
    let limits = signals::limits(signals, plan, started, group)?;
    let Compared { report, stopped: run } = compare::run(&contenders, options, tensors, &RealDisk, &console, &limits)?;
    if group.rank() == 0 {
        if let Some(StoppedRun { label, step, total_steps, by }) = run {
            let command = restart::command(GoesOn::ByItself);
            let text = format!("{label}: {}\nto go on: {command}\n", stopped(by, step, total_steps, group.world_size()));
            return Ok(report::print(&text)?);
        }
        report::print(&if args.json { format!("{:#}\n", serde_json::to_value(&report)?) } else { text(&report, &options) })?;
        if contenders.iter().any(|contender| contender.plan.method.settings().trains_base_weights()) {
            report::warn(&HubFiles::of(&plan.model.model_name_or_path)?.notes);
        }
    }
    Ok(())
}

/// The methods that the arguments name, each with its plan; at least one.
fn contenders(args: &CompareArgs, world_size: usize) -> Result<Vec<Contender>, ConfigError> {
    let CompareArgs { model, data, batch, optim, run, .. } = args.clone();
    let keys = RunConfig { model, data, batch, optim, run, ..RunConfig::default() };
    let mut comparison = config::load_comparison(args.config.as_deref().or(args.config_file.as_deref()), &keys)?;
    comparison.expand_paths(&environment::variable)?;
    report::warn(&comparison.warnings);
    let chosen = comparison.select(&args.methods)?;
    let contenders = chosen.into_iter().map(|(label, loaded)| Ok(Contender { label, plan: loaded.resolve(world_size)? }));
    let contenders: Vec<Contender> = contenders.collect::<Result<_, ConfigError>>()?;
    if contenders.iter().any(|c| c.plan.data.validation_file.is_none()) {
        return Err(ConfigError::Missing { key: "validation_file" });
    }
    Ok(contenders)
}

fn text(report: &Report, options: &Options) -> String {
    let files = [REPORT_FILE, table::FILE, picture::FILE].map(|name| options.output_dir.join(name).display().to_string());
    format!("{}\n{}{}\n", table::table(report), table::notes(report), files.join(", "))
}
