//! A piece of work that every rank does, and whose failure on one is everyone's.

use std::fmt::Write as _;

use super::TrainError;
use crate::dist::{self, ProcessGroup};

/// Runs `work` on every rank; if it fails on any, all fail with the lowest failing rank's message.
///
/// # Errors
/// That of `work`, or of the collective.
pub fn together<T>(group: &dyn ProcessGroup, work: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    match work() {
        Ok(value) => Ok(dist::agree(group, Ok(value))?),
        Err(error) if group.world_size() == 1 => Err(error),
        Err(error) => {
            let mut text = error.to_string();
            if let Some(hint) = error.hint() {
                let _ = write!(text, "\n\nhint: {hint}");
            }
            dist::agree(group, Err::<T, _>(text)).map_err(TrainError::from)
        }
    }
}
