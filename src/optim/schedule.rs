//! The learning rate of each step, as transformers' `get_scheduler` has it.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Down to 0 at the end.
    Linear,
    /// Half a cosine wave down to 0 at the end.
    Cosine,
    /// The base rate after the warm-up (transformers' `constant_with_warmup`; without warm-up its `constant`).
    Constant,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    Steps(u64),
    /// Share of all steps.
    Ratio(f64),
}

impl Warmup {
    /// Number of warm-up steps of a run; a share is rounded up.
    pub fn steps(self, total_steps: u64) -> u64 {
        match self {
            Self::Steps(steps) => steps,
            Self::Ratio(ratio) => (total_steps as f64 * ratio).ceil() as u64,
        }
    }
}

/// Linear rise over `warmup_steps`, then the fall of `kind` until `total_steps`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub kind: SchedulerType,
    pub base_lr: f64,
    pub warmup_steps: u64,
    pub total_steps: u64,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        self.base_lr * self.factor(step)
    }

    fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.kind {
            SchedulerType::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            SchedulerType::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / decay_steps;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
            SchedulerType::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: SchedulerType, warmup_steps: u64, steps: impl IntoIterator<Item = u64>) -> Vec<f64> {
        let schedule = Schedule { kind, base_lr: 0.02, warmup_steps, total_steps: 10 };
        steps.into_iter().map(|t| schedule.lr(t)).collect()
    }

    /// What transformers 5.23.0's `get_scheduler` gave for base rate 0.02 and 10 steps.
    const LINEAR_3: [f64; 8] =
        [0.0, 0.006666666666666666, 0.013333333333333332, 0.02, 0.017142857142857144, 0.002857142857142857, 0.0, 0.0];
    const COSINE_3: [f64; 7] = [0.0, 0.006666666666666666, 0.013333333333333332, 0.02, 0.01900968867902419, 0.0009903113209758097, 0.0];
    const COSINE_0: [f64; 4] = [0.02, 0.019510565162951538, 0.01, 0.0004894348370484647];
    const CONSTANT_3: [f64; 5] = [0.0, 0.006666666666666666, 0.013333333333333332, 0.02, 0.02];

    fn close(a: &[f64], b: &[f64]) {
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-15), "{a:?} {b:?}");
    }

    #[test]
    fn linear_without_warmup_falls_by_a_tenth_a_step() {
        let expected: Vec<f64> = (0..=10).map(|t| 0.02 * f64::from(10 - t) / 10.0).collect();
        close(&rates(SchedulerType::Linear, 0, 0..=10), &expected);
    }

    #[test]
    fn schedules_with_warmup_equal_transformers() {
        close(&rates(SchedulerType::Linear, 3, [0, 1, 2, 3, 4, 9, 10, 12]), &LINEAR_3);
        close(&rates(SchedulerType::Cosine, 3, [0, 1, 2, 3, 4, 9, 10]), &COSINE_3);
        close(&rates(SchedulerType::Cosine, 0, [0, 1, 5, 9]), &COSINE_0);
        close(&rates(SchedulerType::Constant, 3, [0, 1, 2, 3, 9]), &CONSTANT_3);
        close(&rates(SchedulerType::Constant, 0, [0, 9]), &[0.02, 0.02]);
    }

    #[test]
    fn warmup_longer_than_the_run_only_rises() {
        close(&rates(SchedulerType::Linear, 20, [0, 5, 9]), &[0.0, 0.005, 0.009]);
    }

    #[test]
    fn warmup_ratio_is_rounded_up() {
        assert_eq!([Warmup::Ratio(0.03).steps(100), Warmup::Ratio(0.03).steps(101), Warmup::Steps(7).steps(1)], [3, 4, 7]);
    }
}
