//! What a run is asked from outside while it trains: to save, or to save and stop.
//!
//! Any rank may be asked, at any time; the ranks must agree on the step. So each rank states its [`Wish`] in the message in which they share the
//! losses of a step anyway, and all read the same [`Request`] out of it.

use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A file of this name in the output folder asks for a checkpoint without stopping; it is removed once the checkpoint is there.
pub const TRIGGER_FILE: &str = "save_now";

/// Share of the measured times that is added for what may take longer than before.
const RESERVE: f64 = 0.25;

/// Why a run stops before its last step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Interrupt,
    Terminate,
    User1,
    TimeLimit,
}

impl Cause {
    const ALL: [Self; 4] = [Self::Interrupt, Self::Terminate, Self::User1, Self::TimeLimit];

    fn code(self) -> u8 {
        self as u8 + 1
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
            Self::User1 => "SIGUSR1",
            Self::TimeLimit => "`save_before_timeout`",
        })
    }
}

/// What one rank asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    pub stop: Option<Cause>,
    pub save: bool,
}

const SAVE: u8 = 1 << 7;

impl Wish {
    pub fn to_byte(self) -> u8 {
        self.stop.map_or(0, Cause::code) | if self.save { SAVE } else { 0 }
    }

    fn from_byte(byte: u8) -> Self {
        Self { stop: Cause::ALL.into_iter().find(|cause| cause.code() == byte & !SAVE), save: byte & SAVE != 0 }
    }
}

/// Who asked to stop, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    pub rank: usize,
    pub cause: Cause,
}

/// What at least one rank asks for: the same on all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The lowest rank's that asks for it.
    pub stop: Option<Stop>,
    pub save: bool,
}

impl Request {
    /// From the bytes of all ranks' wishes, by rank.
    pub fn of(notes: &[u8]) -> Self {
        let wishes = || notes.iter().map(|&note| Wish::from_byte(note)).enumerate();
        Self {
            stop: wishes().find_map(|(rank, wish)| wish.stop.map(|cause| Stop { rank, cause })),
            save: wishes().any(|(_, wish)| wish.save),
        }
    }
}

/// Signals that this process got; whoever handles signals sets them, and clones share them.
#[derive(Clone, Debug, Default)]
pub struct Signals {
    pub interrupt: Arc<AtomicBool>,
    pub terminate: Arc<AtomicBool>,
    pub user1: Arc<AtomicBool>,
}

impl Signals {
    fn first(&self) -> Option<Cause> {
        let flags = [(&self.terminate, Cause::Terminate), (&self.interrupt, Cause::Interrupt), (&self.user1, Cause::User1)];
        flags.into_iter().find(|(flag, _)| flag.load(Ordering::Relaxed)).map(|(_, cause)| cause)
    }
}

/// What may end a run early. The default never does.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub signals: Signals,
    /// By when a checkpoint must be complete.
    pub deadline: Option<Instant>,
}

/// Listens for one run on one rank.
pub struct Listener<'a> {
    limits: &'a Limits,
    trigger: Option<PathBuf>,
    pace: Cell<Pace>,
}

impl<'a> Listener<'a> {
    /// The first rank looks for the [`TRIGGER_FILE`], so that one machine has to see it.
    pub fn new(limits: &'a Limits, output_dir: &Path, rank: usize) -> Self {
        let trigger = (rank == 0).then(|| output_dir.join(TRIGGER_FILE));
        Self { limits, trigger, pace: Cell::new(Pace::new(Instant::now())) }
    }

    /// What this rank asks for now. Called once a step: the times between calls are the pace of the run.
    pub fn wish(&self) -> Wish {
        let now = Instant::now();
        let pace = self.pace.get().asked(now);
        self.pace.set(pace);
        let is_late = || self.limits.deadline.is_some_and(|deadline| pace.margin() > deadline.saturating_duration_since(now));
        let stop = self.limits.signals.first().or_else(|| is_late().then_some(Cause::TimeLimit));
        Wish { stop, save: self.trigger.as_ref().is_some_and(|path| path.exists()) }
    }

    /// A step took so long, and so did the save behind it where there was one.
    pub fn took(&self, step: Duration, save: Option<Duration>) {
        self.pace.set(self.pace.get().took(step, save));
    }

