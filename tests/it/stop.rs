//! Runs that are asked to save, or to save and stop, by signals, a file or a time limit; and ranks that stall.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};

use crate::cli_support::glmddp_in;
use crate::not_run::{Missing, not_run};

/// A run that does nothing is waited for so long; far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(120);
/// At a few milliseconds each: long enough to be met by a signal, short enough to be run to the end.
const STEPS: &str = "400";

/// A folder with a tiny model in `model` and rows in `data`.
struct Setup(tempfile::TempDir);

/// Who starts the ranks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Nobody,
    Mpirun,
    Script,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for args in [
            &["init-model", "--preset", "tiny", "--output_dir", "model"][..],
            &["demo-data", "--output_dir", "data", "--rows", "60", "--dev_rows", "8"],
        ] {
            let ran = glmddp_in(dir.path(), args);
            assert_eq!(ran.code, 0, "{}", ran.stderr);
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `glmddp train` into `out` on one rank, or on two under a launcher; none, said loudly, where there is no mpirun.
    fn command(&self, by: By, out: &str, args: &[&str]) -> Option<Command> {
        if by != By::Nobody && (!cfg!(feature = "mpi") || Command::new("mpirun").arg("--version").output().is_err()) {
            not_run(Missing::Mpi, "there is no mpirun, or this build has no feature `mpi`, and the test needs both");
            return None;
        }
        let program = env!("CARGO_BIN_EXE_glmddp");
        let mut command = match by {
            By::Nobody => Command::new(program),
            By::Mpirun => Command::new("mpirun"),
            By::Script => {
                // A shell does not see a SIGINT that its parent ignores, as who runs these tests in the background does.
                let mut command = Command::new("env");
                command.arg("--default-signal=INT").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/mpirun.sh"));
                command
            }
        };
        if by != By::Nobody {
            command.args(["-n", "2", program]);
        }
        command.args(["train", "--model_name_or_path", "model", "--train_file", "data/train.jsonl", "--output_dir", out]);
        command.args(["--max_steps", STEPS, "--pre_seq_len", "4", "--per_device_train_batch_size", "2", "--global_batch_size", "12"]);
        command.args(["--threads", "1"]).args(args);
        for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"] {
            command.env(name, "1");
        }
        for (name, value) in [
            ("OMPI_MCA_mpi_yield_when_idle", "1"),
            ("OMPI_MCA_hwloc_base_binding_policy", "none"),
            ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
            ("OMPI_MCA_btl_base_warn_component_unused", "0"),
            ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
            ("RUST_BACKTRACE", "0"),
        ] {
            command.env(name, value);
        }
        command.env_remove("RUST_LOG").env_remove("SLURM_JOB_END_TIME").env_remove("GLMDDP_COMMAND");
        command.current_dir(self.0.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Some(command)
    }

    /// The same, started, and three steps far.
    fn started(&self, by: By, out: &str, args: &[&str]) -> Option<Child> {
        let mut job = self.command(by, out, args)?.spawn().expect("the launcher starts");
        let log = self.path(out).join("trainer_log.jsonl");
        wait_until(&mut job, || std::fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= 3));
        Some(job)
    }

    /// Process id of a rank, from the file that it keeps.
    fn pid_of_rank(&self, out: &str, rank: usize) -> Pid {
        let text = std::fs::read(self.path(out).join(format!(".status/rank-{rank}.json"))).expect("the rank says what it does");
        let status: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        Pid::from_raw(status["pid"].as_i64().expect("a number") as i32).expect("a process id")
    }

    fn adapter(&self, out: &str) -> Vec<u8> {
        std::fs::read(self.path(out).join("adapter/adapter_model.safetensors")).expect("the run has ended")
    }

    /// What is said on stdout, with what differs from run to run masked.
    fn masked(&self, text: &[u8]) -> String {
        let text = String::from_utf8_lossy(text).replace(env!("CARGO_BIN_EXE_glmddp"), "glmddp");
        let text = text.replace(env!("CARGO_MANIFEST_DIR"), "REPOSITORY");
        let mut masked = String::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let number_behind = ["stopped after step ", "checkpoint-"].into_iter().find_map(|before| {
                let (start, rest) = line.split_once(before)?;
                Some(format!("{start}{before}N{}", rest.trim_start_matches(|c: char| c.is_ascii_digit())))
            });
            masked += &number_behind.unwrap_or_else(|| line.to_owned());
            masked.push('\n');
        }
        masked
    }
}

