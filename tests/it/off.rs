//! "Off" and "not given" in run files, in every spelling; a dump of the Trainer's arguments as it is.

use serde_json::{Value, json};

use crate::cli_support::{Ran, glmddp_with};

/// The Trainer's `to_dict()` of arguments at their defaults: every key of transformers 4.30 to 4.57, and two of ours.
const TRAINER: &str = include_str!("trainer_arguments.json");
const PATHS: &str = "\"model_name_or_path\": \"m\", \"train_file\": \"t\", \"output_dir\": \"o\"";

fn plan_of(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    serde_json::from_str::<Value>(&ran.stdout).unwrap()["plan"].clone()
}

/// The plan of a JSON run file with `more`.
fn with_json(more: &str) -> Ran {
    glmddp_with("c.json", &format!("{{{PATHS}{more}}}"), &["plan", "c.json", "--json"])
}

/// The same of a TOML file.
fn with_toml(more: &str) -> Ran {
    let text = format!("model_name_or_path = 'm'\ntrain_file = 't'\noutput_dir = 'o'\n{more}\n");
    glmddp_with("c.toml", &text, &["plan", "c.toml", "--json"])
}

#[test]
fn dump_of_the_trainers_arguments_is_taken_with_one_warning() {
    let ran = glmddp_with("args.json", TRAINER, &["plan", "args.json", "--json"]);
    let plan = plan_of(&ran);
    assert_eq!(ran.stderr.matches("warning: ").count(), 1, "{}", ran.stderr);
    insta::assert_snapshot!("warning_of_a_dump", ran.stderr);
    assert_eq!(plan["optim"]["learning_rate"], 5e-5);
    assert_eq!(plan["batch"]["rows_per_slot"], 8);
    assert_eq!(plan["batch"]["slots_per_step"], 1);
    assert_eq!(plan["run"]["duration"], json!({ "epochs": 3.0 }));
    assert_eq!(
        (&plan["run"]["save_steps"], &plan["run"]["logging_steps"], &plan["run"]["eval_steps"]),
        (&json!(500), &json!(500), &Value::Null)
    );
}

#[test]
fn what_a_dump_asks_for_and_glmddp_does_not_do_is_refused_by_name() {
    let mut texts = Vec::new();
    for (key, value) in [
        ("fsdp", json!(["full_shard", "auto_wrap"])),
        ("fsdp", json!("full_shard")),
        ("fsdp_config", json!({ "min_num_params": 2000, "xla": false })),
        ("deepspeed", json!("ds.json")),
        ("fp16", json!(true)),
        ("gradient_checkpointing_kwargs", json!({ "use_reentrant": false, "debug": true })),
        ("lr_scheduler_kwargs", json!({ "num_cycles": 2 })),
        ("accelerator_config", json!({ "split_batches": true, "even_batches": true })),
        ("label_smoothing_factor", json!(0.1)),
        ("optim", json!("adafactor")),
        ("save_strategy", json!("no")),
        ("eval_strategy", json!("epoch")),
        ("data_seed", json!(0)),
        ("neftune_noise_alpha", json!(5)),
        ("quantization_bit", json!(4)),
    ] {
        let mut dump: Value = serde_json::from_str(TRAINER).unwrap();
        dump[key] = value;
        let ran = glmddp_with("args.json", &dump.to_string(), &["plan", "args.json"]);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{key}: {}", ran.stderr);
        texts.push(ran.stderr);
    }
    insta::assert_snapshot!("asked_for_in_a_dump", texts.join("\n"));
}

/// Keys of other programs, and of ours that may be left out.
#[test]
fn off_in_any_spelling_is_the_default() {
    let plain = plan_of(&with_json(""));
    let keys = [
        "fsdp",
        "deepspeed",
        "lr_scheduler_kwargs",
        "quantization_bit",
        "report_to",
        "validation_file",
        "input_column",
        "history_column",
        "save_total_limit",
    ];
    for key in keys.into_iter().chain([
        "max_train_samples",
        "eval_steps",
        "resume_from_checkpoint",
        "cache_dir",
        "fusion_adapters",
        "warmup_ratio",
    ]) {
        for off in ["null", "[]", "{}", "false", "\"\"", "\"no\"", "\"none\"", "\"None\"", "\"off\""] {
            let ran = with_json(&format!(", \"{key}\": {off}"));
            assert_eq!(plan_of(&ran), plain, "{key}: {off}");
        }
        for off in ["[]", "{}", "false", "''", "'no'", "'none'"] {
            assert_eq!(plan_of(&with_toml(&format!("{key} = {off}"))), plain, "{key} = {off}");
        }
    }
    assert_eq!(plan_of(&with_toml("[fsdp_config]\nmin_num_params = 0\nxla = false\n[lr_scheduler_kwargs]")), plain);
    assert_eq!(plan_of(&with_json(", \"method\": null, \"optim\": {}, \"run\": []")), plain);
}

