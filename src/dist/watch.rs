//! A group whose collectives are watched: a wait that lasts too long ends the job with the name of the rank that does not come.
//!
//! A rank that waits knows only of itself. So each rank keeps a small file with what it does up to date, on a thread of its own, and who waits
//! too long reads the others': a rank that has called fewer collectives has not come, and one whose file stands still does not run. Works
//! wherever the ranks share a folder, and needs nothing of the transport, which may be what is stuck.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use candle_core::Tensor;

use super::stall::{Peers, Status, report};
use super::{Aborter, Collectives, DistError, Duplicate, ProcessGroup};

/// The longest time between two looks; a status file is written no more often.
const LONGEST_TICK: Duration = Duration::from_secs(2);
const SHORTEST_TICK: Duration = Duration::from_millis(50);
/// Looks within the time that a stall may last.
const TICKS: u32 = 12;

/// Another group, watched. Without a time limit, without other ranks, or where ranks are threads, it only passes calls on.
pub struct Watched<'a> {
    inner: &'a dyn Collectives,
    board: Option<Arc<Board>>,
    threads: Vec<JoinHandle<()>>,
}

/// What this rank does, for its threads.
struct Board {
    now: Mutex<Now>,
    /// How long the wait in progress has lasted.
    waited: Mutex<Waited>,
    peers: Mutex<Peers>,
    ended: AtomicBool,
}

#[derive(Clone, Copy)]
struct Now {
    step: u64,
    activity: &'static str,
    /// The collective that this rank is in, or was in last.
    collective: &'static str,
    /// Collectives called so far: the same number is the same call on all ranks.
    sequence: u64,
    is_waiting: bool,
}

#[derive(Clone, Copy, Default)]
struct Waited {
    sequence: u64,
    time: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Watched<'a> {
    /// Watches `inner` from here on: a collective that lasts longer than `limit` ends the job. The ranks' files lie in `dir`, which the first
    /// rank empties. Collective.
    ///
    /// # Errors
    /// When the ranks cannot meet.
    pub fn start(inner: &'a dyn Collectives, dir: &Path, limit: Option<Duration>) -> Result<Self, DistError> {
        let group = inner.group();
        let (rank, world_size) = (group.rank(), group.world_size());
        let (Some(limit), Some(aborter), true) = (limit, group.aborter(), world_size > 1) else {
            return Ok(Self { inner, board: None, threads: Vec::new() });
        };
        if rank == 0 {
            let _ = std::fs::remove_dir_all(dir);
            if let Err(error) = std::fs::create_dir_all(dir) {
                tracing::warn!("cannot create {}: {error}; a rank that stalls will be noticed, but not named", dir.display());
            }
        }
        // Files of another job that writes here are told apart by it.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let job = format!("{}-{}", std::process::id(), since_epoch.as_nanos());
        let job = String::from_utf8_lossy(&group.all_gather_bytes(job.as_bytes())?[0]).into_owned();
        let board = Arc::new(Board {
            now: Mutex::new(Now { step: 0, activity: "start", collective: "none", sequence: 0, is_waiting: false }),
            waited: Mutex::default(),
            peers: Mutex::new(Peers::new(rank, world_size)),
            ended: AtomicBool::new(false),
        });
        let watch = Watch { rank, job, dir: dir.to_owned(), limit, tick: (limit / TICKS).clamp(SHORTEST_TICK, LONGEST_TICK) };
        let (publisher, watchdog) = (watch.clone(), watch);
        let (for_publisher, for_watchdog) = (Arc::clone(&board), Arc::clone(&board));
        let threads = vec![
            std::thread::spawn(move || publisher.publish(&for_publisher)),
            std::thread::spawn(move || watchdog.guard(&for_watchdog, aborter)),
        ];
        Ok(Self { inner, board: Some(board), threads })
    }

    fn watch<T>(&self, collective: &'static str, call: impl FnOnce(&dyn Collectives) -> T) -> T {
        let Some(board) = &self.board else { return call(self.inner) };
        {
            let mut now = lock(&board.now);
            *now = Now { collective, sequence: now.sequence + 1, is_waiting: true, ..*now };
        }
        let result = call(self.inner);
        lock(&board.now).is_waiting = false;
        result
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let Some(board) = &self.board else { return };
        board.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread that panicked has ended the job.
            let _ = thread.join();
        }
    }
}

/// What the threads of a rank know.
#[derive(Clone)]
struct Watch {
    rank: usize,
    job: String,
    dir: PathBuf,
    limit: Duration,
    tick: Duration,
}

impl Watch {
    fn file(&self, rank: usize) -> PathBuf {
        self.dir.join(format!("rank-{rank}.json"))
    }

    /// Over what is there, in one call and with blanks up to the length that the file has: who reads it finds the whole text, even when this
    /// process is stopped in between. Not renamed: on NFS, opening a file asks the server, and looking up a name may not.
    fn write_in_place(&self, mut text: Vec<u8>, length: &mut usize) -> std::io::Result<()> {
        *length = text.len().max(*length);
        text.resize(*length, b' ');
        std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(self.file(self.rank))?.write_all(&text)
    }