fn wait_until(job: &mut Child, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "nothing in two minutes");
        if let Some(status) = job.try_wait().expect("our child") {
            let mut stderr = String::new();
            let _ = std::io::Read::read_to_string(&mut job.stderr.take().expect("piped"), &mut stderr);
            panic!("the job ended early: {status}\n{stderr}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn pid(job: &Child) -> Pid {
    Pid::from_child(job)
}

fn ended(job: Child) -> Output {
    job.wait_with_output().expect("our child")
}

/// Interrupts a run until it ends: of two signals that come before the first is looked at, a busy machine shows one.
fn interrupted(mut job: Child) -> Output {
    let started = Instant::now();
    while job.try_wait().expect("our child").is_none() {
        assert!(started.elapsed() < PATIENCE, "it lives on");
        kill_process(pid(&job), Signal::INT).expect("it runs");
        std::thread::sleep(Duration::from_millis(100));
    }
    ended(job)
}

fn stderr(out: &Output) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(&out.stderr)
}

/// The run has saved and stopped; gives the command that goes on.
fn assert_stopped(out: &Output) -> String {
    assert!(out.status.success(), "{}: {}", out.status, stderr(out));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let command = text.lines().find_map(|line| line.strip_prefix("to go on: "));
    command.unwrap_or_else(|| panic!("no command that goes on: {text}\n{}", stderr(out))).to_owned()
}

/// What a run said to type.
fn shell(setup: &Setup, command: &str) -> Command {
    let mut shell = Command::new("env");
    shell.args(["--default-signal=INT", "sh", "-c", command]).current_dir(setup.0.path()).env_remove("GLMDDP_COMMAND");
    shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"] {
        shell.env(name, "1");
    }
    shell
}

/// Runs what a run said to type, to its end.
fn go_on(setup: &Setup, command: &str) {
    let out = shell(setup, command).output().expect("a shell");
    assert!(out.status.success(), "{command}: {}", stderr(&out));
}

#[test]
fn each_signal_stops_a_lone_run_which_goes_on_to_the_same_bits_by_the_command_it_prints() {
    let setup = Setup::new();
    let whole = setup.command(By::Nobody, "whole", &[]).expect("no launcher").output().expect("the program starts");
    assert!(whole.status.success(), "{}", stderr(&whole));
    for (signal, name) in [(Signal::TERM, "sigterm"), (Signal::INT, "sigint"), (Signal::USR1, "sigusr1")] {
        let job = setup.started(By::Nobody, name, &["--logging_steps", "5"]).expect("no launcher");
        kill_process(pid(&job), signal).expect("it runs");
        let out = ended(job);
        let command = assert_stopped(&out);
        insta::assert_snapshot!(format!("stopped_by_{name}"), setup.masked(&out.stdout));
        assert!(!setup.path(name).join("adapter").exists(), "the run is not done");
        go_on(&setup, &command);
        assert_eq!(setup.adapter(name), setup.adapter("whole"), "{name}");
    }
}

