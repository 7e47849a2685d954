//! Errors of clap whose text is not for users.

use std::error::Error as _;
use std::num::{IntErrorKind, ParseFloatError, ParseIntError};

use clap::error::{ContextKind, ContextValue};

use crate::config::{ConfigError, Place, Source};

/// `error`; for a malformed number, the message that a configuration file would give.
pub fn in_plain_words(error: clap::Error) -> anyhow::Error {
    match of_number(&error) {
        Some(error) => error.into(),
        None => error.into(),
    }
}

fn of_number(error: &clap::Error) -> Option<ConfigError> {
    let source = error.source()?;
    let text = |kind| if let Some(ContextValue::String(text)) = error.get(kind) { Some(text.clone()) } else { None };
    let (argument, value) = (text(ContextKind::InvalidArg)?, text(ContextKind::InvalidValue)?);
    let expected = if let Some(error) = source.downcast_ref::<ParseIntError>() {
        match error.kind() {
            IntErrorKind::Zero => "1 or more",
            IntErrorKind::PosOverflow => "a smaller number",
            _ if value.starts_with('-') => "a whole number of 0 or more",
            _ => "a whole number",
        }
    } else if source.is::<ParseFloatError>() {
        "a number"
    } else {
        return None;
    };
    // `--seed <SEED>`
    let key = argument.trim_start_matches("--").split(' ').next().unwrap_or_default().to_owned();
    Some(ConfigError::Value { value: format!("`{value}`"), expected, place: Place { source: Source::CommandLine, key } })
}
