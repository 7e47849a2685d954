//! Where a step's time goes. Each phase is a `tracing` span of the same name, so that the sums here and a trace agree.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::record::PhaseMillis;

/// A part of the training loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Data,
    ForwardBackward,
    Comm,
    Optim,
    Save,
    Eval,
}

impl Phase {
    pub const ALL: [Self; 6] = [Self::Data, Self::ForwardBackward, Self::Comm, Self::Optim, Self::Save, Self::Eval];

    /// Also the span's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::ForwardBackward => "forward_backward",
            Self::Comm => "comm",
            Self::Optim => "optim",
            Self::Save => "save",
            Self::Eval => "eval",
        }
    }

    fn span(self) -> tracing::Span {
        match self {
            Self::Data => tracing::info_span!("data"),
            Self::ForwardBackward => tracing::info_span!("forward_backward"),
            Self::Comm => tracing::info_span!("comm"),
            Self::Optim => tracing::info_span!("optim"),
            Self::Save => tracing::info_span!("save"),
            Self::Eval => tracing::info_span!("eval"),
        }
    }
}

/// Time spent in each phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes([Duration; Phase::ALL.len()]);

impl PhaseTimes {
    pub fn get(&self, phase: Phase) -> Duration {
        self.0[phase as usize]
    }

    pub fn total(&self) -> Duration {
        self.0.iter().sum()
    }

    /// The phases that a step record has.
    pub fn millis(&self) -> PhaseMillis {
        let millis = |phase| self.get(phase).as_secs_f64() * 1e3;
        PhaseMillis {
            data: millis(Phase::Data),
            forward_backward: millis(Phase::ForwardBackward),
            comm: millis(Phase::Comm),
            optim: millis(Phase::Optim),
            save: millis(Phase::Save),
        }
    }
}

/// Sums the time of each phase. A phase inside another counts for itself only, so that the phases add up to no more than the clock.
#[derive(Debug, Default)]
pub struct PhaseTimer {
    times: Cell<PhaseTimes>,
    /// Time of the phases that ended inside the one that runs.
    inner: Cell<Duration>,
}

impl PhaseTimer {
    /// Runs `work` as a part of `phase`.
    pub fn time<T>(&self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let before = self.inner.replace(Duration::ZERO);
        let started = Instant::now();
        let result = phase.span().in_scope(work);
        let elapsed = started.elapsed();
        let mut times = self.times.get();
        times.0[phase as usize] += elapsed.saturating_sub(self.inner.get());
        self.times.set(times);
        self.inner.set(before + elapsed);
        result
    }

    /// The sums since the last call: one step's times.
    pub fn take(&self) -> PhaseTimes {
        self.times.take()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
    use tracing_subscriber::registry::LookupSpan;

    use super::*;

    fn pause(millis: u64) {
        std::thread::sleep(Duration::from_millis(millis));
    }

    #[test]
    fn times_of_one_phase_are_summed_and_taken_once() {
        let timer = PhaseTimer::default();
        let seven = timer.time(Phase::Data, || {
            pause(5);
            7
        });
        timer.time(Phase::Data, || pause(5));
        let times = timer.take();
        assert_eq!(seven, 7);
        assert!(times.get(Phase::Data) >= Duration::from_millis(10) && times.get(Phase::Comm).is_zero());
        assert!(times.millis().data >= 10.0);
        assert_eq!(timer.take(), PhaseTimes::default());
    }

    #[test]
    fn nested_phase_counts_for_itself_only() {
        let timer = PhaseTimer::default();
        let started = Instant::now();
        timer.time(Phase::ForwardBackward, || {
            pause(4);
            timer.time(Phase::Comm, || pause(20));
            timer.time(Phase::Comm, || timer.time(Phase::Data, || pause(2)));
        });
        let (clock, times) = (started.elapsed(), timer.take());
        assert!(times.total() <= clock, "{times:?} in {clock:?}");
        assert!(times.get(Phase::Comm) >= Duration::from_millis(20) && times.get(Phase::Data) >= Duration::from_millis(2));
        assert!(times.get(Phase::ForwardBackward) <= clock - Duration::from_millis(22));
    }

    struct Names(Arc<Mutex<Vec<&'static str>>>);

    impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Names {
        fn on_enter(&self, id: &tracing::span::Id, context: Context<'_, S>) {
            self.0.lock().unwrap().push(context.span(id).unwrap().name());
        }
    }

    #[test]
    fn phases_open_spans_of_their_names() {
        let names = Arc::new(Mutex::new(Vec::new()));
        let subscriber = tracing_subscriber::registry().with(Names(names.clone()));
        tracing::subscriber::with_default(subscriber, || {
            let timer = PhaseTimer::default();
            Phase::ALL.iter().for_each(|&phase| timer.time(phase, || ()));
        });
        assert_eq!(*names.lock().unwrap(), Phase::ALL.map(Phase::name));
    }
}
