//! The crash matrix: whatever happens to a disk while checkpoints are saved, or to a checkpoint afterwards, a resume says what it passes over,
//! goes on from the newest good checkpoint, and ends with the bits of a run that nothing happened to.
//!
//! A case ends with a resume by `latest`, which is really run once for each different content that the output folder may have when a run claims it:
//! what a resume does follows from that content. `scripts/crash_matrix.sh` prints the table.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex};

use glmddp::checkpoint::{self, Attempt, Call, Claim, Disk, Fault, FaultyDisk, RealDisk, newest_first, open};
use glmddp::config::Plan;
use glmddp::config::plan::Resume;
use glmddp::digest::sha256_hex;
use glmddp::dist::{ProcessGroup, local};
use glmddp::telemetry::Console;
use glmddp::train::requests::Limits;
use glmddp::train::run::{Summary, run_on};
use regex::Regex;

use crate::checkpoints::{STEPS, Setup, texts};
use crate::power_loss::{Model, Tree, Unsynced};

const WORLD_SIZE: usize = 2;
const OUTPUT: &str = "out";
const NONE: &str = "the start";
/// Bits that are flipped in each file of a checkpoint, besides its first and its last.
const NUM_FLIPS: usize = 6;

/// Cases that look the same.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    section: &'static str,
    fault: String,
    said: String,
    from: String,
}

/// How a resume went.
#[derive(Clone)]
struct Resumed {
    /// Lines about checkpoints that were passed over.
    said: String,
    /// The checkpoint that it went on from.
    from: Option<String>,
}

struct Matrix {
    setup: Setup,
    /// The adapter of a run that nothing happened to.
    expected: Vec<u8>,
    /// What each rank's disk was asked in that run.
    attempts: Vec<Vec<Attempt>>,
    /// Checkpoints as they were saved without faults: step and digest.
    good: BTreeSet<(u64, String)>,
    /// By the content of the output folder.
    resumed: BTreeMap<String, Resumed>,
    rows: BTreeMap<Row, usize>,
}

