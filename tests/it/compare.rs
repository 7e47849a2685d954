//! `glmddp compare` as a user starts it: its table, its resumes, its refusals, and the same numbers on two ranks.

use std::path::{Path, PathBuf};
use std::process::Command;

use glmddp::compare::{Figures, Report, RunResult};

use crate::cli_support::{Ran, glmddp_in};
use crate::not_run::{Missing, not_run};

/// Three methods with small sizes; [optim] and [method] of the shared part are passed over with a warning.
const CONFIG: &str = r#"
[model]
model_name_or_path = "model"
[data]
train_file = "data/train.jsonl"
validation_file = "data/dev.jsonl"
max_source_length = 64
max_target_length = 32
[batch]
per_device_train_batch_size = 2
global_batch_size = 8
[run]
output_dir = "out"
max_steps = 4
save_steps = 2
threads = 1

[methods.ptuning_v2]
finetuning_type = "ptuning_v2"
pre_seq_len = 4
learning_rate = 2e-2
[methods.lora]
finetuning_type = "lora"
lora_rank = 2
[methods.rslora]
finetuning_type = "lora"
lora_rank = 2
use_rslora = true
learning_rate = 1e-3
"#;

struct Setup(tempfile::TempDir);

impl Setup {
    /// A tiny model, rows, and `CONFIG` as c.toml.
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for args in [
            &["init-model", "--preset", "tiny", "--output_dir", "model"][..],
            &["demo-data", "--output_dir", "data", "--rows", "40", "--dev_rows", "12"],
        ] {
            let ran = glmddp_in(dir.path(), args);
            assert_eq!(ran.code, 0, "{}", ran.stderr);
        }
        std::fs::write(dir.path().join("c.toml"), CONFIG).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn compare(&self, args: &[&str]) -> Ran {
        glmddp_in(self.0.path(), &[&["compare", "c.toml"], args].concat())
    }

    fn compared(&self, args: &[&str]) -> String {
        let ran = self.compare(args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.stderr + &ran.stdout
    }

    /// What a comparison with `args` on top of c.toml refuses.
    fn refused(&self, args: &[&str]) -> String {
        let ran = self.compare(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        ran.stderr
    }

    fn report(&self, output: &str) -> Report {
        let path = self.path(output).join("compare.json");
        Report::parse(&path, &std::fs::read(&path).expect("a report was written")).expect("it is one")
    }
}

fn figures<'a>(report: &'a Report, label: &str) -> &'a Figures {
    match report.entry(label).and_then(|entry| entry.result.as_ref()) {
        Some(RunResult::Trained(figures)) => figures,
        other => panic!("{label}: {other:?}"),
    }
}

/// What may not depend on ranks, threads or interruptions: the bits of the losses and of the drift.
fn bits(report: &Report) -> Vec<(String, Vec<u64>)> {
    let bits = |f: &Figures| [f.train_loss, f.held_out_loss, f.drift_kl].map(|x| x.expect("finite").to_bits()).to_vec();
    let base = report.base_held_out_loss.expect("finite").to_bits();
    report.trained().map(|(label, f)| (label.to_owned(), [bits(f), vec![base]].concat())).collect()
}

#[test]
fn compare_of_three_methods_fills_the_table_and_a_second_call_computes_nothing() {
    let setup = Setup::new();
    let out = setup.compared(&[]);
    let report = setup.report("out");
    assert_eq!(report.entries.iter().map(|e| e.label.as_str()).collect::<Vec<_>>(), ["ptuning_v2", "lora", "rslora"]);
    assert_eq!((report.shared.steps, report.shared.rows_per_step, report.shared.drift_rows), (4, 8, 12));
    let base = report.base_held_out_loss.unwrap();
    for (label, f) in report.trained() {
        let dir = setup.path("out").join(label);
        let tensors = std::fs::metadata(dir.join("adapter/adapter_model.safetensors")).unwrap().len();
        assert_eq!((f.steps, f.weight_bytes, f.world_size), (4, tensors, 1), "{label}");
        // Updates start at nothing and go down from the first step; a prefix starts as noise, and four steps do not make up for it.
        assert!(f.held_out_loss.unwrap() < base || label == "ptuning_v2", "{label}: {:?}, the base has {base}", f.held_out_loss);
        assert!(f.drift_kl.unwrap() > 1e-9 && f.tokens_per_second.unwrap() > 0.0 && f.seconds > 0.0, "{label}: {f:?}");
        assert!(f.peak_rss_bytes.unwrap() > report.shared.base_parameters * 4, "the base's weights are in it");
        assert!(out.contains(&format!("| {label} ")), "{out}");
    }
    // 4 virtual tokens x 2 x 2 layers x 2 groups x 16 channels; rank 2 on query_key_value of 2 layers.
    assert_eq!(figures(&report, "ptuning_v2").trainable_parameters, 512);
    assert_eq!(figures(&report, "lora").trainable_parameters, 768);
    for name in ["compare.md", "compare.svg"] {
        let text = std::fs::read_to_string(setup.path("out").join(name)).unwrap();
        assert!(["ptuning_v2", "lora", "rslora"].iter().all(|label| text.contains(label)), "{name}: {text}");
    }

    let log = setup.path("out/lora/trainer_log.jsonl");
    let written = std::fs::metadata(&log).unwrap().modified().unwrap();
    let again = setup.compared(&[]);
    assert!(again.contains("lora: done before") && !again.contains("grad_norm"), "{again}");
    assert_eq!(setup.report("out"), report);
    assert_eq!(std::fs::metadata(&log).unwrap().modified().unwrap(), written);
    let json: Report = serde_json::from_str(&setup.compare(&["--json", "--quiet"]).stdout).unwrap();
    assert_eq!(json, report);
}

