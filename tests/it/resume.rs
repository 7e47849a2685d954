//! What a run says when it goes on from a checkpoint, and what it refuses to go on from.

use std::path::Path;

use glmddp::digest::sha256_hex;
use serde_json::Value;

use crate::cli_support::{Ran, glmddp_in};

const TRAIN: [&str; 14] = [
    "train",
    "--model_name_or_path=model",
    "--train_file=data/train.jsonl",
    "--output_dir=out",
    "--max_steps=4",
    "--save_steps=1",
    "--finetuning_type=lora",
    "--lora_rank=2",
    "--max_source_length=64",
    "--max_target_length=32",
    "--per_device_train_batch_size=2",
    "--global_batch_size=4",
    "--threads=1",
    "--seed=1",
];

fn train(dir: &Path, args: &[&str]) -> Ran {
    glmddp_in(dir, &[&TRAIN[..], args].concat())
}

/// A tiny model, rows, and a run of four steps with a checkpoint of each.
fn run() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for args in [
        &["init-model", "--preset", "tiny", "--output_dir", "model"][..],
        &["demo-data", "--output_dir", "data", "--rows", "20", "--dev_rows", "4"],
        &TRAIN,
    ] {
        let ran = glmddp_in(dir.path(), args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    dir
}

/// Changes a checkpoint's manifest, with its hash.
fn forge(checkpoint: &Path, change: impl FnOnce(&mut Value)) {
    let path = checkpoint.join("manifest.json");
    let old = std::fs::read(&path).unwrap();
    let mut manifest: Value = serde_json::from_slice(&old).unwrap();
    change(&mut manifest);
    let new = serde_json::to_vec_pretty(&manifest).unwrap();
    let sums = checkpoint.join("SHA256SUMS");
    let text = std::fs::read_to_string(&sums).unwrap().replace(&sha256_hex(&old), &sha256_hex(&new));
    std::fs::write(sums, text).unwrap();
    std::fs::write(path, new).unwrap();
}

#[test]
fn resumed_run_tells_where_it_goes_on_and_what_differs() {
    let dir = run();
    std::fs::remove_file(dir.path().join("out/checkpoint-4/manifest.json")).unwrap();
    let args = ["--resume_from_checkpoint=latest", "--learning_rate=0.5", "--per_device_train_batch_size=1", "--save_total_limit=9"];
    let ran = train(dir.path(), &args);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let start = ran.stderr.find("goes on from").expect("a report");
    let last = "the probe gave what it gave then";
    let end = ran.stderr.find(last).expect("a report") + last.len();
    insta::assert_snapshot!("resumed_with_another_plan", &ran.stderr[start..end]);
}

#[test]
fn manifest_and_export_hold_the_probe_of_their_step() {
    let dir = run();
    let read = |path: &str| -> Value { serde_json::from_slice(&std::fs::read(dir.path().join(path)).unwrap()).unwrap() };
    let of_step = |step: u64| read(&format!("out/checkpoint-{step}/manifest.json"))["probe"].clone();
    assert_eq!(of_step(4)["rows"], of_step(1)["rows"]);
    assert_ne!(of_step(4)["loss"], of_step(1)["loss"]);
    assert_eq!(of_step(4)["rows"].as_array().unwrap().len(), 2);
    assert!(of_step(4)["rows"][0]["ids"].as_array().unwrap().len() <= 64);
    assert_eq!(read("out/adapter/glmddp.json")["probe"], of_step(4));
    assert_eq!(read("out/checkpoint-4/glmddp.json")["probe"], of_step(4));
}

#[test]
fn state_that_gives_another_loss_or_logit_is_refused_with_both_values() {
    let dir = run();
    let checkpoint = dir.path().join("out/checkpoint-4");
    let resumed = || {
        let Ran { code, stderr, .. } = train(dir.path(), &["--resume_from_checkpoint=latest", "--max_steps=5", "--quiet"]);
        (code, regex::Regex::new(r"is -?[\d.]+").unwrap().replace_all(&stderr, "is NOW").into_owned())
    };
    let probe: Value = serde_json::from_slice::<Value>(&std::fs::read(checkpoint.join("manifest.json")).unwrap()).unwrap()["probe"].clone();
    // Less than the tolerance: another processor.
    forge(&checkpoint, |manifest| manifest["probe"]["loss"] = (probe["loss"].as_f64().unwrap() * 1.0001).into());
    assert_eq!(resumed().0, 0);
    std::fs::remove_dir_all(dir.path().join("out/checkpoint-5")).unwrap();
    forge(&checkpoint, |manifest| manifest["probe"]["loss"] = 1.25.into());
    let (code, text) = resumed();
    assert_eq!(code, 2);
    insta::assert_snapshot!("resume_with_another_loss", text);
    forge(&checkpoint, |manifest| {
        manifest["probe"] = probe.clone();
        manifest["probe"]["logits"][3] = 77.5.into();
    });
    insta::assert_snapshot!("resume_with_another_logit", resumed().1);
    forge(&checkpoint, |manifest| manifest["probe"]["rows"][0]["targets"][0] = 700.into());
    let (code, text) = resumed();
    assert_eq!(code, 1, "a manifest that was forged");
    assert!(text.contains("target 700 of probe row 0 is not among its"), "{text}");
}

#[test]
fn adapter_that_gives_another_loss_is_refused() {
    let dir = run();
    let evaluate = || {
        let args = ["--model_name_or_path=model", "--adapter=out/adapter", "--validation_file=data/dev.jsonl", "--threads=1"];
        glmddp_in(dir.path(), &[&["evaluate"], &args[..]].concat())
    };
    assert_eq!(evaluate().code, 0);
    let path = dir.path().join("out/adapter/glmddp.json");
    let mut about: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    about["probe"]["loss"] = 9.5.into();
    std::fs::write(&path, about.to_string()).unwrap();
    let Ran { code, stderr, .. } = evaluate();
    assert_eq!(code, 2);
    assert!(stderr.contains("loss of the probe was 9.5 and is "), "{stderr}");
}

#[test]
fn other_rows_of_the_same_number_are_refused() {
    let dir = run();
    let path = dir.path().join("data/train.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut rows: Vec<&str> = text.lines().collect();
    rows.swap(3, 7);
    std::fs::write(&path, format!("{}\n", rows.join("\n"))).unwrap();
    let Ran { code, stderr, .. } = train(dir.path(), &["--resume_from_checkpoint=latest", "--max_steps=5", "--quiet"]);
    assert_eq!(code, 2);
    insta::assert_snapshot!("resume_with_other_rows", regex::Regex::new("[0-9a-f]{64}").unwrap().replace_all(&stderr, "HASH"));
}
