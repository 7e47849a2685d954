//! What a finished run came to, from its log and its exported weights.

use std::path::Path;

use crate::telemetry::{LoggedStep, logged_steps};
use crate::train::TrainError;

/// The training loss of a run is the mean over so many last steps: one step's loss depends on its rows.
pub const LAST_STEPS: usize = 10;

/// The part of [`super::Figures`] that a run's log holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Logged {
    pub tokens_per_second: Option<f64>,
    pub train_loss: Option<f64>,
    pub peak_rss_bytes: Option<u64>,
    pub seconds: f64,
}

impl Logged {
    /// # Errors
    /// When the log of the run in `dir` cannot be read.
    pub fn read(dir: &Path) -> Result<Self, TrainError> {
        Ok(Self::of(&logged_steps(dir)?))
    }

    fn of(steps: &[LoggedStep]) -> Self {
        let last = &steps[steps.len().saturating_sub(LAST_STEPS)..];
        let losses: Option<Vec<f64>> = last.iter().map(|s| s.loss).collect();
        let mean = |losses: Vec<f64>| (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64);
        Self {
            tokens_per_second: median(steps.iter().filter(|s| s.is_warm()).map(|s| s.tokens_per_second).collect()),
            train_loss: losses.and_then(mean),
            peak_rss_bytes: steps.iter().filter_map(|s| s.memory_bytes).max(),
            seconds: steps.iter().map(|s| s.step_ms).sum::<f64>() / 1e3,
        }
    }
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    Some(if values.len() % 2 == 1 { upper } else { (values[values.len() / 2 - 1] + upper) / 2.0 })
}

/// Bytes of the weights in an exported folder and those below it: its safetensors files, or where it has none its `.bin` files. Where both are
/// there, they hold the same values twice.
///
/// # Errors
/// When a folder cannot be read.
pub(super) fn weight_bytes(dir: &Path) -> Result<u64, TrainError> {
    let sizes = || {
        let (mut safetensors, mut pickles, mut open) = (0, 0, vec![dir.to_owned()]);
        while let Some(folder) = open.pop() {
            for entry in std::fs::read_dir(folder)? {
                let entry = entry?;
                match entry.path().extension().and_then(|e| e.to_str()) {
                    _ if entry.file_type()?.is_dir() => open.push(entry.path()),
                    Some("safetensors") => safetensors += entry.metadata()?.len(),
                    Some("bin") => pickles += entry.metadata()?.len(),
                    _ => {}
                }
            }
        }
        Ok(if safetensors > 0 { safetensors } else { pickles })
    };
    sizes().map_err(|source| TrainError::Io { path: dir.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(n: u64, loss: f64, speed: f64, is_first: bool) -> LoggedStep {
        let left = if is_first { "null" } else { "\"0:00:01\"" };
        let json = format!(
            r#"{{"current_steps":{n},"loss":{loss},"tokens_per_second":{speed},"step_ms":500,"memory_bytes":{},"remaining_time":{left}}}"#,
            10 * n
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn figures_leave_out_the_first_step_of_each_process_and_average_the_last_ten() {
        let steps: Vec<_> = (1..=14).map(|n| step(n, n as f64, if n == 1 || n == 7 { 0.0 } else { n as f64 }, n == 1 || n == 7)).collect();
        let logged = Logged::of(&steps);
        assert_eq!(logged.tokens_per_second, Some(8.5), "2 3 4 5 6 8 | 9 10 11 12 13 14");
        assert_eq!((logged.train_loss, logged.peak_rss_bytes, logged.seconds), (Some(9.5), Some(140), 7.0));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
    }

    #[test]
    fn figures_of_an_empty_log_are_absent() {
        let logged = Logged::of(&[]);
        assert_eq!(logged, Logged { tokens_per_second: None, train_loss: None, peak_rss_bytes: None, seconds: 0.0 });
    }

    #[test]
    fn weights_are_counted_in_one_format() {
        let dir = tempfile::tempdir().unwrap();
        for (name, len) in [("adapter_model.safetensors", 30), ("pytorch_model.bin", 40), ("config.json", 5), ("b.safetensors", 2)] {
            std::fs::write(dir.path().join(name), vec![0; len]).unwrap();
        }
        assert_eq!(weight_bytes(dir.path()).unwrap(), 32);
        assert!(weight_bytes(&dir.path().join("absent")).is_err());
    }
}
