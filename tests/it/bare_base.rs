//! Model folders that hold more than a base: what tuning or quantizing left in them is named, in every command that loads a base.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use glmddp::formats::{TensorFile, safetensors, torch_pickle};
use serde_json::{Value, json};

use crate::cli_support::{ok, project, refused, run};
use crate::tensor_files::change_json;

const INDEX: &str = "model.safetensors.index.json";
const QKV: &str = "transformer.encoder.layers.0.self_attention.query_key_value";

const EVALUATE: &str = "evaluate --model_name_or_path model --validation_file data/dev.jsonl --threads 1";
const TRAIN: &str = "--train_file data/train.jsonl --max_steps 1 --threads 1 --quiet";

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// The tensors of the tiny model in `model`.
fn tensors(model: &Path) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    for shard in [1, 2] {
        let file = TensorFile::open(&model.join(format!("model-0000{shard}-of-00002.safetensors"))).unwrap();
        for name in file.names() {
            tensors.insert(name.to_owned(), file.get(name).unwrap().to_tensor(DType::F32, &Device::Cpu).unwrap());
        }
    }
    tensors
}

fn change_config(model: &Path, change: impl Fn(&mut Value)) {
    change_json(&model.join("config.json"), change);
}

/// The same model in one file, with more tensors; what `glmddp evaluate` says of it.
fn with_tensors(more: &[(&str, &[usize])]) -> String {
    let dir = project(8, 4);
    let model = dir.path().join("model");
    let mut all = tensors(&model);
    all.extend(more.iter().map(|(name, shape)| ((*name).to_owned(), zeros(shape))));
    std::fs::write(model.join("model.safetensors"), safetensors::to_bytes(&all).unwrap()).unwrap();
    std::fs::remove_file(model.join(INDEX)).unwrap();
    refused(dir.path(), EVALUATE)
}

#[test]
fn base_with_the_buffer_of_the_hubs_files_is_read_in_every_layout() {
    let dir = project(8, 4);
    let model = dir.path().join("model");
    let expected = ok(dir.path(), EVALUATE).stdout;
    change_config(&model, |c| {
        c["pre_seq_len"] = Value::Null;
        c["prefix_projection"] = json!(false);
    });
    let mut all = tensors(&model);
    all.insert("transformer.rotary_pos_emb.inv_freq".to_owned(), zeros(&[4]));
    // Beside the shards, as ChatGLM3-6B's folder has both layouts.
    std::fs::write(model.join("pytorch_model.bin"), torch_pickle::to_bytes(&all).unwrap()).unwrap();
    assert_eq!(ok(dir.path(), EVALUATE).stdout, expected);
    std::fs::remove_file(model.join(INDEX)).unwrap();
    assert_eq!(ok(dir.path(), EVALUATE).stdout, expected);
    std::fs::write(model.join("model.safetensors"), safetensors::to_bytes(&all).unwrap()).unwrap();
    assert_eq!(ok(dir.path(), EVALUATE).stdout, expected);
}

