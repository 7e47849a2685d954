//! Every tuning method through one run's life: killed and resumed, exported and read back, merged, and refused where it does not belong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use glmddp::digest::sha256_hex;
use glmddp::peft::METHOD_NAMES;
use serde_json::Value;

use crate::cli_support::{Ran, glmddp_in};

/// A method as a user asks for it.
struct Case {
    /// Of `train`.
    args: &'static str,
    /// Arguments on top of them that give it another size; [`OTHER_BASE`] where its sizes are the base's.
    resized: &'static str,
}

const fn case(args: &'static str, resized: &'static str) -> Case {
    Case { args, resized }
}

const OTHER_BASE: &str = "--model_name_or_path deeper";

/// Learning rates are such that three steps change the loss.
#[rustfmt::skip]
const CASES: [Case; 16] = [
    case("--finetuning_type ptuning_v2 --pre_seq_len 4", "--pre_seq_len 5"),
    case("--finetuning_type ptuning_v2 --pre_seq_len 4 --prefix_projection --learning_rate 1e-3", "--prefix_projection=false"),
    case("--finetuning_type prefix_tuning --pre_seq_len 4 --encoder_hidden_size 5", "--encoder_hidden_size 6"),
    case("--finetuning_type prompt_tuning --num_virtual_tokens 4", "--num_virtual_tokens 5"),
    case("--finetuning_type p_tuning --num_virtual_tokens 4", "--encoder_hidden_size 6"),
    case("--finetuning_type p_tuning --num_virtual_tokens 4 --encoder_reparameterization_type LSTM --encoder_hidden_size 6",
         "--encoder_reparameterization_type MLP"),
    case("--finetuning_type lora --lora_rank 4 --learning_rate 1e-2", "--lora_rank 8"),
    case("--finetuning_type lora --lora_rank 4 --lora_target all --use_rslora --learning_rate 1e-2", "--use_rslora=false"),
    case("--finetuning_type lora --lora_rank 4 --lora_target .*layers\\.1\\..*dense --use_dora --learning_rate 1e-2",
         "--lora_target .*layers\\.0\\..*dense"),
    case("--finetuning_type adapter --adapter_config houlsby --reduction_factor 8 --learning_rate 1e-3", "--reduction_factor 16"),
    case("--finetuning_type adapter --adapter_config pfeiffer --learning_rate 1e-3", "--adapter_config houlsby"),
    case("--finetuning_type adapter_fusion --fusion_adapters one/adapter,two/adapter --learning_rate 1e-3",
         "--fusion_adapters one/adapter,three/adapter"),
    case("--finetuning_type freeze --freeze_trainable_layers 1", "--freeze_trainable_layers 2"),
    case("--finetuning_type freeze --freeze_trainable_modules query_key_value", "--freeze_trainable_modules dense"),
    case("--finetuning_type full", OTHER_BASE),
    case("--finetuning_type ia3 --learning_rate 1e-2", "--ia3_target query_key_value"),
];

impl Case {
    fn method(&self) -> &'static str {
        self.args.split_whitespace().nth(1).unwrap()
    }

    fn is_whole_model(&self) -> bool {
        ["freeze", "full"].contains(&self.method())
    }
}

/// A folder with tiny models (`model`, `other` of another seed, `deeper` of 3 layers), rows, and the adapters that a fusion is of.
struct Setup(tempfile::TempDir);

impl Setup {
    fn new() -> Self {
        let setup = Self(tempfile::tempdir().expect("a temporary folder"));
        for (output, more) in [("model", ""), ("other", "--seed 1"), ("deeper", "--num_layers 3")] {
            setup.ok(&format!("init-model --preset tiny --output_dir {output} {more}"));
        }
        setup.ok("demo-data --output_dir data --rows 20 --dev_rows 7");
        for name in ["one", "two", "three"] {
            setup.train(name, &format!("--max_steps 2 --finetuning_type adapter --adapter_name {name} --learning_rate 1e-3"));
        }
        setup
    }

    fn run(&self, args: &str) -> Ran {
        glmddp_in(self.0.path(), &args.split_whitespace().collect::<Vec<_>>())
    }

