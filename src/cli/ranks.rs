//! A subcommand that every rank of a job runs: how the ranks meet, speak, share the cores and leave.

use std::process::ExitCode;

use clap::Args;

use super::{environment, plan, report};
use crate::compare::CompareError;
use crate::config::{ConfigError, Plan};
use crate::dist::{self, Collectives, ProcessGroup, Turn};
use crate::telemetry::{self, Console, Verbosity};
use crate::train::TrainError;

#[derive(Clone, Debug, Args)]
pub struct MessageArgs {
    /// Say more; twice: everything
    #[arg(long, short, action = clap::ArgAction::Count, help_heading = "Messages")]
    pub verbose: u8,
    /// Say only what is wrong
    #[arg(long, short, conflicts_with = "verbose", help_heading = "Messages")]
    pub quiet: bool,
}

/// Does `work` on this rank. An error that all ranks have ends them in good order; one that is this rank's alone ends the job.
///
/// # Errors
/// That of `work`, or when the ranks cannot meet.
pub fn run(work: impl FnOnce(&dyn Collectives) -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let tensors = dist::connect(&environment::variable)?;
    let group = tensors.group();
    dist::install_panic_hook(group);
    match work(&*tensors) {
        Ok(()) => {
            tensors.finish();
            Ok(ExitCode::SUCCESS)
        }
        Err(error) if group.world_size() == 1 || is_everyones(&error) => {
            tensors.finish();
            Err(error)
        }
        Err(error) => {
            let text = report::render(&error);
            group.abort(text.trim_start_matches("error: ").trim_end())
        }
    }
}

/// Whether this process does what a command for one process does. Where a launcher started more of them, the first does, and says so.
///
/// # Errors
/// When it cannot be told which is the first.
pub fn has_turn() -> anyhow::Result<bool> {
    match dist::turn(&environment::variable)? {
        Turn::Own => Ok(true),
        Turn::Another => Ok(false),
        Turn::First { claim } => {
            report::warn(&[format!(
                "started by {} as {}, but this command runs in one: the first does it",
                claim.launcher,
                claim.processes()
            )]);
            Ok(true)
        }
    }
}

/// Whether every rank returns this error, so that all can leave in good order.
fn is_everyones(error: &anyhow::Error) -> bool {
    if let Some(error) = error.downcast_ref::<TrainError>() {
        return error.is_everyones();
    }
    match error.downcast_ref::<CompareError>() {
        Some(error) => error.is_everyones(),
        None => error.is::<ConfigError>(),
    }
}

/// # Errors
/// When `RUST_LOG` is no filter.
pub fn console(group: &dyn ProcessGroup, messages: &MessageArgs) -> anyhow::Result<Console> {
    let verbosity = match (messages.quiet, messages.verbose) {
        (true, _) => Verbosity::Quiet,
        (false, 0) => Verbosity::Normal,
        (false, 1) => Verbosity::Debug,
        (false, _) => Verbosity::Trace,
    };
    Ok(telemetry::init(group.rank(), group.world_size(), verbosity, environment::variable("RUST_LOG").as_deref())?)
}

/// Takes this rank's share of the cores, and says how the batch is shared.
///
/// # Errors
/// When the ranks cannot be asked or the threads cannot be started.
pub fn take_threads(group: &dyn ProcessGroup, plan: &Plan) -> anyhow::Result<()> {
    let threads = dist::plan_threads(group, plan.run.threads)?;
    dist::install_thread_pool(threads.count)?;
    if let (0, Some(hint)) = (group.rank(), threads.hint()) {
        tracing::warn!("{hint}");
    }
    tracing::info!("{} ranks x {} threads; {}", group.world_size(), threads.count, plan::batch_line(&plan.batch));
    Ok(())
}
