//! `glmddp checkpoint`: what its commands show, do and refuse.

use std::path::Path;

use crate::cli_support::{Ran, glmddp_in};
use crate::support;

const PATHS: [&str; 2] = ["--model_name_or_path=model", "--train_file=data/train.jsonl"];
const SIZES: [&str; 8] = [
    "--max_source_length=64",
    "--max_target_length=32",
    "--per_device_train_batch_size=2",
    "--global_batch_size=4",
    "--threads=1",
    "--seed=1",
    "--max_steps=3",
    "--learning_rate=0.01",
];

fn good(dir: &Path, args: &[&str]) -> String {
    let ran = glmddp_in(dir, args);
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
    ran.stdout
}

fn refused(dir: &Path, args: &[&str]) -> String {
    let Ran { code, stdout, stderr } = glmddp_in(dir, args);
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    hidden(&stderr)
}

/// Hashes, sizes on the disk and times are of no matter.
fn hidden(text: &str) -> String {
    let replace = |text: &str, pattern: &str, by: &str| regex::Regex::new(pattern).unwrap().replace_all(text, by).into_owned();
    let text = replace(text, "[0-9a-f]{64}", "HASH");
    let text = replace(&text, r"expected \d+ bytes", "expected SIZE");
    let text = replace(&text, r"[0-9.]+ ([KM]iB|B)\b", "SIZE");
    replace(&text, r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME")
}

/// A tiny model and rows.
fn base() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    good(dir.path(), &["init-model", "--preset", "tiny", "--output_dir", "model"]);
    good(dir.path(), &["demo-data", "--output_dir", "data", "--rows", "20", "--dev_rows", "4"]);
    dir
}

fn train(dir: &Path, output: &str, args: &[&str]) -> String {
    let output = format!("--output_dir={output}");
    good(dir, &[&["train", "--quiet", &output][..], &PATHS, &SIZES, args].concat())
}

const PREFIX: [&str; 2] = ["--finetuning_type=prefix", "--pre_seq_len=4"];

/// The same with three checkpoints of a prefix, with held-out losses.
fn run() -> tempfile::TempDir {
    let dir = base();
    let eval = ["--validation_file=data/dev.jsonl", "--eval_steps=1", "--save_steps=1"];
    train(dir.path(), "out", &[&PREFIX[..], &eval].concat());
    dir
}

fn shard(dir: &Path, step: u64) -> std::path::PathBuf {
    dir.join(format!("out/checkpoint-{step}/state-00000-of-00001.safetensors.zst"))
}