    fn ok(&self, args: &str) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args}: {}", ran.stderr);
        ran.stdout
    }

    /// What is said to a user at fault; A and B stand for sha256 sums, which change with the weights that init-model draws.
    fn refused(&self, args: &str) -> String {
        let ran = self.run(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args}: {}", ran.stderr);
        let mut sums: Vec<String> = Vec::new();
        let sum = regex::Regex::new("[0-9a-f]{64}").unwrap();
        let letter = |found: &regex::Captures| {
            let index = sums.iter().position(|s| *s == found[0]).unwrap_or_else(|| {
                sums.push(found[0].to_owned());
                sums.len() - 1
            });
            format!("SHA256-{}", char::from(b'A' + index as u8))
        };
        // Warnings of rows that are cut short go before it.
        let error = ran.stderr.find("error: ").map_or(ran.stderr.as_str(), |at| &ran.stderr[at..]);
        sum.replace_all(error, letter).into_owned()
    }

    /// Trains into `output`; gives what is printed.
    fn train(&self, output: &str, args: &str) -> String {
        self.ok(&format!("{TRAIN} --output_dir {output} --overwrite_output_dir {args}"))
    }

    /// The losses of the log of `output`, `loss` or `eval_loss`, as they stand there.
    fn losses(&self, output: &str, key: &str) -> Vec<(u64, f64)> {
        let log = std::fs::read_to_string(self.path(output).join("trainer_log.jsonl")).expect("a log was written");
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
        lines.filter_map(|line| Some((line["current_steps"].as_u64()?, line[key].as_f64()?))).collect()
    }

    /// The held-out loss of `model`, with an adapter or alone.
    fn evaluate(&self, args: &str) -> f64 {
        serde_json::from_str::<Value>(&self.ok(&format!("{EVALUATE} {args}"))).unwrap()["eval_loss"].as_f64().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// All that must be the same of two runs of `steps` steps: sums of the export's files and of the last state's tensors, and the losses.
    fn outcome(&self, output: &str, steps: u64) -> Outcome {
        let mut sums = BTreeMap::new();
        add_sums(&self.path(output), &self.path(output).join("adapter"), &mut sums);
        assert!(sums.len() > 2, "{output} exported {sums:?}");
        let state = crate::support::state_sums(&self.path(output).join(format!("checkpoint-{steps}")));
        sums.extend(state.into_iter().map(|(tensor, sum)| (PathBuf::from(tensor), sum)));
        (sums, self.losses(output, "loss"), self.losses(output, "eval_loss"))
    }
}

type Outcome = (BTreeMap<PathBuf, String>, Vec<(u64, f64)>, Vec<(u64, f64)>);

/// Sha256 of a file, or of all below a folder, by path from `root`.
fn add_sums(root: &Path, path: &Path, sums: &mut BTreeMap<PathBuf, String>) {
    if path.is_dir() {
        std::fs::read_dir(path).unwrap().for_each(|entry| add_sums(root, &entry.unwrap().path(), sums));
    } else {
        sums.insert(path.strip_prefix(root).unwrap().to_owned(), sha256_hex(std::fs::read(path).expect("a file was written")));
    }
}

const TRAIN: &str = "train --model_name_or_path model --train_file data/train.jsonl --validation_file data/dev.jsonl --max_steps 3 \
    --per_device_train_batch_size 2 --global_batch_size 4 --max_source_length 32 --max_target_length 16 --lr_scheduler_type constant \
    --threads 1 --quiet --seed 1";
const EVALUATE: &str = "evaluate --model_name_or_path model --validation_file data/dev.jsonl --per_device_eval_batch_size 2 \
    --max_source_length 32 --max_target_length 16 --threads 1 --json";

#[test]
fn methods_are_all_in_the_table() {
    let mut missing: Vec<_> = METHOD_NAMES.iter().filter(|name| !CASES.iter().any(|case| case.method() == **name)).collect();
    missing.retain(|name| **name != "prefix"); // another name of ptuning_v2
    assert!(missing.is_empty(), "{missing:?}");
}

