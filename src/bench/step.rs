//! The time of a training step.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::setup::{Bench, BenchSetup};
use crate::data::sampler::slots_of_rank;
use crate::dist::{Collectives, ProcessGroup, Reduction};
use crate::telemetry::{PhaseMillis, PhaseTimer, peak_rss_bytes};
use crate::train::TrainError;
use crate::train::requests::Wish;
use crate::train::step::{Trainer, gradient_sum};

/// Medians over the measured steps; a step's time is the slowest rank's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepTimes {
    pub world_size: usize,
    pub threads: usize,
    pub ms_step_median: f64,
    pub ms_step_min: f64,
    pub ms_step_max: f64,
    /// Tokens of rows (no padding, no prefix) of all ranks over the time of all measured steps.
    pub real_tokens_s: f64,
    /// Of rank 0, mean over the measured steps.
    pub phases: Phases,
    /// Largest of any rank.
    pub peak_rss_mib: u64,
    pub first_loss: f64,
    pub last_loss: f64,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Phases {
    pub data: f64,
    pub forward_backward: f64,
    pub comm: f64,
    pub optim: f64,
}

impl Phases {
    fn add(&mut self, other: PhaseMillis, share: f64) {
        self.data += other.data * share;
        self.forward_backward += other.forward_backward * share;
        self.comm += other.comm * share;
        self.optim += other.optim * share;
    }
}

/// Runs `warmup + steps` steps of `setup.slots` micro-batches, dealt to the ranks, and measures the last `steps`.
///
/// # Errors
/// When a file cannot be read, the sizes do not fit, or a collective fails.
pub fn run(setup: &BenchSetup, tensors: &dyn Collectives, warmup: usize, steps: usize) -> Result<StepTimes, TrainError> {
    let mut bench = Bench::new(setup)?;
    let group = tensors.group();
    let sum = gradient_sum(tensors, Reduction::SlotTree, setup.slots.get(), &*bench.method, &bench.optimizer)?;
    let world_size = std::num::NonZeroUsize::new(group.world_size()).unwrap_or(std::num::NonZeroUsize::MIN);
    let slots = slots_of_rank(setup.slots.get(), world_size, group.rank());
    let timer = PhaseTimer::default();
    let (mut times, mut tokens, mut losses, mut phases) = (Vec::new(), 0, Vec::new(), Phases::default());
    for step in 0..warmup + steps {
        group.barrier()?;
        let started = Instant::now();
        let batches: Vec<_> =
            timer.time(crate::telemetry::Phase::Data, || slots.clone().map(|slot| (slot, bench.micro_batch(step, slot))).collect());
        let settings = bench.settings;
        let (model, method, optimizer) = (&bench.model, &mut *bench.method, &mut bench.optimizer);
        let mut trainer = Trainer { model, method, optimizer, sum: &sum, settings, wish: &Wish::default };
        losses.push(trainer.step(&batches, 2e-2, &timer)?.loss);
        let took = started.elapsed().as_secs_f64();
        let took = slowest(group, took)?;
        let parts = timer.take().millis();
        if step >= warmup {
            times.push(took * 1e3);
            phases.add(parts, 1.0 / steps as f64);
            tokens += (0..setup.slots.get()).map(|slot| bench.real_tokens(&bench.micro_batch(step, slot))).sum::<usize>();
        }
    }
    let real_tokens_s = tokens as f64 / (times.iter().sum::<f64>() / 1e3);
    let rss = peak_rss_bytes().unwrap_or(0) as f64 / (1024.0 * 1024.0);
    times.sort_by(f64::total_cmp);
    Ok(StepTimes {
        world_size: group.world_size(),
        threads: rayon::current_num_threads(),
        ms_step_median: times[times.len() / 2],
        ms_step_min: times[0],
        ms_step_max: times[times.len() - 1],
        real_tokens_s,
        phases,
        peak_rss_mib: slowest(group, rss)? as u64,
        first_loss: losses[0],
        last_loss: losses[losses.len() - 1],
    })
}

/// The largest of all ranks' values.
fn slowest(group: &dyn ProcessGroup, mine: f64) -> Result<f64, TrainError> {
    let all = group.all_gather_bytes(&mine.to_le_bytes())?;
    Ok(all.iter().filter_map(|bytes| Some(f64::from_le_bytes(bytes.as_slice().try_into().ok()?))).fold(f64::MIN, f64::max))
}
