//! Why a comparison stops.

use std::path::PathBuf;

use super::report::Difference;
use crate::checkpoint::CheckpointError;
use crate::dist::DistError;
use crate::train::TrainError;

/// The same on every rank, but for what [`CompareError::is_everyones`] leaves out.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error("{what} in {} was made otherwise: {}", path.display(), list(differences))]
    Differs { path: PathBuf, what: String, differences: Vec<Difference> },
    #[error("{} is not the report of a comparison: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("there are no held-out rows to compare on")]
    NoHeldOutRows,
    #[error(transparent)]
    Train(Box<TrainError>),
}

impl From<TrainError> for CompareError {
    fn from(error: TrainError) -> Self {
        Self::Train(Box::new(error))
    }
}

impl From<DistError> for CompareError {
    fn from(error: DistError) -> Self {
        TrainError::from(error).into()
    }
}

impl From<CheckpointError> for CompareError {
    fn from(error: CheckpointError) -> Self {
        TrainError::from(error).into()
    }
}

impl CompareError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Differs { .. } => {
                Some("go on with the same settings, or compare in another output_dir; --overwrite_output_dir starts anew".to_owned())
            }
            Self::Unreadable { path, .. } => Some(format!("move {} away to start anew", path.display())),
            Self::NoHeldOutRows => Some("give `--validation_file`".to_owned()),
            Self::Train(error) => error.hint(),
        }
    }

    /// Whether every rank returns this error, so that all can leave in good order.
    pub fn is_everyones(&self) -> bool {
        match self {
            Self::Train(error) => error.is_everyones(),
            _ => true,
        }
    }

    /// Whether what the user gave is at fault (exit code 2), not the program or the machine (1).
    pub fn is_users(&self) -> bool {
        match self {
            Self::Train(error) => error.is_users(),
            _ => true,
        }
    }
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
