//! Models that cannot be loaded, and what is said about them.

use std::path::Path;

use candle_core::{DType, Device};
use glmddp::model::config::{ModelConfig, ModelError};
use glmddp::model::init::{InitOptions, Preset, init_model};
use glmddp::model::weights::WeightSource;
use serde_json::{Value, json};

/// The error and its hint, with the folder's name replaced.
fn text(dir: &Path, error: &ModelError) -> String {
    let hint = error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
    format!("{error}{hint}").replace(&dir.display().to_string(), "MODEL")
}

fn published() -> Value {
    json!({
        "_name_or_path": "THUDM/chatglm2-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": false,
        "add_qkv_bias": true, "apply_residual_connection_post_layernorm": false, "ffn_hidden_size": 13696, "hidden_size": 4096,
        "kv_channels": 128, "layernorm_epsilon": 1e-5, "multi_query_attention": true, "multi_query_group_num": 2,
        "num_attention_heads": 32, "num_layers": 28, "original_rope": true, "padded_vocab_size": 65024, "post_layer_norm": true,
        "rmsnorm": true, "seq_length": 32768, "torch_dtype": "float16", "transformers_version": "4.27.1",
        "tie_word_embeddings": false, "eos_token_id": 2, "pad_token_id": 0
    })
}

/// The published configuration with keys changed; null removes one.
fn load(changes: &Value) -> Result<ModelConfig, String> {
    let mut config = published();
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            config.as_object_mut().unwrap().remove(key);
        } else {
            config[key] = value.clone();
        }
    }
    load_text(&config.to_string())
}

fn load_text(config: &str) -> Result<ModelConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    ModelConfig::load(dir.path()).map_err(|error| text(dir.path(), &error))
}

fn refusal(changes: &Value) -> String {
    load(changes).unwrap_err()
}

#[test]
fn config_of_the_family_resolves_rope_ratio_by_the_name_in_the_file() {
    let rope = |changes| {
        let rope = load(&changes).unwrap().rope;
        (rope.base, rope.position_scale)
    };
    assert_eq!(rope(json!({})), (1e4, 1.0));
    assert_eq!(rope(json!({"rope_ratio": 16})), (1e4, 16.0));
    assert_eq!(rope(json!({"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k", "transformers_version": "4.41.2"})), (1e4, 16.0));
    assert_eq!(rope(json!({"rope_ratio": 1, "_name_or_path": "THUDM/chatglm2-6b-32k"})), (1e4, 1.0));
    assert_eq!(rope(json!({"rope_ratio": 50, "_name_or_path": "THUDM/chatglm3-6b-32k", "transformers_version": "4.30.2"})), (5e5, 1.0));
    let saved_again = json!({"AutoConfig": "THUDM/chatglm3-6b-32k--configuration_chatglm.ChatGLMConfig"});
    assert_eq!(rope(json!({"rope_ratio": 50, "_name_or_path": "/models/x", "auto_map": saved_again})), (5e5, 1.0));
    assert_eq!(rope(json!({"_name_or_path": "/models/x", "transformers_version": "4.41.2"})), (1e4, 1.0));
}

