//! A subcommand that runs on all ranks of a launcher: in good order to the end, or all of them stop.

use std::process::ExitCode;

use super::{environment, report};
use crate::config::ConfigError;
use crate::dist::{self, ProcessGroup};
use crate::train::TrainError;

/// Connects the ranks and runs `work` on each.
///
/// # Errors
/// When the ranks cannot be connected, or `work` fails on every rank alike or on the only one; a failure of some ranks ends the job here.
pub fn run(work: impl FnOnce(&dyn ProcessGroup) -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let group = dist::connect(&environment::variable)?;
    dist::install_panic_hook(&*group);
    match work(&*group) {
        Ok(()) => {
            group.finish();
            Ok(ExitCode::SUCCESS)
        }
        Err(error) if group.world_size() == 1 || is_everyones(&error) => {
            group.finish();
            Err(error)
        }
        Err(error) => {
            let text = report::render(&error);
            group.abort(text.trim_start_matches("error: ").trim_end())
        }
    }
}

/// Whether every rank returns this error, so that all can leave in good order.
fn is_everyones(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<TrainError>() {
        Some(error) => error.is_everyones(),
        None => error.is::<ConfigError>(),
    }
}
