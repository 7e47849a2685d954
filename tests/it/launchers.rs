//! Launchers that start several processes which no MPI library connects: refused, with the line that works.

use std::path::Path;

use glmddp::dist::launcher::ALONE;

use crate::cli_support::{Ran, glmddp_in, glmddp_under, ok};
use crate::not_run::{Missing, not_run};

/// A folder with a tiny model in `tiny` and rows in `demo`.
fn setup() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), "init-model --preset tiny --output_dir tiny");
    ok(dir.path(), "demo-data --output_dir demo --rows 16 --dev_rows 4");
    dir
}

const TRAIN: [&str; 7] = [
    "train",
    "--model_name_or_path=tiny",
    "--train_file=demo/train.jsonl",
    "--max_steps=1",
    "--global_batch_size=2",
    "--quiet",
    "--output_dir=it's out",
];

const LAUNCHERS: &[(&str, &[(&str, &str)])] = &[
    ("torchrun", &[("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")]),
    ("torchrun", &[("WORLD_SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("TORCHELASTIC_RUN_ID", "none"), ("GROUP_RANK", "0")]),
    ("accelerate", &[("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("ACCELERATE_MIXED_PRECISION", "no")]),
    ("deepspeed", &[("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("CROSS_RANK", "0"), ("CROSS_SIZE", "1")]),
    ("horovodrun", &[("HOROVOD_SIZE", "3"), ("HOROVOD_RANK", "2")]),
    ("a cluster's job", &[("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "job-0"), ("MASTER_PORT", "23456")]),
    ("a cluster's job", &[("PET_NNODES", "2"), ("PET_NODE_RANK", "1")]),
    ("a launcher", &[("WORLD_SIZE", "2")]),
    ("srun", &[("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "3")]),
];

/// The message, with the program's path as `glmddp`.
fn told(ran: &Ran) -> String {
    ran.stderr.replace(env!("CARGO_BIN_EXE_glmddp"), "glmddp")
}

#[test]
fn launchers_without_mpi_are_refused_with_the_line_that_works() {
    if !cfg!(feature = "mpi") {
        return not_run(Missing::Mpi, "this build has no feature `mpi`, and its messages are others");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut texts = Vec::new();
    for (name, variables) in LAUNCHERS {
        let ran = glmddp_under(dir.path(), variables, &TRAIN);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{variables:?}: {}", ran.stderr);
        assert!(ran.stderr.starts_with(&format!("error: started by {name} as ")), "{}", ran.stderr);
        texts.push(told(&ran));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made");
    texts.dedup();
    insta::assert_snapshot!("launchers_refused", texts.join("\n"));
}

#[test]
fn every_command_of_several_ranks_is_refused_under_torchrun() {
    let dir = setup();
    let data = ["--model_name_or_path=tiny", "--validation_file=demo/dev.jsonl"];
    for command in [
        &TRAIN[..],
        &["evaluate", data[0], data[1]],
        &["compare", data[0], data[1], "--train_file=demo/train.jsonl", "--output_dir=out", "--methods=lora"],
        &["bench", "step", "--layers=1"],
    ] {
        let ran = glmddp_under(dir.path(), LAUNCHERS[0].1, command);
        assert_eq!(ran.code, 2, "{command:?}: {}", ran.stderr);
        assert!(ran.stderr.starts_with("error: started by torchrun as 2 processes"), "{}", ran.stderr);
    }
}

/// What one process does: under mpirun the first does it, under what MPI does not know nobody.
#[test]
fn command_for_one_process_runs_once_under_mpirun_and_is_refused_under_torchrun() {
    let dir = setup();
    let root = dir.path();
    assert_eq!(glmddp_in(root, &[&TRAIN[..], &["--output_dir=out"]].concat()).code, 0);
    let torchrun = glmddp_under(root, LAUNCHERS[0].1, &["demo-data", "--output_dir=new"]);
    insta::assert_snapshot!(told(&torchrun), @r"
    error: started by torchrun as 2 processes (WORLD_SIZE is 2), but this command runs in one: each would do the same in the same place

    hint: start it without the launcher: `glmddp demo-data '--output_dir=new'`; if no other process belongs to this one: `GLMDDP_ALONE=1 glmddp demo-data '--output_dir=new'`
    ");
    let resume = ["--train_file=demo/train.jsonl", "--model_name_or_path=tiny", "--output_dir=new"];
    for command in [
        &["demo-data", "--output_dir=new"][..],
        &["init-model", "--preset=tiny", "--output_dir=new"],
        &["generate", "--prompt=a", "--model_name_or_path=tiny", "--max_new_tokens=1"],
        &["export", "--merge", "--model_name_or_path=tiny", "--adapter=out/adapter", "--output_dir=new"],
        &["tokenize", resume[0], resume[1], resume[2]],
        &["checkpoint", "verify", "out"],
        &["checkpoint", "export", "out", "--output_dir=new"],
        &["checkpoint", "import", "out/adapter", resume[0], resume[1], resume[2]],
        &["checkpoint", "prune", "out", "--save_total_limit=1"],
        &["completions", "bash"],
        &["man", "--output_dir=new"],
    ] {
        let ran = glmddp_under(root, LAUNCHERS[1].1, command);
        assert!(ran.code == 2 && ran.stdout.is_empty() && ran.stderr.contains("runs in one: each would"), "{command:?}: {}", ran.stderr);
        let of_mpirun = |rank| [("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", rank)];
        let second = glmddp_under(root, &of_mpirun("1"), command);
        assert_eq!((second.code, second.stdout.as_str(), second.stderr.as_str()), (0, "", ""), "{command:?}");
        assert!(!root.join("new").exists(), "{command:?}");
        if command[0] == "export" {
            continue; // P-Tuning v2 has no merge.
        }
        let first = glmddp_under(root, &of_mpirun("0"), command);
        let warning =
            "warning: started by mpirun as 2 processes (OMPI_COMM_WORLD_SIZE is 2), but this command runs in one: the first does it\n";
        assert!(first.code == 0 && first.stderr.starts_with(warning), "{command:?}: {}", first.stderr);
        let _ = std::fs::remove_dir_all(root.join("new"));
    }
    // A pod or a leftover variable: this process may well be the only one on its machine.
    assert_eq!(glmddp_under(root, LAUNCHERS[5].1, &["demo-data", "--output_dir=new", "--rows=4", "--dev_rows=2"]).code, 0);
}

/// The two commands of the hint, typed in.
#[test]
fn lines_of_the_hint_work_when_typed() {
    if !cfg!(feature = "mpi") {
        return not_run(Missing::Mpi, "this build has no feature `mpi`, and its messages are others");
    }
    let dir = setup();
    let ran = glmddp_under(dir.path(), LAUNCHERS[0].1, &TRAIN);
    let commands: Vec<&str> = ran.stderr.split('`').skip(1).step_by(2).collect();
    assert_eq!(commands.len(), 2, "{}", ran.stderr);
    // As a user may have to: in a container, as root, with fewer cores than ranks.
    let mpirun = format!("OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 {}", commands[0]);
    for (command, what) in [(mpirun.as_str(), "mpirun -n 2 "), (commands[1], "GLMDDP_ALONE=1 ")] {
        assert!(command.contains(what), "{command}");
        if what.starts_with("mpirun") && !has_mpirun() {
            not_run(Missing::Mpi, "mpirun is not installed, and the test needs it");
            continue;
        }
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", command]).current_dir(dir.path()).envs(LAUNCHERS[0].1.iter().copied());
        let shell = shell.output().unwrap();
        assert!(shell.status.success(), "{command}\n{}", String::from_utf8_lossy(&shell.stderr));
        assert!(dir.path().join("it's out/adapter").exists());
        std::fs::remove_dir_all(dir.path().join("it's out")).unwrap();
    }
}

fn has_mpirun() -> bool {
    std::process::Command::new("mpirun").arg("--version").output().is_ok_and(|o| o.status.success())
}

fn trains(dir: &Path, variables: &[(&str, &str)]) {
    let ran = glmddp_under(dir, variables, &TRAIN);
    assert_eq!(ran.code, 0, "{variables:?}: {}", ran.stderr);
    std::fs::remove_dir_all(dir.join("it's out")).unwrap();
}

#[test]
fn variables_of_one_process_or_of_nobody_do_not_break_a_lone_run() {
    let dir = setup();
    for size in ["1", "0", "", "two", "-2", "2.0"] {
        trains(dir.path(), &[("WORLD_SIZE", size), ("RANK", "0"), ("LOCAL_RANK", "0"), ("HOROVOD_SIZE", size), ("PET_NNODES", size)]);
    }
    trains(dir.path(), &[("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_NTASKS", "8"), ("PBS_NP", "8"), ("LSB_DJOB_NUMPROC", "8")]);
    trains(dir.path(), &[("WORLD_SIZE", "8"), ("RANK", "7"), ("LOCAL_RANK", "3"), (ALONE, "1")]);
}

#[test]
fn word_for_alone_that_is_neither_1_nor_0_is_refused() {
    let ran = glmddp_under(Path::new("."), &[(ALONE, "maybe")], &TRAIN);
    assert_eq!(ran.code, 2);
    insta::assert_snapshot!(ran.stderr, @r"
    error: the environment variable GLMDDP_ALONE is `maybe`, expected 1 or 0

    hint: set GLMDDP_ALONE=1 if no other process belongs to this one, else unset it
    ");
}

/// What MPI could connect is not alone because somebody says so: the hint has what helps.
#[test]
fn hint_about_srun_does_not_offer_what_is_already_done() {
    if !cfg!(feature = "mpi") {
        return not_run(Missing::Mpi, "this build has no feature `mpi`, and its messages are others");
    }
    let ran = glmddp_under(Path::new("."), &[("SLURM_STEP_NUM_TASKS", "2"), ("PMI_RANK", "0"), (ALONE, "1")], &TRAIN);
    assert!(ran.code == 2 && ran.stderr.contains("hint: start it with `srun --mpi=pmix`"), "{}", ran.stderr);
    assert!(!ran.stderr.contains(ALONE), "{}", ran.stderr);
}

#[test]
fn doctor_believes_that_a_process_is_alone() {
    let ran = glmddp_under(Path::new("."), &[("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), (ALONE, "1")], &["doctor", "--json"]);
    let found: Vec<serde_json::Value> = serde_json::from_str(&ran.stdout).unwrap();
    assert!(found.iter().any(|finding| finding["what"] == "started by" && finding["status"] == "good"));
}

#[test]
fn doctor_names_a_launcher_that_mpi_does_not_connect() {
    let ran = glmddp_under(Path::new("."), LAUNCHERS[0].1, &["doctor", "--json"]);
    let found: Vec<serde_json::Value> = serde_json::from_str(&ran.stdout).unwrap();
    let found = found.iter().find(|finding| finding["what"] == "started by").unwrap();
    assert_eq!(found["found"], "torchrun: rank 1 of 2, whose processes MPI does not connect");
    assert_eq!(found["status"], "poor");
}
