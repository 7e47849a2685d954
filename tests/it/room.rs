//! What cannot fit into memory is refused before a model is loaded; what fits is not.

use std::path::Path;
use std::time::{Duration, Instant};

use glmddp::config::arithmetic::{RowLengths, least_rank_bytes, plan_arithmetic};
use glmddp::config::{self, RunConfig};
use glmddp::model::ModelConfig;
use glmddp::model::shape::ModelShape;

use crate::cli_support::{Ran, ok, refused};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.ok("init-model --preset tiny --num_layers 8 --output_dir model");
        folder.ok("demo-data --output_dir data --rows 64 --dev_rows 4");
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn ok(&self, args: &str) -> Ran {
        ok(self.path(), args)
    }

    /// The error of what is refused.
    fn refused(&self, args: &str) -> String {
        let said = refused(self.path(), args);
        said[said.find("error: ").unwrap()..].to_owned()
    }
}

const RUN: &str = "--model_name_or_path model --train_file data/train.jsonl --output_dir out --quiet";

#[test]
fn run_that_cannot_fit_is_refused_with_the_plans_lines_and_what_fits() {
    let folder = Folder::new();
    let many = "--per_device_train_batch_size 32 --global_batch_size 32 --max_steps 2";
    insta::assert_snapshot!(folder.refused(&format!("train {RUN} {many} --memory_limit 20MiB")), @r"
    error: the run needs at least 29.6 MiB of memory, and `memory_limit` is 20.0 MiB
      1.77 MiB weights, in f32
      256 KiB trained parameters
      512 KiB their two moments
      256 KiB gradients
      26.7 MiB activations
      96.0 KiB logits

    hint: it fits with `--recompute block` (about 16.3 MiB a rank), or with `--per_device_train_batch_size 8 --global_batch_size 32` (about 18.6 MiB a rank); a larger `--memory_limit`, or `--memory_limit none`, starts it all the same
    ");
    insta::assert_snapshot!(folder.refused(&format!("train {RUN} {many} --memory_limit 4MiB")), @r"
    error: the run needs at least 29.6 MiB of memory, and `memory_limit` is 4.00 MiB
      1.77 MiB weights, in f32
      256 KiB trained parameters
      512 KiB their two moments
      256 KiB gradients
      26.7 MiB activations
      96.0 KiB logits

    hint: use a machine with more memory, or a smaller model; a larger `--memory_limit`, or `--memory_limit none`, starts it all the same
    ");
    insta::assert_snapshot!(folder.refused(&format!("train {RUN} --memory_limit 1MiB --finetuning_type full")), @r"
    error: the run needs at least 14.9 MiB of memory, and `memory_limit` is 1.00 MiB
      1.77 MiB trained parameters
      3.53 MiB their two moments
      8.83 MiB gradients
      835 KiB activations
      3.00 KiB logits

    hint: use a machine with more memory, or a smaller model; a larger `--memory_limit`, or `--memory_limit none`, starts it all the same
    ");
    assert!(!folder.path().join("out/trainer_log.jsonl").exists());
}

#[test]
fn hint_of_what_fits_is_right_when_it_is_followed() {
    let folder = Folder::new();
    let many = format!("{RUN} --overwrite_output_dir --per_device_train_batch_size 32 --global_batch_size 32 --max_steps 1");
    let limit = "--memory_limit 20MiB";
    let text = folder.refused(&format!("train {many} {limit}"));
    let changes: Vec<&str> = text.split('`').filter(|part| part.starts_with("--") && !part.contains("memory_limit")).collect();
    assert_eq!(changes.len(), 2, "{text}");
    for change in changes {
        folder.ok(&format!("train {many} {limit} {change}"));
    }
    folder.ok(&format!("train {many} --memory_limit none"));
}

#[test]
fn plan_says_what_a_memory_limit_does_to_a_training() {
    let folder = Folder::new();
    let said = |more: &str| {
        let ran = folder.ok(&format!("plan {} {more}", RUN.replace(" --quiet", "")));
        assert!(ran.stdout.contains("about "), "the table comes all the same: {}", ran.stdout);
        ran.stderr
    };
    let texts = [
        said("--memory_limit 1MiB --finetuning_type full"),
        said("--memory_limit 20MiB --per_device_train_batch_size 32 --global_batch_size 32"),
        said("--memory_limit 4MiB --ranks 2 --finetuning_type full --global_batch_size 32"),
    ];
    insta::assert_snapshot!(texts.concat());
    assert_eq!(said("--memory_limit 20GiB") + &said("--memory_limit none") + &said(""), "");
}

/// Gradients of slots that are held at once: one more with each doubling of the slots of a rank, and that of the running one.
#[test]
fn least_memory_counts_the_gradient_sums_of_a_ranks_slots() {
    let folder = Folder::new();
    let shape = ModelShape::from(&ModelConfig::load(&folder.path().join("model")).unwrap());
    let sums = |method: &str, world_size: usize, slots: usize, more: &str| {
        let file = folder.path().join("run.toml");
        let text = format!(
            "model_name_or_path = 'model'\ntrain_file = 't'\noutput_dir = 'o'\nmax_steps = 9\nfinetuning_type = '{method}'\n\
             per_device_train_batch_size = 1\nglobal_batch_size = {slots}\n{more}"
        );
        std::fs::write(&file, text).unwrap();
        let plan = config::load(Some(&file), &RunConfig::default()).unwrap().resolve(world_size).unwrap();
        let lengths = RowLengths { shortest: 5, longest: 5, num_rows: 1000 };
        let least = least_rank_bytes(&shape, &plan, &lengths).unwrap();
        let most = plan_arithmetic(&shape, &plan).unwrap();
        assert!(least.slot_sums <= most.rank_bytes.slot_sums, "{method} {world_size} {slots}");
        let costs = plan.method.settings().costs(&shape).unwrap();
        least.slot_sums / (4 * costs.site_elements)
    };
    let tree = |method: &str| [1, 2, 3, 4, 7, 8, 15, 16].map(|slots| sums(method, 1, slots, ""));
    assert_eq!(tree("full"), [1, 2, 2, 3, 3, 4, 4, 5]);
    assert_eq!(tree("lora"), [1, 1, 1, 2, 2, 3, 3, 4]);
    assert_eq!([2, 4, 8].map(|slots| sums("full", 2, slots, "")), [1, 2, 2]);
    assert_eq!([1, 2, 8].map(|slots| sums("full", 1, slots, "reduction = 'all_reduce'")), [1, 2, 2]);
}

#[test]
fn memory_limit_is_a_key_of_the_run_file_and_is_kept_there() {
    let folder = Folder::new();
    let file = |limit: &str| std::fs::write(folder.path().join("run.toml"), format!("[run]\nmemory_limit = \"{limit}\"\n")).unwrap();
    file("1MiB");
    assert!(folder.refused(&format!("train run.toml {RUN} --max_steps 1")).contains("`memory_limit` is 1.00 MiB"));
    folder.ok(&format!("train run.toml {RUN} --max_steps 1 --memory_limit 16GiB"));
    let kept = std::fs::read_to_string(folder.path().join("out/training_args.toml")).unwrap();
    assert!(kept.contains("memory_limit = \"16GiB\""), "{kept}");
    file("20");
    insta::assert_snapshot!(folder.refused(&format!("train run.toml {RUN}")), @r#"
    error: `run.memory_limit` is text "20", expected a size with its unit, such as 20GiB, or none
      --> run.toml:2, key `run.memory_limit`
    "#);
}

#[test]
fn commands_that_load_a_model_refuse_one_that_cannot_fit() {
    let folder = Folder::new();
    folder.ok(&format!("train {RUN} --max_steps 1 --finetuning_type lora --memory_limit none"));
    let tuned = "--model_name_or_path model --adapter out/adapter --memory_limit 1MiB";
    insta::assert_snapshot!(folder.refused(&format!("evaluate {tuned} --validation_file data/dev.jsonl")), @r"
    error: the model in model needs at least 1.77 MiB of memory, and `memory_limit` is 1.00 MiB
      1.77 MiB weights, in f32

    hint: use a machine with more memory, or a smaller model; a larger `--memory_limit`, or `--memory_limit none`, starts it all the same
    ");
    for command in ["generate --prompt a", "export --merge --output_dir merged"] {
        assert!(folder.refused(&format!("{command} {tuned}")).starts_with("error: the model in model needs at least "), "{command}");
    }
    let compared = "--model_name_or_path model --train_file data/train.jsonl --validation_file data/dev.jsonl --output_dir all --quiet";
    let text = folder.refused(&format!("compare --methods ia3,full {compared} --max_steps 1 --memory_limit 5MiB"));
    assert!(text.starts_with("error: the run of full needs at least "), "{text}");
    assert!(!folder.path().join("all/ia3").exists());
    let text = folder.refused(&format!(
        "checkpoint import out/adapter {} --finetuning_type lora --output_dir new --memory_limit 1MiB",
        RUN.replace(" --quiet", "")
    ));
    assert!(text.starts_with("error: the model in model needs at least "), "{text}");
}

/// A configuration of 4096 layers, whose weights are not there: it is refused before they are looked for.
#[test]
fn refusal_comes_before_the_weights_are_opened() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path().join("large")).unwrap();
    let config = std::fs::read_to_string(folder.path().join("model/config.json")).unwrap();
    let config = config.replace("\"num_layers\": 8", "\"num_layers\": 4096");
    std::fs::write(folder.path().join("large/config.json"), config).unwrap();
    std::fs::copy(folder.path().join("model/tokenizer.model"), folder.path().join("large/tokenizer.model")).unwrap();
    let started = Instant::now();
    let text = folder.refused(&format!("train {} --memory_limit 500MiB", RUN.replace("model --", "large --")));
    assert!(text.starts_with("error: the run needs at least "), "{text}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

/// What a run takes, less what another does, is no less than the figures' difference: what every run takes cancels.
#[cfg(target_os = "linux")]
#[test]
fn least_memory_of_rows_and_of_trained_weights_is_no_more_than_what_they_take() {
    let folder = Folder::new();
    folder.ok("init-model --preset small --num_layers 3 --output_dir small");
    let shape = ModelShape::from(&ModelConfig::load(&folder.path().join("small")).unwrap());
    let measure = |args: &str| {
        let args =
            format!("train {} {args} --max_steps 2 --max_train_samples 32 --max_target_length 200", RUN.replace("model --", "small --"));
        folder.ok(&format!("{args} --overwrite_output_dir --threads 1 --logging_steps 1"));
        let log = std::fs::read_to_string(folder.path().join("out/trainer_log.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        let peak = last["memory_bytes"].as_u64().unwrap();
        let plan = config::load(Some(&folder.path().join("out/training_args.toml")), &RunConfig::default()).unwrap().resolve(1).unwrap();
        // No more than the lengths of the data.
        let lengths = RowLengths { shortest: 40, longest: 60, num_rows: 32 };
        let least = least_rank_bytes(&shape, &plan, &lengths).unwrap().total();
        let most = plan_arithmetic(&shape, &plan).unwrap().rank_bytes.total();
        assert!(least < peak && least <= most, "{args}: at least {least}, at most {most}, took {peak}");
        (peak as i64, least as i64)
    };
    for method in MEASURED {
        let [one, many] = ["1", "32"]
            .map(|rows| measure(&format!("--finetuning_type {method} --per_device_train_batch_size {rows} --global_batch_size {rows}")));
        assert!(many.0 - one.0 >= many.1 - one.1, "{method}: {many:?} and {one:?}");
    }
    let [full, lora] = ["full", "lora"].map(|method| measure(&format!("--finetuning_type {method} --global_batch_size 1")));
    assert!(full.0 - lora.0 >= full.1 - lora.1, "{full:?} and {lora:?}");
    let eight = measure("--finetuning_type full --global_batch_size 8");
    assert!(eight.0 - full.0 >= eight.1 - full.1, "{eight:?} and {full:?}");
}

#[rustfmt::skip]
const MEASURED: [&str; 4] = [
    "ptuning_v2 --pre_seq_len 4",
    "lora --lora_target dense_4h_to_h --recompute block",
    "adapter",
    "freeze --freeze_trainable_layers 2",
];
