//! `glmddp plan` and the files in configs/.

use std::path::Path;

use clap::CommandFactory;
use glmddp::config::arithmetic::{plan_arithmetic, plan_length};
use glmddp::config::plan::{Duration, LossMean, Recompute, Reduction, Resume, Truncation, Warmup, WeightDtype};
use glmddp::config::values::FinetuningType;
use glmddp::config::{self, Plan, RunConfig, Sources};
use glmddp::model::shape::ModelShape;

use crate::cli_support::{glmddp_in, glmddp_with};

/// ChatGLM2-6B's config.json, as far as it is read.
const CONFIG_JSON: &str = r#"{"model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696,
    "num_attention_heads": 32, "multi_query_attention": true, "multi_query_group_num": 2, "kv_channels": 128, "padded_vocab_size": 65024,
    "seq_length": 32768, "layernorm_epsilon": 1e-05, "add_bias_linear": false, "add_qkv_bias": true, "post_layer_norm": true, "rmsnorm": true,
    "apply_residual_connection_post_layernorm": false, "original_rope": true, "torch_dtype": "float16", "eos_token_id": 2, "pad_token_id": 0}"#;

fn configs() -> Vec<std::path::PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    // A comparison is no run: it has a test of its own.
    files.retain(|file| !file.ends_with("compare.toml"));
    files.sort();
    files
}

fn resolve(file: &Path, world_size: usize) -> Plan {
    config::load(Some(file), &RunConfig::default()).unwrap().resolve(world_size).unwrap()
}

/// The plans of a comparison, by label.
fn resolve_all(file: &Path, world_size: usize) -> Vec<(String, Plan)> {
    let comparison = config::load_comparison(Some(file), &RunConfig::default()).unwrap();
    assert_eq!(comparison.warnings, [""; 0], "{}", file.display());
    let methods = comparison.select("all").unwrap();
    methods.into_iter().map(|(label, loaded)| (label, loaded.resolve(world_size).unwrap())).collect()
}

/// A method that a comparison cannot train from nothing but rows stands here.
const NOT_IN_COMPARE: &[&str] = &["adapter_fusion"];

#[test]
fn compare_config_has_every_method_with_its_own_learning_rate_on_1_2_and_4_ranks() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/compare.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    for table in text.split("\n[methods.").skip(1) {
        let rate = table.lines().find(|line| line.starts_with("learning_rate = ")).expect("each table has its learning rate");
        assert!(rate.split_once('#').is_some_and(|(_, source)| source.trim().len() > 8), "where does it come from? {rate}");
    }
    for world_size in [1, 2, 4] {
        let plans = resolve_all(&file, world_size);
        let first = &plans[0].1;
        for (label, plan) in &plans {
            assert_eq!((&plan.data, &plan.batch, &plan.run), (&first.data, &first.batch, &first.run), "{label}");
            assert_eq!(plan.batch.rows_per_step(), 16);
            assert!(plan.data.validation_file.is_some());
        }
        let mut train = glmddp::cli::Cli::command();
        train.build();
        let train = train.find_subcommand("train").unwrap();
        let kinds = train.get_arguments().find(|a| a.get_id() == "finetuning_type").unwrap().get_possible_values();
        for kind in kinds.iter().map(|k| k.get_name()).filter(|k| !NOT_IN_COMPARE.contains(k)) {
            let kind: FinetuningType = serde_json::from_value(kind.into()).unwrap();
            let name = serde_json::to_value(kind).unwrap();
            assert!(plans.iter().any(|(_, plan)| serde_json::to_value(&plan.method).unwrap()["name"] == name), "{name} is not compared");
        }
    }
}

#[test]
fn methods_that_are_built_in_hold_for_files_without_their_own() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built_in = config::load_comparison(Some(&root.join("configs/demo.toml")), &RunConfig::default()).unwrap();
    let own: Vec<_> = resolve_all(&root.join("configs/compare.toml"), 1).into_iter().map(|(label, plan)| (label, plan.method)).collect();
    let chosen = built_in.select("all").unwrap().into_iter();
    assert_eq!(chosen.map(|(label, loaded)| (label, loaded.resolve(1).unwrap().method)).collect::<Vec<_>>(), own);
    // demo.toml is of one method: its keys are passed over aloud.
    assert!(
        built_in.warnings.iter().any(|w| w.contains("`pre_seq_len`: each method of a comparison has its own")),
        "{:?}",
        built_in.warnings
    );
    let error = config::load(Some(&root.join("configs/compare.toml")), &RunConfig::default()).unwrap_err();
    assert_eq!(error.to_string(), "unknown section `[methods]`");
}

