//! Arithmetic that surprises is said before the run: by `train`, `plan` and `compare`, each line once.

use crate::cli_support::{Ran, ok, run};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.ok("init-model --preset tiny --num_layers 1 --output_dir model");
        folder.ok("demo-data --output_dir data --rows 20 --dev_rows 4");
        folder
    }

    fn run(&self, args: &str) -> Ran {
        run(self.0.path(), args)
    }

    fn ok(&self, args: &str) -> Ran {
        ok(self.0.path(), args)
    }

    /// What `train` and `plan` warn of, which is the same.
    fn warnings(&self, args: &str) -> String {
        let run = "--model_name_or_path model --train_file data/train.jsonl --output_dir out --overwrite_output_dir";
        let trained = self.ok(&format!("train {run} {args} --quiet"));
        let planned = self.ok(&format!("plan {run} {args}"));
        // What is seen at the end alone is for another test.
        let at_the_end = ["computes what its base does", "`auto_map`"];
        let is_before = |line: &&str| line.starts_with("warning: ") && !at_the_end.iter().any(|text| line.contains(text));
        let warned = |ran: &Ran| ran.stderr.lines().filter(is_before).map(|l| format!("{l}\n")).collect::<String>();
        assert_eq!(warned(&trained), warned(&planned));
        warned(&trained)
    }

    /// Epochs at the end of the last run, as its log has them.
    fn epochs(&self) -> f64 {
        let log = std::fs::read_to_string(self.0.path().join("out/trainer_log.jsonl")).unwrap();
        serde_json::from_str::<serde_json::Value>(log.lines().last().unwrap()).unwrap()["epoch"].as_f64().unwrap()
    }
}

#[test]
fn step_larger_than_the_data_is_said_with_the_epochs_that_come_out() {
    let folder = Folder::new();
    insta::assert_snapshot!(folder.warnings("--num_train_epochs 1 --max_train_samples 3"), @"warning: a step of 16 rows is larger than the data: each of the 3 rows is in it 5.33 times; 1 step is 5.33 epochs, 1 asked for; use `--global_batch_size 3` without `--gradient_accumulation_steps`");
    assert!((folder.epochs() - 16.0 / 3.0).abs() < 1e-9);
    insta::assert_snapshot!(folder.warnings("--max_steps 2 --max_train_samples 5 --per_device_train_batch_size 8"), @"warning: a step of 16 rows is larger than the data: each of the 5 rows is in it 3.20 times; 2 steps are 6.40 epochs; use `--per_device_train_batch_size 1 --global_batch_size 5` without `--gradient_accumulation_steps`");
    insta::assert_snapshot!(folder.warnings("--num_train_epochs 0.001 --max_train_samples 16 --global_batch_size 4"), @"warning: a run has whole steps, of 4 rows each, and there are 16 rows; 1 step is 0.25 epochs, 0.001 asked for; ask for what is done with `--max_steps 1`");
    assert_eq!(folder.warnings("--num_train_epochs 1 --max_train_samples 3 --global_batch_size 3"), "");
    assert_eq!(folder.epochs(), 1.0);
}

#[test]
fn plan_shows_the_epochs_that_are_done() {
    let folder = Folder::new();
    let run = "--model_name_or_path model --train_file data/train.jsonl --output_dir out --num_train_epochs 1";
    let line = |args: &str| {
        let ran = folder.ok(&format!("plan {run} {args}"));
        ran.stdout.lines().find(|line| line.starts_with("length")).unwrap().to_owned()
    };
    assert_eq!(line("--max_train_samples 3"), "length     1 steps x 16 rows = 16 rows = 5.33 epochs");
    assert_eq!(line(""), "length     2 steps x 16 rows = 32 rows = 1.60 epochs");
    assert_eq!(line("--global_batch_size 10"), "length     2 steps x 10 rows = 20 rows = 1.00 epochs");
    let ran = folder.ok(&format!("plan {run} --json"));
    assert_eq!(serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["length"]["epochs"], 1.6);
}

