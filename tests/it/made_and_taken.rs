//! What the program makes it takes again: models, rows, configurations, adapters, checkpoints, answers.

use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use glmddp::cli::init_model::own_tokenizer;
use glmddp::config::{self, RunConfig};
use glmddp::formats::safetensors;
use glmddp::model::init::{self, InitOptions, Preset};
use glmddp::tokenizer::GlmTokenizer;
use serde_json::Value;

use crate::cli_support::{ok, project, refused};

/// A folder in which the program is run.
struct Folder(tempfile::TempDir);

impl Folder {
    /// With a tiny model and rows.
    fn with_model() -> Self {
        Self(project(6, 3))
    }

    fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn ok(&self, args: &str) -> String {
        ok(self.0.path(), args).stdout
    }

    fn refused(&self, args: &str) -> String {
        refused(self.0.path(), args)
    }

    /// The held-out loss of a model, with an adapter or alone.
    fn loss(&self, args: &str) -> f64 {
        let text = self.ok(&format!("evaluate --json --validation_file data/dev.jsonl {args}"));
        serde_json::from_str::<Value>(&text).unwrap()["eval_loss"].as_f64().unwrap()
    }
}

/// One step of one row.
const ONE_STEP: &str = "--global_batch_size 1 --max_steps 1 --max_train_samples 1 --quiet";

#[test]
fn made_models_of_all_small_presets_are_trained_on_evaluated_and_asked() {
    let folder = Folder::empty();
    for kind in ["advert", "answer"] {
        folder.ok(&format!("demo-data --kind {kind} --output_dir {kind} --rows 3 --dev_rows 2 --seed 9"));
    }
    folder.ok("init-model --preset small --num_layers 1 --output_dir small");
    for (name, args) in [
        ("tiny", "--preset tiny"),
        ("seeded", "--preset tiny --seed 18446744073709551615"),
        ("shallow", "--preset tiny --num_layers 1"),
        ("given", "--preset tiny --tokenizer small/tokenizer.model --num_layers 3"),
        ("small", ""),
    ] {
        if !args.is_empty() {
            folder.ok(&format!("init-model {args} --output_dir {name}"));
        }
        for kind in ["advert", "answer"] {
            let output = format!("{name}-{kind}");
            let rows = format!("--train_file {kind}/train.jsonl --validation_file {kind}/dev.jsonl");
            folder.ok(&format!("train --model_name_or_path {name} {rows} --output_dir {output} --finetuning_type lora {ONE_STEP}"));
            let tuned = format!("--model_name_or_path {name} --adapter {output}/adapter");
            folder.ok(&format!("evaluate {tuned} --validation_file {kind}/dev.jsonl"));
            folder.ok(&format!("generate {tuned} --file {kind}/dev.jsonl --rows 1 --max_new_tokens 2"));
        }
    }
}

/// The preset's own configuration, index and tokenizer, with weights of 0: drawing 700 million of them would take the test's time.
#[test]
fn made_model_of_the_6b_preset_is_trained_on() {
    let folder = Folder::empty();
    let tokenizer = own_tokenizer(Preset::SixB);
    let num_ids = GlmTokenizer::from_bytes(&tokenizer, Path::new("tokenizer.model")).unwrap().vocab_size();
    let options = InitOptions { preset: Preset::SixB, num_layers: Some(1), seed: 0 };
    let (_, shards) = init::write_all_but_weights(&folder.path("model"), options, &tokenizer, num_ids).unwrap();
    for (name, tensors) in shards {
        let mut file = std::fs::File::create(folder.path("model").join(name)).unwrap();
        file.write_all(&safetensors::header(&tensors).unwrap()).unwrap();
        let num_bytes: usize = tensors.iter().map(|(_, dtype, shape)| shape.iter().product::<usize>() * dtype.bitsize() / 8).sum();
        let start = file.stream_position().unwrap();
        file.set_len(start + num_bytes as u64).unwrap();
    }
    folder.ok("demo-data --output_dir data --rows 1 --dev_rows 0");
    let done = folder.ok(&format!(
        "train --model_name_or_path model --train_file data/train.jsonl --output_dir out --pre_seq_len 1 {ONE_STEP} \
         --max_source_length 24 --max_target_length 1"
    ));
    assert!(done.starts_with("done: 1 steps"), "{done}");
}

#[test]
fn tokenizer_that_training_would_refuse_is_refused_by_init_model() {
    let folder = Folder::empty();
    folder.ok("init-model --preset tiny --output_dir tiny");
    let text = folder.refused("init-model --preset 6b --tokenizer tiny/tokenizer.model --output_dir six");
    insta::assert_snapshot!(text, @r"
    error: the tokenizer tiny/tokenizer.model has 764 ids, the vocabulary of preset 6b takes 64001 to 65024

    hint: leave `--tokenizer` out, or take a preset whose vocabulary follows from the tokenizer: tiny or small
    ");
    assert!(!folder.path("six").exists());
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 1, "no temporary folder is left");
}