#[test]
fn compare_that_was_stopped_goes_on_to_the_same_bits() {
    let setup = Setup::new();
    setup.compared(&["--output_dir=whole"]);
    let whole = setup.report("whole");
    // One method finished; one killed behind its first checkpoint, its report not written; one that never began.
    setup.compared(&["--methods=ptuning_v2"]);
    let killed = ["train", "c2.toml", "--max_steps=2", "--lr_scheduler_type=constant", "--quiet"];
    let shared = CONFIG.split("[methods").next().unwrap().replace("\"out\"", "\"out/lora\"");
    std::fs::write(setup.path("c2.toml"), shared + "[method]\nfinetuning_type = \"lora\"\nlora_rank = 2\n").unwrap();
    let train = glmddp_in(setup.0.path(), &killed);
    assert_eq!(train.code, 0, "{}", train.stderr);
    std::fs::remove_dir_all(setup.path("out/lora/adapter")).unwrap();
    let out = setup.compared(&["--lr_scheduler_type=constant", "--methods=lora", "--output_dir=constant"]);
    assert!(!out.contains("goes on from"), "{out}");

    let mut report = setup.report("out");
    let mut begun = setup.report("constant").entry("lora").unwrap().clone();
    begun.result = None;
    report.entries = vec![begun];
    std::fs::write(setup.path("out/compare.json"), serde_json::to_vec(&report).unwrap()).unwrap();
    let out = setup.compared(&["--lr_scheduler_type=constant", "--methods=lora"]);
    assert!(out.contains("goes on from out/lora/checkpoint-2: step 2"), "{out}");
    assert_eq!(bits(&setup.report("out")), bits(&setup.report("constant")));

    // Killed between the end of a run and its line in the report: read from the run's checkpoint, nothing trained.
    let mut report = whole.clone();
    report.entries[1].result = None;
    std::fs::write(setup.path("whole/compare.json"), serde_json::to_vec(&report).unwrap()).unwrap();
    let out = setup.compared(&["--output_dir=whole"]);
    assert!(!out.contains("grad_norm"), "{out}");
    assert_eq!(bits(&setup.report("whole")), bits(&whole));
    assert_eq!(figures(&setup.report("whole"), "lora").seconds, figures(&whole, "lora").seconds);
}

#[test]
fn compare_on_two_ranks_gives_the_same_bits() {
    let setup = Setup::new();
    setup.compared(&[]);
    let program = env!("CARGO_BIN_EXE_glmddp");
    if !cfg!(feature = "mpi") || Command::new("mpirun").arg("--version").output().is_err() {
        not_run(Missing::Mpi, "there is no mpirun, or this build has no feature `mpi`, and the test needs both");
        return;
    }
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/mpirun.sh"));
    command.args(["-n", "2", program, "compare", "c.toml", "--output_dir=two"]).current_dir(setup.0.path()).env_remove("RUST_LOG");
    let out = command.output().expect("the launcher starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let two = setup.report("two");
    assert_eq!(bits(&two), bits(&setup.report("out")));
    assert_eq!(figures(&two, "lora").world_size, 2);
    assert_eq!(String::from_utf8_lossy(&out.stdout).matches("(base)").count(), 1, "one rank prints");
}

#[test]
fn compare_by_tokens_ends_with_the_step_that_reaches_them() {
    let setup = Setup::new();
    setup.compared(&["--methods=lora", "--max_tokens=600"]);
    let report = setup.report("out");
    let (steps, tokens) = (report.shared.steps, report.shared.budget_tokens);
    let log = std::fs::read_to_string(setup.path("out/lora/trainer_log.jsonl")).unwrap();
    let totals: Vec<u64> =
        log.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["total_tokens"].as_u64()).collect();
    assert_eq!((totals.len() as u64, totals.last()), (steps, Some(&tokens)));
    assert!(tokens >= 600 && totals.iter().rev().nth(1).is_none_or(|&before| before < 600), "{totals:?}");
}