/// Changes a byte.
fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = at.min(bytes.len() - 1);
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn inspect_shows_one_checkpoint_or_all_of_a_run() {
    let dir = run();
    let one = good(dir.path(), &["checkpoint", "inspect", "out/checkpoint-2", "--stats"]);
    assert!(one.contains("parameter") && one.contains("exp_avg_sq"));
    insta::assert_snapshot!("inspect_one", hidden(&one));
    std::fs::remove_file(dir.path().join("out/checkpoint-1/manifest.json")).unwrap();
    std::fs::remove_file(shard(dir.path(), 2)).unwrap();
    insta::assert_snapshot!("inspect_all", hidden(&good(dir.path(), &["checkpoint", "inspect", "out"])));
    let json: serde_json::Value = serde_json::from_str(&good(dir.path(), &["checkpoint", "inspect", "out", "--json"])).unwrap();
    assert_eq!((json[0]["step"].as_u64(), json[0]["state"].as_str()), (Some(3), Some("whole")));
    assert!(json[2]["state"]["incomplete"].is_string(), "{json}");
    let json = good(dir.path(), &["checkpoint", "inspect", "out/checkpoint-3", "--json", "--stats"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["kinds"]["parameter"]["elements"], json["kinds"]["exp_avg"]["elements"]);
    assert!(json["stats"][0]["norm"].as_f64().unwrap() > 0.0);
}

#[test]
fn verify_names_every_damage_and_what_a_resume_would_take() {
    let dir = run();
    insta::assert_snapshot!("verify_whole", hidden(&good(dir.path(), &["checkpoint", "verify", "out"])));
    flip(&shard(dir.path(), 3), 400_000);
    flip(&dir.path().join("out/checkpoint-3/adapter_config.json"), 5);
    std::fs::write(dir.path().join("out/checkpoint-2/glmddp.json"), "{}").unwrap();
    std::fs::create_dir(dir.path().join("out/.tmp-checkpoint-4")).unwrap();
    let ran = glmddp_in(dir.path(), &["checkpoint", "verify", "out"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (1, ""));
    assert_eq!(ran.stdout.matches("DAMAGED").count(), 2);
    insta::assert_snapshot!("verify_damaged", hidden(&ran.stdout));
    let ran = glmddp_in(dir.path(), &["checkpoint", "verify", "out", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.code, json["latest"].as_str()), (1, Some("out/checkpoint-1")));
    assert_eq!(json["checkpoints"][0]["damages"].as_array().unwrap().len(), 2, "{json}");
    assert_eq!(json["leftovers"][0], "out/.tmp-checkpoint-4");
    good(dir.path(), &["checkpoint", "verify", "out/checkpoint-1"]);
}

/// Of two damaged tensors in one shard both are named.
#[test]
fn verify_goes_on_behind_a_damaged_tensor() {
    let dir = run();
    let checkpoint = dir.path().join("out/checkpoint-3");
    let path = checkpoint.join("manifest.json");
    let old = std::fs::read(&path).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_slice(&old).unwrap();
    for tensor in ["exp_avg", "parameter"] {
        let name = format!("{tensor}.transformer.prefix_encoder.embedding.weight");
        manifest["tensors"][&name]["pieces"][0]["sha256"] = "0".repeat(64).into();
    }
    let new = serde_json::to_vec(&manifest).unwrap();
    let sum = |bytes: &[u8]| glmddp::digest::sha256_hex(bytes);
    let sums = std::fs::read_to_string(checkpoint.join("SHA256SUMS")).unwrap().replace(&sum(&old), &sum(&new));
    std::fs::write(checkpoint.join("SHA256SUMS"), sums).unwrap();
    std::fs::write(path, new).unwrap();
    let ran = glmddp_in(dir.path(), &["checkpoint", "verify", "out/checkpoint-3"]);
    assert_eq!(ran.code, 1);
    insta::assert_snapshot!("verify_two_damaged_tensors", hidden(&ran.stdout));
}

#[test]
fn diff_shows_plan_and_tensors() {
    let dir = run();
    insta::assert_snapshot!("diff_of_steps", figures_hidden(&good(dir.path(), &["checkpoint", "diff", "out/checkpoint-1", "out"])));
    train(dir.path(), "other", &["--finetuning_type=prefix", "--pre_seq_len=5", "--max_steps=1", "--weight_decay=0.5"]);
    insta::assert_snapshot!("diff_of_runs", figures_hidden(&good(dir.path(), &["checkpoint", "diff", "out/checkpoint-1", "other"])));
    let json = good(dir.path(), &["checkpoint", "diff", "out/checkpoint-1", "out/checkpoint-1", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json["plan"].as_array().unwrap().len(), &json["tensors"][0][1]), (0, &"equal".into()));
}

/// Numbers of a floating-point computation.
fn figures_hidden(text: &str) -> String {
    let replace = |text: &str, pattern: &str, by: &str| regex::Regex::new(pattern).unwrap().replace_all(text, by).into_owned();
    replace(&replace(&hidden(text), r"\d\.\d+e-?\d+", "FIGURE"), r"\d+\.\d{6,}", "FIGURE")
}

#[test]
fn export_gives_what_the_run_exported() {
    let dir = run();
    good(dir.path(), &["checkpoint", "export", "out", "--output_dir", "again"]);
    let names = |folder: &str| {
        let mut names: Vec<_> = std::fs::read_dir(dir.path().join(folder)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names("again"), names("out/adapter"));
    for name in names("again") {
        let read = |folder: &str| std::fs::read(dir.path().join(folder).join(&name)).unwrap();
        assert!(read("again") == read("out/adapter"), "{}", name.display());
    }
    insta::assert_snapshot!("export_into_a_taken_folder", refused(dir.path(), &["checkpoint", "export", "out", "--output_dir", "again"]));
}

#[test]
fn export_of_a_model_needs_its_base() {
    let dir = base();
    train(dir.path(), "out", &["--finetuning_type=full", "--learning_rate=0.001"]);
    let args = ["checkpoint", "export", "out", "--output_dir", "again"];
    insta::assert_snapshot!("export_without_a_base", refused(dir.path(), &args));
    good(dir.path(), &["init-model", "--preset", "tiny", "--seed", "7", "--output_dir", "stranger"]);
    insta::assert_snapshot!("export_on_another_base", refused(dir.path(), &[&args[..], &["--model_name_or_path=stranger"]].concat()));
    good(dir.path(), &[&args[..], &["--model_name_or_path=model"]].concat());
    for entry in std::fs::read_dir(dir.path().join("again")).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |folder: &str| std::fs::read(dir.path().join(folder).join(&name)).unwrap();
        assert!(read("again") == read("out/adapter"), "{}", name.display());
    }
}

/// The parameters of a checkpoint by name, without its moments.
fn parameters(checkpoint: &Path) -> Vec<(String, String)> {
    support::state_sums(checkpoint).into_iter().filter(|(name, _)| name.starts_with("parameter.")).collect()
}

#[test]
fn adapters_of_any_format_become_the_start_of_a_run() {
    let dir = run();
    let out = dir.path().join("out");
    let import = |adapter: &str, output: &str, args: &[&str]| {
        let output_dir = format!("--output_dir={output}");
        good(dir.path(), &[&["checkpoint", "import", adapter, &output_dir][..], &PATHS, &SIZES, args].concat());
        parameters(&dir.path().join(output).join("checkpoint-0"))
    };
    let expected = parameters(&out.join("checkpoint-3"));
    // THUDM's two files alone, PEFT's alone, and both.
    for (folder, names) in [("thudm", ["config.json", "pytorch_model.bin"]), ("peft", ["adapter_config.json", "adapter_model.safetensors"])]
    {
        std::fs::create_dir(dir.path().join(folder)).unwrap();
        for name in names {
            std::fs::copy(out.join("adapter").join(name), dir.path().join(folder).join(name)).unwrap();
        }
    }
    assert_eq!(import("thudm", "from-thudm", &PREFIX), expected);
    assert_eq!(import("peft", "from-peft", &PREFIX), expected);
    assert_eq!(import("out/adapter", "from-both", &PREFIX), expected);
    let as_prefix_tuning =
        import("peft", "other-method", &["--finetuning_type=prefix_tuning", "--pre_seq_len=4", "--prefix_projection=false"]);
    assert_eq!(as_prefix_tuning[0].1, expected[0].1);
    let going_on = train(dir.path(), "from-thudm", &[&PREFIX[..], &["--resume_from_checkpoint=latest"]].concat());
    assert!(going_on.contains("done: 3 steps"), "{going_on}");

    train(dir.path(), "projected", &[&PREFIX[..], &["--prefix_projection"]].concat());
    let projected = parameters(&dir.path().join("projected/checkpoint-3"));
    assert_eq!(import("projected/adapter", "from-projected", &[&PREFIX[..], &["--prefix_projection"]].concat()), projected);
    train(dir.path(), "lora", &["--finetuning_type=lora", "--lora_rank=2"]);
    let lora = parameters(&dir.path().join("lora/checkpoint-3"));
    assert_eq!(import("lora/adapter", "from-lora", &["--finetuning_type=lora", "--lora_rank=2"]), lora);
}

#[test]
fn adapter_that_does_not_fit_is_refused_with_both_values() {
    let dir = run();
    let import = |adapter: &str, args: &[&str]| {
        refused(dir.path(), &[&["checkpoint", "import", adapter, "--output_dir=new"][..], &PATHS, &SIZES, args].concat())
    };
    train(dir.path(), "lora", &["--finetuning_type=lora", "--lora_rank=2"]);
    insta::assert_snapshot!("import_of_another_length", import("out/adapter", &["--finetuning_type=prefix", "--pre_seq_len=5"]));
    insta::assert_snapshot!("import_of_another_rank", import("lora/adapter", &["--finetuning_type=lora", "--lora_rank=4"]));
    insta::assert_snapshot!("import_of_another_method", import("out/adapter", &["--finetuning_type=lora", "--lora_rank=4"]));
    std::fs::remove_file(dir.path().join("out/adapter/pytorch_model.bin")).unwrap();
    let projected = [&PREFIX[..], &["--prefix_projection"]].concat();
    insta::assert_snapshot!("import_of_an_output_into_a_projection", import("out/adapter", &projected));
    insta::assert_snapshot!("import_of_no_adapter", import("data", &PREFIX));
    insta::assert_snapshot!("import_of_a_misspelt_key", import("out/adapter", &["--finetuning_typ=lora"]));
    assert!(!dir.path().join("new/checkpoint-0").exists());
    insta::assert_snapshot!(
        "import_into_another_run",
        refused(dir.path(), &[&["checkpoint", "import", "out/adapter", "--output_dir=out"][..], &PATHS, &SIZES, &PREFIX].concat())
    );
}

#[test]
fn prune_shows_and_deletes_by_the_rules_and_never_the_newest_whole_one() {
    let dir = run();
    let prune = |args: &[&str]| good(dir.path(), &[&["checkpoint", "prune", "out", "--save_total_limit=1"], args].concat());
    insta::assert_snapshot!("prune_dry_run", prune(&["--dry-run", "--save_keep_every=2"]));
    let steps = || {
        let all = glmddp::checkpoint::newest_first(&glmddp::checkpoint::RealDisk, &dir.path().join("out")).unwrap();
        all.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(steps().len(), 3);
    flip(&shard(dir.path(), 3), 400_000);
    insta::assert_snapshot!("prune_with_a_damaged_newest", prune(&[]));
    assert_eq!(steps(), ["checkpoint-3", "checkpoint-2"]);
    flip(&shard(dir.path(), 2), 400_000);
    let args = ["checkpoint", "prune", "out", "--save_total_limit=1"];
    insta::assert_snapshot!("prune_without_a_whole_one", refused(dir.path(), &args));
    assert_eq!(steps().len(), 2);
}

#[test]
fn paths_that_are_no_checkpoints_are_refused() {
    let dir = run();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let texts = [
        &["verify", "absent"][..],
        &["verify", "data/train.jsonl"],
        &["inspect", "empty"],
        &["inspect", "data/train.jsonl"],
        &["diff", "out/checkpoint-1", "empty"],
        &["diff", "out/checkpoint-9", "out"],
        &["export", "empty", "--output_dir=new"],
        &["prune", "out/checkpoint-1", "--save_total_limit=1"],
        &["prune", "out", "--save_total_limit=0"],
        &["prune", "out"],
    ]
    .map(|args| format!("checkpoint {}\n{}", args.join(" "), refused(dir.path(), &[&["checkpoint"], args].concat())));
    insta::assert_snapshot!("paths_that_are_no_checkpoints", texts.join("\n"));
}