/// Bytes that several threads write.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Matrix {
    fn new() -> Self {
        let setup = Setup::new();
        let (good, attempts) = (BTreeSet::new(), Vec::new());
        let mut matrix = Self { setup, expected: Vec::new(), attempts, good, resumed: BTreeMap::new(), rows: BTreeMap::new() };
        let disks = [FaultyDisk::new(usize::MAX, Fault::Stop), FaultyDisk::new(usize::MAX, Fault::Stop)];
        assert_eq!(texts(&matrix.train(&disks)), ["fine", "fine"]);
        matrix.expected = matrix.setup.adapter(OUTPUT);
        matrix.attempts = disks.iter().map(FaultyDisk::attempts).collect();
        let both = matrix.tree_of_both();
        matrix.good = (1..=STEPS).map(|step| (step, digest(&both, &format!("{OUTPUT}/checkpoint-{step}/")))).collect();
        matrix
    }

    fn plan(&self, world_size: usize) -> Plan {
        let mut plan = self.setup.plan(OUTPUT, world_size);
        plan.run.save_total_limit = NonZeroUsize::new(1);
        plan
    }

    /// A run from the start.
    fn train(&self, disks: &[FaultyDisk; WORLD_SIZE]) -> Vec<anyhow::Result<Summary>> {
        let disks: Vec<&dyn Disk> = disks.iter().map(|disk| disk as &dyn Disk).collect();
        self.setup.run(&self.plan(WORLD_SIZE), &disks)
    }

    /// What the disk holds when the last checkpoint is durable and the one before is not yet deleted.
    fn tree_of_both(&self) -> Tree {
        let calls = in_one_order(&self.attempts);
        let is_deletion = |call: &Call| matches!(call, Call::Rename(_, to) if to.ends_with(".trash-checkpoint-1"));
        let deletion = calls.iter().position(is_deletion).expect("the first checkpoint is deleted");
        Model::after(self.setup.dir.path(), &Tree::new(), &calls[..deletion]).found(Unsynced::Kept)
    }

    fn put(&self, tree: &Tree) {
        self.clear();
        for (name, content) in tree {
            let path = self.setup.dir.path().join(name);
            match content {
                None => std::fs::create_dir(&path).unwrap(),
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            }
        }
    }

    fn clear(&self) {
        match std::fs::remove_dir_all(self.setup.output(OUTPUT)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{error}"),
            _ => {}
        }
    }

    /// Resumes from what is in the output folder, and counts the case. `durable` is the step of a checkpoint that must not be lost.
    fn settle(&mut self, section: &'static str, fault: &str, said: &str, durable: Option<u64>) -> Resumed {
        let out = self.setup.output(OUTPUT);
        checkpoint::claim(&RealDisk, &out, Claim::Resume).expect("the folder can be claimed");
        let mut tree = Tree::new();
        read_tree(&out, OUTPUT, &mut tree);
        let left: Vec<_> = tree.keys().filter(|name| name[OUTPUT.len() + 1..].starts_with('.')).collect();
        assert!(left.is_empty(), "{fault}: left over: {left:?}");
        let key = digest(&tree, "");
        if !self.resumed.contains_key(&key) {
            let resumed = self.resume(fault, &tree);
            self.resumed.insert(key.clone(), resumed);
        }
        let resumed = self.resumed[&key].clone();
        let step = resumed.from.as_ref().map(|name| name["checkpoint-".len()..].parse::<u64>().expect("a step"));
        assert!(step >= durable, "{fault}: checkpoint {durable:?} was durable, and the run goes on from {step:?}");
        let said = if said.is_empty() { &resumed.said } else { said };
        let from = resumed.from.clone().unwrap_or(NONE.to_owned());
        *self.rows.entry(Row { section, fault: fault.to_owned(), said: self.masked(said), from }).or_default() += 1;
        resumed
    }

    /// Really resumes, and holds what comes out against the undisturbed run.
    fn resume(&self, fault: &str, tree: &Tree) -> Resumed {
        let out = self.setup.output(OUTPUT);
        let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
        let candidates: Vec<String> = newest_first(&RealDisk, &out).unwrap().iter().map(|path| name(path)).collect();
        let is_whole = |name: &String| open(&RealDisk, &out.join(name)).is_ok_and(|checkpoint| checkpoint.verify(&RealDisk).is_ok());
        let whole = candidates.iter().position(is_whole);
        // On as many ranks as saved it, or on another number.
        let world_size = 1 + self.resumed.len() % WORLD_SIZE;
        let mut plan = self.plan(world_size);
        let Some(whole) = whole else {
            plan.run.resume = Resume::Latest;
            let (results, _) = self.run_heard(&plan, world_size);
            let said = texts(&results).remove(0);
            assert!(said.contains(if candidates.is_empty() { "has no complete checkpoint" } else { "is whole" }), "{fault}: {said}");
            (plan.run.resume, plan.run.overwrite_output_dir) = (Resume::No, true);
            assert!(self.run_heard(&plan, world_size).0.iter().all(Result::is_ok), "{fault}");
            self.check_end(fault);
            return Resumed { said, from: None };
        };
        let from = candidates[whole].clone();
        let step = open(&RealDisk, &out.join(&from)).expect("it is whole").manifest.header.step;
        // One that is named after another step is a copy; the others are those of a run without faults, byte for byte.
        if from == format!("checkpoint-{step}") && !fault.starts_with("unknown ") {
            self.check_checkpoint(fault, tree, &from);
        }
        plan.run.resume = Resume::Latest;
        let (results, heard) = self.run_heard(&plan, world_size);
        assert!(results.iter().all(Result::is_ok), "{fault}, {candidates:?}: {results:?}");
        let passed: Vec<&str> = heard.lines().filter(|line| line.contains(" is passed over: ")).collect();
        assert_eq!(passed.len(), whole, "{fault}: every damaged checkpoint is named: {heard}");
        for (line, name) in passed.iter().zip(&candidates) {
            assert!(line.contains(&format!("{name} is passed over: ")), "{fault}: {line}");
        }
        self.check_end(fault);
        Resumed { said: passed.join("\n"), from: Some(from) }
    }

    fn check_checkpoint(&self, fault: &str, tree: &Tree, name: &str) {
        let step: u64 = name["checkpoint-".len()..].parse().unwrap();
        let found = (step, digest(tree, &format!("{OUTPUT}/{name}/")));
        assert!(self.good.contains(&found), "{fault}: {name} is another than it was");
    }

    /// The output folder is that of a run that is done.
    fn check_end(&self, fault: &str) {
        assert_eq!(self.setup.adapter(OUTPUT), self.expected, "{fault}: other bits");
        assert_eq!(self.setup.newest_whole(OUTPUT), Some(STEPS), "{fault}: the last checkpoint is missing");
    }

    /// A run on good disks, and what its first rank says.
    fn run_heard(&self, plan: &Plan, world_size: usize) -> (Vec<anyhow::Result<Summary>>, String) {
        let lines = Lines::default();
        let results = local::run(world_size, |group| {
            let run = || Ok(run_on(&self.setup.base, plan, group, &RealDisk, &Console::without_bar(), &Limits::default())?.summary);
            if group.rank() > 0 {
                return run();
            }
            let sink = lines.clone();
            let subscriber = tracing_subscriber::fmt().without_time().with_ansi(false).with_writer(move || sink.clone()).finish();
            tracing::subscriber::with_default(subscriber, run)
        });
        let heard = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        (results, heard)
    }

    /// The first line, without what differs from run to run or from case to case.
    fn masked(&self, said: &str) -> String {
        let text = said.lines().next().unwrap_or_default().replace(&format!("{}/", self.setup.dir.path().display()), "");
        let text = text.split_once("is passed over: ").map_or(text.as_str(), |(_, reason)| reason);
        let rules = [
            (r"sha256 \S{64}", "sha256 …"),
            ("[0-9a-f]{64}", "…"),
            (r"\b(expected|found|byte|bytes of|needs|and|though|line|column|elements|than|frame of) \d+", "$1 N"),
            (r"N\.\.\d+", "N..N"),
        ];
        rules.iter().fold(text.to_owned(), |text, (pattern, by)| Regex::new(pattern).unwrap().replace_all(&text, *by).into_owned())
    }

    fn table(&self) -> String {
        let mut table = String::new();
        let mut section = "";
        for (Row { section: of, fault, said, from }, num) in &self.rows {
            if section != *of {
                section = of;
                table.push_str(&format!(
                    "\n## {section}\n| fault | cases | what glmddp says | goes on from |\n| --- | ---: | --- | --- |\n"
                ));
            }
            let said = if said.is_empty() { "nothing: the newest is whole".to_owned() } else { said.replace('|', "\\|") };
            table.push_str(&format!("| {fault} | {num} | {said} | {from} |\n"));
        }
        table
    }
}