#[test]
fn compare_of_a_method_that_diverges_says_so_and_goes_on() {
    let setup = Setup::new();
    std::fs::write(setup.path("c.toml"), CONFIG.replace("learning_rate = 1e-3", "learning_rate = 1e30")).unwrap();
    let out = setup.compared(&["--methods=rslora,lora"]);
    let report = setup.report("out");
    assert!(matches!(&report.entries[0].result, Some(RunResult::Stopped { reason }) if reason.contains("is not finite")), "{report:?}");
    assert!(figures(&report, "lora").held_out_loss.is_some());
    assert!(out.contains("stopped") && out.contains("rslora: step 2: loss or gradient is not finite"), "{out}");
    let again = setup.compared(&["--methods=rslora,lora"]);
    assert!(again.contains("rslora: done before"), "the same would happen again: {again}");
}

#[test]
fn compare_of_what_cannot_be_compared_says_what_and_where() {
    let setup = Setup::new();
    insta::assert_snapshot!("unknown_label", setup.refused(&["--methods=lora,ptunig_v2"]));
    insta::assert_snapshot!("no_label", setup.refused(&["--methods=,"]));
    insta::assert_snapshot!("learning_rate_for_all", setup.refused(&["--learning_rate=1e-3"]));
    insta::assert_snapshot!("resume_by_hand", setup.refused(&["--resume_from_checkpoint=latest"]));
    let with = |from: &str, to: &str| std::fs::write(setup.path("c.toml"), CONFIG.replace(from, to)).unwrap();
    with("validation_file = \"data/dev.jsonl\"\n", "");
    insta::assert_snapshot!("no_validation_file", setup.refused(&[]));
    with("lora_rank = 2\nuse", "lora_rank = 2\nseed = 7\nuse");
    insta::assert_snapshot!("shared_key_of_one_method", setup.refused(&[]));
    with("[methods.rslora]", "[methods.\"rs/lora\"]");
    insta::assert_snapshot!("label_that_is_no_folder", setup.refused(&[]));
    with("lora_rank = 2\nuse", "lora_rank = 2\nweight_dcay = 0.1\nuse");
    insta::assert_snapshot!("unknown_key_of_one_method", setup.refused(&[]));
    with("lora_rank = 2\nuse", "lora_rank = 0\nuse");
    insta::assert_snapshot!("bad_value_of_one_method", setup.refused(&[]));
}

#[test]
fn compare_into_the_folder_of_another_is_refused_with_both_values() {
    let setup = Setup::new();
    setup.compared(&["--methods=lora"]);
    let with = |from: &str, to: &str| std::fs::write(setup.path("c.toml"), CONFIG.replace(from, to)).unwrap();
    insta::assert_snapshot!("other_steps", setup.refused(&["--max_steps=5", "--quiet"]).replace(|c: char| c.is_ascii_digit(), "N"));
    with("lora_rank = 2\n[methods.rs", "lora_rank = 3\nlearning_rate = 1e-3\n[methods.rs");
    insta::assert_snapshot!("other_settings_of_a_method", setup.refused(&["--quiet"]));
    // Where results go, and how often the run logs, are not what decides them; a label that is not asked for stays in the report.
    with("save_steps = 2", "save_steps = 3\nlogging_steps = 1");
    setup.compared(&["--methods=ptuning_v2"]);
    assert_eq!(setup.report("out").trained().map(|t| t.0).collect::<Vec<_>>(), ["lora", "ptuning_v2"]);
    with("max_steps = 4", "max_steps = 5");
    setup.compared(&["--methods=lora", "--overwrite_output_dir"]);
    assert_eq!(setup.report("out").trained().map(|(label, f)| (label, f.steps)).collect::<Vec<_>>(), [("lora", 5)]);
}
