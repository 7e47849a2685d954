//! Exported adapters in use: `glmddp generate` and `glmddp evaluate`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::cli_support::glmddp_in;
use crate::not_run::{Missing, not_run};

fn ok(dir: &Path, args: &[&str]) -> String {
    let ran = glmddp_in(dir, args);
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
    ran.stdout
}

fn refused(dir: &Path, args: &[&str]) -> String {
    let ran = glmddp_in(dir, args);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
    ran.stderr
}

/// A folder with a tiny model in `model`, and rows in `data`.
fn setup() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    ok(dir.path(), &["init-model", "--preset", "tiny", "--output_dir", "model"]);
    ok(dir.path(), &["demo-data", "--output_dir", "data", "--rows", "20", "--dev_rows", "7"]);
    dir
}

/// Trains into `out`.
fn train(dir: &Path, method: &[&str]) {
    let rest = "train --model_name_or_path model --train_file data/train.jsonl --validation_file data/dev.jsonl --output_dir out \
                --overwrite_output_dir --max_steps 3 --per_device_train_batch_size 2 --global_batch_size 4 --threads 1 --quiet --seed 1";
    ok(dir, &[&rest.split_whitespace().collect::<Vec<_>>()[..], method].concat());
}

const EVALUATE: [&str; 6] =
    ["evaluate", "--model_name_or_path=model", "--validation_file=data/dev.jsonl", "--threads=1", "--json", "--adapter=out/adapter"];
#[test]
fn generation_after_learning_one_row_gives_its_answer_and_stops() {
    let dir = setup();
    let dir = dir.path();
    std::fs::write(dir.join("one.jsonl"), "{\"q\":\"类型#裤\",\"a\":\"这款长裤，适合春季。\"}\n").unwrap();
    train(
        dir,
        &"--train_file one.jsonl --validation_file one.jsonl --prompt_column q --response_column a --max_steps 60 --global_batch_size 2 \
          --finetuning_type lora --lora_rank 8 --lora_target all --learning_rate 2e-2"
            .split_whitespace()
            .collect::<Vec<_>>(),
    );
    let generate = "generate --model_name_or_path model --adapter out/adapter --file one.jsonl --prompt_column q";
    let generate: Vec<&str> = generate.split_whitespace().collect();
    let with = |more: &[&str]| ok(dir, &[&generate[..], more].concat());
    let all: Value = serde_json::from_str(&with(&["--response_column=a", "--json"])).unwrap();
    insta::assert_snapshot!("one_row_learned", all);
    insta::assert_snapshot!("one_row_learned_as_text", with(&["--response_column=a"]));
    let cut: Value = serde_json::from_str(&with(&["--max_new_tokens=3", "--json"])).unwrap();
    assert_eq!((cut["answer_tokens"].as_u64(), cut["stopped"].as_str()), (Some(3), Some("max_new_tokens")));
    assert!(cut.get("expected").is_none() && cut["answer"] != all["answer"]);
}

#[test]
fn rows_of_a_file_are_answered_in_order_as_their_prompts_are() {
    let dir = setup();
    let dir = dir.path();
    let rows = "generate --model_name_or_path model --file data/dev.jsonl --rows 3 --max_new_tokens 5 --json";
    let rows = ok(dir, &rows.split_whitespace().collect::<Vec<_>>());
    let answers: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.iter().map(|a| a["row"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    for answer in answers {
        let prompt = answer["prompt"].as_str().unwrap();
        let alone = ok(dir, &["generate", "--model_name_or_path=model", "--max_new_tokens=5", "--prompt", prompt]);
        assert_eq!(alone.trim_end_matches('\n'), answer["answer"].as_str().unwrap().trim_end_matches('\n'));
    }
}

#[test]
fn folder_without_an_adapter_that_can_be_read_is_refused() {
    let dir = setup();
    let dir = dir.path();
    train(dir, &["--finetuning_type=ptuning_v2", "--pre_seq_len=4"]);
    let adapter = |more: &[&str]| refused(dir, &[&EVALUATE[..], more].concat());
    insta::assert_snapshot!("folder_without_an_adapter", adapter(&["--adapter=data"]));
    insta::assert_snapshot!("no_such_adapter", adapter(&["--adapter=absent"]));

    let path = dir.join("out/adapter/adapter_config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, json.replace("PREFIX_TUNING", "ADALORA")).unwrap();
    insta::assert_snapshot!("adapter_of_an_unknown_method", adapter(&[]));
}

#[test]
fn held_out_loss_has_the_same_bits_on_one_and_on_three_ranks() {
    if !cfg!(feature = "mpi") || Command::new("mpirun").arg("--version").output().is_err() {
        not_run(Missing::Mpi, "there is no mpirun, or this build has no feature `mpi`, and the test needs both");
        return;
    }
    let dir = setup();
    let dir = dir.path();
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/mpirun.sh"));
    command.args(["-n", "3", env!("CARGO_BIN_EXE_glmddp")]).args(&EVALUATE[..5]).arg("--per_device_eval_batch_size=2").current_dir(dir);
    let out = command.output().expect("the launcher starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let alone = ok(dir, &[&EVALUATE[..5], &["--per_device_eval_batch_size=2"]].concat());
    assert_eq!(String::from_utf8(out.stdout).unwrap(), alone, "printed once, the same");
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/mpirun.sh"));
    command.args(["-n", "2", env!("CARGO_BIN_EXE_glmddp")]).args(EVALUATE).current_dir(dir);
    let out = command.output().expect("the launcher starts");
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    assert_eq!(errors.matches("error: no such folder: out/adapter").count(), 1, "said once: {errors}");
}