/// The calls that both ranks made, in an order that they may have had: the second rank writes its shard as soon as there is a folder for it.
fn in_one_order(attempts: &[Vec<Attempt>]) -> Vec<Call> {
    let done = |rank: usize| attempts[rank].iter().filter(|attempt| attempt.is_done).map(|attempt| attempt.call.clone());
    let mut calls = Vec::new();
    for call in done(0) {
        let made = if let Call::MakeFolder(path) = &call { Some(path.clone()) } else { None };
        calls.push(call);
        calls.extend(done(1).filter(|other| made.as_deref().is_some_and(|made| path_of(other).parent() == Some(made))));
    }
    assert_eq!(calls.len(), done(0).count() + done(1).count(), "every call has its place");
    calls
}

fn path_of(call: &Call) -> &Path {
    match call {
        Call::MakeFolder(path) | Call::Create(path) | Call::Write(path, _) | Call::Sync(path) | Call::SyncFolder(path) => path,
        Call::Rename(path, _) | Call::RemoveFile(path) | Call::RemoveFolder(path) => path,
    }
}

fn kind_of(call: &Call) -> &'static str {
    match call {
        Call::MakeFolder(_) => "mkdir",
        Call::Create(_) => "create",
        Call::Write(..) => "write",
        Call::Sync(_) => "fsync",
        Call::Rename(..) => "rename",
        Call::SyncFolder(_) => "fsync of a folder",
        Call::RemoveFile(_) => "unlink",
        Call::RemoveFolder(_) => "rmdir",
    }
}

