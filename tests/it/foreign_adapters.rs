//! Adapters as other programs write them: settings that change the mathematics are refused by name, those that do not pass, however "off" is
//! spelt; and files with sizes or tensors that are not the base's are refused with what differs.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use glmddp::model::ChatGlm2;
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::{Base, ExportContext, FinetuningType, MethodPlan, PeftMethod, create, read};
use serde_json::{Value, json};

use crate::golden::cases;
use crate::golden_model::model;
use crate::support::shared;
use crate::tensor_files::{change, change_json, copy};

/// A base, and a folder for adapters of it.
struct Setup {
    model: ChatGlm2,
    dir: tempfile::TempDir,
    base_dir: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let case = cases().remove(0);
        Self { model: model(&case), dir: tempfile::tempdir().unwrap(), base_dir: case.dir.join("hf") }
    }

    /// A fresh adapter as `name`, without what this program alone writes.
    fn adapter(&self, name: &str, kind: FinetuningType, keys: &MethodKeys) -> PathBuf {
        let method = create(&MethodPlan::resolve(kind, keys).unwrap(), &self.model, 7).unwrap();
        let context = ExportContext { model_dir: &self.base_dir, config: &self.model.config, dtype: None, about: &json!({}) };
        let dir = self.dir.path().join(name);
        for (file, bytes) in method.export(&context).unwrap() {
            if Path::new(&file).file_name().is_some_and(|name| name != "glmddp.json") {
                let path = dir.join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, bytes).unwrap();
            }
        }
        dir
    }

    fn lora(&self) -> PathBuf {
        self.adapter("lora", FinetuningType::Lora, &MethodKeys { lora_rank: Some(2), ..MethodKeys::default() })
    }

    fn prefix(&self) -> PathBuf {
        let keys = MethodKeys { pre_seq_len: Some(3), prefix_projection: Some(false), ..MethodKeys::default() };
        self.adapter("prefix", FinetuningType::PrefixTuning, &keys)
    }

    fn prompt(&self) -> PathBuf {
        self.adapter("prompt", FinetuningType::PromptTuning, &MethodKeys { num_virtual_tokens: Some(3), ..MethodKeys::default() })
    }

    fn p_tuning(&self) -> PathBuf {
        self.adapter("p_tuning", FinetuningType::PTuning, &MethodKeys { num_virtual_tokens: Some(3), ..MethodKeys::default() })
    }

    fn ia3(&self) -> PathBuf {
        self.adapter("ia3", FinetuningType::Ia3, &MethodKeys::default())
    }

    fn bottleneck(&self, name: &str) -> PathBuf {
        let keys = MethodKeys { adapter_name: Some(name.to_owned()), ..MethodKeys::default() };
        self.adapter(name, FinetuningType::Adapter, &keys)
    }

    fn fusion(&self) -> PathBuf {
        let listed = format!("{},{}", self.bottleneck("one").display(), self.bottleneck("two").display());
        let keys = MethodKeys { fusion_adapters: Some(listed), ..MethodKeys::default() };
        self.adapter("fusion", FinetuningType::AdapterFusion, &keys)
    }

    fn read(&self, dir: &Path) -> Result<Box<dyn PeftMethod>, String> {
        read(dir, Base { model: &self.model, fingerprint: "none", tokenizer_sha256: "none" }).map_err(|error| {
            let hint = error.hint().map(|hint| format!("\n  hint: {hint}")).unwrap_or_default();
            format!("{error}{hint}").replace(&self.dir.path().display().to_string(), "DIR")
        })
    }

    /// What is said of the adapter in `dir` whose configuration has this key and value.
    fn with_key(&self, dir: &Path, file: &str, key: &str, value: &Value) -> Result<(), String> {
        let path = dir.join(file);
        let before = std::fs::read(&path).unwrap();
        change_json(&path, |json| match key.split_once('/') {
            Some((object, key)) => json[object][key] = value.clone(),
            None => json[key] = value.clone(),
        });
        let said = self.read(dir).map(drop);
        std::fs::write(path, before).unwrap();
        said
    }
}

const CONFIG: &str = "adapter_config.json";