#[test]
fn warm_up_that_outlasts_the_run_is_said_with_the_rate_that_it_comes_to() {
    let folder = Folder::new();
    let few = "--global_batch_size 2 --finetuning_type lora";
    insta::assert_snapshot!(folder.warnings(&format!("{few} --max_steps 2 --warmup_steps 500")), @"warning: the learning rate rises over 500 steps, and the run has 2: it ends at 1e-6, below its peak of 5e-4; use `--warmup_steps 0`, or more steps");
    insta::assert_snapshot!(folder.warnings(&format!("{few} --max_steps 1 --warmup_ratio 0.1")), @"warning: the learning rate rises over 1 step, and the run has 1: it is 0 in every step, and nothing is trained; use `--warmup_ratio 0`, or more steps");
    insta::assert_snapshot!(folder.warnings(&format!("{few} --max_steps 2 --warmup_ratio 1.0 --warmup_steps 0")), @"warning: the learning rate rises over 2 steps, and the run has 2: it ends at 2.5e-4, below its peak of 5e-4; use `--warmup_ratio 0.1`, or more steps");
}

#[test]
fn steps_that_never_come_are_said() {
    let folder = Folder::new();
    let all =
        "--save_steps 5 --eval_steps 500 --validation_file data/dev.jsonl --logging_steps 50 --save_total_limit 1 --save_keep_every 9";
    insta::assert_snapshot!(folder.warnings(&format!("--global_batch_size 2 --max_steps 2 {all}")), @r"
    warning: `save_steps` is 5, and the run has 2 steps: the one checkpoint is that of the last step; use at most 2
    warning: `eval_steps` is 500, and the run has 2 steps: the held-out loss is computed only at the end; use at most 2
    warning: `save_keep_every` is 9, and the run has 2 steps: it keeps no checkpoint; use at most 2
    warning: `logging_steps` is 50, and the run has 2 steps: only the first and the last step are shown; use at most 2
    ");
    assert_eq!(folder.warnings("--global_batch_size 2 --max_steps 2 --save_steps 2"), "");
    assert_eq!(folder.warnings("--global_batch_size 2 --max_steps 2"), "", "defaults were not asked for");
}

#[test]
fn settings_under_which_no_value_moves_are_said() {
    let folder = Folder::new();
    let few = "--global_batch_size 2 --max_steps 1 --finetuning_type full";
    insta::assert_snapshot!(folder.warnings(&format!("{few} --learning_rate 1e-12")), @"warning: `learning_rate` is 1e-12: a step moves a value by about that, which f32 values above 2e-5 do not show; use more");
    insta::assert_snapshot!(folder.warnings(&format!("{few} --max_grad_norm 1e-9")), @"warning: `max_grad_norm` 1e-9 is no more than `adam_epsilon` 1e-8: a step moves a value by at most 9 % of the learning rate; use a larger `--max_grad_norm`, such as 1");
    insta::assert_snapshot!(folder.warnings(&format!("{few} --adam_epsilon 2")), @"warning: `max_grad_norm` 1e0 is no more than `adam_epsilon` 2e0: a step moves a value by at most 33 % of the learning rate; use a smaller `--adam_epsilon`, such as 1e-8");
    assert_eq!(folder.warnings(&format!("{few} --max_grad_norm 0")), "", "no clipping");
}

#[test]
fn key_that_another_displaces_is_said() {
    let folder = Folder::new();
    let both = "--global_batch_size 2 --max_steps 20 --num_train_epochs 3 --warmup_steps 1 --warmup_ratio 0.5";
    insta::assert_snapshot!(folder.warnings(both), @r"
    warning: `run.num_train_epochs` does nothing here: `max_steps` takes precedence (command line, `--num_train_epochs`)
    warning: `optim.warmup_ratio` does nothing here: `warmup_steps` takes precedence (command line, `--warmup_ratio`)
    ");
}

#[test]
fn held_out_rows_that_are_the_training_rows_are_said() {
    let folder = Folder::new();
    let few = "--global_batch_size 2 --max_steps 1 --finetuning_type ia3";
    std::fs::create_dir(folder.0.path().join("sub")).unwrap();
    for file in ["data/train.jsonl", "./sub/../data/train.jsonl"] {
        let said = folder.warnings(&format!("{few} --validation_file {file}"));
        assert_eq!(
            said,
            format!(
                "warning: `validation_file` is `train_file` ({file}): the held-out loss is that of rows that were trained on; give other rows, or leave `--validation_file` out\n"
            )
        );
    }
    assert_eq!(folder.warnings(&format!("{few} --validation_file data/dev.jsonl")), "");
}

#[test]
fn column_that_is_to_be_two_things_is_refused_before_anything_is_loaded() {
    let folder = Folder::new();
    let run = "--model_name_or_path nowhere --train_file nowhere --output_dir out";
    let refused = |args: &str| {
        let ran = folder.run(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args}: {}", ran.stderr);
        ran.stderr
    };
    std::fs::write(folder.0.path().join("c.toml"), "[data]\nhistory_column = 'content'\n").unwrap();
    let texts = [
        refused(&format!("plan {run} --prompt_column summary")),
        refused(&format!("plan {run} --response_column content")),
        refused(&format!("train {run} --input_column content")),
        refused(&format!("train {run} --prompt_column q --input_column a --response_column a")),
        refused(&format!("plan c.toml {run}")),
        refused("evaluate --model_name_or_path nowhere --validation_file nowhere --response_column content"),
        refused("generate --model_name_or_path nowhere --file nowhere --input_column content"),
    ];
    insta::assert_snapshot!(texts.join("\n"));
    // A question's column that also stands where nobody asks for an answer.
    folder.ok("generate --model_name_or_path model --file data/dev.jsonl --prompt_column summary --rows 1 --max_new_tokens 1");
}

#[test]
fn weight_decay_that_leaves_nothing_is_refused() {
    let folder = Folder::new();
    let run = "train --model_name_or_path model --train_file data/train.jsonl --output_dir out";
    let ran = folder.run(&format!("{run} --learning_rate 0.02 --weight_decay 60"));
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""));
    insta::assert_snapshot!(ran.stderr, @r"
    error: `optim.weight_decay` is 60: a step at the learning rate 0.02 subtracts 1.2 times each parameter, so that nothing learnt stays
      --> command line, `--weight_decay`

    hint: use `--weight_decay 5` or less, or a lower `--learning_rate`
    ");
    for (rate, decay) in [("0.02", "5"), ("1e-4", "1000"), ("3e-2", "3")] {
        let ran = folder.run(&format!("{run} --learning_rate {rate} --weight_decay 1e6"));
        assert!(
            ran.stderr.ends_with(&format!("hint: use `--weight_decay {decay}` or less, or a lower `--learning_rate`\n")),
            "{}",
            ran.stderr
        );
        folder.ok(&format!("{} --learning_rate {rate} --weight_decay {decay}", run.replace("train ", "plan ")));
    }
}

#[test]
fn rows_of_which_most_are_cut_are_said() {
    let folder = Folder::new();
    let run = "train --model_name_or_path model --train_file data/train.jsonl --output_dir out --overwrite_output_dir --quiet";
    let ran = folder.ok(&format!("{run} --global_batch_size 2 --max_steps 1 --max_source_length 24 --max_target_length 2"));
    insta::assert_snapshot!(ran.stderr.lines().filter(|l| l.starts_with("warning")).collect::<Vec<_>>().join("\n"), @r"
    warning: 20 of 20 prompts of data/train.jsonl were cut to `max_source_length`; use a larger one
    warning: 20 of 20 answers of data/train.jsonl were cut to `max_target_length`; use a larger one
    ");
    let ran = folder.ok(&format!("{run} --global_batch_size 2 --max_steps 1 --max_source_length 200 --max_target_length 200"));
    assert!(!ran.stderr.contains("warning"), "{}", ran.stderr);
}

#[test]
fn adapter_that_changes_nothing_is_said_when_it_is_made_and_when_it_is_used() {
    let folder = Folder::new();
    let warmed = "--global_batch_size 2 --max_steps 1 --warmup_steps 1 --overwrite_output_dir --quiet";
    let run = format!("train --model_name_or_path model --train_file data/train.jsonl {warmed}");
    let warned = |ran: &Ran| ran.stderr.lines().filter(|l| l.starts_with("warning")).map(|l| format!("{l}\n")).collect::<String>();
    let mut all = String::new();
    for method in ["lora", "lora --use_dora", "ia3"] {
        all += &warned(&folder.ok(&format!("{run} --finetuning_type {method} --output_dir out")));
        all += &warned(&folder.ok("evaluate --model_name_or_path model --validation_file data/dev.jsonl --adapter out/adapter"));
        all += &warned(&folder.ok("generate --model_name_or_path model --prompt a --max_new_tokens 1 --adapter out/adapter"));
    }
    insta::assert_snapshot!(all, @r"
    warning: the learning rate rises over 1 step, and the run has 1: it is 0 in every step, and nothing is trained; use `--warmup_steps 0`, or more steps
    warning: the tuned model computes what its base does: each of its `lora_B` is 0; more steps, or a higher learning rate, change it
    warning: out/adapter changes nothing, the result is that of the base alone: each of its `lora_B` is 0
    warning: out/adapter changes nothing, the result is that of the base alone: each of its `lora_B` is 0
    warning: the learning rate rises over 1 step, and the run has 1: it is 0 in every step, and nothing is trained; use `--warmup_steps 0`, or more steps
    warning: the tuned model computes what its base does: each of its `lora_B` is 0; more steps, or a higher learning rate, change it
    warning: out/adapter changes nothing, the result is that of the base alone: each of its `lora_B` is 0
    warning: out/adapter changes nothing, the result is that of the base alone: each of its `lora_B` is 0
    warning: the learning rate rises over 1 step, and the run has 1: it is 0 in every step, and nothing is trained; use `--warmup_steps 0`, or more steps
    warning: the tuned model computes what its base does: each of its factors is 1; more steps, or a higher learning rate, change it
    warning: out/adapter changes nothing, the result is that of the base alone: each of its factors is 1
    warning: out/adapter changes nothing, the result is that of the base alone: each of its factors is 1
    ");

    folder.ok(&run.replace("--warmup_steps 1", "--finetuning_type lora --output_dir trained"));
    let evaluate = "evaluate --model_name_or_path model --validation_file data/dev.jsonl --adapter trained/adapter";
    assert_eq!(folder.ok(evaluate).stderr, "");
    // As PEFT's file may say it, from whatever program.
    let path = folder.0.path().join("trained/adapter/adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"lora_alpha\": 16.0", "\"lora_alpha\": 0.0")).unwrap();
    std::fs::remove_file(folder.0.path().join("trained/adapter/glmddp.json")).unwrap();
    insta::assert_snapshot!(warned(&folder.ok(evaluate)), @"warning: trained/adapter changes nothing, the result is that of the base alone: its `lora_alpha` is 0");
}

#[test]
fn comparison_says_what_is_of_all_methods_once_and_what_is_of_some_with_their_labels() {
    let folder = Folder::new();
    let methods = "[methods.a]\nfinetuning_type = 'lora'\nwarmup_steps = 9\n[methods.b]\nfinetuning_type = 'ia3'\n\
                   [methods.c]\nfinetuning_type = 'lora'\nwarmup_steps = 9\n";
    std::fs::write(folder.0.path().join("c.toml"), methods).unwrap();
    let rows = "--model_name_or_path model --train_file data/train.jsonl --validation_file data/dev.jsonl --max_train_samples 4";
    let ran = folder.ok(&format!("compare c.toml {rows} --output_dir all --max_steps 1 --quiet"));
    let warned: Vec<&str> = ran.stderr.lines().filter(|l| l.starts_with("warning") && !l.contains("computes what")).collect();
    insta::assert_snapshot!(warned.join("\n"), @r"
    warning: a step of 16 rows is larger than the data: each of the 4 rows is in it 4.00 times; 1 step is 4.00 epochs; use `--global_batch_size 4` without `--gradient_accumulation_steps`
    warning: a, c: the learning rate rises over 9 steps, and the run has 1: it is 0 in every step, and nothing is trained; use `--warmup_steps 0`, or more steps
    ");
}
