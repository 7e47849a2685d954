//! Checkpoints of several ranks: saved beside the steps, and passed over where one rank's disk fails. `crash_matrix` has all faults of disks.

use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use glmddp::checkpoint::{Attempt, Call, Disk, DiskFile, Fault, FaultyDisk, RealDisk, newest_first, open};
use glmddp::config::plan::{Duration, OnSaveError, SchedulerType};
use glmddp::config::{Plan, RunConfig, Sources};
use glmddp::dist::{Solo, local};
use glmddp::telemetry::Console;
use glmddp::train::base::Base;
use glmddp::train::requests::Limits;
use glmddp::train::run::{Outcome, Summary, run_on};

use crate::cli_support::glmddp_in;
use crate::support;

pub const STEPS: u64 = 2;

/// A base in memory, and where runs on it go.
pub struct Setup {
    pub dir: tempfile::TempDir,
    pub base: Base,
}

impl Setup {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for args in [
            &["init-model", "--preset", "tiny", "--output_dir", "model"][..],
            &["demo-data", "--output_dir", "data", "--rows", "12", "--dev_rows", "4"],
        ] {
            let ran = glmddp_in(dir.path(), args);
            assert_eq!(ran.code, 0, "{}", ran.stderr);
        }
        let base = Base::load(&plan(dir.path(), "base", 1), &Solo).expect("a base");
        Self { dir, base }
    }

    pub fn plan(&self, output: &str, world_size: usize) -> Plan {
        plan(self.dir.path(), output, world_size)
    }

    /// What each rank comes to.
    pub fn run(&self, plan: &Plan, disks: &[&dyn Disk]) -> Vec<anyhow::Result<Summary>> {
        let console = || Console::without_bar();
        local::run(disks.len(), |group| {
            let rank = glmddp::dist::ProcessGroup::rank(group);
            let Outcome { summary, .. } = run_on(&self.base, plan, group, disks[rank], &console(), &Limits::default())?;
            anyhow::Ok(summary)
        })
    }

    pub fn output(&self, output: &str) -> PathBuf {
        self.dir.path().join(output)
    }

    pub fn adapter(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.output(output).join("adapter/adapter_model.safetensors")).expect("an adapter was exported")
    }

    /// The step of the newest checkpoint that is whole.
    pub fn newest_whole(&self, output: &str) -> Option<u64> {
        let all = newest_first(&RealDisk, &self.output(output)).expect("a folder");
        let whole = all.iter().filter_map(|path| open(&RealDisk, path).ok().filter(|checkpoint| checkpoint.verify(&RealDisk).is_ok()));
        whole.map(|checkpoint| checkpoint.manifest.header.step).max()
    }

    /// The step of the newest checkpoint; all must be whole.
    pub fn newest(&self, output: &str) -> Option<u64> {
        let all = newest_first(&RealDisk, &self.output(output)).expect("a folder");
        let steps = all.iter().map(|path| {
            let checkpoint = open(&RealDisk, path).expect("a whole checkpoint");
            checkpoint.verify(&RealDisk).expect("a whole checkpoint");
            checkpoint.manifest.header.step
        });
        steps.max()
    }
}

/// More than one chunk of the optimizer, so that both ranks have a shard: 30,848 parameters.
fn plan(dir: &Path, output: &str, world_size: usize) -> Plan {
    let mut config = RunConfig::default();
    config.model.model_name_or_path = Some(dir.join("model"));
    config.data.train_file = Some(dir.join("data/train.jsonl"));
    config.data.max_source_length = Some(24);
    config.data.max_target_length = Some(8);
    config.method.finetuning_type = Some(glmddp::peft::FinetuningType::Lora);
    config.method.lora_rank = Some(16);
    config.method.lora_target = Some("all".to_owned());
    config.batch.per_device_train_batch_size = Some(1);
    config.batch.global_batch_size = Some(2);
    config.optim.shard_optimizer = Some(true);
    config.run.output_dir = Some(dir.join(output));
    config.run.max_steps = Some(STEPS as i64);
    config.run.save_steps = Some(1);
    config.run.seed = Some(1);
    config.resolve(world_size, &Sources::default()).expect("the plan resolves")
}

pub fn texts(results: &[anyhow::Result<Summary>]) -> Vec<String> {
    results.iter().map(|result| result.as_ref().err().map_or("fine".to_owned(), ToString::to_string)).collect()
}

/// A disk on which a write of one path fails, or waits.
struct Gate<F>(F);

