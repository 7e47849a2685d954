//! What can go wrong while logging.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("bad log filter `{filter}`: {reason}")]
    BadFilter { filter: String, reason: String },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}: {reason}", path.display())]
    BadLine { path: PathBuf, line: usize, reason: String },
    #[error("cannot write a log record as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl TelemetryError {
    /// What to do about it, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::BadFilter { .. } => Some("write it as `info`, `debug`, or `warn,glmddp::dist=trace`".to_owned()),
            Self::BadLine { path, .. } => Some(format!("move {} away to go on with a new log", path.display())),
            Self::Io { .. } | Self::Json(_) => None,
        }
    }
}
