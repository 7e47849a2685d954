//! The records of `trainer_log.jsonl`. Names follow the log of the Hugging Face trainers; numbers are written so that they read back to the same bits.

use std::time::Duration;

use serde::{Serialize, Serializer};

use super::numbers::hours;

/// One optimizer step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub current_steps: u64,
    pub total_steps: u64,
    /// Before the step.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    pub epoch: f64,
    /// Of the run, 0 to 100.
    pub percentage: f64,
    /// Since this process started training.
    #[serde(serialize_with = "as_hours")]
    pub elapsed_time: Duration,
    /// None before the second step.
    #[serde(serialize_with = "as_hours_or_null")]
    pub remaining_time: Option<Duration>,
    /// Of this step, all ranks together.
    pub tokens_per_second: f64,
    pub step_ms: f64,
    pub phases: PhaseMillis,
    /// Of `phases.save`: time for which a save waited until the one before was written.
    pub save_wait_ms: f64,
    /// The process's peak.
    pub memory_bytes: Option<u64>,
    /// Tokens of this step, all ranks together.
    pub tokens: u64,
    /// Of these, tokens in the loss.
    pub target_tokens: u64,
    /// Tokens of all steps so far.
    pub total_tokens: u64,
}

/// A step's phases in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PhaseMillis {
    pub data: f64,
    pub forward_backward: f64,
    pub comm: f64,
    pub optim: f64,
    /// For which training stood still since the step before to save: copying the state, agreeing, waiting.
    pub save: f64,
}

/// One evaluation on held-out rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EvalRecord {
    pub current_steps: u64,
    pub total_steps: u64,
    pub eval_loss: f64,
    pub epoch: f64,
    pub eval_rows: u64,
    pub eval_target_tokens: u64,
    pub eval_ms: f64,
}

fn as_hours<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hours(*time))
}

fn as_hours_or_null<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(hours).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_record_writes_its_fields_in_order() {
        let record = StepRecord {
            current_steps: 120,
            total_steps: 3000,
            loss: 2.5,
            elapsed_time: Duration::from_secs(61),
            remaining_time: Some(Duration::from_secs(3600)),
            ..StepRecord::default()
        };
        insta::assert_snapshot!(serde_json::to_string(&record).unwrap(), @r#"{"current_steps":120,"total_steps":3000,"loss":2.5,"grad_norm":0.0,"lr":0.0,"epoch":0.0,"percentage":0.0,"elapsed_time":"0:01:01","remaining_time":"1:00:00","tokens_per_second":0.0,"step_ms":0.0,"phases":{"data":0.0,"forward_backward":0.0,"comm":0.0,"optim":0.0,"save":0.0},"save_wait_ms":0.0,"memory_bytes":null,"tokens":0,"target_tokens":0,"total_tokens":0}"#);
    }

    #[test]
    fn losses_read_back_to_the_same_bits() {
        for loss in [0.1f32, 2.341_1, 1e-30, f32::MIN_POSITIVE, 16_777_217.0].map(f64::from).into_iter().chain([0.1, 2.0 / 3.0, 1e300]) {
            let json = serde_json::to_string(&StepRecord { loss, ..StepRecord::default() }).unwrap();
            let written = json.split("\"loss\":").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
            assert_eq!(written.parse::<f64>().unwrap().to_bits(), loss.to_bits(), "{written}");
        }
    }

    #[test]
    fn loss_that_is_no_number_is_written_as_null() {
        let json = serde_json::to_string(&StepRecord { loss: f64::NAN, ..StepRecord::default() }).unwrap();
        assert!(json.contains("\"loss\":null"), "{json}");
    }
}
