//! What a user sees of a configuration that cannot be run: exit code 2, the place, a hint that holds.

use glmddp::config::{self, ConfigError, RunConfig};

use crate::cli_support::{Ran, glmddp_with};

const PATHS: &str = "model_name_or_path = 'm'\ntrain_file = 't'\noutput_dir = 'o'\n";

/// The program's message about `PATHS` with `more` behind it, planned with `args`.
fn refused(more: &str, args: &[&str]) -> String {
    let Ran { code, stdout, stderr } = glmddp_with("c.toml", &format!("{PATHS}{more}"), &[&["plan", "c.toml"], args].concat());
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{stderr}");
    stderr
}

#[test]
fn batch_that_ranks_do_not_divide_names_both_neighbours() {
    let text = refused("[batch]\nglobal_batch_size = 18\nper_device_train_batch_size = 2\n", &["--ranks", "4"]);
    insta::assert_snapshot!(text, @r"
    error: `batch.global_batch_size` is 18, which 4 ranks x micro-batch 2 = 8 does not divide
      --> c.toml:5, key `batch.global_batch_size`

    hint: use 16 or 24
    ");
}

#[test]
fn batch_that_ranks_do_not_divide_on_the_command_line_names_the_option() {
    insta::assert_snapshot!(refused("", &["--ranks", "3", "--global-batch-size=7"]), @r"
    error: `batch.global_batch_size` is 7, which 3 ranks x micro-batch 1 = 3 does not divide
      --> command line, `--global_batch_size`

    hint: use 6 or 9
    ");
}

#[test]
fn ranks_above_the_number_of_slots_are_counted() {
    insta::assert_snapshot!(refused("global_batch_size = 8\nper_device_train_batch_size = 2\n", &["--ranks", "6"]), @r"
    error: `batch.global_batch_size` is 8: 4 slots of micro-batch 2, fewer than 6 ranks
      --> c.toml:4, key `batch.global_batch_size`

    hint: start 4 ranks, or use 12
    ");
}

/// Feeds every number of every hint back.
#[test]
fn batch_hints_of_any_size_are_valid() {
    let mut num_hints = 0;
    for world_size in 1..=9 {
        for micro in 1..=5 {
            for rows in 1..=40 {
                let mut keys = RunConfig::default();
                keys.model.model_name_or_path = Some("m".into());
                keys.data.train_file = Some("t".into());
                keys.run.output_dir = Some("o".into());
                keys.batch.per_device_train_batch_size = Some(micro);
                let resolve = |rows, world_size| {
                    let mut keys = keys.clone();
                    keys.batch.global_batch_size = Some(rows);
                    config::load(None, &keys).unwrap().resolve(world_size)
                };
                let Err(error) = resolve(rows, world_size) else { continue };
                let hint = error.hint().unwrap();
                let numbers = hint.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<usize>().ok());
                let ranks = matches!(error, ConfigError::TooManyRanks { .. });
                for (i, n) in numbers.enumerate() {
                    let mended = if ranks && i == 0 { resolve(rows, n) } else { resolve(n, world_size) };
                    assert!(mended.is_ok(), "{rows} rows, micro-batch {micro}, {world_size} ranks: hint `{hint}`");
                    num_hints += 1;
                }
            }
        }
    }
    assert!(num_hints > 1000);
}

#[test]
fn unknown_key_names_line_and_nearest_name() {
    insta::assert_snapshot!(refused("[optim]\n\nlerning_rate = 0.1\n", &[]), @r"
    error: unknown key `lerning_rate`
      --> c.toml:6, key `optim.lerning_rate`

    hint: did you mean `learning_rate`?
    ");
    insta::assert_snapshot!(refused("", &["--pre-seq-length", "8"]), @r"
    error: unknown key `pre_seq_length`
      --> command line, `--pre_seq_length`

    hint: did you mean `pre_seq_len`?
    ");
}

#[test]
fn unknown_section_names_the_nearest() {
    insta::assert_snapshot!(refused("[optimizer]\nlearning_rate = 0.1\n", &[]), @r"
    error: unknown section `[optimizer]`
      --> c.toml:4, key `optimizer`

    hint: did you mean `[optim]`?
    ");
}

#[test]
fn key_in_another_section_names_the_right_one() {
    insta::assert_snapshot!(refused("[model]\nlearning_rate = 0.1\n", &[]), @r"
    error: key `learning_rate` stands in section `[model]`, expected `[optim]`
      --> c.toml:5, key `model.learning_rate`

    hint: move `learning_rate` to `[optim]`, or above the first section
    ");
}

#[test]
fn key_given_flat_and_in_its_section_names_both_lines() {
    insta::assert_snapshot!(refused("seed = 1\n[run]\nseed = 2\n", &[]), @r"
    error: key `seed` is given twice, in lines 4 and 6
      --> c.toml:6, key `run.seed`

    hint: leave one `seed` out
    ");
}

#[test]
fn values_of_the_wrong_kind_say_what_was_expected() {
    insta::assert_snapshot!(refused("learning_rate = 'fast'\n", &[]), @r#"
    error: `optim.learning_rate` is string "fast", expected a number
      --> c.toml:4, key `optim.learning_rate`
    "#);
    insta::assert_snapshot!(refused("max_source_length = 64.0\n", &[]), @r"
    error: `data.max_source_length` is floating point `64.0`, expected a whole number of 0 or more
      --> c.toml:4, key `data.max_source_length`
    ");
    insta::assert_snapshot!(refused("pre_seq_len = -1\n", &[]), @r"
    error: `method.pre_seq_len` is integer `-1`, expected a whole number of 0 or more
      --> c.toml:4, key `method.pre_seq_len`
    ");
    insta::assert_snapshot!(refused("prefix_projection = 1\n", &[]), @r"
    error: `method.prefix_projection` is integer `1`, expected true or false
      --> c.toml:4, key `method.prefix_projection`
    ");
    insta::assert_snapshot!(refused("lr_scheduler_type = 'polynomial'\n", &[]), @r"
    error: `optim.lr_scheduler_type` is `polynomial`, expected one of `linear`, `cosine`, `constant`
      --> c.toml:4, key `optim.lr_scheduler_type`
    ");
}

#[test]
fn values_out_of_range_say_what_was_expected() {
    insta::assert_snapshot!(refused("learning_rate = nan\n", &[]), @r"
    error: `optim.learning_rate` is NaN, expected a number above 0
      --> c.toml:4, key `optim.learning_rate`
    ");
    insta::assert_snapshot!(refused("prefix_dropout = 1.0\n", &[]), @r"
    error: `method.prefix_dropout` is 1, expected a share of at least 0 and below 1
      --> c.toml:4, key `method.prefix_dropout`
    ");
    insta::assert_snapshot!(refused("", &["--max_steps", "0"]), @r"
    error: `run.max_steps` is 0, expected 1 or more, or -1 for `num_train_epochs`
      --> command line, `--max_steps`
    ");
    insta::assert_snapshot!(refused("per_device_train_batch_size = 0\n", &[]), @r"
    error: `batch.per_device_train_batch_size` is 0, expected 1 or more
      --> c.toml:4, key `batch.per_device_train_batch_size`
    ");
}

#[test]
fn contradicting_keys_are_both_named() {
    insta::assert_snapshot!(refused("global_batch_size = 32\ngradient_accumulation_steps = 4\n", &["--ranks", "2"]), @r"
    error: `batch.global_batch_size` contradicts `batch.gradient_accumulation_steps`: 1 rows x 4 accumulation x 2 ranks = 8 rows a step, not 32
      --> c.toml:4, key `batch.global_batch_size`

    hint: leave one of the two out
    ");
    insta::assert_snapshot!(refused("recompute = 'none'\ngradient_checkpointing = true\n", &[]), @r"
    error: `model.recompute` contradicts `model.gradient_checkpointing`: they ask for different recomputation
      --> c.toml:4, key `model.recompute`

    hint: leave one of the two out
    ");
    for (name, more) in [
        ("save_best_without_a_limit", "save_best = true\n"),
        ("save_keep_every_without_a_limit", "save_keep_every = 100\n"),
        ("save_best_without_held_out_rows", "save_best = true\nsave_total_limit = 2\n"),
        (
            "save_best_at_other_steps",
            "save_best = true\nsave_total_limit = 2\nsave_steps = 100\neval_steps = 40\nvalidation_file = \"d\"\n",
        ),
        ("save_best_with_losses_at_the_end", "save_best = true\nsave_total_limit = 2\nsave_steps = 100\nvalidation_file = \"d\"\n"),
        ("on_save_error_of_another_name", "on_save_error = \"go on\"\n"),
    ] {
        insta::assert_snapshot!(name, refused(more, &[]));
    }
    insta::assert_snapshot!(refused("eval_steps = 10\n", &[]), @r"
    error: `run.eval_steps` is given, but `data.validation_file` is not
      --> c.toml:4, key `run.eval_steps`

    hint: give `data.validation_file` as well
    ");
}

#[test]
fn arguments_that_would_change_results_are_refused_with_the_reason() {
    insta::assert_snapshot!(refused("quantization_bit = 4\n", &[]), @r"
    error: `quantization_bit` is not supported: the base model is not quantized yet
      --> c.toml:4, key `quantization_bit`

    hint: leave `quantization_bit` out
    ");
    insta::assert_snapshot!(refused("", &["--fp16"]), @r"
    error: `fp16` is not supported: a GPU computes in bfloat16 and a CPU in float32, unless compute_dtype says otherwise
      --> command line, `--fp16`

    hint: leave `fp16` out
    ");
    insta::assert_snapshot!(refused("", &["--lora_rank", "8"]), @r"
    error: `method.lora_rank` contradicts `method.finetuning_type`: it belongs to lora, and the method is ptuning_v2
      --> command line, `--lora_rank`

    hint: leave one of the two out
    ");
    insta::assert_snapshot!(refused("", &["--finetuning_type", "lora", "--lora_target", "qkv,dense"]), @r#"
    error: `method.lora_target` is "qkv,dense", expected `all`, a list of query_key_value, dense, dense_h_to_4h, dense_4h_to_h, or a regular expression for whole names
      --> command line, `--lora_target`
    "#);
    insta::assert_snapshot!(refused("", &["--finetuning_type", "lora", "--prefix_projection"]), @r"
    error: `method.prefix_projection` contradicts `method.finetuning_type`: it belongs to ptuning_v2 and prefix_tuning, and the method is lora
      --> command line, `--prefix_projection`

    hint: leave one of the two out
    ");
    insta::assert_snapshot!(refused("", &["--finetuning_type", "lora", "--torch_dtype", "bfloat16"]), @r"
    error: `model.torch_dtype` contradicts `method.finetuning_type`: bfloat16 is for methods that train weights of the base, and lora trains none
      --> command line, `--torch_dtype`

    hint: leave one of the two out
    ");
    assert_eq!(glmddp_with("c.toml", PATHS, &["plan", "c.toml", "--torch_dtype", "float32"]).code, 0);
    assert_eq!(glmddp_with("c.toml", PATHS, &["plan", "c.toml", "--fp16", "False"]).code, 0);
}

#[test]
fn missing_paths_say_how_to_give_them() {
    let ran = glmddp_with("c.toml", "output_dir = 'o'\n", &["plan", "c.toml"]);
    assert_eq!(ran.code, 2);
    insta::assert_snapshot!(ran.stderr, @r"
    error: `model_name_or_path` is not given

    hint: add `model_name_or_path` to the configuration file or give `--model_name_or_path`
    ");
}

#[test]
fn files_that_cannot_be_read_say_why() {
    insta::assert_snapshot!(glmddp_with("c.toml", "", &["plan", "d.toml"]).stderr, @r"
    error: cannot read configuration file: no such file: d.toml

    hint: is `c.toml` meant?
    ");
    insta::assert_snapshot!(glmddp_with("c.toml", "", &["plan", "."]).stderr, @r"
    error: cannot read configuration file: expected a file, found a folder: .

    hint: there are `./c.toml`
    ");
    insta::assert_snapshot!(glmddp_with("c.toml", "a = 1\nb = \n", &["plan", "c.toml"]).stderr, @r"
    error: configuration file is not valid TOML: string values must be quoted, expected literal string
      --> c.toml:2
    ");
    insta::assert_snapshot!(glmddp_with("c.json", "{\n \"seed\": 1,\n}", &["plan", "c.json"]).stderr, @r"
    error: configuration file is not valid JSON: trailing comma at line 3 column 1
      --> c.json:3
    ");
}
