//! Signals that ask a run to save and stop, and the time by which it must have.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use signal_hook::iterator::Signals as Arriving;

use super::environment::{self, SLURM_JOB_END_TIME};
use crate::config::ConfigError;
use crate::config::plan::{Plan, TimeLimit};
use crate::dist::ProcessGroup;
use crate::train::requests::{Limits, Signals};

/// Exit code of a process that a second SIGINT ends, as a shell has it.
const INTERRUPTED: i32 = 130;

/// Handles SIGTERM, SIGINT and SIGUSR1 from here on: each asks for a stop, but a second SIGINT ends this process at once.
///
/// # Errors
/// When the system takes no handler.
pub fn listen() -> anyhow::Result<Signals> {
    let signals = Signals::default();
    let asks = |signal, flag: &Arc<AtomicBool>| flag::register(signal, Arc::clone(flag));
    // Before the flag is set by the same signal: the first finds it unset.
    flag::register_conditional_shutdown(SIGINT, INTERRUPTED, Arc::clone(&signals.interrupt))
        .and_then(|_| asks(SIGINT, &signals.interrupt))
        .and_then(|_| asks(SIGTERM, &signals.terminate))
        .and_then(|_| asks(SIGUSR1, &signals.user1))
        .context("while preparing for signals")?;
    let mut arriving = Arriving::new([SIGINT, SIGTERM, SIGUSR1]).context("while preparing for signals")?;
    // A step may last minutes: who presses Ctrl-C wants to see at once that it was heard.
    std::thread::spawn(move || {
        for signal in arriving.forever() {
            let (name, more) = match signal {
                SIGINT => ("SIGINT", "; once more ends it at once, without saving"),
                SIGTERM => ("SIGTERM", ""),
                _ => ("SIGUSR1", ""),
            };
            tracing::info!("{name}: the run saves and stops when its step is done{more}");
        }
    });
    Ok(signals)
}

/// `signals`, and the time that `plan` gives a run of a program that was started at `started`. Collective: the first rank's environment counts,
/// for a launcher may pass nothing of it on to other machines.
///
/// # Errors
/// On all ranks alike, when the end of the job is asked of Slurm, and it has told none. Or when the ranks cannot meet.
pub fn limits(signals: &Signals, plan: &Plan, started: Instant, group: &dyn ProcessGroup) -> anyhow::Result<Limits> {
    let deadline = match plan.run.save_before_timeout {
        None => None,
        Some(TimeLimit::After(span)) => Some(started + span.0),
        Some(TimeLimit::Slurm) => {
            let mine = environment::variable(SLURM_JOB_END_TIME).unwrap_or_default();
            let found = String::from_utf8_lossy(&group.all_gather_bytes(mine.as_bytes())?[0]).into_owned();
            let Ok(end) = found.parse() else { return Err(ConfigError::NoJobEnd { found }.into()) };
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            Some(Instant::now() + Duration::from_secs(end).saturating_sub(now))
        }
    };
    Ok(Limits { signals: signals.clone(), deadline })
}
