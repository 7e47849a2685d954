//! The steps of a run, read back from its `trainer_log.jsonl`.

use std::path::Path;

use serde::Deserialize;

use super::error::TelemetryError;
use super::run_log::RUN_LOG_FILE;
use crate::json;

/// What the log says of one step; the fields are those of [`super::StepRecord`].
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LoggedStep {
    pub current_steps: u64,
    /// None where it was not finite.
    pub loss: Option<f64>,
    pub tokens_per_second: f64,
    pub step_ms: f64,
    pub memory_bytes: Option<u64>,
    /// None at the first step of a process.
    remaining_time: Option<String>,
}

impl LoggedStep {
    /// The first step of a process warms up caches and allocators, and times leave it out.
    pub fn is_warm(&self) -> bool {
        self.remaining_time.is_some()
    }
}

/// The steps in the log of the run in `dir`, in order; evaluations are passed over.
///
/// # Errors
/// When there is no log, or a line of it is no record.
pub fn logged_steps(dir: &Path) -> Result<Vec<LoggedStep>, TelemetryError> {
    let path = dir.join(RUN_LOG_FILE);
    let text = std::fs::read_to_string(&path).map_err(|source| TelemetryError::Io { action: "read", path: path.clone(), source })?;
    let bad = |line: usize, error: &serde_json::Error| TelemetryError::BadLine {
        path: path.clone(),
        line,
        reason: format!("not a record of a training log ({error})"),
    };
    let mut steps = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let record: serde_json::Value = json::value(line.as_bytes()).map_err(|e| bad(index + 1, &e))?;
        if record.get("eval_loss").is_none() {
            steps.push(serde_json::from_value(record).map_err(|e| bad(index + 1, &e))?);
        }
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::super::{EvalRecord, RunLog, StepRecord};
    use super::*;
    use std::time::Duration;

    #[test]
    fn steps_read_back_what_was_logged_without_evaluations() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = RunLog::open(dir.path()).unwrap();
        let first = StepRecord { current_steps: 1, loss: 0.1, step_ms: 2.5, memory_bytes: Some(9), ..StepRecord::default() };
        let left = Some(Duration::ZERO);
        let second = StepRecord { current_steps: 2, loss: f64::NAN, tokens_per_second: 7.0, remaining_time: left, ..StepRecord::default() };
        log.step(&first).unwrap();
        log.step(&second).unwrap();
        log.eval(&EvalRecord { current_steps: 2, ..EvalRecord::default() }).unwrap();
        let steps = logged_steps(dir.path()).unwrap();
        assert_eq!((steps.len(), steps[0].current_steps, steps[1].current_steps), (2, 1, 2));
        assert_eq!((steps[0].loss, steps[0].step_ms, steps[0].memory_bytes, steps[0].is_warm()), (Some(0.1), 2.5, Some(9), false));
        assert_eq!((steps[1].loss, steps[1].tokens_per_second, steps[1].memory_bytes, steps[1].is_warm()), (None, 7.0, None, true));
    }

    #[test]
    fn log_that_is_missing_or_foreign_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(logged_steps(dir.path()).unwrap_err().to_string().starts_with("cannot read "));
        std::fs::write(dir.path().join(RUN_LOG_FILE), "{\"current_steps\": 1}\n").unwrap();
        assert!(logged_steps(dir.path()).unwrap_err().to_string().contains("line 1: not a record"));
    }
}
