//! The step line.

use super::numbers::{bytes, hours, thousands};
use super::record::StepRecord;

/// The fixed, greppable line of one step:
/// `step   120/3000 | loss 2.3411 | grad_norm 0.812 | lr 1.96e-02 | 14,210 tok/s | 412 ms (data 3, fwd+bwd 371, comm 9, optim 2) | mem 21.3 GiB | eta 0:19:42`
pub fn step_line(record: &StepRecord) -> String {
    let phases = &record.phases;
    let memory = record.memory_bytes.map_or_else(|| "n/a".to_owned(), bytes);
    let eta = record.remaining_time.map_or_else(|| "-:--:--".to_owned(), hours);
    format!(
        "step {:>5}/{} | loss {:.4} | grad_norm {:.3} | lr {} | {} tok/s | {:.0} ms (data {:.0}, fwd+bwd {:.0}, comm {:.0}, optim {:.0}) | mem {memory} | eta {eta}",
        record.current_steps,
        record.total_steps,
        record.loss,
        record.grad_norm,
        scientific(record.lr),
        thousands(record.tokens_per_second.round().max(0.0) as u64),
        record.step_ms,
        phases.data,
        phases.forward_backward,
        phases.comm,
        phases.optim,
    )
}

/// Three digits and an exponent of at least two: `1.96e-02`.
fn scientific(value: f64) -> String {
    let text = format!("{value:.2e}");
    let Some((mantissa, exponent)) = text.split_once('e') else { return text };
    let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
    format!("{mantissa}e{sign}{digits:0>2}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::record::PhaseMillis;
    use super::*;

    fn record() -> StepRecord {
        StepRecord {
            current_steps: 120,
            total_steps: 3000,
            loss: 2.34106,
            grad_norm: 0.8123,
            lr: 0.0196,
            tokens_per_second: 14_210.3,
            step_ms: 412.2,
            phases: PhaseMillis { data: 3.1, forward_backward: 371.4, comm: 9.0, optim: 2.2, save: 0.0 },
            memory_bytes: Some(22_870_700_000),
            remaining_time: Some(Duration::from_secs(1182)),
            ..StepRecord::default()
        }
    }

    #[test]
    fn step_line_has_its_fixed_form() {
        insta::assert_snapshot!(
            step_line(&record()),
            @"step   120/3000 | loss 2.3411 | grad_norm 0.812 | lr 1.96e-02 | 14,210 tok/s | 412 ms (data 3, fwd+bwd 371, comm 9, optim 2) | mem 21.3 GiB | eta 0:19:42"
        );
    }

    #[test]
    fn step_line_without_memory_and_eta_says_so() {
        let first = StepRecord { current_steps: 1, lr: 0.0, memory_bytes: None, remaining_time: None, loss: f64::NAN, ..record() };
        insta::assert_snapshot!(
            step_line(&first),
            @"step     1/3000 | loss NaN | grad_norm 0.812 | lr 0.00e+00 | 14,210 tok/s | 412 ms (data 3, fwd+bwd 371, comm 9, optim 2) | mem n/a | eta -:--:--"
        );
    }

    #[test]
    fn numbers_are_written_as_people_read_them() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([2e-2, 5e-5, 1e-100, 1.0, 0.0].map(scientific), ["2.00e-02", "5.00e-05", "1.00e-100", "1.00e+00", "0.00e+00"]);
        assert_eq!([59, 3600, 100 * 3600 + 61].map(|s| hours(Duration::from_secs(s))), ["0:00:59", "1:00:00", "100:01:01"]);
    }
}
