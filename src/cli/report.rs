//! Errors and warnings as the user sees them: `error`, `-->`, `hint`, once.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use super::{environment, hint, restart};
use crate::checkpoint::CheckpointError;
use crate::compare::CompareError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::dist::DistError;
use crate::kernels::cuda::CudaError;
use crate::kernels::launch::LaunchError;
use crate::model::ModelError;
use crate::paths::NotThere;
use crate::peft::MethodError;
use crate::telemetry::TelemetryError;
use crate::tokenizer::TokenizerError;
use crate::train::TrainError;

/// Whose fault an error is; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    User,
    Ours,
}

impl Fault {
    pub fn exit_code(self) -> u8 {
        match self {
            Self::User => 2,
            Self::Ours => 1,
        }
    }
}

/// What is known of an error beyond its text.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    fault: Fault,
    place: Option<String>,
    hint: Option<String>,
}

/// The facts of the first cause that is known here.
fn facts(error: &anyhow::Error) -> Facts {
    let known = |cause: &(dyn std::error::Error + 'static)| {
        if let Some(config) = cause.downcast_ref::<ConfigError>() {
            return Some(Facts { fault: Fault::User, place: config.place(), hint: config.hint() });
        }
        if let Some(error) = cause.downcast_ref::<TrainError>() {
            let fault = if error.is_users() { Fault::User } else { Fault::Ours };
            return Some(Facts { fault, place: None, hint: error.hint() });
        }
        if let Some(error) = cause.downcast_ref::<CompareError>() {
            let fault = if error.is_users() { Fault::User } else { Fault::Ours };
            return Some(Facts { fault, place: None, hint: error.hint() });
        }
        if let Some(error) = cause.downcast_ref::<CheckpointError>() {
            return Some(Facts { fault: Fault::User, place: None, hint: error.hint() });
        }
        let user = |hint| Some(Facts { fault: Fault::User, place: None, hint });
        if let Some(error) = cause.downcast_ref::<DataError>() {
            return user(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<MethodError>() {
            return user(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<NotThere>() {
            return user(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<ModelError>() {
            return user(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<TokenizerError>() {
            return user(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<TelemetryError>() {
            return user(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<CudaError>() {
            return user(error.hint());
        }
        if let Some(error) = cause.downcast_ref::<LaunchError>() {
            let fault = if matches!(error, LaunchError::Cuda(_)) { Fault::User } else { Fault::Ours };
            return Some(Facts { fault, place: None, hint: error.hint() });
        }
        if let Some(error) = cause.downcast_ref::<DistError>() {
            use DistError::{Alone, Repeated, Unconnected, WithoutMpi};
            let is_users = matches!(error, WithoutMpi { .. } | Unconnected { .. } | Repeated { .. } | Alone { .. });
            let hint = match error {
                Unconnected { claim } => Some(restart::connected(claim)),
                Repeated { .. } => Some(restart::alone()),
                _ => error.hint(),
            };
            return Some(Facts { fault: if is_users { Fault::User } else { Fault::Ours }, place: None, hint });
        }
        cause.is::<std::io::Error>().then_some(Facts { fault: Fault::User, place: None, hint: None })
    };
    error.chain().find_map(known).unwrap_or(Facts { fault: Fault::Ours, place: None, hint: None })
}

/// The message without its exit code: `error: ...`, causes that it does not quote, `  --> place`, an empty line, `hint: ...`.
pub fn render(error: &anyhow::Error) -> String {
    let Facts { place, hint, .. } = facts(error);
    let hint = hint.map(|hint| hint::of_this_command(&hint, &environment::arguments()));
    let mut text = format!("error: {error}\n");
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            let _ = writeln!(text, "  caused by: {cause}");
        }
    }
    if let Some(place) = place {
        let _ = writeln!(text, "  --> {place}");
    }
    if let Some(hint) = hint {
        let _ = write!(text, "\nhint: {hint}\n");
    }
    text
}

/// Prints `error` on stderr, unless this is one of several ranks that all have it and not the first, and gives its exit code.
pub fn exit(error: &anyhow::Error) -> ExitCode {
    let speaks = environment::is_first_rank();
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        if speaks {
            let _ = usage.print();
        }
        return ExitCode::from(usage.exit_code() as u8);
    }
    if speaks {
        let _ = std::io::stderr().write_all(render(error).as_bytes());
    }
    ExitCode::from(facts(error).fault.exit_code())
}

/// Prints `lines` on the first rank's stderr.
pub fn warn(lines: &[String]) {
    if environment::is_first_rank() {
        let text: String = lines.iter().map(|line| format!("warning: {line}\n")).collect();
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// Writes `text` to stdout. A reader that has gone away (`glmddp plan | head`) is no error.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