impl<F: Fn(&Path) -> io::Result<()> + Send + Sync> Disk for Gate<F> {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        (self.0)(path)?;
        RealDisk.create(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.sync_dir(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        RealDisk.open(path)
    }
    fn len(&self, path: &Path) -> io::Result<u64> {
        RealDisk.len(path)
    }
    fn is_folder(&self, path: &Path) -> bool {
        RealDisk.is_folder(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        RealDisk.list(path)
    }
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }
}

fn is_first_checkpoint(path: &Path) -> bool {
    path.to_string_lossy().contains(".tmp-checkpoint-1/state-")
}

#[test]
fn save_that_fails_on_one_rank_is_passed_over_and_counted_where_the_plan_says_so() {
    let setup = Setup::new();
    let broken = Gate(|path: &Path| if is_first_checkpoint(path) { Err(io::Error::other("a bad sector")) } else { Ok(()) });
    let disks: [&dyn Disk; 2] = [&RealDisk, &broken];
    let stopped = setup.run(&setup.plan("stop", 2), &disks);
    let expected =
        format!("rank 1 of 2: cannot create {}: a bad sector", "DIR/stop/.tmp-checkpoint-1/state-00001-of-00002.safetensors.zst");
    let dir = setup.dir.path().display().to_string();
    assert!(texts(&stopped).iter().all(|text| text.replace(&dir, "DIR").starts_with(&expected)), "{stopped:?}");
    assert_eq!(setup.newest("stop"), None);
    assert_eq!(RealDisk.list(&setup.output("stop")).unwrap().len(), 1, "the log alone: the other rank's shard is gone");

    let mut plan = setup.plan("warn", 2);
    plan.run.on_save_error = OnSaveError::Warn;
    for summary in setup.run(&plan, &disks) {
        let summary = summary.expect("the run goes on");
        assert_eq!((summary.steps, summary.failed_saves), (STEPS, 1));
        assert!(summary.checkpoint.is_some_and(|path| path.ends_with("checkpoint-2")));
    }
    assert_eq!(setup.newest("warn"), Some(STEPS));
    assert_eq!(setup.run(&setup.plan("whole", 2), &[&RealDisk, &RealDisk]).len(), 2);
    assert_eq!(setup.adapter("warn"), setup.adapter("whole"));
}

#[test]
fn deletion_that_fails_makes_no_failed_save() {
    let setup = Setup::new();
    let run = |output: &str, disk: &FaultyDisk| {
        let mut plan = setup.plan(output, 1);
        plan.run.save_total_limit = NonZeroUsize::new(1);
        setup.run(&plan, &[disk]).remove(0).expect("the run is not stopped")
    };
    let good = FaultyDisk::new(usize::MAX, Fault::Stop);
    run("good", &good);
    assert_eq!(RealDisk.list(&setup.output("good")).unwrap().iter().filter(|path| path.ends_with("checkpoint-1")).count(), 0);
    let is_deletion = |attempt: &Attempt| matches!(&attempt.call, Call::Rename(_, to) if to.ends_with(".trash-checkpoint-1"));
    let at = good.attempts().iter().position(is_deletion).expect("the first checkpoint is deleted");
    let summary = run("out", &FaultyDisk::new(at, Fault::Fail(libc::EIO)));
    assert_eq!((summary.steps, summary.failed_saves), (STEPS, 0));
    assert!(summary.checkpoint.is_some_and(|path| path.ends_with(format!("checkpoint-{STEPS}"))));
    assert_eq!(setup.newest("out"), Some(STEPS));
    assert_eq!(setup.adapter("out"), setup.adapter("good"));
}

/// The first rank's write of checkpoint 2 waits until step 3 is in the log: were saving not beside the steps, it would wait in vain.
#[test]
fn steps_go_on_while_a_checkpoint_is_written_and_what_it_holds_is_its_own_step() {
    let setup = Setup::new();
    let log = setup.output("out").join("trainer_log.jsonl");
    let slow = Gate(|path: &Path| {
        if !path.to_string_lossy().contains(".tmp-checkpoint-2/state-") {
            return Ok(());
        }
        for _ in 0..30_000 {
            if std::fs::read_to_string(&log)?.lines().count() >= 3 {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Err(io::Error::other("no step was taken meanwhile"))
    });
    let plan = |output: &str, steps: u64| {
        let mut plan = setup.plan(output, 2);
        plan.run.duration = Duration::Steps(steps);
        plan.run.save_steps = NonZeroUsize::new(2);
        plan.optim.lr_scheduler_type = SchedulerType::Constant;
        plan
    };
    for (output, disk, steps) in [("out", &slow as &dyn Disk, 4), ("two", &RealDisk, 2)] {
        assert_eq!(texts(&setup.run(&plan(output, steps), &[disk, &RealDisk])), ["fine", "fine"]);
    }
    let sums = |output: &str| support::state_sums(&setup.output(output).join("checkpoint-2"));
    assert_eq!(sums("out"), sums("two"));
    assert_eq!(setup.newest("out"), Some(4));
}