#[test]
fn every_file_in_configs_loads_and_resolves_on_1_2_and_4_ranks() {
    let files = configs();
    assert!(files.len() >= 5, "configs/ has {} files", files.len());
    for file in files {
        for world_size in [1, 2, 4] {
            let plan = resolve(&file, world_size);
            assert_eq!(plan.batch.rows_per_step(), 16, "{}", file.display());
        }
    }
}

#[test]
fn plan_written_as_toml_resolves_to_itself() {
    let dir = tempfile::tempdir().unwrap();
    for file in configs() {
        let plan = resolve(&file, 2);
        let again = dir.path().join("training_args.toml");
        std::fs::write(&again, plan.to_toml().unwrap()).unwrap();
        assert_eq!(resolve(&again, 2), plan, "{}", file.display());
    }
}

#[test]
fn published_recipe_has_the_values_of_train_sh() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/ptuning_v2_adgen.toml");
    let plan = resolve(&file, 1);
    assert_eq!((plan.data.max_source_length, plan.data.max_target_length), (64, 128));
    assert_eq!((plan.optim.learning_rate, plan.run.duration, plan.run.seed), (2e-2, Duration::Steps(3000), 42));
    assert_eq!(plan.optim.warmup, Warmup::Steps(0));
    assert_eq!(plan.model.recompute, Recompute::None);
    let costs = plan_arithmetic(&ModelShape::CHATGLM2_6B, &plan).unwrap();
    assert_eq!(costs.trainable_parameters, 1_835_008);
    assert_eq!(costs.max_row_tokens, 192);
    let bytes = costs.rank_bytes;
    assert_eq!([bytes.trained_parameters, bytes.gradient, bytes.moments], [4 * 1_835_008, 4 * 1_835_008, 8 * 1_835_008]);
    let length = plan_length(&plan, Some(114_599));
    assert!((length.epochs.unwrap() - 0.42).abs() < 0.005);
}

/// 1,835,008 parameters are 112 chunks of 2^14, the unit in which the optimizer's state is dealt.
#[test]
fn plan_with_a_sharded_optimizer_counts_a_ranks_shard() {
    let held = |file: &str, world_size| {
        let mut plan = resolve(&Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(file), world_size);
        assert!(!plan.optim.shard_optimizer, "the default where no weight of the base is trained");
        plan.optim.shard_optimizer = true;
        let bytes = plan_arithmetic(&ModelShape::CHATGLM2_6B, &plan).unwrap().rank_bytes;
        [bytes.trained_parameters, bytes.gradient, bytes.moments]
    };
    assert_eq!(held("ptuning_v2_adgen.toml", 1), [4 * 1_835_008, 4 * 1_835_008, 8 * 1_835_008]);
    assert_eq!(held("ptuning_v2_adgen.toml", 4), [4 * 1_835_008, 4 * 28 * 16_384, 8 * 28 * 16_384]);
    // Behind an MLP each rank needs the whole gradient: 7,282 chunks make 1,820.5 a rank.
    assert_eq!(held("ptuning_v2_projection.toml", 4), [4 * 119_293_952, 4 * 119_293_952, 8 * 1821 * 16_384]);
}

/// The 6B model's 6,243,584,000 parameters are 381,078.4 chunks of 2^14: 95,270 of four ranks' longest shards.
#[test]
fn plan_in_bfloat16_counts_a_ranks_masters() {
    let masters = |dtype, world_size| {
        let mut config = RunConfig::default();
        config.model.model_name_or_path = Some("m".into());
        config.model.torch_dtype = Some(dtype);
        config.data.train_file = Some("t".into());
        config.run.output_dir = Some("o".into());
        config.method.finetuning_type = Some(FinetuningType::Full);
        let bytes =
            plan_arithmetic(&ModelShape::CHATGLM2_6B, &config.resolve(world_size, &Sources::default()).unwrap()).unwrap().rank_bytes;
        assert_eq!(bytes.moments, 8 * if world_size == 1 { 6_243_584_000 } else { 95_270 * 16_384 });
        assert!(bytes.total() > bytes.weights + bytes.trained_parameters + bytes.moments + bytes.masters);
        bytes.masters
    };
    assert_eq!(masters(WeightDtype::Float32, 4), 0);
    assert_eq!(masters(WeightDtype::Bfloat16, 1), 4 * 6_243_584_000);
    assert_eq!(masters(WeightDtype::Bfloat16, 4), 4 * 95_270 * 16_384);
}