    /// Writes this rank's file, and reads the others' when there is a wait. Alone on its thread: a file system may hang.
    fn publish(&self, board: &Board) {
        let (pid, uname) = (std::process::id(), rustix::system::uname());
        let host = uname.nodename().to_string_lossy().into_owned();
        let (mut has_warned, mut length) = (false, 0);
        for beat in 0.. {
            let now = *lock(&board.now);
            let status = Status {
                job: self.job.clone(),
                rank: self.rank,
                pid,
                host: host.clone(),
                beat,
                step: now.step,
                activity: now.activity.to_owned(),
                collective: now.collective.to_owned(),
                sequence: now.sequence,
                is_waiting: now.is_waiting,
            };
            let written = serde_json::to_vec(&status).map_err(std::io::Error::from).and_then(|text| self.write_in_place(text, &mut length));
            if let (Err(error), false) = (&written, has_warned) {
                tracing::warn!("cannot write {}: {error}; a stall of this rank will not be explained", self.file(self.rank).display());
            }
            has_warned = written.is_err();
            if lock(&board.waited).time > self.limit / 4 {
                let read = |rank| serde_json::from_slice::<Status>(&std::fs::read(self.file(rank)).ok()?).ok();
                let of_this_job = |status: &Status| status.job == self.job;
                let found: Vec<_> = (0..lock(&board.peers).world_size()).map(|rank| read(rank).filter(of_this_job)).collect();
                lock(&board.peers).see(found);
            } else {
                lock(&board.peers).forget();
            }
            if board.ended.load(Ordering::Relaxed) {
                break;
            }
            std::thread::park_timeout(self.tick);
        }
        let _ = std::fs::remove_file(self.file(self.rank));
        // The last to leave succeeds.
        let _ = std::fs::remove_dir(&self.dir);
    }

    /// Measures waits, warns, and ends the job. Touches no file.
    fn guard(&self, board: &Board, aborter: Aborter) {
        let (mut looked, mut has_warned) = (Instant::now(), false);
        while !board.ended.load(Ordering::Relaxed) {
            std::thread::park_timeout(self.tick);
            // Where the whole job was suspended, no rank is to blame: only time in which this thread ran counts.
            let passed = looked.elapsed().min(2 * self.tick);
            looked = Instant::now();
            let now = *lock(&board.now);
            let before = *lock(&board.waited);
            let is_same = now.is_waiting && before.sequence == now.sequence;
            let waited = Waited { sequence: now.sequence, time: if is_same { before.time + passed } else { Duration::ZERO } };
            *lock(&board.waited) = waited;
            has_warned &= is_same;
            let silence = (self.limit / 6).max(5 * self.tick);
            let described = |peers: &Peers| {
                let place = format!("{} (call {}) of step {}, {}", now.collective, now.sequence, now.step, now.activity);
                report(&place, waited.time, &peers.culprits(now.sequence, self.tick, silence))
            };
            if waited.time > self.limit {
                let peers = lock(&board.peers);
                // The first of those who wait speaks; the others only where it does not.
                let patience = if peers.first_to_wait(now.sequence) == self.rank { Duration::ZERO } else { 8 * self.tick };
                if waited.time > self.limit + patience {
                    aborter.abort(&format!("{}; `stall_timeout` is {}", described(&peers), humantime::format_duration(self.limit)));
                }
            } else if waited.time > self.limit / 2 && !std::mem::replace(&mut has_warned, true) {
                tracing::warn!("{}", described(&lock(&board.peers)));
            }
        }
    }
}

impl ProcessGroup for Watched<'_> {
    fn rank(&self) -> usize {
        self.inner.group().rank()
    }

    fn world_size(&self) -> usize {
        self.inner.group().world_size()
    }

    fn local_rank(&self) -> usize {
        self.inner.group().local_rank()
    }

    fn local_size(&self) -> usize {
        self.inner.group().local_size()
    }

    fn machine(&self) -> usize {
        self.inner.group().machine()
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, DistError> {
        self.watch("all_gather_bytes", |inner| inner.group().all_gather_bytes(mine))
    }

    fn barrier(&self) -> Result<(), DistError> {
        self.watch("barrier", |inner| inner.group().barrier())
    }

    fn wait(&self, collective: &'static str, wait: &mut dyn FnMut()) {
        self.watch(collective, |_| wait());
    }

    fn now_at(&self, step: u64, activity: &'static str) {
        if let Some(board) = &self.board {
            let mut now = lock(&board.now);
            *now = Now { step, activity, ..*now };
        }
    }

    fn abort(&self, message: &str) -> ! {
        self.inner.group().abort(message)
    }

    fn aborter(&self) -> Option<Aborter> {
        self.inner.group().aborter()
    }
}

impl Collectives for Watched<'_> {
    fn group(&self) -> &dyn ProcessGroup {
        self
    }

    fn all_gather(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        self.watch("all_gather", |inner| inner.all_gather(mine))
    }

    fn all_to_all_v(&self, parts: &Tensor, send: &[usize], receive: &[usize]) -> Result<Tensor, DistError> {
        self.watch("all_to_all_v", |inner| inner.all_to_all_v(parts, send, receive))
    }

    fn all_reduce(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        self.watch("all_reduce", |inner| inner.all_reduce(mine))
    }

    fn broadcast(&self, mine: &Tensor, root: usize) -> Result<Tensor, DistError> {
        self.watch("broadcast", |inner| inner.broadcast(mine, root))
    }

    /// The other set is not watched: what is done with it ends in a [`ProcessGroup::wait`] of this group.
    fn duplicate(&self) -> Duplicate {
        self.inner.duplicate()
    }

    /// What is watched stays for its owner to take leave of.
    fn finish(self: Box<Self>) {}
}