/// The step of the newest checkpoint that got its name, and the name was synced.
fn durable_step<'c>(calls: impl IntoIterator<Item = &'c Call>) -> Option<u64> {
    let (mut named, mut durable) = (None, None);
    for call in calls {
        match call {
            Call::Rename(_, to) => {
                let name = to.file_name().unwrap().to_string_lossy().into_owned();
                named = name.strip_prefix("checkpoint-").and_then(|step| step.parse().ok()).or(named);
            }
            Call::SyncFolder(path) if path.ends_with(OUTPUT) => durable = named.max(durable),
            _ => {}
        }
    }
    durable
}

/// All below a folder but what a run writes beside its checkpoints: the log, with its times.
fn read_tree(folder: &Path, name: &str, tree: &mut Tree) {
    for path in RealDisk.list(folder).unwrap() {
        let below = format!("{name}/{}", path.file_name().unwrap().to_string_lossy());
        if RealDisk.is_folder(&path) {
            tree.insert(below.clone(), None);
            read_tree(&path, &below, tree);
        } else if !path.ends_with("trainer_log.jsonl") {
            tree.insert(below, Some(std::fs::read(&path).unwrap()));
        }
    }
}

/// Of all whose name starts with `prefix`.
fn digest(tree: &Tree, prefix: &str) -> String {
    let entries = tree.iter().filter(|(name, _)| name.starts_with(prefix));
    let lines = entries.map(|(name, content)| format!("{name} {}\n", content.as_deref().map_or("folder".to_owned(), sha256_hex)));
    sha256_hex(lines.collect::<String>().as_bytes())
}

fn every_call_of_every_rank(matrix: &mut Matrix) {
    let faults = [
        (Fault::Stop, "stopped at a"),
        (Fault::TornWrite, "stopped in the middle of a"),
        (Fault::Fail(libc::ENOSPC), "ENOSPC in a"),
        (Fault::Fail(libc::EIO), "EIO in a"),
        (Fault::ReadOnly, "EROFS from then on, at a"),
    ];
    for (fault, text) in faults {
        for rank in 0..WORLD_SIZE {
            for (at, Attempt { call, .. }) in matrix.attempts[rank].clone().into_iter().enumerate() {
                if fault == Fault::TornWrite && !matches!(call, Call::Write(..)) {
                    continue;
                }
                matrix.clear();
                let case = format!("{text} {}", kind_of(&call));
                let disks = [0, 1].map(|of| FaultyDisk::new(if of == rank { at } else { usize::MAX }, fault));
                let results = matrix.train(&disks);
                let (said, which) = (texts(&results), format!("{case}, call {at} of rank {rank}"));
                assert!(disks[rank].num_calls() > at, "{which}: it was not made");
                assert_eq!(said[0], said[1], "{which}: all ranks say the same");
                if said[0] == "fine" {
                    // The work is done; what failed was taking something away, which the next start does.
                    assert_eq!(matrix.setup.adapter(OUTPUT), matrix.expected, "{which}");
                    assert_eq!(matrix.setup.newest_whole(OUTPUT), Some(STEPS), "{which}");
                } else {
                    assert!(said[0].starts_with(&format!("rank {rank} of {WORLD_SIZE}: ")), "{which}: {said:?}");
                }
                let durable = durable_step(disks[0].attempts().iter().filter(|a| a.is_done).map(|attempt| &attempt.call));
                let name = Regex::new(&format!(r"{}/{OUTPUT}(/\S*[^:\s])?", matrix.setup.dir.path().display())).unwrap();
                let said = name.replace(&said[0], "FILE").into_owned();
                matrix.settle(if rank == 0 { "Rank 0 of 2" } else { "Rank 1 of 2" }, &case, &said, durable);
            }
        }
    }
}