#[test]
fn settings_that_change_the_mathematics_are_refused_by_their_names() {
    let setup = Setup::new();
    let (lora, ia3, prefix, prompt) = (setup.lora(), setup.ia3(), setup.prefix(), setup.prompt());
    let mut said = String::new();
    let mut refused = |dir: &Path, file: &str, key: &str, value: Value| {
        let text = setup.with_key(dir, file, key, &value).expect_err(key);
        let shown = key.replace('/', ".");
        assert!(text.contains(&format!("key `{shown}` is ")), "{key}: {text}");
        said.push_str(&format!("{text}\n"));
    };
    for value in ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of_next_year"] {
        refused(&lora, CONFIG, "init_lora_weights", json!(value));
    }
    for (key, value) in [
        ("alora_invocation_tokens", json!([64790, 64792])),
        ("alpha_pattern", json!({"query_key_value": 4})),
        ("rank_pattern", json!({"query_key_value": 4})),
        ("arrow_config", json!({"top_k": 3})),
        ("bias", json!("lora_only")),
        ("exclude_modules", json!(["dense"])),
        ("fan_in_fan_out", json!(true)),
        ("kasa_config", json!({})),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("layers_to_transform", json!(1)),
        ("layers_to_transform", json!([0])),
        ("lora_bias", json!(true)),
        ("lora_dropout", json!(1.5)),
        ("megatron_config", json!({"tensor_model_parallel_size": 2})),
        ("modules_to_save", json!(["output_layer"])),
        ("monteclora_config", json!({"num_samples": 8})),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("trainable_token_indices", json!({"word_embeddings": [1, 2]})),
        ("use_bdlora", json!({"nblocks": 2})),
        ("use_dora", json!("yes")),
        ("use_qalora", json!(true)),
        ("use_rslora", json!(1)),
        ("velora_config", json!({"num_groups": 64, "scale": 1.0})),
        ("a_setting_of_next_year", json!(true)),
        ("another", json!({"long": "x".repeat(200)})),
    ] {
        refused(&lora, CONFIG, key, value);
    }
    for (key, value) in [
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["output_layer"])),
        ("feedforward_modules", json!(["dense"])),
        ("target_modules", json!(["layers.0.mlp.dense_4h_to_h"])),
        ("a_setting_of_next_year", json!(0.5)),
    ] {
        refused(&ia3, CONFIG, key, value);
    }
    for dir in [&prefix, &prompt] {
        refused(dir, CONFIG, "task_type", json!("SEQ_2_SEQ_LM"));
        refused(dir, CONFIG, "num_transformer_submodules", json!(2));
        refused(dir, CONFIG, "modules_to_save", json!(["output_layer"]));
        refused(dir, CONFIG, "a_setting_of_next_year", json!("on"));
    }
    insta::assert_snapshot!("settings_refused", said);
}

#[test]
fn settings_of_bottlenecks_and_fusions_that_change_the_mathematics_are_refused() {
    let setup = Setup::new();
    let fusion = setup.fusion();
    let one = setup.dir.path().join("one");
    let mut said = String::new();
    for (key, value) in [
        ("config/scaling", json!("learned")),
        ("config/inv_adapter", json!("nice")),
        ("config/leave_out", json!([0])),
        ("config/phm_layer", json!(true)),
        ("config/residual_before_ln", json!("post_add")),
        ("config/reduction_factor", json!({"default": 16})),
        ("config/architecture", json!("lora")),
        ("config/invertible_adapter", json!({"block_type": "nice", "reduction_factor": 2})),
        ("config/a_setting_of_next_year", json!(2)),
    ] {
        said.push_str(&format!("{}\n", setup.with_key(&one, CONFIG, key, &value).expect_err(key)));
    }
    for (file, key, value) in [
        ("one,two/adapter_fusion_config.json", "config/temperature", json!(true)),
        ("one,two/adapter_fusion_config.json", "config/a_setting_of_next_year", json!([1])),
        ("adapter_setup.json", "head_setup", json!({"type": "single"})),
        ("two/adapter_config.json", "config/use_gating", json!(true)),
    ] {
        said.push_str(&format!("{}\n", setup.with_key(&fusion, file, key, &value).expect_err(key)));
    }
    insta::assert_snapshot!("bottleneck_settings_refused", said);
}