#[test]
fn plan_of_a_method_that_trains_the_base_shards_its_optimizer_unless_told_otherwise() {
    let file = "model_name_or_path = 'm'\ntrain_file = 't'\noutput_dir = 'o'\n";
    let sharded = |args: &[&str]| {
        glmddp_with("c.toml", file, &[&["plan", "c.toml", "--json"], args].concat()).stdout.contains("\"shard_optimizer\": true")
    };
    assert!(sharded(&["--finetuning_type", "full"]) && sharded(&["--finetuning_type", "freeze"]));
    assert!(!sharded(&["--finetuning_type", "full", "--shard_optimizer", "false"]) && !sharded(&["--finetuning_type", "lora"]));
}

#[test]
fn projection_recipe_has_the_published_number_of_parameters() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/ptuning_v2_projection.toml");
    assert_eq!(plan_arithmetic(&ModelShape::CHATGLM2_6B, &resolve(&file, 1)).unwrap().trainable_parameters, 119_293_952);
}

#[test]
fn defaults_with_three_paths_are_the_published_recipe() {
    let ran = glmddp_with("c.toml", "model_name_or_path = 'm'\ntrain_file = 't'\noutput_dir = 'o'\n", &["plan", "c.toml", "--json"]);
    let plan: Plan = serde_json::from_value(serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["plan"].clone()).unwrap();
    assert_eq!((plan.data.truncation, plan.optim.loss_mean), (Truncation::KeepAnswerMark, LossMean::Token));
    assert_eq!((plan.optim.reduction, plan.optim.max_grad_norm), (Reduction::SlotTree, Some(1.0)));
    assert_eq!((plan.run.resume.clone(), plan.run.logging_steps.get()), (Resume::No, 10));
    assert_eq!((plan.batch.rows_per_step(), plan.batch.rows_per_slot.get()), (16, 1));
}

#[test]
fn plan_of_the_6b_model_on_two_ranks_shows_its_arithmetic() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("m")).unwrap();
    std::fs::write(dir.path().join("m/config.json"), CONFIG_JSON).unwrap();
    let row = "{\"content\": \"a\", \"summary\": \"b\"}\n";
    std::fs::write(dir.path().join("train.json"), row.repeat(6000)).unwrap();
    let args = "plan --model-name-or-path m --train-file train.json --output-dir out --per_device_train_batch_size 4 \
                --gradient_accumulation_steps 4 --ranks 2 --recompute block --warmup_ratio 0.1";
    let ran = glmddp_in(dir.path(), &args.split_whitespace().collect::<Vec<_>>());
    insta::assert_snapshot!("plan_6b", ran.stdout);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let ran = glmddp_in(dir.path(), &[args, "--shard_optimizer"].join(" ").split_whitespace().collect::<Vec<_>>());
    let memory = ran.stdout.lines().skip_while(|line| !line.starts_with("memory")).take_while(|line| !line.starts_with("output"));
    insta::assert_snapshot!("plan_6b_sharded_memory", memory.collect::<Vec<_>>().join("\n"));
    let more = "--finetuning_type full --torch_dtype bfloat16";
    let ran = glmddp_in(dir.path(), &[args, more].join(" ").split_whitespace().collect::<Vec<_>>());
    let memory = ran.stdout.lines().skip_while(|line| !line.starts_with("memory")).take_while(|line| !line.starts_with("output"));
    insta::assert_snapshot!("plan_6b_bfloat16_memory", memory.collect::<Vec<_>>().join("\n"));
}

