//! The program on a file system that is really full, out of inodes, or read-only: a small tmpfs, in mount and user namespaces of the test's own.

use std::path::Path;
use std::process::{Command, Output};

use glmddp::checkpoint::{Disk, RealDisk, newest_first, open};

use crate::cli_support::glmddp_in;
use crate::not_run::{Missing, not_run};

/// Runs of six steps that save every two, on `disk`. What a step leaves is copied out of the mount, and the program's words and exit status with it.
const SCRIPT: &str = r#"
set -eu
run() {
    name=$1
    shift
    code=0
    "$GLMDDP" train --model_name_or_path model --train_file data/train.jsonl --max_source_length 24 --max_target_length 8 \
        --finetuning_type lora --lora_rank 16 --lora_target all --per_device_train_batch_size 1 --global_batch_size 2 \
        --lr_scheduler_type constant --max_steps 6 --save_steps 2 --seed 1 --threads 1 --quiet --output_dir disk/out "$@" > "$name.out" 2> "$name.err" || code=$?
    echo "$code" > "$name.code"
    cp -r disk/out "$name"
}
fresh() { rm -rf disk/out; mount -o "remount,$1" disk; }

mount -t tmpfs -o size=64m,nr_inodes=1000 tmpfs disk
run whole
blocks=$(du -sk disk/out/checkpoint-2 | cut -f 1)
inodes=$(find disk/out/checkpoint-2 | wc -l)

# Room for one checkpoint and a half.
fresh "size=$((blocks * 3 / 2))k"
run full
mount -o remount,size=64m disk
run full_resumed --resume_from_checkpoint latest
fresh "size=$((blocks * 3 / 2))k"
run full_warned --on_save_error warn

# The root, the output folder, and two files beside the checkpoints; the second checkpoint meets the end in the middle of its files.
fresh "size=64m,nr_inodes=$((inodes * 3 / 2 + 4))"
run inodes
mount -o remount,nr_inodes=1000 disk
run inodes_resumed --resume_from_checkpoint latest

fresh size=64m
run before_read_only --max_steps 2
mount -o remount,ro disk
run read_only --resume_from_checkpoint latest
mount -o remount,rw disk
run read_only_resumed --resume_from_checkpoint latest
"#;

/// Runs [`SCRIPT`] in `dir`; none where a mount is not permitted.
fn run_mounted(dir: &Path) -> Option<Output> {
    let permitted: [&[&str]; 2] = [&["--mount"], &["--mount", "--map-root-user"]];
    let is_permitted = |args: &&&[&str]| {
        let probe = Command::new("unshare").args(**args).args(["mount", "-t", "tmpfs", "tmpfs", "disk"]).current_dir(dir).output();
        probe.is_ok_and(|out| out.status.success())
    };
    let args = permitted.iter().find(is_permitted)?;
    let mut command = Command::new("unshare");
    command.args(*args).args(["sh", "-c", SCRIPT]).current_dir(dir).env("GLMDDP", env!("CARGO_BIN_EXE_glmddp")).env("RUST_BACKTRACE", "0");
    Some(command.env_remove("RUST_LOG").output().expect("a shell"))
}

#[test]
fn full_disk_keeps_what_was_saved_and_the_run_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("disk")).unwrap();
    for args in [&["init-model", "--preset", "tiny", "--output_dir", "model"][..], &["demo-data", "--output_dir", "data", "--rows", "12"]] {
        assert_eq!(glmddp_in(dir.path(), args).code, 0);
    }
    let Some(ran) = run_mounted(dir.path()) else {
        not_run(Missing::Mount, "this user may not mount a tmpfs in a namespace of its own, and the test needs one");
        return;
    };
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let read = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    let adapter = |run: &str| std::fs::read(path(run).join("adapter/adapter_model.safetensors")).unwrap();
    let steps = |run: &str| -> Vec<u64> {
        let mut whole = Vec::new();
        for checkpoint in newest_first(&RealDisk, &path(run)).unwrap() {
            let checkpoint = open(&RealDisk, &checkpoint).unwrap();
            checkpoint.verify(&RealDisk).unwrap();
            whole.push(checkpoint.manifest.header.step);
        }
        whole
    };
    let hidden = |run: &str| RealDisk.list(&path(run)).unwrap().iter().any(|path| path.file_name().unwrap().as_encoded_bytes()[0] == b'.');
    let said = |run: &str| {
        // Steps with their times, how long a save waited for the one before, and rows that are cut short.
        let is_left_out = |line: &&str| line.starts_with("step ") || line.contains(" waited ") || line.contains(" were cut to ");
        let lines = read(&format!("{run}.err")).lines().filter(|line| !is_left_out(line)).collect::<Vec<_>>().join("\n");
        let text = format!("{lines}\nexit status {}", read(&format!("{run}.code")).trim());
        regex::Regex::new(r"\d{3,}").unwrap().replace_all(&text, "N").into_owned()
    };
    let done = "exit status 0";
    assert!(said("whole").ends_with(done), "{}", said("whole"));
    assert_eq!(steps("whole"), [6, 4, 2]);

    for run in ["full", "inodes"] {
        insta::assert_snapshot!(format!("real_disk_{run}"), said(run));
        assert_eq!((steps(run), hidden(run)), (vec![2], false), "{run}: the earlier checkpoint is whole, and nothing else is left");
        assert!(!path(run).join("adapter").exists());
    }
    insta::assert_snapshot!("real_disk_full_warned", said("full_warned"));
    assert_eq!((steps("full_warned"), hidden("full_warned")), (vec![2], false));
    insta::assert_snapshot!("real_disk_read_only", said("read_only"));
    assert_eq!(steps("read_only"), [2]);

    for run in ["full_resumed", "full_warned", "inodes_resumed", "read_only_resumed"] {
        assert!(said(run).ends_with(done), "{run}: {}", said(run));
        assert!(adapter(run) == adapter("whole"), "{run}: other bits");
    }
    for run in ["full_resumed", "inodes_resumed", "read_only_resumed"] {
        assert_eq!(steps(run), [6, 4, 2], "{run}");
    }
}