#[test]
fn off_passes_however_it_is_spelt_and_so_do_keys_that_only_inform() {
    let setup = Setup::new();
    let passes = |dir: &Path, file: &str, key: &str, value: &Value| {
        setup.with_key(dir, file, key, value).unwrap_or_else(|said| panic!("{key} = {value}: {said}"));
    };
    let off = [json!(null), json!(false), json!(""), json!([]), json!({})];
    let lora = setup.lora();
    for value in &off {
        for key in [
            "modules_to_save",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
            "loftq_config",
            "target_parameters",
            "alora_invocation_tokens",
            "arrow_config",
            "fan_in_fan_out",
            "lora_bias",
            "use_dora",
            "use_rslora",
            "init_lora_weights",
            "bias",
            "a_setting_of_next_year",
        ] {
            passes(&lora, CONFIG, key, value);
        }
        for (dir, key) in [
            (setup.ia3(), "exclude_modules"),
            (setup.prefix(), "modules_to_save"),
            (setup.prompt(), "num_layers"),
            (setup.p_tuning(), "num_transformer_submodules"),
        ] {
            passes(&dir, CONFIG, key, value);
            passes(&dir, CONFIG, "a_setting_of_next_year", value);
        }
        passes(&setup.bottleneck("one"), CONFIG, "config/leave_out", value);
        passes(&setup.bottleneck("one"), CONFIG, "config/inv_adapter", value);
        passes(&setup.bottleneck("one"), CONFIG, "config/a_setting_of_next_year", value);
    }
    for (key, value) in [
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!("Gaussian")),
        ("init_lora_weights", json!("eva")),
        ("init_lora_weights", json!("orthogonal")),
        ("init_lora_weights", json!("mica")),
        ("eva_config", json!({"rho": 2.0})),
        ("loftq_config", json!({"loftq_bits": 4})), // without init_lora_weights = "loftq" PEFT ignores it
        ("auto_mapping", json!({"base_model_class": "ChatGLMForConditionalGeneration", "parent_library": "transformers_modules"})),
        ("base_model_name_or_path", json!("THUDM/chatglm2-6b")),
        ("inference_mode", json!(false)),
        ("peft_version", json!("0.21.0")),
        ("revision", json!("main")),
        ("task_type", json!("SEQ_2_SEQ_LM")),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(32)),
        ("runtime_config", json!({"ephemeral_gpu_offload": true})),
    ] {
        passes(&lora, CONFIG, key, &value);
    }
    passes(&setup.prefix(), CONFIG, "init_weights", &json!("zero"));
    passes(&setup.prompt(), CONFIG, "prompt_tuning_init_text", &json!("请写一段广告"));
    passes(&setup.p_tuning(), CONFIG, "encoder_dropout", &json!(0.1));
    passes(&setup.bottleneck("one"), CONFIG, "config/dropout", &json!(0.1));
    passes(&setup.bottleneck("one"), CONFIG, "label2id", &json!({"a": 0}));
}