/// What is on by default is off when the file says so.
#[test]
fn off_of_what_is_on_by_default_is_zero() {
    for (key, part, name, off) in [
        ("max_grad_norm", "optim", "max_grad_norm", Value::Null),
        ("save_steps", "run", "save_steps", Value::Null),
        ("audit_steps", "run", "audit_steps", Value::Null),
        ("stall_timeout", "run", "stall_timeout", Value::Null),
    ] {
        for spelled in ["false", "\"no\"", "\"none\""] {
            assert_eq!(plan_of(&with_json(&format!(", \"{key}\": {spelled}")))[part][name], off, "{key}: {spelled}");
        }
        assert_ne!(plan_of(&with_json(&format!(", \"{key}\": null")))[part][name], off, "null is not given");
    }
    for spelled in ["false", "\"no\"", "\"False\"", "\"off\"", "null", "[]"] {
        let plan = plan_of(&with_json(&format!(", \"overwrite_output_dir\": {spelled}")));
        assert_eq!(plan["run"]["overwrite_output_dir"], false, "{spelled}");
    }
    for spelled in ["\"none\"", "\"no\"", "\"None\"", "false", "null", "[]"] {
        assert_eq!(plan_of(&with_json(&format!(", \"recompute\": {spelled}")))["model"]["recompute"], "none", "{spelled}");
    }
}

#[test]
fn keys_that_cannot_be_off_are_refused() {
    let mut texts = Vec::new();
    for more in
        [", \"learning_rate\": false", ", \"max_steps\": \"none\"", ", \"finetuning_type\": \"none\"", ", \"lr_scheduler_type\": false"]
    {
        let ran = with_json(more);
        assert_eq!(ran.code, 2, "{more}");
        texts.push(ran.stderr);
    }
    texts.push(with_json(", \"mask_history\": false").stderr);
    texts.push(with_json(", \"lerning_rate\": false").stderr);
    texts.push(with_json(", \"logging_steps\": \"no\"").stderr);
    insta::assert_snapshot!("never_off", texts.join("\n"));
}

/// Keys that nobody knows, as a dump of a newer program has them: what is null or empty asks for nothing.
#[test]
fn unknown_key_that_asks_for_nothing_is_named_and_one_that_asks_is_refused() {
    let plain = plan_of(&with_json(""));
    for off in ["null", "[]", "{}", "\"\""] {
        let ran = with_json(&format!(", \"some_new_key\": {off}"));
        assert_eq!(plan_of(&ran), plain, "{off}");
        assert_eq!(ran.stderr, "warning: `some_new_key` does nothing here: it is off or has its default (c.json:1, key `some_new_key`)\n");
    }
    for off in ["[]", "{}", "''"] {
        assert_eq!(plan_of(&with_toml(&format!("some_new_key = {off}"))), plain, "{off}");
    }
    for on in ["false", "0", "\"no\"", "[0]", "{\"a\": null}"] {
        let ran = with_json(&format!(", \"some_new_key\": {on}"));
        assert!(ran.code == 2 && ran.stderr.starts_with("error: unknown "), "{on}: {}", ran.stderr);
    }
}

/// What the scripts of THUDM and LLaMA-Factory have.
#[test]
fn run_files_of_other_programs_are_taken() {
    let thudm = r#", "do_train": true, "preprocessing_num_workers": 10, "prompt_column": "content", "response_column": "summary",
        "overwrite_cache": true, "config_name": null, "tokenizer_name": null, "model_revision": "main", "use_fast_tokenizer": true,
        "quantization_bit": null, "ptuning_checkpoint": null, "source_prefix": "", "pad_to_max_length": false, "val_max_target_length": null,
        "forced_bos_token": null, "num_beams": null, "test_file": null, "predict_with_generate": true, "fp16": false"#;
    let factory = r#", "stage": "sft", "template": "chatglm2", "finetuning_type": "lora", "lora_target": "query_key_value", "plot_loss": true,
        "packing": false, "flash_attn": "auto", "val_size": 0.0, "deepspeed": "", "report_to": "none", "neftune_noise_alpha": 0,
        "ddp_timeout": 180000000, "dataset_dir": "data""#;
    for more in [thudm, factory] {
        let ran = with_json(more);
        plan_of(&ran);
        assert_eq!(ran.stderr.matches("warning: ").count(), 1, "{}", ran.stderr);
    }
    for (key, value) in [("dataset", "\"alpaca\""), ("template", "\"llama3\""), ("cutoff_len", "1024"), ("stage", "\"dpo\"")] {
        let ran = with_json(&format!(", \"{key}\": {value}"));
        assert!(ran.code == 2 && ran.stderr.starts_with(&format!("error: `{key}` is not supported: ")), "{}", ran.stderr);
    }
}