fn power_loss_after_every_call(matrix: &mut Matrix) {
    let calls = in_one_order(&matrix.attempts);
    lose_power(matrix, "Lost power, after every call of a run", &Tree::new(), &calls, None);
    // A resume that replaces a damaged checkpoint by a new one of the same name.
    let mut before = matrix.tree_of_both();
    let shard = format!("{OUTPUT}/checkpoint-2/state-00001-of-00002.safetensors.zst");
    before.get_mut(&shard).unwrap().as_mut().unwrap().truncate(100);
    matrix.put(&before);
    let disks = [FaultyDisk::new(usize::MAX, Fault::Stop), FaultyDisk::new(usize::MAX, Fault::Stop)];
    let mut plan = matrix.plan(WORLD_SIZE);
    plan.run.resume = Resume::Latest;
    assert_eq!(texts(&matrix.setup.run(&plan, &[&disks[0], &disks[1]])), ["fine", "fine"]);
    let calls = in_one_order(&disks.each_ref().map(FaultyDisk::attempts));
    assert!(calls.iter().any(|call| matches!(call, Call::Rename(_, to) if to.ends_with(".replaced-checkpoint-2"))));
    // Its manifest has the plan of the resume.
    let mut after = Tree::new();
    read_tree(&matrix.setup.output(OUTPUT), OUTPUT, &mut after);
    matrix.check_end("the resume that replaces");
    matrix.good.insert((2, digest(&after, &format!("{OUTPUT}/checkpoint-2/"))));
    lose_power(matrix, "Lost power, after every call of a resume that replaces a damaged checkpoint", &before, &calls, Some(1));
}

/// After each of `calls`, on a disk that held `before`, with a checkpoint that must not be lost.
fn lose_power(matrix: &mut Matrix, section: &'static str, before: &Tree, calls: &[Call], durable_before: Option<u64>) {
    for num_calls in 0..=calls.len() {
        let model = Model::after(matrix.setup.dir.path(), before, &calls[..num_calls]);
        let durable = durable_step(&calls[..num_calls]).max(durable_before);
        let seed = num_calls as u64;
        for (unsynced, case) in [
            (Unsynced::Kept, "all processes are killed, and no power is lost"),
            (Unsynced::Lost, "what was not synced is lost"),
            (Unsynced::Empty, "names are kept, content that was not synced is lost"),
            (Unsynced::Cut(seed), "names are kept, content that was not synced is cut"),
            (Unsynced::Any(seed), "each change that was not synced is kept or lost"),
            (Unsynced::Any(seed + 1000), "each change that was not synced is kept or lost"),
        ] {
            matrix.put(&model.found(unsynced));
            if num_calls == calls.len() {
                assert_eq!(matrix.setup.adapter(OUTPUT), matrix.expected, "{case}: a run that ended has its adapter");
            }
            matrix.settle(section, case, "", durable);
        }
    }
}

