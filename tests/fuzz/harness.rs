//! Runs a reader on hostile folders and holds it to what is promised of each.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::counting::peak_of;
use crate::mutate::{Dice, Folder, mutate};
use crate::watch::Watch;

/// Of the inputs that the tests run.
const SEED: u64 = 20_261_125;
/// The program's names for a longer run: see `scripts/fuzz.sh`.
const SECONDS: &str = "GLMDDP_FUZZ_SECONDS";
const OTHER_SEED: &str = "GLMDDP_FUZZ_SEED";
/// So many failures are told before a target ends.
const MAX_FAILURES: usize = 8;

/// Memory that a reader may have live for a folder of some size.
#[derive(Clone, Copy)]
pub struct Bound {
    /// Bytes, whatever the input.
    pub constant: usize,
    /// Bytes for each byte of the folder.
    pub factor: usize,
}

/// A reader of the program, and what to feed it.
pub struct Target<'a> {
    pub name: &'static str,
    /// Executions in the tests.
    pub executions: u64,
    /// The first is a valid one, and half of the inputs are made from it.
    pub seeds: Vec<Folder>,
    /// Tokens of the format.
    pub words: Vec<&'static [u8]>,
    /// Makes the folder that is written from the parts that are mutated: lengths and checksums that hold, so that what is behind them is met.
    pub assemble: fn(Folder, &mut Dice) -> Folder,
    pub bound: Bound,
    /// Reads the folder; the text of its error, as the user gets it.
    #[allow(clippy::type_complexity, reason = "a name for it would say no more")]
    pub read: Box<dyn Fn(&Path) -> Result<(), String> + 'a>,
}

pub fn as_it_is(folder: Folder, _: &mut Dice) -> Folder {
    folder
}

/// One at a time: the allocator counts for the whole process.
static TURN: Mutex<()> = Mutex::new(());

/// What a run saw.
#[derive(Default)]
struct Seen {
    executions: u64,
    accepted: u64,
    /// Greatest share of its bound that an input used, in percent, and that input's bytes live and size.
    memory: (f64, usize, usize),
    /// The longest execution, and the number of its input.
    slowest: (Duration, u64),
    failures: Vec<String>,
}

/// The folders of one target: `in` is read, `outside` must never be opened.
pub struct Stage {
    root: PathBuf,
    watch: Watch,
}

impl Stage {
    pub fn new(name: &str) -> Self {
        // A longer run has folders of its own, so that the tests can run beside it.
        let top = if std::env::var_os(SECONDS).is_some() { "fuzz-longer" } else { "fuzz" };
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(top).join(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::create_dir_all(root.join("outside")).unwrap();
        let watch = Watch::new(&root);
        Self { root, watch }
    }

    /// Puts `folder` in the place of what was in `in`.
    fn set(&mut self, folder: &Folder) {
        let dir = self.root.join("in");
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() { std::fs::remove_dir_all(path).unwrap() } else { std::fs::remove_file(path).unwrap() }
        }
        for (name, bytes) in folder {
            let path = dir.join(name);
            if name.contains('/') {
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            }
            std::fs::write(path, bytes).unwrap();
        }
    }

    /// Reads `folder` by `target`: the reader's text, or what promise was broken.
    fn read(&mut self, target: &Target, folder: &Folder, seen: &mut Seen) -> Result<Result<(), String>, String> {
        self.set(folder);
        let dir = self.root.join("in");
        self.watch.events();
        let started = Instant::now();
        let (result, peak) = peak_of(|| catch_unwind(AssertUnwindSafe(|| (target.read)(&dir))));
        seen.slowest = seen.slowest.max((started.elapsed(), seen.executions));
        seen.executions += 1;
        let size: usize = folder.values().map(Vec::len).sum();
        let allowed = target.bound.constant + target.bound.factor * size;
        let share = 100.0 * peak as f64 / allowed as f64;
        if share > seen.memory.0 {
            seen.memory = (share, peak, size);
        }
        let Ok(read) = result else { return Err("it panics".to_owned()) };
        if peak > allowed {
            return Err(format!("{peak} bytes were live, and {size} bytes of input justify {allowed}"));
        }
        if let Some(event) = self.watch.events().first() {
            return Err(format!("it touched what is outside of its folder: {event}"));
        }
        match &read {
            Ok(()) => seen.accepted += 1,
            Err(text) if !text.contains(&*dir.to_string_lossy()) => return Err(format!("its error does not name the file: {text}")),
            Err(_) => {}
        }
        Ok(read)
    }
}

/// Reads one folder with all promises asserted; the reader's answer.
pub fn read_one(target: &Target, folder: &Folder) -> Result<(), String> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let test = std::thread::current().name().unwrap_or_default().replace("::", "-");
    let mut stage = Stage::new(&format!("{}-{test}", target.name));
    stage.read(target, folder, &mut Seen::default()).unwrap()
}

/// Runs `target`: its seeds as they are, then mutations of them; as many as the tests do, or for as long as the environment says.
pub fn fuzz(target: &Target) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let (seconds, seed) = (number(SECONDS), number(OTHER_SEED).unwrap_or(SEED));
    let mut stage = Stage::new(target.name);
    let mut seen = Seen::default();
    let started = Instant::now();
    for i in 0.. {
        let done = match seconds {
            Some(seconds) => started.elapsed() >= Duration::from_secs(seconds),
            None => i >= target.executions,
        };
        if done || seen.failures.len() >= MAX_FAILURES {
            break;
        }
        let folder = input(target, seed, i);
        if let Err(broken) = stage.read(target, &folder, &mut seen) {
            let kept = stage.root.join(format!("found-{i}"));
            for (name, bytes) in &folder {
                let path = kept.join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, bytes).unwrap();
            }
            seen.failures.push(format!("{}: {broken}", kept.display()));
        }
    }
    report(target, &seen, started.elapsed());
}

fn report(target: &Target, seen: &Seen, took: Duration) {
    let (share, peak, size) = seen.memory;
    let mut line = format!("{:<14}", target.name);
    write!(line, " {:>9} executions {:>8.1} s", seen.executions, took.as_secs_f64()).unwrap();
    write!(line, " | {} accepted, {} refused", seen.accepted, seen.executions - seen.accepted).unwrap();
    write!(line, " | memory {share:.0} % of its bound ({peak} bytes live for {size})").unwrap();
    write!(line, " | slowest {:.0} ms (input {})", seen.slowest.0.as_secs_f64() * 1e3, seen.slowest.1).unwrap();
    eprintln!("\n{line}");
    assert!(seen.failures.is_empty(), "{} (seed and number give the input again):\n{}", target.name, seen.failures.join("\n"));
    assert!(0 < seen.accepted && seen.accepted < seen.executions, "the inputs of {} are all alike", target.name);
}

/// Input `i`: the seeds first.
fn input(target: &Target, seed: u64, i: u64) -> Folder {
    let mut dice = Dice::new(seed, target.name, i);
    let num_seeds = target.seeds.len();
    if let Some(seed) = target.seeds.get(i as usize) {
        return (target.assemble)(seed.clone(), &mut dice);
    }
    let mut folder = target.seeds[if dice.one_in(2) { 0 } else { dice.below(num_seeds) }].clone();
    let other = &target.seeds[dice.below(num_seeds)];
    mutate(&mut folder, &mut dice, &target.words, other);
    (target.assemble)(folder, &mut dice)
}