#[test]
fn rope_ratio_of_which_two_models_differ_is_asked_for() {
    let saved_by = |version: &str| json!({"rope_ratio": 16, "_name_or_path": "/models/x", "transformers_version": version});
    insta::assert_snapshot!(refusal(&saved_by("4.41.2")), @r#"
    MODEL/config.json: `rope_ratio` is 16, which divides positions in ChatGLM2-6B-32k and multiplies the base of the angles in ChatGLM3-6B-32k, and `_name_or_path` "/models/x" does not say which of the two this is
    hint: set `_name_or_path` in config.json to the model that this one was made from, "THUDM/chatglm2-6b-32k" or "THUDM/chatglm3-6b-32k"
    "#);
    assert_eq!(refusal(&saved_by("4.27.1")), refusal(&saved_by("4.41.2")));
    insta::assert_snapshot!(refusal(&json!({"rope_ratio": 50, "_name_or_path": null, "transformers_version": null})), @r#"
    MODEL/config.json: `rope_ratio` is 50, which divides positions in ChatGLM2-6B-32k and multiplies the base of the angles in ChatGLM3-6B-32k, and a file without `_name_or_path` does not say which of the two this is
    hint: set `_name_or_path` in config.json to the model that this one was made from, "THUDM/chatglm2-6b-32k" or "THUDM/chatglm3-6b-32k"
    "#);
    for name in ["", "THUDM/codegeex2-6b", "chatglm2-and-chatglm3", "/home/chatglm3-runs/ckpt"] {
        let text = refusal(&json!({"rope_ratio": 16, "_name_or_path": name}));
        assert!(text.contains("does not say which of the two this is"), "{text}");
    }
    let two = json!({"AutoModel": "THUDM/chatglm3-6b-32k--m.Model", "AutoConfig": "THUDM/chatglm2-6b-32k--c.Config"});
    assert!(refusal(&json!({"rope_ratio": 16, "_name_or_path": "x", "auto_map": two})).contains("does not say which"));
    // The hint, followed.
    for name in ["THUDM/chatglm2-6b-32k", "THUDM/chatglm3-6b-32k"] {
        load(&json!({"rope_ratio": 16, "_name_or_path": name, "transformers_version": "4.41.2"})).unwrap();
    }
}

#[test]
fn rope_ratio_that_a_32k_model_has_lost_is_asked_for() {
    insta::assert_snapshot!(refusal(&json!({"_name_or_path": "THUDM/chatglm2-6b-32k"})), @r#"
    MODEL/config.json: `_name_or_path` "THUDM/chatglm2-6b-32k" is a 32k model, but there is no `rope_ratio`: ChatGLM2-6B-32k has 16 and ChatGLM3-6B-32k 50; 1 changes nothing
    hint: add the key `rope_ratio` to config.json: the model's own, from its page on the hub, or 1 if it was trained without one
    "#);
    insta::assert_snapshot!(refusal(&json!({"_name_or_path": "/models/chatglm3-6b", "seq_length": 32768})), @r#"
    MODEL/config.json: `_name_or_path` is "/models/chatglm3-6b" and `seq_length` 32768, where ChatGLM3-6B has 8192, but there is no `rope_ratio`: ChatGLM2-6B-32k has 16 and ChatGLM3-6B-32k 50; 1 changes nothing
    hint: add the key `rope_ratio` to config.json: the model's own, from its page on the hub, or 1 if it was trained without one
    "#);
    assert!(refusal(&json!({"_name_or_path": "/models/my_ChatGLM3_6B_32K/"})).contains("is a 32k model"));
    for ratio in [1, 50] {
        load(&json!({"_name_or_path": "/models/chatglm3-6b", "seq_length": 32768, "rope_ratio": ratio})).unwrap();
    }
    load(&json!({"_name_or_path": "THUDM/chatglm3-6b", "seq_length": 8192})).unwrap();
}

/// What each key means that the file does not have: see the table in `model::config`.
#[test]
fn config_without_keys_takes_the_defaults_that_all_published_models_have() {
    let all = load(&json!({})).unwrap();
    for key in [
        "add_bias_linear",
        "post_layer_norm",
        "rmsnorm",
        "apply_residual_connection_post_layernorm",
        "fp32_residual_connection",
        "original_rope",
        "tie_word_embeddings",
        "pad_token_id",
        "hidden_dropout",
        "attention_dropout",
        "rope_ratio",
        "transformers_version",
    ] {
        assert_eq!(load(&json!({key: null})).unwrap(), all, "{key}");
    }
}

#[test]
fn config_of_codegeex2_and_without_multi_query_attention_loads() {
    let codegeex2 = load(
        &json!({"_name_or_path": null, "torch_dtype": "bfloat16", "pad_token_id": null, "interleaved_qkv": false, "rotary_percent": 0.5}),
    );
    let codegeex2 = codegeex2.unwrap();
    assert_eq!((codegeex2.torch_dtype, codegeex2.pad_token_id), (DType::BF16, 0));
    let every_head = load(&json!({"multi_query_attention": false, "multi_query_group_num": null})).unwrap();
    assert_eq!((every_head.multi_query_group_num, every_head.heads_per_group()), (32, 1));
}

#[test]
fn config_that_is_absent_or_broken_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    insta::assert_snapshot!(text(dir.path(), &ModelConfig::load(dir.path()).unwrap_err()), @r#"
    cannot read MODEL/config.json: No such file or directory (os error 2)
    hint: give the folder of a ChatGLM2 model as the hub has it: config.json, weights, tokenizer.model; `glmddp init-model` makes one
    "#);
    insta::assert_snapshot!(load_text("{\n  \"model_type\": \"chatglm\",\n  oops\n}").unwrap_err(), @r#"MODEL/config.json is not valid JSON: key must be a string at line 3 column 3"#);
    insta::assert_snapshot!(load_text("[]").unwrap_err(), @r#"MODEL/config.json: expected a JSON object at the top"#);
}

#[test]
fn config_without_a_needed_key_is_refused_by_its_name() {
    insta::assert_snapshot!(refusal(&json!({"add_qkv_bias": null})), @r#"
    MODEL/config.json: key `add_qkv_bias` is missing
    hint: take config.json from the model's page on the hub; the defaults of its class are not the published values
    "#);
    for key in [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "multi_query_attention",
        "multi_query_group_num",
        "padded_vocab_size",
        "layernorm_epsilon",
        "seq_length",
        "torch_dtype",
        "eos_token_id",
        "model_type",
    ] {
        let text = refusal(&json!({key: null}));
        assert!(text.starts_with(&format!("MODEL/config.json: key `{key}` is missing")), "{text}");
    }
}

#[test]
fn config_of_another_model_is_refused_by_what_differs() {
    insta::assert_snapshot!(refusal(&json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})), @r#"
    MODEL/config.json is of another model: `model_type` is "llama", expected "chatglm"
    hint: ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load
    "#);
    insta::assert_snapshot!(refusal(&json!({"architectures": ["LlamaForCausalLM"]})), @r#"
    MODEL/config.json is of another model: `architectures` is ["LlamaForCausalLM"], expected ["ChatGLMModel"]
    hint: ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load
    "#);
    insta::assert_snapshot!(refusal(&json!({"eos_token_id": [151329, 151336, 151338], "padded_vocab_size": 151552})), @r#"
    MODEL/config.json is of another model: `eos_token_id` is [151329,151336,151338], expected one number (a list of them is GLM-4's)
    hint: ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load
    "#);
    insta::assert_snapshot!(refusal(&json!({"padded_vocab_size": 151552})), @r#"
    MODEL/config.json is of another model: `padded_vocab_size` is 151552, expected 65024 (151552 is GLM-4's)
    hint: ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load
    "#);
    insta::assert_snapshot!(refusal(&json!({"quantization_bit": 4})), @r#"
    MODEL/config.json is of another model: `quantization_bit` is 4, expected none (f16, bf16 or f32 weights)
    hint: ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load
    "#);
    insta::assert_snapshot!(refusal(&json!({"rmsnorm": false})), @r#"
    MODEL/config.json is of another model: `rmsnorm` is false, expected true
    hint: ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load
    "#);
    insta::assert_snapshot!(refusal(&json!({"hidden_dropout": 0.1})), @r"
    MODEL/config.json is of another model: `hidden_dropout` is 0.1, expected 0 (the published models drop nothing out)
    hint: ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B and CodeGeeX2-6B load
    ");
    assert!(refusal(&json!({"attention_dropout": 0.5})).contains("`attention_dropout` is 0.5, expected 0 "));
    assert!(refusal(&json!({"quantization_config": {"quant_method": "gptq"}})).contains("is of another model: `quantization_config` is "));
    for (key, value) in [
        ("apply_residual_connection_post_layernorm", true),
        ("fp32_residual_connection", true),
        ("tie_word_embeddings", true),
        ("interleaved_qkv", true),
        ("original_rope", false),
        ("position_encoding_2d", true),
    ] {
        let text = refusal(&json!({key: value}));
        assert!(text.contains(&format!("is of another model: `{key}` is {value}, expected ")), "{text}");
    }
}

#[test]
fn config_with_sizes_that_do_not_fit_is_refused() {
    insta::assert_snapshot!(refusal(&json!({"multi_query_group_num": 5})), @r#"MODEL/config.json: `num_attention_heads` 32 is not a multiple of `multi_query_group_num` 5"#);
    insta::assert_snapshot!(refusal(&json!({"kv_channels": 6})), @r#"MODEL/config.json: `kv_channels` 6 is not a multiple of 4, but half of it turns in pairs"#);
    insta::assert_snapshot!(refusal(&json!({"hidden_size": "4096"})), @r#"MODEL/config.json: key `hidden_size` is "4096", expected a whole number below 2^31"#);
    insta::assert_snapshot!(refusal(&json!({"num_layers": 0})), @r#"MODEL/config.json: key `num_layers` is 0, expected a number above 0"#);
    insta::assert_snapshot!(refusal(&json!({"torch_dtype": "int8"})), @r#"MODEL/config.json: key `torch_dtype` is "int8", expected "float16", "bfloat16" or "float32""#);
    insta::assert_snapshot!(refusal(&json!({"eos_token_id": 70000})), @r#"MODEL/config.json: `eos_token_id` 70000 is not below `padded_vocab_size` 65024"#);
    for value in [json!(-1), json!(1.5), json!(1u64 << 40), json!(u64::MAX), json!(1e300)] {
        assert!(refusal(&json!({"num_layers": value})).contains("`num_layers`"));
    }
}

/// Damages a tiny model and tells what loading all of it says.
fn weights_after(damage: impl Fn(&Path)) -> String {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    init_model(&dir, InitOptions { preset: Preset::Tiny, num_layers: None, seed: 1 }, b"tokenizer", 256).unwrap();
    damage(&dir);
    let load = || -> Result<(), ModelError> {
        let shapes = ModelConfig::load(&dir)?.parameter_shapes();
        let source = WeightSource::open(&dir)?;
        source.check(&shapes)?;
        shapes.iter().try_for_each(|(name, shape)| source.get(name, shape, DType::F32, &Device::Cpu).map(|_| ()))
    };
    text(&dir, &load().unwrap_err())
}

fn change_json(path: &Path, change: impl Fn(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

const SHARD: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn weights_that_are_absent_are_refused() {
    insta::assert_snapshot!(weights_after(|dir| std::fs::remove_file(dir.join(INDEX)).unwrap()), @r#"
    MODEL holds no weights: expected one of model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json; found config.json, model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, tokenizer.model
    hint: give the folder of a model as the hub has it, weights included
    "#);
    insta::assert_snapshot!(weights_after(|dir| std::fs::remove_file(dir.join(SHARD)).unwrap()), @r#"
    1 of 2 weight shards are missing in MODEL: model-00002-of-00002.safetensors
    hint: download model-00002-of-00002.safetensors into the folder
    "#);
}

#[test]
fn weight_shard_that_is_cut_off_is_refused_with_both_lengths() {
    let cut = |len: u64| weights_after(|dir| std::fs::OpenOptions::new().write(true).open(dir.join(SHARD)).unwrap().set_len(len).unwrap());
    insta::assert_snapshot!(cut(10_000), @r#"
    MODEL/model-00002-of-00002.safetensors is cut off: expected 248800 bytes, found 10000
    hint: download the file again; it did not arrive whole or is of another kind
    "#);
    insta::assert_snapshot!(cut(0), @r#"
    MODEL/model-00002-of-00002.safetensors is empty
    hint: download the file again; it did not arrive whole or is of another kind
    "#);
    insta::assert_snapshot!(weights_after(|dir| std::fs::write(dir.join(SHARD), "version https://git-lfs.github.com/spec/v1\n").unwrap()), @r#"
    MODEL/model-00002-of-00002.safetensors is a Git LFS pointer, not the file itself
    hint: run `git lfs pull` in the model's folder, or download the file from the hub
    "#);
}

#[test]
fn weight_tensor_that_is_missing_or_of_another_shape_is_refused_by_name() {
    let name = "transformer.output_layer.weight";
    insta::assert_snapshot!(weights_after(|dir| change_json(&dir.join("config.json"), |c| c["padded_vocab_size"] = json!(320))), @r#"
    tensor `transformer.embedding.word_embeddings.weight` in MODEL/model-00001-of-00002.safetensors has shape [256, 64], expected [320, 64] by config.json
    hint: config.json and weights are of different models: take both from the same place
    "#);
    insta::assert_snapshot!(weights_after(|dir| change_json(&dir.join("config.json"), |c| c["num_layers"] = json!(3))), @r#"
    tensor `transformer.encoder.layers.2.input_layernorm.weight` is missing: MODEL/model.safetensors.index.json does not hold it
    hint: the weights are of another model, or a shard is of another version: download index and shards anew
    "#);
    insta::assert_snapshot!(weights_after(|dir| change_json(&dir.join(INDEX), |i| i["weight_map"][name] = json!("model-00001-of-00002.safetensors"))), @r#"
    tensor `transformer.output_layer.weight` is missing: MODEL/model-00001-of-00002.safetensors does not hold it
    hint: the weights are of another model, or a shard is of another version: download index and shards anew
    "#);
    insta::assert_snapshot!(weights_after(|dir| change_json(&dir.join(INDEX), |i| i["weight_map"][name] = json!("../secret.bin"))), @r#"MODEL/model.safetensors.index.json is not an index of weights: shard `../secret.bin` is not a plain file name"#);
}