#[test]
fn made_rows_are_never_a_file_without_rows() {
    let folder = Folder::with_model();
    insta::assert_snapshot!(folder.ok("demo-data --output_dir few --rows 1 --dev_rows 0"), @"few/train.jsonl: 1 rows; columns content, summary");
    assert!(!folder.path("few/dev.jsonl").exists());
    folder.ok(&format!("train --model_name_or_path model --train_file few/train.jsonl --output_dir out {ONE_STEP}"));
    insta::assert_snapshot!(folder.refused("demo-data --output_dir none --rows 0"), @r"
    error: `rows` is `0`, expected 1 or more
      --> command line, `--rows`
    ");
    assert!(!folder.path("none").exists());
}

#[test]
fn made_configuration_of_every_method_gives_the_same_plan_and_the_same_adapter() {
    let folder = Folder::with_model();
    for name in ["one", "two"] {
        folder.train(name, &format!("--finetuning_type adapter --adapter_name {name}"));
    }
    for (i, method) in METHODS.iter().enumerate() {
        let more = MORE[i % MORE.len()];
        let output = format!("run{i}");
        folder.train(&output, &format!("{method} {more}"));
        let kept = format!("{output}/training_args.toml");
        let load = |path: &str| config::load(Some(&folder.path(path)), &RunConfig::default()).unwrap();
        let plan = load(&kept).resolve(1).unwrap();
        std::fs::write(folder.path("again.toml"), plan.to_toml().unwrap()).unwrap();
        assert_eq!(load("again.toml").resolve(1).unwrap(), plan, "{method}");
        assert_eq!(load(&kept).warnings, [""; 0], "{method}");

        folder.ok(&format!("train --config {kept} --output_dir again --overwrite_output_dir --quiet"));
        assert_eq!(weights(&folder.path(&output)), weights(&folder.path("again")), "{method}");
    }
}

#[test]
fn made_export_of_every_method_has_the_loss_of_the_run_wherever_it_lies() {
    let folder = Folder::with_model();
    for name in ["one", "two"] {
        folder.train(name, &format!("--finetuning_type adapter --adapter_name {name}"));
    }
    for (i, method) in METHODS.iter().enumerate() {
        let output = format!("run{i}");
        folder.train(&output, method);
        folder.ok(&format!("checkpoint export {output} --model_name_or_path model --output_dir exported{i}"));
        let is_model = method.contains("freeze") || method.contains("full");
        let loss = |dir: &str| {
            folder.loss(&if is_model {
                format!("--model_name_or_path {dir}")
            } else {
                format!("--model_name_or_path model --adapter {dir}")
            })
        };
        let trained = loss(&format!("{output}/adapter"));
        assert_eq!(loss(&format!("exported{i}")), trained, "{method}");
        if is_model {
            folder.ok(&format!("{TRAIN} --model_name_or_path exported{i} --output_dir {output}-on --finetuning_type lora"));
            continue;
        }
        assert_eq!(loss(&format!("{output}/checkpoint-2")), trained, "{method}: a checkpoint holds the adapter too");
        if method.contains("lora") || method.contains("ia3") {
            folder.ok(&format!("export --merge --model_name_or_path model --adapter exported{i} --output_dir merged{i}"));
            let merged = folder.loss(&format!("--model_name_or_path merged{i}"));
            assert!((merged - trained).abs() < 1e-5, "{method}: {merged} and {trained}");
            folder.ok(&format!("{TRAIN} --model_name_or_path merged{i} --output_dir {output}-on --finetuning_type ia3"));
        }
    }
}

#[test]
fn made_checkpoint_of_an_imported_adapter_is_trained_on_with_the_kept_configuration() {
    let folder = Folder::with_model();
    for name in ["one", "two"] {
        folder.train(name, &format!("--finetuning_type adapter --adapter_name {name}"));
    }
    // PEFT's format holds the output of an encoder, which is no start for a run with one: README says so.
    for (i, method) in METHODS.iter().enumerate().filter(|(_, method)| !["p_tuning", "prefix_tuning"].iter().any(|m| method.contains(m))) {
        if method.contains("freeze") || method.contains("full") {
            continue;
        }
        let output = format!("run{i}");
        folder.train(&output, method);
        let again = format!("--config {output}/training_args.toml --output_dir imported{i}");
        folder.ok(&format!("checkpoint import {output}/adapter {again}"));
        let done = folder.ok(&format!("train {again} --resume_from_checkpoint latest --quiet"));
        assert!(done.starts_with("done: 2 steps"), "{method}: {done}");
    }
}

#[test]
fn made_answers_are_rows_to_evaluate_and_to_train_on() {
    let folder = Folder::with_model();
    folder.train("out", "--finetuning_type full --learning_rate 1e-2 --max_steps 20");
    let file = "--file data/dev.jsonl --response_column summary --max_new_tokens 6 --json";
    let answers = folder.ok(&format!("generate --model_name_or_path out/adapter {file}"));
    std::fs::write(folder.path("answers.jsonl"), answers).unwrap();
    let loss = |file: &str, columns: &str| {
        let text = folder.ok(&format!("evaluate --model_name_or_path model --validation_file {file} {columns} --json"));
        serde_json::from_str::<Value>(&text).unwrap()["eval_loss"].as_f64().unwrap()
    };
    let expected = loss("answers.jsonl", "--prompt_column prompt --response_column expected");
    assert_eq!(expected, loss("data/dev.jsonl", ""), "the rows are the same");
    let columns = "--prompt_column prompt --response_column answer --train_file answers.jsonl";
    folder.ok(&format!("train --model_name_or_path model {columns} --output_dir on_answers {ONE_STEP}"));
}

#[test]
fn made_comparison_has_adapters_that_are_taken() {
    let folder = Folder::with_model();
    let rows = "--train_file data/train.jsonl --validation_file data/dev.jsonl --global_batch_size 2 --max_steps 2";
    folder.ok(&format!("compare --methods lora,ia3,prompt_tuning --model_name_or_path model {rows} --output_dir all --quiet"));
    for label in ["lora", "ia3", "prompt_tuning"] {
        let adapter = folder.loss(&format!("--model_name_or_path model --adapter all/{label}/adapter"));
        folder.ok(&format!("checkpoint export all/{label} --output_dir {label}"));
        assert_eq!(folder.loss(&format!("--model_name_or_path model --adapter {label}")), adapter, "{label}");
    }
}

#[test]
fn made_completions_are_a_script_for_bash() {
    let script = Folder::empty().ok("completions bash");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("glmddp.bash"), script).unwrap();
    let check = Command::new("bash").arg("-c").arg("source glmddp.bash && complete -p glmddp").current_dir(dir.path()).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
}