fn damage_of_every_file(matrix: &mut Matrix) {
    const SECTION: &str = "The newest checkpoint, afterwards";
    let both = matrix.tree_of_both();
    let (old, new) = (format!("{OUTPUT}/checkpoint-1/"), format!("{OUTPUT}/checkpoint-2/"));
    let damaged = |matrix: &mut Matrix, case: &str, from: &str, change: &dyn Fn(&mut Tree)| {
        let mut tree = both.clone();
        change(&mut tree);
        assert!(tree != both, "{case}");
        matrix.put(&tree);
        let resumed = matrix.settle(SECTION, case, "", None);
        assert_eq!(resumed.from.as_deref().unwrap_or(NONE), from, "{case}: {}", resumed.said);
    };
    let files: Vec<(String, Vec<u8>)> = both.iter().filter_map(|(name, content)| Some((name.clone(), content.clone()?))).collect();
    let mut seed = 5_u64;
    for (path, bytes) in files.iter().filter(|(name, _)| name.starts_with(&new)) {
        let name = &path[new.len()..];
        let from = "checkpoint-1";
        for flip in 0..NUM_FLIPS + 2 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = match flip {
                0 => 0,
                1 => bytes.len() * 8 - 1,
                _ => (seed >> 20) as usize % (bytes.len() * 8),
            };
            damaged(matrix, &format!("bit flip of {name}"), from, &|tree| {
                tree.get_mut(path).unwrap().as_mut().unwrap()[at / 8] ^= 1 << (at % 8)
            });
        }
        for len in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            damaged(matrix, &format!("cut of {name}"), from, &|tree| tree.get_mut(path).unwrap().as_mut().unwrap().truncate(len));
        }
        damaged(matrix, &format!("{name} is missing"), from, &|tree| drop(tree.remove(path)));
        let before = &both[&path.replace(&new, &old)];
        if before.as_ref() != Some(bytes) {
            damaged(matrix, &format!("{name} of another step"), from, &|tree| drop(tree.insert(path.clone(), before.clone())));
        }
        damaged(matrix, &format!("bit flip of {name}, of both checkpoints"), NONE, &|tree| {
            for path in [path.clone(), path.replace(&new, &old)] {
                tree.get_mut(&path).unwrap().as_mut().unwrap()[0] ^= 1;
            }
        });
        damaged(matrix, &format!("bit flip of {name}, of the checkpoint before"), "checkpoint-2", &|tree| {
            tree.get_mut(&path.replace(&new, &old)).unwrap().as_mut().unwrap()[0] ^= 1;
        });
    }
    let shard = |step: &str, rank: usize| format!("{step}state-{rank:05}-of-{WORLD_SIZE:05}.safetensors.zst");
    let copy = |tree: &mut Tree, from: &str, to: &str| drop(tree.insert(to.to_owned(), both[from].clone()));
    damaged(matrix, "two ranks' shards are swapped", "checkpoint-1", &|tree| {
        copy(tree, &shard(&new, 0), &shard(&new, 1));
        copy(tree, &shard(&new, 1), &shard(&new, 0));
    });
    damaged(matrix, "one rank's shard in another's place", "checkpoint-1", &|tree| copy(tree, &shard(&new, 0), &shard(&new, 1)));
    damaged(matrix, "all shards of another step", "checkpoint-1", &|tree| {
        (0..WORLD_SIZE).for_each(|rank| copy(tree, &shard(&old, rank), &shard(&new, rank)));
    });
    damaged(matrix, "manifest and SHA256SUMS of another step", "checkpoint-1", &|tree| {
        ["manifest.json", "SHA256SUMS"].iter().for_each(|name| copy(tree, &format!("{old}{name}"), &format!("{new}{name}")));
    });
    damaged(matrix, "another step under this name", "checkpoint-2", &|tree| {
        files.iter().filter(|(name, _)| name.starts_with(&old)).for_each(|(name, _)| copy(tree, name, &name.replace(&old, &new)));
    });
    damaged(matrix, "all files are missing", "checkpoint-1", &|tree| tree.retain(|name, _| !name.starts_with(&new)));
    damaged(matrix, "a file under its name", "checkpoint-1", &|tree| {
        tree.retain(|name, _| !name.starts_with(&new));
        tree.insert(new.trim_end_matches('/').to_owned(), Some(b"text".to_vec()));
    });
    damaged(matrix, "unknown file in it", "checkpoint-2", &|tree| drop(tree.insert(format!("{new}notes.txt"), Some(b"mine".to_vec()))));
    damaged(matrix, "unknown folder in it", "checkpoint-2", &|tree| drop(tree.insert(format!("{new}notes"), None)));
    damaged(matrix, "unknown file beside it", "checkpoint-2", &|tree| {
        drop(tree.insert(format!("{OUTPUT}/notes.txt"), Some(b"mine".to_vec())))
    });
}

#[test]
fn crash_matrix_has_no_silent_loss() {
    let mut matrix = Matrix::new();
    let started = std::time::Instant::now();
    for part in [every_call_of_every_rank, power_loss_after_every_call, damage_of_every_file] {
        part(&mut matrix);
        let num_cases: usize = matrix.rows.values().sum();
        println!("{num_cases} cases, {} resumes, {:.1} s", matrix.resumed.len(), started.elapsed().as_secs_f64());
    }
    let num_cases: usize = matrix.rows.values().sum();
    if let Some(path) = std::env::var_os("GLMDDP_CRASH_MATRIX") {
        let num_calls: usize = matrix.attempts.iter().map(Vec::len).sum();
        let summary = format!(
            "{num_cases} cases, {num_calls} calls that change the disk, {} different resumes, 0 silent losses.\n",
            matrix.resumed.len()
        );
        std::fs::write(path, summary + &matrix.table()).expect("the table is written");
    }
    assert!(num_cases >= 300, "{num_cases}");
}