#[test]
fn second_sigint_leaves_at_once() {
    let setup = Setup::new();
    let slow = ["--global_batch_size", "4800"];
    let mut job = setup.command(By::Nobody, "out", &slow).expect("no launcher").spawn().expect("the program starts");
    // The log is opened right before the first step.
    wait_until(&mut job, || setup.path("out/trainer_log.jsonl").exists());
    let out = interrupted(job);
    assert_eq!(out.status.code(), Some(130), "{}", stderr(&out));
    assert!(stderr(&out).contains("SIGINT: the run saves and stops when its step is done; once more ends it at once, without saving"));
    let left: Vec<_> = std::fs::read_dir(setup.path("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["trainer_log.jsonl"]);
}

#[test]
fn mpirun_signal_to_one_rank_or_to_mpirun_stops_all() {
    let setup = Setup::new();
    let whole = setup.command(By::Nobody, "whole", &[]).expect("no launcher").output().expect("the program starts");
    assert!(whole.status.success(), "{}", stderr(&whole));
    // mpirun itself passes SIGUSR1 on, and answers the other two by killing the ranks: launch/README.md.
    for (signal, rank, name) in [
        (Signal::TERM, Some(1), "sigterm_rank_1"),
        (Signal::INT, Some(0), "sigint_rank_0"),
        (Signal::USR1, Some(1), "sigusr1_rank_1"),
        (Signal::USR1, None, "sigusr1_mpirun"),
    ] {
        let Some(job) = setup.started(By::Mpirun, name, &[]) else { return };
        let to = rank.map_or(pid(&job), |rank| setup.pid_of_rank(name, rank));
        kill_process(to, signal).expect("it runs");
        let out = ended(job);
        let command = assert_stopped(&out);
        insta::assert_snapshot!(format!("stopped_by_{name}"), setup.masked(&out.stdout));
        assert!(!setup.path(name).join(".status").exists(), "the ranks took their files with them");
        go_on(&setup, &command);
        assert_eq!(setup.adapter(name), setup.adapter("whole"), "{name}");
    }
}

#[test]
fn mpirun_script_turns_each_signal_into_a_stop() {
    let setup = Setup::new();
    for (signal, name) in [(Signal::TERM, "sigterm"), (Signal::INT, "sigint"), (Signal::USR1, "sigusr1"), (Signal::HUP, "sighup")] {
        // No end that a run could come to before the signal has gone through script and mpirun.
        let Some(job) = setup.started(By::Script, name, &["--max_steps", "100000"]) else { return };
        kill_process(pid(&job), signal).expect("it runs");
        let out = ended(job);
        let command = assert_stopped(&out);
        if signal == Signal::INT {
            insta::assert_snapshot!("stopped_by_sigint_script", setup.masked(&out.stdout));
            let log = setup.path(name).join("trainer_log.jsonl");
            let num_steps = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
            let before = num_steps();
            let mut job = shell(&setup, &format!("exec {command}")).spawn().expect("a shell");
            wait_until(&mut job, || num_steps() > before);
            kill_process(pid(&job), signal).expect("it runs");
            assert_stopped(&ended(job));
        }
    }
}

#[test]
fn mpirun_script_ends_at_once_on_a_second_sigint_and_when_it_is_killed() {
    let setup = Setup::new();
    let slow = ["--global_batch_size", "4800", "--max_steps", "1000"];
    for is_killed in [false, true] {
        let out = if is_killed { "killed" } else { "interrupted" };
        let Some(mut command) = setup.command(By::Script, out, &slow) else { return };
        let mut job = command.spawn().expect("the launcher starts");
        wait_until(&mut job, || setup.path(out).join("trainer_log.jsonl").exists() && setup.path(out).join(".status/rank-1.json").exists());
        let rank = setup.pid_of_rank(out, 1);
        if is_killed {
            kill_process(pid(&job), Signal::KILL).expect("it runs");
            ended(job);
        } else {
            let ended = interrupted(job);
            assert_eq!(ended.status.code(), Some(130), "{}", stderr(&ended));
        }
        let started = Instant::now();
        while rustix::process::test_kill_process(rank).is_ok() {
            assert!(started.elapsed() < PATIENCE, "rank 1 lives on");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!setup.path(out).join("adapter").exists());
    }
}

#[test]
fn trigger_file_saves_without_stopping_and_goes() {
    let setup = Setup::new();
    let mut job = setup.started(By::Nobody, "out", &["--max_steps", "100000", "--save_steps", "0"]).expect("no launcher");
    let (trigger, out) = (setup.path("out/save_now"), setup.path("out"));
    for num_saved in 1..=2 {
        std::fs::write(&trigger, b"").unwrap();
        wait_until(&mut job, || !trigger.exists());
        let is_checkpoint = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("checkpoint-");
        let checkpoints = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap()).filter(is_checkpoint).count();
        assert_eq!(checkpoints, num_saved, "the file goes when the checkpoint is there");
    }
    kill_process(pid(&job), Signal::TERM).expect("it runs on");
    assert_stopped(&ended(job));
}

#[test]
fn time_limit_is_met_with_a_checkpoint() {
    let setup = Setup::new();
    let until = (SystemTime::now() + Duration::from_secs(6)).duration_since(UNIX_EPOCH).unwrap().as_secs().to_string();
    for (limit, out) in [("4s", "duration"), ("slurm", "slurm")] {
        let args = ["--max_steps", "1000000", "--save_steps", "0", "--save_before_timeout", limit];
        let mut command = setup.command(By::Nobody, out, &args).expect("no launcher");
        let ran = command.env("SLURM_JOB_END_TIME", &until).output().expect("the program starts");
        assert_stopped(&ran);
        insta::assert_snapshot!(format!("stopped_by_a_time_limit_{out}"), setup.masked(&ran.stdout));
        assert!(setup.path(out).join("checkpoint-1").exists(), "the first step is saved: how long that takes is then known");
    }
    let mut command = setup.command(By::Nobody, "refused", &["--save_before_timeout", "slurm"]).expect("no launcher");
    let refused = command.output().expect("the program starts");
    assert_eq!(refused.status.code(), Some(2));
    insta::assert_snapshot!("time_limit_without_slurm", stderr(&refused));
    let refused = glmddp_in(setup.0.path(), &["train", "--save_before_timeout", "235"]);
    assert_eq!(refused.code, 2);
    insta::assert_snapshot!("time_limit_without_a_unit", refused.stderr);
}

#[test]
fn mpirun_rank_that_is_stopped_is_named_and_the_job_ends() {
    let setup = Setup::new();
    let Some(job) = setup.started(By::Mpirun, "out", &["--max_steps", "100000", "--stall_timeout", "3s"]) else { return };
    let stalled = setup.pid_of_rank("out", 1);
    kill_process(stalled, Signal::STOP).expect("it runs");
    let out = ended(job);
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    let all = stderr(&out);
    let errors: Vec<&str> = all.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{all}");
    let who = format!("rank 1 (process {} on {}) does not run: no sign of it for ", stalled.as_raw_nonzero(), host());
    assert!(errors[0].starts_with("error: rank 0 of 2: stalled: waits for 3s in all_"), "{}", errors[0]);
    assert!(errors[0].contains(&who) && errors[0].contains("it was last seen ") && errors[0].contains(" of step "), "{}", errors[0]);
    assert!(errors[0].ends_with("; `stall_timeout` is 3s"), "{}", errors[0]);
    println!("{}", errors[0]);
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[test]
fn comparison_that_is_stopped_saves_and_goes_on_with_the_same_command() {
    let setup = Setup::new();
    let files = ["--train_file", "data/train.jsonl", "--validation_file", "data/dev.jsonl", "--model_name_or_path", "model"];
    let args =
        ["compare", "--methods", "ptuning_v2", "--max_steps", STEPS, "--output_dir", "out", "--threads", "1", "--global_batch_size", "12"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_glmddp"));
    command.args(args).args(files).current_dir(setup.0.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut job = command.env_remove("GLMDDP_COMMAND").spawn().expect("the program starts");
    let log = setup.path("out/ptuning_v2/trainer_log.jsonl");
    wait_until(&mut job, || std::fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= 3));
    kill_process(pid(&job), Signal::INT).expect("it runs");
    let out = ended(job);
    let command = assert_stopped(&out);
    insta::assert_snapshot!("comparison_stopped", setup.masked(&out.stdout));
    assert!(!setup.path("out/ptuning_v2/adapter").exists(), "the run is not done");
    go_on(&setup, &command);
    assert!(setup.path("out/ptuning_v2/adapter").exists());
}