/// `to_dict()` of PEFT 0.20.0's configurations with what its models fill in, and the keys that came after it.
#[test]
fn configurations_with_every_default_of_peft_are_read() {
    let setup = Setup::new();
    let model = &setup.model.config;
    let common = json!({
        "auto_mapping": null, "base_model_name_or_path": "THUDM/chatglm2-6b", "inference_mode": true, "peft_version": "0.20.0",
        "revision": null, "task_type": "CAUSAL_LM",
    });
    let prompt = json!({
        "modules_to_save": null, "num_layers": model.num_layers, "num_transformer_submodules": 1, "num_virtual_tokens": 3,
    });
    let of_prompt = |own: Value| [common.clone(), prompt.clone(), own];
    for (dir, parts) in [
        (
            setup.lora(),
            vec![
                common.clone(),
                json!({
                    "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "bias": "none", "corda_config": null,
                    "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
                    "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
                    "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 4, "lora_bias": false, "lora_dropout": 0.0,
                    "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
                    "monteclora_config": null, "peft_type": "LORA", "qalora_group_size": 16, "r": 2, "rank_pattern": {},
                    "target_modules": ["query_key_value"], "target_parameters": null, "trainable_token_indices": null,
                    "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null,
                }),
            ],
        ),
        (
            setup.ia3(),
            vec![
                common.clone(),
                json!({
                    "exclude_modules": null, "fan_in_fan_out": false, "feedforward_modules": ["mlp.dense_4h_to_h"],
                    "init_ia3_weights": true, "modules_to_save": null, "peft_type": "IA3",
                    "target_modules": ["query_key_value", "mlp.dense_4h_to_h"],
                }),
            ],
        ),
        (
            setup.prefix(),
            of_prompt(json!({
                "encoder_hidden_size": null, "init_weights": null, "peft_type": "PREFIX_TUNING", "prefix_projection": false,
                "num_attention_heads": model.multi_query_group_num, "token_dim": model.multi_query_group_num * model.kv_channels,
            }))
            .to_vec(),
        ),
        (
            setup.prompt(),
            of_prompt(json!({
                "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": null, "tokenizer_kwargs": null,
                "tokenizer_name_or_path": null, "num_attention_heads": model.num_attention_heads, "token_dim": model.hidden_size,
            }))
            .to_vec(),
        ),
        (
            setup.p_tuning(),
            of_prompt(json!({
                "encoder_dropout": 0.0, "encoder_hidden_size": model.hidden_size, "encoder_num_layers": 2,
                "encoder_reparameterization_type": "MLP", "peft_type": "P_TUNING", "num_attention_heads": model.num_attention_heads,
                "token_dim": model.hidden_size,
            }))
            .to_vec(),
        ),
    ] {
        let ours = setup.read(&dir).unwrap();
        let mut all = serde_json::Map::new();
        parts.into_iter().for_each(|part| all.extend(part.as_object().unwrap().clone()));
        std::fs::write(dir.join(CONFIG), Value::Object(all).to_string()).unwrap();
        let theirs = setup.read(&dir).unwrap_or_else(|said| panic!("{said}"));
        assert_eq!((theirs.name(), theirs.sizes()), (ours.name(), ours.sizes()));
    }
}

/// Small inputs on which the program failed.
#[test]
fn published_cases_of_settings_are_refused_or_read() {
    let setup = Setup::new();
    let lora = setup.lora();
    for (case, is_read) in [("cases/pissa-adapter", false), ("cases/empty-is-null", true)] {
        let Some(case) = shared(case) else { continue };
        // Its settings, on an adapter of this base.
        let theirs: Value = serde_json::from_slice(&std::fs::read(case.join(CONFIG)).unwrap()).unwrap();
        change_json(&lora.join(CONFIG), |ours| {
            for (key, value) in theirs.as_object().unwrap() {
                if !["r", "lora_alpha", "target_modules"].contains(&key.as_str()) {
                    ours[key.as_str()] = value.clone();
                }
            }
        });
        match setup.read(&lora) {
            Ok(_) => assert!(is_read),
            Err(said) => assert!(!is_read && said.contains("key `init_lora_weights` is \"pissa\""), "{said}"),
        }
    }
}

fn zeros(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn adapters_with_a_tensor_missing_or_too_many_or_of_another_shape_are_refused_by_its_name() {
    let setup = Setup::new();
    let mut said = String::new();
    let fusion = setup.fusion();
    for (dir, file) in [
        (setup.lora(), "adapter_model.safetensors"),
        (setup.ia3(), "adapter_model.safetensors"),
        (setup.prefix(), "adapter_model.safetensors"),
        (setup.prompt(), "adapter_model.safetensors"),
        (setup.dir.path().join("one"), "pytorch_adapter.bin"),
        (fusion, "one,two/pytorch_model_adapter_fusion.bin"),
    ] {
        let whole = setup.dir.path().join("whole");
        copy(&dir, &whole);
        let mut refused = |change_of: &dyn Fn(&mut crate::tensor_files::Tensors)| {
            change(&dir.join(file), change_of);
            said.push_str(&format!("{}\n", setup.read(&dir).err().expect("a refusal")));
            copy(&whole, &dir);
        };
        refused(&|tensors| _ = tensors.pop_last());
        refused(&|tensors| {
            let (name, tensor) = tensors.first_key_value().map(|(name, tensor)| (name.clone(), tensor.clone())).unwrap();
            let mut dims = tensor.dims().to_vec();
            dims[0] += 1;
            tensors.insert(name, zeros(&dims));
        });
        refused(&|tensors| _ = tensors.insert("base_model.model.transformer.output_layer.weight".to_owned(), zeros(&[2, 2])));
        std::fs::remove_dir_all(whole).unwrap();
    }
    insta::assert_snapshot!("tensors_refused", said);
}