#[test]
fn command_line_over_a_file_displaces_its_alternatives() {
    let file = "model_name_or_path = 'm'\ntrain_file = 't'\noutput_dir = 'o'\nmax_steps = 7\nwarmup_steps = 3\ngradient_accumulation_steps = 8\nrecompute = 'none'\n";
    let args =
        "plan c.toml --json --num_train_epochs 2 --warmup-ratio=0.5 --global_batch_size 4 --gradient_checkpointing --learning_rate 1e-3";
    let ran = glmddp_with("c.toml", file, &args.split_whitespace().collect::<Vec<_>>());
    let plan: Plan = serde_json::from_value(serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["plan"].clone()).unwrap();
    assert_eq!((plan.run.duration, plan.optim.warmup), (Duration::Epochs(2.0), Warmup::Ratio(0.5)));
    assert_eq!((plan.batch.rows_per_step(), plan.model.recompute, plan.optim.learning_rate), (4, Recompute::Block, 1e-3));
}

/// THUDM/ChatGLM2-6B `ptuning/train.sh`, less `--quantization_bit 4`.
#[test]
fn arguments_of_train_sh_work_as_they_are() {
    let args = "plan --do_train --train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json --preprocessing_num_workers 10 \
                --prompt_column content --response_column summary --overwrite_cache --model_name_or_path THUDM/chatglm2-6b \
                --output_dir output/adgen --overwrite_output_dir --max_source_length 64 --max_target_length 128 \
                --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16 --predict_with_generate \
                --max_steps 3000 --logging_steps 10 --save_steps 1000 --learning_rate 2e-2 --pre_seq_len 128 --json";
    let ran = glmddp_in(Path::new("."), &args.split_whitespace().collect::<Vec<_>>());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    insta::assert_snapshot!("train_sh_warnings", ran.stderr);
    let plan: Plan = serde_json::from_value(serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["plan"].clone()).unwrap();
    assert!(plan.run.overwrite_output_dir && plan.data.overwrite_cache);
    assert_eq!(plan.batch.rows_per_step(), 16);
}

#[test]
fn flat_json_and_sections_of_toml_give_the_same_plan() {
    let json = r#"{"model_name_or_path": "m", "train_file": "t", "output_dir": "o", "max_steps": -1, "num_train_epochs": 1,
        "prefix_projection": true, "resume_from_checkpoint": "latest", "preprocessing_num_workers": 10}"#;
    let toml = "[model]\nmodel_name_or_path = 'm'\n[data]\ntrain_file = 't'\n[method]\nprefix_projection = true\n\
                [run]\noutput_dir = 'o'\nnum_train_epochs = 1.0\nresume_from_checkpoint = true\n";
    let a = glmddp_with("c.json", json, &["plan", "c.json", "--json"]);
    let b = glmddp_with("c.toml", toml, &["plan", "--config", "c.toml", "--json"]);
    assert_eq!(a.stdout, b.stdout);
    assert_eq!(b.stderr, "");
    assert!(a.stdout.contains("\"epochs\": 1.0") && a.stderr.starts_with("warning: `preprocessing_num_workers` does nothing here"));
}

#[test]
fn flags_before_the_file_do_not_swallow_it() {
    let file = "model_name_or_path = 'm'\ntrain_file = 't'\noutput_dir = 'o'\n";
    let plan = |args: &[&str]| glmddp_with("c.toml", file, args).stdout;
    let on = plan(&["plan", "--prefix-projection", "c.toml", "--json"]);
    assert!(on.contains("\"prefix_projection\": true"), "{on}");
    assert_eq!(on, plan(&["plan", "--prefix_projection", "True", "c.toml", "--json"]));
    assert_eq!(on, plan(&["plan", "--prefix-projection=true", "--config=c.toml", "--json"]));
    assert!(plan(&["plan", "--prefix_projection", "false", "c.toml", "--json"]).contains("\"prefix_projection\": false"));
}

#[test]
fn plan_of_rows_without_the_column_is_refused_before_any_work() {
    let paths = "plan --model_name_or_path m --train_file t.csv --output_dir o";
    let ran = glmddp_with("t.csv", "question,answer\na,b\n", &paths.split_whitespace().collect::<Vec<_>>());
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("t.csv") && ran.stderr.contains("`answer`"), "{}", ran.stderr);
}