#[test]
fn tuned_prefix_in_a_base_is_refused_by_every_command() {
    let dir = project(8, 4);
    let (dir, model) = (dir.path(), dir.path().join("model"));
    ok(dir, &format!("train --model_name_or_path model --output_dir out --finetuning_type full {TRAIN}"));
    ok(dir, &format!("train --model_name_or_path model --output_dir lora --finetuning_type lora {TRAIN}"));
    change_config(&model, |c| c["pre_seq_len"] = json!(4));
    let mut all = tensors(&model);
    all.insert("transformer.prefix_encoder.embedding.weight".to_owned(), zeros(&[4, 128]));
    std::fs::write(model.join("model.safetensors"), safetensors::to_bytes(&all).unwrap()).unwrap();
    let text = refused(dir, EVALUATE);
    insta::assert_snapshot!(text, @r"
    error: model/model.safetensors is not a bare base: it holds a tuned prefix (`transformer.prefix_encoder.embedding.weight`)

    hint: give the bare base as --model_name_or_path; generate and evaluate take this folder as --adapter
    ");
    for command in [
        format!("train --model_name_or_path model --output_dir new {TRAIN}"),
        "generate --model_name_or_path model --prompt a --threads 1".to_owned(),
        "export --merge --model_name_or_path model --adapter lora/adapter --output_dir merged --threads 1".to_owned(),
        format!("compare --model_name_or_path model --output_dir compared --validation_file data/dev.jsonl {TRAIN}"),
        "plan --model_name_or_path model --train_file data/train.jsonl --output_dir new".to_owned(),
        format!("checkpoint import lora/adapter --model_name_or_path model --output_dir new --finetuning_type lora {TRAIN}")
            .replace("--quiet", ""),
        "checkpoint export out/checkpoint-1 --model_name_or_path model --output_dir exported".to_owned(),
    ] {
        assert_eq!(refused(dir, &command), text, "{command}");
    }
    for (name, folder) in [("new", false), ("merged", false), ("exported", false), ("compared", false), ("out", true)] {
        assert_eq!(dir.join(name).join("config.json").exists() || dir.join(name).join("checkpoint-1").exists(), folder, "{name}");
    }
}

#[test]
fn tensors_of_tuned_or_quantized_bases_are_named_by_kind() {
    let mut texts = String::new();
    let lora = format!("{QKV}.lora_A.default.weight");
    let peft = format!("base_model.model.{QKV}.base_layer.weight");
    let wrapped = format!("base_model.model.{QKV}.weight");
    let adapter = "transformer.encoder.layers.0.mlp.adapters.ads.adapter_down.0.weight";
    let scale = format!("{QKV}.weight_scale");
    for (name, shape) in [
        (lora.as_str(), vec![8, 64]),
        (&peft, vec![96, 64]),
        (&wrapped, vec![96, 64]),
        (adapter, vec![4, 64]),
        (&scale, vec![96]),
        ("lm_head.weight", vec![256, 64]),
        ("transformer.encoder.layers.2.input_layernorm.weight", vec![64]),
        ("transformer.encoder.layers.1.mlp.dense_4h_to_h.bias", vec![64]),
        ("transformer.rotary_pos_emb.inv_freq.lora_A", vec![4]),
    ] {
        texts += &format!("{}\n", with_tensors(&[(name, &shape)]));
    }
    insta::assert_snapshot!(texts, @r"
    error: model/model.safetensors is not a bare base: it holds parts of a PEFT adapter (`transformer.encoder.layers.0.self_attention.query_key_value.lora_A.default.weight`)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate the folder that PEFT saved (adapter_config.json and adapter_model.safetensors) as --adapter; or fold the adapter into the base in Python (`merge_and_unload`, then `save_pretrained`) and give the result

    error: model/model.safetensors is not a bare base: it holds parts of a PEFT adapter (`base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.base_layer.weight`)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate the folder that PEFT saved (adapter_config.json and adapter_model.safetensors) as --adapter; or fold the adapter into the base in Python (`merge_and_unload`, then `save_pretrained`) and give the result

    error: model/model.safetensors is not a bare base: it holds a model inside a PEFT adapter (`base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.weight`)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate the folder that PEFT saved (adapter_config.json and adapter_model.safetensors) as --adapter; or fold the adapter into the base in Python (`merge_and_unload`, then `save_pretrained`) and give the result

    error: model/model.safetensors is not a bare base: it holds parts of an adapter of the adapters library (`transformer.encoder.layers.0.mlp.adapters.ads.adapter_down.0.weight`)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate the folder that `save_adapter` wrote as --adapter

    error: model/model.safetensors is not a bare base: it holds scales of quantized weights (`transformer.encoder.layers.0.self_attention.query_key_value.weight_scale`)

    hint: quantized weights cannot be trained on: take the f16 model from the hub

    error: model/model.safetensors is not a bare base: it holds `lm_head.weight`, which the model of config.json does not have

    hint: take config.json and weights from the same place, or save the weights without these tensors

    error: model/model.safetensors is not a bare base: it holds `transformer.encoder.layers.2.input_layernorm.weight`, which the model of config.json does not have: its `num_layers` is 2

    hint: take config.json and weights from the same place, or save the weights without these tensors

    error: model/model.safetensors is not a bare base: it holds `transformer.encoder.layers.1.mlp.dense_4h_to_h.bias`, which the model of config.json does not have: its `add_bias_linear` is false

    hint: take config.json and weights from the same place, or save the weights without these tensors

    error: model/model.safetensors is not a bare base: it holds parts of a PEFT adapter (`transformer.rotary_pos_emb.inv_freq.lora_A`)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate the folder that PEFT saved (adapter_config.json and adapter_model.safetensors) as --adapter; or fold the adapter into the base in Python (`merge_and_unload`, then `save_pretrained`) and give the result
    ");
}

#[test]
fn many_tensors_and_kinds_are_counted_in_one_message() {
    let layer = |i: usize, end: &str| format!("transformer.encoder.layers.{i}.self_attention.query_key_value.{end}");
    let names = [layer(0, "lora_A.weight"), layer(0, "lora_B.weight"), layer(1, "lora_A.weight"), layer(1, "lora_B.weight")];
    let mut more: Vec<(&str, &[usize])> = names.iter().map(|name| (name.as_str(), [8, 8].as_slice())).collect();
    more.push(("transformer.prefix_encoder.trans.0.weight", &[4, 4]));
    more.push(("value_head\u{1b}[31m", &[1]));
    insta::assert_snapshot!(with_tensors(&more), @r#"
    error: model/model.safetensors is not a bare base: it holds a tuned prefix (`transformer.prefix_encoder.trans.0.weight`); it holds parts of a PEFT adapter (`transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight`, `transformer.encoder.layers.0.self_attention.query_key_value.lora_B.weight`, `transformer.encoder.layers.1.self_attention.query_key_value.lora_A.weight` and 1 more); it holds `value_head\u{1b}[31m`, which the model of config.json does not have

    hint: give the bare base as --model_name_or_path; generate and evaluate take this folder as --adapter
    "#);
}

#[test]
fn tuned_tensors_outside_of_the_files_that_are_read_are_refused() {
    let mut texts = String::new();
    // Weights of another layout beside them: a trainer's file copied into the base's folder.
    let dir = project(8, 4);
    let prefix = BTreeMap::from([("transformer.prefix_encoder.embedding.weight".to_owned(), zeros(&[4, 128]))]);
    let file = dir.path().join("model/pytorch_model.bin");
    std::fs::write(&file, torch_pickle::to_bytes(&prefix).unwrap()).unwrap();
    texts += &refused(dir.path(), EVALUATE);
    // What cannot be read there is said, and does not matter.
    std::fs::write(&file, "version https://git-lfs.github.com/spec/v1\n").unwrap();
    let ran = run(dir.path(), EVALUATE);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    std::fs::remove_file(&file).unwrap();
    // An adapter's own files.
    std::fs::write(dir.path().join("model/adapter_config.json"), "{}").unwrap();
    texts += &refused(dir.path(), EVALUATE);
    std::fs::remove_file(dir.path().join("model/adapter_config.json")).unwrap();
    // In a shard, and not in its index.
    let shard = dir.path().join("model/model-00002-of-00002.safetensors");
    let opened = TensorFile::open(&shard).unwrap();
    let mut all: BTreeMap<String, Tensor> =
        opened.names().map(|name| (name.to_owned(), opened.get(name).unwrap().to_tensor(DType::F32, &Device::Cpu).unwrap())).collect();
    all.insert(format!("{QKV}.ia3_l"), zeros(&[96, 1]));
    std::fs::write(&shard, safetensors::to_bytes(&all).unwrap()).unwrap();
    texts += &refused(dir.path(), EVALUATE);
    insta::assert_snapshot!(texts, @r"
    error: model/pytorch_model.bin is not a bare base: it holds a tuned prefix (`transformer.prefix_encoder.embedding.weight`)

    hint: give the bare base as --model_name_or_path; generate and evaluate take this folder as --adapter
    error: model is not a bare base: it holds an adapter (adapter_config.json)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate this folder as --adapter; if base and adapter share the folder, move adapter_config.json and the adapter's weights to one of their own
    error: model/model-00002-of-00002.safetensors is not a bare base: it holds parts of a PEFT adapter (`transformer.encoder.layers.0.self_attention.query_key_value.ia3_l`)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate the folder that PEFT saved (adapter_config.json and adapter_model.safetensors) as --adapter; or fold the adapter into the base in Python (`merge_and_unload`, then `save_pretrained`) and give the result
    ");
}

#[test]
fn folder_of_an_adapter_given_as_a_base_is_named_as_one() {
    let dir = project(8, 4);
    let dir = dir.path();
    let mut texts = String::new();
    for method in ["ptuning_v2 --pre_seq_len 4", "lora"] {
        let train = format!("train --model_name_or_path model --output_dir out --overwrite_output_dir --finetuning_type {method} {TRAIN}");
        ok(dir, &train);
        texts += &refused(dir, &EVALUATE.replace(" model ", " out/adapter "));
        // The hint, followed.
        ok(dir, &format!("{EVALUATE} --adapter out/adapter"));
    }
    insta::assert_snapshot!(texts, @r"
    error: out/adapter is not a bare base: it holds an adapter (adapter_config.json)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate this folder as --adapter; if base and adapter share the folder, move adapter_config.json and the adapter's weights to one of their own
    error: out/adapter is not a bare base: it holds an adapter (adapter_config.json)

    hint: give the bare base as --model_name_or_path, and to generate and evaluate this folder as --adapter; if base and adapter share the folder, move adapter_config.json and the adapter's weights to one of their own
    ");
}

/// What PEFT and the adapters library leave in a model's folder beside an adapter_config.json.
#[test]
fn weights_and_keys_of_an_adapter_beside_a_base_are_refused_by_name() {
    let dir = project(8, 4);
    let (dir, model) = (dir.path(), dir.path().join("model"));
    let mut texts = String::new();
    for name in ["adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors", "adapter_model.bin", "pytorch_adapter.bin"] {
        std::fs::write(model.join(name), "").unwrap();
        let text = refused(dir, EVALUATE);
        assert!(text.contains(&format!("({name})")), "{text}");
        if texts.is_empty() {
            texts = text;
        }
        std::fs::remove_file(model.join(name)).unwrap();
    }
    let empty = json!({ "adapters": {}, "config_map": {}, "fusion_config_map": {}, "fusions": {} });
    for (key, value) in [("peft_config", json!({ "peft_type": "LORA" })), ("adapters", json!({ "adapters": { "ads": "pfeiffer" } }))] {
        for off in [Value::Null, json!({}), empty.clone()] {
            change_config(&model, |c| c[key] = off.clone());
            ok(dir, EVALUATE);
        }
        change_config(&model, |c| c[key] = value.clone());
        texts += &refused(dir, EVALUATE);
        change_config(&model, |c| _ = c.as_object_mut().unwrap().remove(key));
    }
    ok(dir, EVALUATE);
    insta::assert_snapshot!(texts);
}

#[test]
fn pre_seq_len_without_a_prefix_is_refused_with_or_without_weights() {
    let dir = project(8, 4);
    let (dir, model) = (dir.path(), dir.path().join("model"));
    change_config(&model, |c| c["pre_seq_len"] = json!(128));
    let text = refused(dir, EVALUATE);
    std::fs::remove_file(model.join(INDEX)).unwrap();
    let plan = "plan --model_name_or_path model --train_file data/train.jsonl --output_dir new";
    assert_eq!(refused(dir, plan), text);
    insta::assert_snapshot!(text, @r"
    error: model/config.json is not a bare base: `pre_seq_len` is 128, as in the file of a tuned prefix

    hint: give the bare base as --model_name_or_path; generate and evaluate take this folder as --adapter; if the weights are the base's and no prefix belongs to them, remove `pre_seq_len` from config.json
    ");
    change_config(&model, |c| _ = c.as_object_mut().unwrap().remove("pre_seq_len"));
    ok(dir, plan);
}