    /// Whether it is known how long a save takes.
    pub fn has_measured_a_save(&self) -> bool {
        self.pace.get().save.is_some()
    }

    /// Takes the trigger file away: what it asked for is done.
    ///
    /// # Errors
    /// When it cannot be removed; it would ask again after each step. A file that is gone already is no error.
    pub fn honoured(&self) -> Result<(), (PathBuf, std::io::Error)> {
        let Some(path) = &self.trigger else { return Ok(()) };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err((path.clone(), error)),
            _ => Ok(()),
        }
    }
}

/// The longest times of this run so far.
#[derive(Clone, Copy, Debug)]
struct Pace {
    asked: Instant,
    /// From one question to the next: a step with what stands between steps, such as an evaluation.
    round: Duration,
    step: Duration,
    save: Option<Duration>,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { asked: now, round: Duration::ZERO, step: Duration::ZERO, save: None }
    }

    fn asked(self, now: Instant) -> Self {
        Self { asked: now, round: self.round.max(now - self.asked), ..self }
    }

    fn took(self, step: Duration, save: Option<Duration>) -> Self {
        Self { step: self.step.max(step), save: self.save.max(save), ..self }
    }

    /// What must be left for the run to be asked once more: the way there, the rest of that step, and its save.
    fn margin(self) -> Duration {
        (self.round + self.step + self.save.unwrap_or_default()).mul_f64(1.0 + RESERVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_survive_their_byte_and_the_lowest_rank_is_named() {
        for stop in Cause::ALL.into_iter().map(Some).chain([None]) {
            for save in [false, true] {
                let wish = Wish { stop, save };
                assert_eq!(Wish::from_byte(wish.to_byte()), wish);
            }
        }
        let byte = |stop, save| Wish { stop, save }.to_byte();
        assert_eq!(Request::of(&[0, 0]), Request::default());
        let notes = [byte(None, true), byte(Some(Cause::Terminate), false), byte(Some(Cause::Interrupt), false)];
        assert_eq!(Request::of(&notes), Request { stop: Some(Stop { rank: 1, cause: Cause::Terminate }), save: true });
    }

    #[test]
    fn signal_on_a_rank_is_its_wish() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits::default();
        let listener = Listener::new(&limits, dir.path(), 0);
        assert_eq!(listener.wish(), Wish::default());
        limits.signals.user1.store(true, Ordering::Relaxed);
        assert_eq!(listener.wish().stop, Some(Cause::User1));
    }

    #[test]
    fn trigger_file_is_seen_by_the_first_rank_until_it_is_honoured() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(TRIGGER_FILE), b"").unwrap();
        let limits = Limits::default();
        let (first, second) = (Listener::new(&limits, dir.path(), 0), Listener::new(&limits, dir.path(), 1));
        assert_eq!((first.wish().save, second.wish().save), (true, false));
        second.honoured().unwrap();
        assert!(first.wish().save);
        first.honoured().unwrap();
        assert!(!first.wish().save);
        first.honoured().unwrap();
    }

    #[test]
    fn margin_covers_the_way_to_the_next_question_its_step_and_its_save() {
        let (start, s) = (Instant::now(), Duration::from_secs);
        let pace = Pace::new(start).asked(start + s(6)).took(s(8), Some(s(20))).asked(start + s(40)).took(s(7), None).asked(start + s(48));
        assert_eq!((pace.round, pace.step, pace.save), (s(34), s(8), Some(s(20))));
        assert_eq!(pace.margin(), s(62).mul_f64(1.25));
    }

    #[test]
    fn deadline_that_is_near_is_a_wish_to_stop() {
        let dir = tempfile::tempdir().unwrap();
        for (left, stop) in [(Duration::from_secs(3600), None), (Duration::from_secs(50), Some(Cause::TimeLimit))] {
            let limits = Limits { deadline: Some(Instant::now() + left), ..Limits::default() };
            let listener = Listener::new(&limits, dir.path(), 0);
            listener.took(Duration::from_secs(30), Some(Duration::from_secs(20)));
            assert_eq!(listener.wish().stop, stop, "{left:?}");
        }
    }
}
