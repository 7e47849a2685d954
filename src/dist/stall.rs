//! What ranks publish of themselves, and who of them keeps the others waiting.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Ranks that a message names one by one.
const MAX_NAMED: usize = 4;

/// The file of one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Status {
    pub job: String,
    pub rank: usize,
    pub pid: u32,
    pub host: String,
    /// Grows with each writing: a file that stands still is of a process that does not run.
    pub beat: u64,
    pub step: u64,
    pub activity: String,
    pub collective: String,
    pub sequence: u64,
    pub is_waiting: bool,
}

/// The other ranks' files as a rank has read them during a wait.
#[derive(Debug)]
pub(super) struct Peers {
    rank: usize,
    /// By rank; this rank's own is not looked at.
    seen: Vec<Seen>,
}

#[derive(Clone, Debug, Default)]
struct Seen {
    status: Option<Status>,
    /// Readings since the beat last grew.
    still: u32,
}

/// A rank that keeps the others waiting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Culprit {
    rank: usize,
    status: Option<Status>,
    life: Life,
}

/// Whether a process runs, from its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Runs,
    /// Its file was not read often enough.
    Unknown,
    /// Its file has stood still so long.
    Silent(Duration),
}

impl Peers {
    pub(super) fn new(rank: usize, world_size: usize) -> Self {
        Self { rank, seen: vec![Seen::default(); world_size] }
    }

    pub(super) fn world_size(&self) -> usize {
        self.seen.len()
    }

    pub(super) fn see(&mut self, found: Vec<Option<Status>>) {
        for (seen, found) in self.seen.iter_mut().zip(found) {
            let has_grown = match (&seen.status, &found) {
                (Some(before), Some(now)) => now.beat != before.beat,
                (None, Some(_)) => true,
                (_, None) => false,
            };
            seen.still = if has_grown { 0 } else { seen.still + 1 };
            seen.status = found.or_else(|| seen.status.take());
        }
    }

    /// The wait is over.
    pub(super) fn forget(&mut self) {
        self.seen.fill(Seen::default());
    }

    /// The ranks that have not come to collective `sequence`, or do not run: their files have stood still for `silence`, one reading a `tick`.
    pub(super) fn culprits(&self, sequence: u64, tick: Duration, silence: Duration) -> Vec<Culprit> {
        let others = self.seen.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        let culprits = others.map(|(rank, seen)| {
            let life = match tick * seen.still {
                time if time >= silence => Life::Silent(time),
                _ if seen.still == 0 => Life::Runs,
                _ => Life::Unknown,
            };
            Culprit { rank, status: seen.status.clone(), life }
        });
        culprits.filter(|c| matches!(c.life, Life::Silent(_)) || c.status.as_ref().is_none_or(|s| s.sequence < sequence)).collect()
    }

    /// The lowest rank that waits in collective `sequence` and runs; this one does.
    pub(super) fn first_to_wait(&self, sequence: u64) -> usize {
        let waits = |seen: &Seen| seen.still < 3 && seen.status.as_ref().is_some_and(|s| s.is_waiting && s.sequence == sequence);
        (0..self.rank).find(|&rank| waits(&self.seen[rank])).unwrap_or(self.rank)
    }
}

/// `place` is where this rank waits.
pub(super) fn report(place: &str, waited: Duration, culprits: &[Culprit]) -> String {
    let seconds = |time: Duration| humantime::format_duration(Duration::from_secs(time.as_secs().max(1)));
    let one = |Culprit { rank, status, life }: &Culprit| {
        let Some(s) = status else { return format!("rank {rank} has not come, and has left no status") };
        let who = format!("rank {rank} (process {} on {})", s.pid, s.host);
        let what = match life {
            Life::Silent(time) => format!("does not run: no sign of it for {}", seconds(*time)),
            Life::Runs => "runs, but has not come".to_owned(),
            Life::Unknown => "has not come".to_owned(),
        };
        let side = if s.is_waiting { "in" } else { "after" };
        format!("{who} {what}; it was last seen {side} {} (call {}) of step {}, {}", s.collective, s.sequence, s.step, s.activity)
    };
    let mut text = format!("stalled: waits for {} in {place}", seconds(waited));
    match culprits {
        [] => text += ": all other ranks have come, so the network or the MPI library does not deliver",
        _ => {
            text += ": ";
            text += &culprits.iter().take(MAX_NAMED).map(one).collect::<Vec<_>>().join("; ");
            if culprits.len() > MAX_NAMED {
                text += &format!("; and {} more ranks", culprits.len() - MAX_NAMED);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_secs(2);
    const SILENCE: Duration = Duration::from_secs(10);

    fn status(rank: usize, beat: u64, sequence: u64, is_waiting: bool) -> Option<Status> {
        let (job, host) = ("1-2".to_owned(), format!("node{}", rank / 2));
        let (activity, collective) = ("training".to_owned(), "all_gather_bytes".to_owned());
        Some(Status { job, rank, pid: 100 + rank as u32, host, beat, step: 17, activity, collective, sequence, is_waiting })
    }

    /// What rank 0 of `at(beat).len()` says after six readings, waiting in collective 42.
    fn said(at: impl Fn(u64) -> Vec<Option<Status>>) -> String {
        let mut peers = Peers::new(0, at(0).len());
        (0..6).for_each(|beat| peers.see(at(beat)));
        report("all_to_all (call 42) of step 17, training", Duration::from_secs(600), &peers.culprits(42, TICK, SILENCE))
    }

    #[test]
    fn report_names_who_does_not_run_who_has_not_come_and_who_left_no_status() {
        insta::assert_snapshot!("stalled_stopped", said(|beat| vec![status(0, beat, 42, true), status(1, 7, 41, false)]));
        insta::assert_snapshot!("stalled_stopped_in_the_collective", said(|beat| vec![status(0, beat, 42, true), status(1, 7, 42, true)]));
        insta::assert_snapshot!(
            "stalled_late",
            said(|beat| vec![status(0, beat, 42, true), status(1, beat, 42, true), status(2, beat, 40, false)])
        );
        let started_late = |beat| vec![status(0, beat, 42, true), status(1, beat.min(3), 41, false)];
        insta::assert_snapshot!("stalled_and_not_yet_known", said(started_late));
        insta::assert_snapshot!("stalled_without_status", said(|beat| vec![status(0, beat, 42, true), None]));
        insta::assert_snapshot!("stalled_transport", said(|beat| vec![status(0, beat, 42, true), status(1, beat, 42, true)]));
        insta::assert_snapshot!("stalled_many", said(|beat| (0..9).map(|r| status(r, beat, 41 + u64::from(r == 0), r == 0)).collect()));
    }

    #[test]
    fn lowest_rank_that_waits_and_runs_speaks() {
        let mut peers = Peers::new(2, 4);
        assert_eq!(peers.first_to_wait(42), 2, "nothing is known of the others");
        peers.see(vec![status(0, 1, 41, false), status(1, 1, 42, true), status(2, 1, 42, true), None]);
        assert_eq!(peers.first_to_wait(42), 1);
        (0..3).for_each(|beat| peers.see(vec![status(0, beat, 41, false), status(1, 1, 42, true), status(2, beat, 42, true), None]));
        assert_eq!(peers.first_to_wait(42), 2, "rank 1 does not run");
        peers.forget();
        assert!(peers.culprits(42, TICK, SILENCE).iter().all(|culprit| culprit.status.is_none()));
    }
}
