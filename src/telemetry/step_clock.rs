//! How long a run takes: averages leave out the first step, which warms up caches and allocators.

use std::time::Duration;

/// Counts the steps of this process; after a resume it starts anew.
#[derive(Clone, Copy, Debug)]
pub struct StepClock {
    total_steps: u64,
    done: u64,
    measured: u32,
    measured_time: Duration,
    elapsed: Duration,
    is_first: bool,
}

impl StepClock {
    /// A run that stands at `done` of `total_steps`.
    pub fn new(done: u64, total_steps: u64) -> Self {
        Self { total_steps, done, measured: 0, measured_time: Duration::ZERO, elapsed: Duration::ZERO, is_first: true }
    }

    /// A step ended that took so long, evaluation and saving included.
    pub fn step(&mut self, took: Duration) {
        self.done += 1;
        self.elapsed += took;
        if !self.is_first {
            self.measured = self.measured.saturating_add(1);
            self.measured_time += took;
        }
        self.is_first = false;
    }

    /// Time of all steps of this process.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// Mean time of a step without the first; none before the second.
    pub fn mean_step(&self) -> Option<Duration> {
        (self.measured > 0).then(|| self.measured_time / self.measured)
    }

    /// Time to the end; none before the second step.
    pub fn remaining(&self) -> Option<Duration> {
        let left = self.total_steps.saturating_sub(self.done);
        Some(Duration::from_secs_f64((self.mean_step()?.as_secs_f64() * left as f64).min(1e12)))
    }

    /// Share of the run that is done, 0 to 100.
    pub fn percentage(&self) -> f64 {
        if self.total_steps == 0 { 100.0 } else { self.done as f64 / self.total_steps as f64 * 100.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remaining_time_leaves_out_the_first_step() {
        let mut clock = StepClock::new(0, 12);
        clock.step(Duration::from_secs(100));
        assert_eq!((clock.mean_step(), clock.remaining()), (None, None));
        clock.step(Duration::from_secs(2));
        clock.step(Duration::from_secs(4));
        assert_eq!(clock.mean_step(), Some(Duration::from_secs(3)));
        assert_eq!(clock.remaining(), Some(Duration::from_secs(27)));
        assert_eq!(clock.elapsed(), Duration::from_secs(106));
        assert_eq!(clock.percentage(), 25.0);
    }

    #[test]
    fn resumed_run_counts_from_where_it_stands() {
        let mut clock = StepClock::new(10, 12);
        clock.step(Duration::from_secs(9));
        clock.step(Duration::from_secs(1));
        assert_eq!((clock.remaining(), clock.percentage()), (Some(Duration::ZERO), 100.0));
        clock.step(Duration::from_secs(1));
        assert_eq!(clock.remaining(), Some(Duration::ZERO));
    }
}
