//! What a user can give `train` that is wrong: the text, exit code 2, and no backtrace.

use std::path::Path;

use glmddp::checkpoint::FaultyDisk;
use glmddp::config::{Plan, RunConfig, Sources};
use glmddp::dist::Solo;
use glmddp::telemetry::Console;
use glmddp::train::requests::Limits;
use glmddp::train::run;

use crate::cli_support::glmddp_in;
use crate::support;

/// A folder with a tiny model in `model` and rows in `data`.
fn setup() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for args in [
        &["init-model", "--preset", "tiny", "--output_dir", "model"][..],
        &["demo-data", "--output_dir", "data", "--rows", "20", "--dev_rows", "4"],
    ] {
        let ran = glmddp_in(dir.path(), args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    dir
}

const TRAIN: [&str; 13] = [
    "train",
    "--model_name_or_path=model",
    "--train_file=data/train.jsonl",
    "--output_dir=out",
    "--max_steps=2",
    "--pre_seq_len=4",
    "--max_source_length=64",
    "--max_target_length=32",
    "--per_device_train_batch_size=2",
    "--global_batch_size=4",
    "--threads=1",
    "--quiet",
    "--seed=1",
];

/// What `train` says with `args` on top, after `break_it` has changed the folder.
fn refused(break_it: impl FnOnce(&Path), args: &[&str]) -> String {
    let dir = setup();
    break_it(dir.path());
    let ran = glmddp_in(dir.path(), &[&TRAIN[..], args].concat());
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(!ran.stderr.contains("backtrace") && !ran.stderr.contains("panicked"), "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    ran.stderr
}

fn nothing(_: &Path) {}

fn write(name: &'static str, text: &'static str) -> impl FnOnce(&Path) {
    move |dir| std::fs::write(dir.join(name), text).expect("the file is written")
}

/// Changes a key of the model's config.json.
fn config(key: &'static str, value: serde_json::Value) -> impl FnOnce(&Path) {
    move |dir| {
        let path = dir.join("model/config.json");
        let mut json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        json[key] = value;
        std::fs::write(path, json.to_string()).unwrap();
    }
}

#[test]
fn train_with_wrong_rows_says_what_and_where() {
    insta::assert_snapshot!("no_such_file", refused(nothing, &["--train_file=absent.jsonl"]));
    insta::assert_snapshot!("directory_instead_of_file", refused(nothing, &["--train_file=data"]));
    insta::assert_snapshot!("empty_file", refused(write("empty.jsonl", ""), &["--train_file=empty.jsonl"]));
    let broken = "{\"content\":\"a\",\"summary\":\"b\"}\n".repeat(6) + "{\"content\":\"a\",\n";
    insta::assert_snapshot!(
        "bad_json_at_line_7",
        refused(|dir| std::fs::write(dir.join("bad.jsonl"), broken).unwrap(), &["--train_file=bad.jsonl"])
    );
    insta::assert_snapshot!("missing_column", refused(nothing, &["--response_column=summaty"]));
    insta::assert_snapshot!("wrong_type", refused(write("t.jsonl", "{\"content\":\"a\",\"summary\":[1]}\n"), &["--train_file=t.jsonl"]));
}

#[test]
fn train_with_a_wrong_configuration_says_what_would_be_right() {
    insta::assert_snapshot!("unknown_key", refused(nothing, &["--lerning_rate=1"]));
    insta::assert_snapshot!("batch_that_ranks_do_not_divide", refused(nothing, &["--global_batch_size=5"]));
}

#[test]
fn train_with_a_wrong_model_names_file_and_tensor() {
    insta::assert_snapshot!("config_of_another_model", refused(config("model_type", "llama".into()), &[]));
    let shards = |dir: &Path| -> Vec<std::path::PathBuf> {
        let mut shards: Vec<_> = std::fs::read_dir(dir.join("model")).unwrap().map(|e| e.unwrap().path()).collect();
        shards.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
        shards.sort();
        shards
    };
    insta::assert_snapshot!("missing_shard", refused(|dir| std::fs::remove_file(&shards(dir)[0]).unwrap(), &[]));
    insta::assert_snapshot!(
        "truncated_shard",
        refused(
            |dir| {
                let shard = &shards(dir)[0];
                let bytes = std::fs::read(shard).unwrap();
                std::fs::write(shard, &bytes[..bytes.len() / 2]).unwrap();
            },
            &[]
        )
    );
    insta::assert_snapshot!("wrongly_shaped_shard", refused(config("ffn_hidden_size", 180.into()), &[]));
    insta::assert_snapshot!("tokenizer_of_another_vocabulary", refused(config("padded_vocab_size", 320.into()), &[]));
}

#[test]
fn train_into_the_folder_of_another_run_is_refused() {
    let dir = setup();
    assert_eq!(glmddp_in(dir.path(), &TRAIN).code, 0);
    let again = glmddp_in(dir.path(), &TRAIN);
    assert_eq!(again.code, 2);
    insta::assert_snapshot!("output_directory_of_another_run", again.stderr);
    let other_seed = glmddp_in(dir.path(), &[&TRAIN[..12], &["--seed=2", "--max_steps=4", "--resume_from_checkpoint=latest"]].concat());
    assert_eq!(other_seed.code, 2);
    insta::assert_snapshot!("resume_with_another_seed", other_seed.stderr);
    let done = glmddp_in(dir.path(), &[&TRAIN[..], &["--resume_from_checkpoint=latest"]].concat());
    assert_eq!(done.code, 2);
    insta::assert_snapshot!("resume_of_a_finished_run", done.stderr);
    assert_eq!(glmddp_in(dir.path(), &[&TRAIN[..], &["--overwrite_output_dir"]].concat()).code, 0);
}

#[test]
fn train_on_more_ranks_than_slots_is_refused() {
    let mut config = RunConfig::default();
    config.model.model_name_or_path = Some("model".into());
    config.data.train_file = Some("train.jsonl".into());
    config.run.output_dir = Some("out".into());
    config.batch.per_device_train_batch_size = Some(2);
    config.batch.global_batch_size = Some(4);
    let error = config.resolve(3, &Sources::default()).expect_err("3 ranks cannot share 2 slots");
    insta::assert_snapshot!("more_ranks_than_slots", format!("{error}\n\nhint: {}", error.hint().unwrap_or_default()));
}

fn plan(dir: &Path) -> Plan {
    let mut config = RunConfig::default();
    config.model.model_name_or_path = Some(dir.join("model"));
    config.data.train_file = Some(dir.join("data/train.jsonl"));
    config.run.output_dir = Some(dir.join("out"));
    config.run.max_steps = Some(2);
    config.run.save_steps = Some(1);
    config.method.pre_seq_len = Some(4);
    config.batch.per_device_train_batch_size = Some(2);
    config.batch.global_batch_size = Some(4);
    config.resolve(1, &Sources::default()).expect("the plan resolves")
}

#[test]
fn train_onto_a_full_disk_stops_and_leaves_no_half_checkpoint() {
    let dir = setup();
    let disk = FaultyDisk::with_free_bytes(5000);
    let error = run::run(&plan(dir.path()), &Solo, &disk, &Console::without_bar(), &Limits::default()).expect_err("the disk is full");
    assert!(error.is_users());
    let text = format!("{error}\n\nhint: {}", error.hint().unwrap_or_default()).replace(&dir.path().display().to_string(), "DIR");
    // Sizes vary with the length of the temporary folder's name.
    let digits = text.split(|c: char| c.is_ascii_digit()).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("N");
    insta::assert_snapshot!("full_disk", digits);
    let left: Vec<_> = std::fs::read_dir(dir.path().join("out")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["trainer_log.jsonl"], "neither a checkpoint nor a part of one");
}

#[test]
fn train_with_a_value_that_is_not_finite_stops_before_the_update_and_names_the_rows() {
    let dir = setup();
    // The logits overflow, so every loss is NaN.
    let path = support::first_shard_with(&dir.path().join("model"), "transformer.output_layer.weight");
    let mut tensors = crate::golden::load(&path);
    let weight = tensors["transformer.output_layer.weight"].clone();
    let bad = (weight.ones_like().unwrap() * 3e38).unwrap();
    tensors.insert("transformer.output_layer.weight".into(), bad);
    candle_core::safetensors::save(&tensors.into_iter().collect(), &path).unwrap();
    let ran = glmddp_in(dir.path(), &TRAIN);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    insta::assert_snapshot!("value_that_is_not_finite", ran.stderr);
    assert!(!dir.path().join("out/adapter").exists());
    assert_eq!(std::fs::read_to_string(dir.path().join("out/trainer_log.jsonl")).unwrap(), "");
}