/// Killed by SIGKILL in a step behind a checkpoint, at a moment that no run chooses; the rate is constant, so that the run may end anywhere.
#[test]
fn method_killed_and_resumed_gives_the_bits_of_an_undisturbed_run() {
    let setup = Setup::new();
    for case in &CASES {
        let args = format!("{TRAIN} --save_steps 3 --eval_steps 2 --save_total_limit 2 {}", case.args);
        let endless = format!("{args} --max_steps 100000 --output_dir out --overwrite_output_dir");
        let mut command = Command::new(env!("CARGO_BIN_EXE_glmddp"));
        command.args(endless.split_whitespace()).current_dir(setup.0.path()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut job = command.spawn().expect("the program starts");
        let (log, started) = (setup.path("out/trainer_log.jsonl"), Instant::now());
        // Step, step, evaluation, step, checkpoint, step, evaluation: after six lines there is a step behind the checkpoint.
        let lines = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
        while lines() < 6 || !setup.path("out/checkpoint-3").exists() {
            assert!(job.try_wait().expect("our child").is_none(), "{}: the run ended early", case.args);
            assert!(started.elapsed() < Duration::from_secs(60), "{}: no checkpoint in a minute", case.args);
            std::thread::sleep(Duration::from_millis(1));
        }
        job.kill().expect("SIGKILL");
        assert!(!job.wait().expect("our child").success());

        let done = setup.losses("out", "loss").last().expect("steps were logged").0;
        let steps = done + 2;
        setup.ok(&format!("{args} --max_steps {steps} --output_dir out --resume_from_checkpoint latest"));
        setup.train("whole", &format!("{} --save_steps 0 --eval_steps 2 --max_steps {steps}", case.args));
        assert_eq!(setup.outcome("out", steps), setup.outcome("whole", steps), "{}", case.args);
        println!("{}: killed in step {} or behind it, equal after {steps}", case.args, done + 1);
        std::fs::remove_dir_all(setup.path("out")).unwrap();
    }
}

#[test]
fn method_exported_and_reloaded_has_the_loss_that_its_run_ended_with_and_changes_the_answer() {
    const GENERATE: &str = "generate --threads 1 --max_new_tokens 12 --file data/dev.jsonl --rows 3 --model_name_or_path";
    let setup = Setup::new();
    let base = (setup.evaluate(""), setup.ok(&format!("{GENERATE} model")));
    let mut said = String::new();
    for case in &CASES {
        let printed = setup.train("out", case.args);
        let exported = printed.lines().find(|line| line.contains("out/adapter")).expect("where the export is");
        said.push_str(&format!("{}\n  {exported}\n", case.args));
        let (_, trained) = *setup.losses("out", "eval_loss").last().expect("the run evaluates");
        let reloaded = if case.is_whole_model() { "out/adapter" } else { "model --adapter out/adapter" };
        assert_eq!(setup.evaluate(&format!("--model_name_or_path {reloaded}")), trained, "{}", case.args);
        assert_ne!(trained, base.0, "{}", case.args);
        assert_ne!(setup.ok(&format!("{GENERATE} {reloaded}")), base.1, "{}", case.args);
    }
    insta::assert_snapshot!("exported", said);
}

/// What each case says, but for the hint, when its run of one step goes on with the arguments that `change` gives for the case's index.
fn refused_resumes(setup: &Setup, change: impl Fn(usize) -> String) -> String {
    let mut said = String::new();
    for (i, case) in CASES.iter().enumerate() {
        setup.train("out", &format!("{} --max_steps 1", case.args));
        let changed = change(i);
        let text = setup.refused(&format!("{TRAIN} --output_dir out --resume_from_checkpoint latest {changed}"));
        let error = text.strip_suffix("\nhint: resume with the settings of the checkpoint, or start anew in another output_dir\n");
        said.push_str(&format!("{}\n  resumed with {changed}\n{}", case.args, error.expect("the hint")));
    }
    said
}

#[test]
fn resume_with_another_method_is_refused_with_both_values() {
    let next = |i: usize| {
        let rest = CASES.iter().cycle().skip(i).find(|other| other.method() != CASES[i].method());
        rest.expect("there are several methods").args.to_owned()
    };
    insta::assert_snapshot!("resume_with_another_method", refused_resumes(&Setup::new(), next));
}

#[test]
fn resume_with_another_size_is_refused_with_both_values() {
    let resized = |i: usize| format!("{} {}", CASES[i].args, CASES[i].resized);
    insta::assert_snapshot!("resume_with_another_size", refused_resumes(&Setup::new(), resized));
}

#[test]
fn resume_on_another_base_is_refused_with_both_values() {
    let other = |i: usize| format!("{} --model_name_or_path other", CASES[i].args);
    insta::assert_snapshot!("resume_on_another_base", refused_resumes(&Setup::new(), other));
}

#[test]
fn adapter_of_another_base_is_refused_with_both_values_whatever_its_format() {
    let setup = Setup::new();
    let (mut by_sum, mut by_size) = (String::new(), String::new());
    for (format, case) in [
        ("PEFT's prefix", &CASES[0]),
        ("PEFT's prompt", &CASES[3]),
        ("PEFT's LoRA", &CASES[6]),
        ("the adapters library's adapter", &CASES[10]),
        ("the adapters library's fusion", &CASES[11]),
    ] {
        setup.train("out", case.args);
        let evaluate = |model: &str| setup.refused(&format!("{EVALUATE} --model_name_or_path {model} --adapter out/adapter"));
        let (other, generate) = (evaluate("other"), "generate --threads 1 --prompt x --model_name_or_path other --adapter out/adapter");
        assert_eq!(other, setup.refused(generate), "{format}");
        by_sum.push_str(&format!("{format}\n{other}\n"));

        // As the libraries write it: nothing says what the base was, and the sizes alone are held against it.
        std::fs::remove_file(setup.path("out/adapter/glmddp.json")).unwrap();
        setup.evaluate("--adapter out/adapter");
        by_size.push_str(&format!("{format}\n{}\n", evaluate("deeper")));
        if case.method() == "adapter_fusion" {
            continue; // its parts are adapters, which the case before it is about
        }
        setup.train("out", &format!("{} {OTHER_BASE}", case.args));
        std::fs::remove_file(setup.path("out/adapter/glmddp.json")).unwrap();
        by_size.push_str(&format!("{format} of a deeper model\n{}\n", evaluate("model")));
    }
    insta::assert_snapshot!("adapter_of_another_base", by_sum);
    insta::assert_snapshot!("adapter_of_another_size", by_size);
}

#[test]
fn merged_model_computes_what_base_and_adapter_do() {
    let setup = Setup::new();
    std::fs::create_dir(setup.path("merged-0")).unwrap(); // an empty folder is as good as none
    for (i, case) in CASES.iter().filter(|case| case.method() == "lora").enumerate() {
        setup.train("out", case.args);
        setup.ok(&format!("export --merge --model_name_or_path model --adapter out/adapter --output_dir merged-{i}"));
        let (base, adapted) = (setup.evaluate(""), setup.evaluate("--adapter out/adapter"));
        let merged = setup.evaluate(&format!("--model_name_or_path merged-{i}"));
        println!("{}: base {base}, with the adapter {adapted}, merged {merged}: {:.1e}", case.args, merged / adapted - 1.0);
        assert!((merged / adapted - 1.0).abs() < 1e-6, "{}: merged {merged}, with the adapter {adapted}", case.args);
        assert!((base / adapted - 1.0).abs() > 1e-4, "{}: base {base}, with the adapter {adapted}", case.args);
    }
}

#[test]
fn merge_that_cannot_be_is_refused() {
    let setup = Setup::new();
    let merge =
        |output: &str| setup.refused(&format!("export --merge --model_name_or_path model --adapter out/adapter --output_dir {output}"));
    setup.train("out", CASES[0].args);
    insta::assert_snapshot!("merge_of_a_prefix", merge("merged"));
    assert!(!setup.path("merged").exists());
    std::fs::create_dir(setup.path("empty")).unwrap();
    insta::assert_snapshot!("merge_into_a_folder_that_is_there", merge("data"));
    assert_eq!(merge("data/dev.jsonl"), merge("data").replace("data", "data/dev.jsonl"));
    assert_eq!(merge("empty"), merge("merged"), "a folder may be there if it is empty");
}