const TRAIN: &str = "train --train_file data/train.jsonl --global_batch_size 2 --max_steps 2 --quiet";

/// One of each method, and of each kind of it that has a file format of its own.
#[rustfmt::skip]
const METHODS: [&str; 14] = [
    "--finetuning_type ptuning_v2 --pre_seq_len 4",
    "--finetuning_type prefix_tuning --pre_seq_len 4 --encoder_hidden_size 5",
    "--finetuning_type prompt_tuning --num_virtual_tokens 4",
    "--finetuning_type p_tuning --num_virtual_tokens 4",
    "--finetuning_type p_tuning --num_virtual_tokens 4 --encoder_reparameterization_type LSTM --encoder_hidden_size 6",
    "--finetuning_type lora --lora_rank 4 --lora_alpha 0.1 --lora_target all --use_rslora",
    "--finetuning_type lora --lora_target .*layers\\.1\\..*dense --use_dora",
    "--finetuning_type adapter --adapter_config houlsby --reduction_factor 8 --adapter_name more",
    "--finetuning_type adapter",
    "--finetuning_type adapter_fusion --fusion_adapters one/adapter,two/adapter --fusion_regularization 0.01",
    "--finetuning_type freeze --freeze_trainable_layers 1",
    "--finetuning_type freeze --freeze_trainable_modules layers.1.mlp,output_layer --torch_dtype bfloat16",
    "--finetuning_type full",
    "--finetuning_type ia3 --ia3_target dense,dense_4h_to_h --ia3_feedforward dense_4h_to_h",
];

/// Settings of a run that are written down otherwise than they are given.
#[rustfmt::skip]
const MORE: [&str; 5] = [
    "--warmup_ratio 0.5 --lr_scheduler_type cosine --seed 9223372036854775807",
    "--max_steps -1 --num_train_epochs 0.5 --save_steps 0 --audit_steps 0 --stall_timeout 0s",
    "--max_grad_norm 0 --weight_decay 1e-300 --adam_epsilon 1e-12 --recompute block --save_before_timeout 1-03:55:00",
    "--per_device_train_batch_size 2 --reduction all_reduce --loss_mean micro_batch --truncation published --shard_optimizer",
    "--validation_file data/dev.jsonl --eval_steps 1 --save_steps 1 --save_best --save_total_limit 1 --save_keep_every 2 --on_save_error warn",
];

impl Folder {
    fn train(&self, output: &str, args: &str) -> String {
        self.ok(&format!("{TRAIN} --model_name_or_path model --output_dir {output} {args}"))
    }
}

/// sha256 of each file of weights in a run's export, by path.
fn weights(output: &Path) -> Vec<(PathBuf, String)> {
    let root = output.join("adapter");
    let mut files = Vec::new();
    let mut dirs = vec![root.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            match path.extension().and_then(|e| e.to_str()) {
                _ if path.is_dir() => dirs.push(path),
                Some("bin" | "safetensors") => {
                    files.push((path.strip_prefix(&root).unwrap().to_owned(), glmddp::digest::sha256_hex(std::fs::read(&path).unwrap())));
                }
                _ => {}
            }
        }
    }
    files.sort();
    assert!(!files.is_empty(), "{}", root.display());
    files
}
