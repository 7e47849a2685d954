//! A prefix as THUDM's scripts save it, wherever an adapter is read: in each kind of weight file, alone or beside the base's weights, and not
//! where it does not belong.

use std::path::{Path, PathBuf};

use candle_core::DType;

use crate::cli_support::{ok, project, refused};
use crate::support::{shared, state_sums};
use crate::tensor_files::{Tensors, change, change_json, copy, files, read, write};

const PATHS: &str = "--model_name_or_path model --train_file data/train.jsonl --validation_file data/dev.jsonl";
const SIZES: &str = "--max_source_length 32 --max_target_length 16 --per_device_train_batch_size 2 --global_batch_size 4 --threads 1";
const EVALUATE: &str = "evaluate --model_name_or_path model --validation_file data/dev.jsonl --threads 1 --adapter";
const GENERATE: &str = "generate --model_name_or_path model --file data/dev.jsonl --rows 2 --max_new_tokens 4 --threads 1 --adapter";

/// A folder with a tiny model, rows, the run `out` of a prefix, and in `thudm` THUDM's two files of it.
struct Setup {
    dir: tempfile::TempDir,
    method: &'static str,
}

impl Setup {
    fn new(method: &'static str) -> Self {
        let setup = Self { dir: project(20, 6), method };
        setup.ok(&format!("train --quiet {PATHS} {SIZES} --max_steps 2 --output_dir out {method}"));
        std::fs::create_dir(setup.path("thudm")).unwrap();
        for name in ["config.json", "pytorch_model.bin"] {
            std::fs::copy(setup.path("out/adapter").join(name), setup.path("thudm").join(name)).unwrap();
        }
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn ok(&self, args: &str) -> String {
        ok(self.dir.path(), args).stdout
    }

    fn refused(&self, args: &str) -> String {
        refused(self.dir.path(), args)
    }

    fn tensors(&self) -> Tensors {
        read(&self.path("thudm/pytorch_model.bin"))
    }

    /// A folder `name` with the prefix's config.json and these weights.
    fn folder(&self, name: &str, weights: &[(&str, Tensors)]) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(self.path("thudm/config.json"), dir.join("config.json")).unwrap();
        weights.iter().for_each(|(file, tensors)| write(&dir.join(file), tensors));
        dir
    }

    fn parameters(&self, checkpoint: &str) -> Vec<(String, String)> {
        state_sums(&self.path(checkpoint)).into_iter().filter(|(name, _)| name.starts_with("parameter.")).collect()
    }

    /// Tests that the adapter in folder `name` is read everywhere, with the values of the run `out`.
    fn assert_is_the_prefix(&self, name: &str) {
        for command in [EVALUATE, GENERATE] {
            assert_eq!(self.ok(&format!("{command} {name}")), self.ok(&format!("{command} out/adapter")), "{command} {name}");
        }
        let output = format!("from-{name}");
        self.ok(&format!("checkpoint import {name} {PATHS} {SIZES} {} --output_dir {output}", self.method));
        assert_eq!(self.parameters(&format!("{output}/checkpoint-0")), self.parameters("out/checkpoint-2"), "{name}");
        self.ok(&format!(
            "train --quiet {PATHS} {SIZES} --max_steps 1 {} --output_dir {output} --resume_from_checkpoint latest",
            self.method
        ));
    }
}

/// The tensors under names with another start.
fn renamed(tensors: &Tensors, start: &str) -> Tensors {
    let own = |name: &str| name.strip_prefix("transformer.prefix_encoder.").unwrap().to_owned();
    tensors.iter().map(|(name, tensor)| (format!("{start}{}", own(name)), tensor.clone())).collect()
}

/// Shards of at most one tensor each, with their index.
fn write_shards(dir: &Path, ending: &str, tensors: &Tensors) {
    let stem = if ending == "bin" { "pytorch_model" } else { "model" };
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.{ending}", i + 1, tensors.len());
        write(&dir.join(&file), &Tensors::from([(name.clone(), tensor.clone())]));
        map.insert(name.clone(), file.into());
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(dir.join(format!("{stem}.{ending}.index.json")), index.to_string()).unwrap();
}

fn is_read_in_every_kind_of_file(method: &'static str) {
    let setup = Setup::new(method);
    let tensors = setup.tensors();
    setup.folder("safetensors", &[("model.safetensors", tensors.clone())]);
    setup.folder("of-the-trunk", &[("pytorch_model.bin", renamed(&tensors, "prefix_encoder."))]);
    setup.folder("of-the-encoder", &[("model.safetensors", renamed(&tensors, ""))]);
    for ending in ["safetensors", "bin"] {
        write_shards(&setup.folder(&format!("shards-{ending}"), &[]), ending, &tensors);
    }
    // All weights of the base beside it, as ChatGLM3's script saves a model.
    let mut whole = tensors.clone();
    files(&setup.path("model")).iter().for_each(|file| whole.extend(read(file)));
    let inv_freq = candle_core::Tensor::ones(4, DType::F32, &candle_core::Device::Cpu).unwrap();
    whole.insert("transformer.rotary_pos_emb.inv_freq".to_owned(), inv_freq);
    setup.folder("whole", &[("model.safetensors", whole)]);
    // A copy of the prefix's file in the base's own folder.
    copy(&setup.path("model"), &setup.path("beside"));
    copy(&setup.path("thudm"), &setup.path("beside"));
    for name in ["thudm", "safetensors", "of-the-trunk", "of-the-encoder", "shards-safetensors", "shards-bin", "whole", "beside"] {
        setup.assert_is_the_prefix(name);
    }
}

#[test]
fn thudms_prefix_is_read_from_every_kind_of_file() {
    is_read_in_every_kind_of_file("--finetuning_type ptuning_v2 --pre_seq_len 4");
}

#[test]
fn thudms_projected_prefix_is_read_from_every_kind_of_file() {
    is_read_in_every_kind_of_file("--finetuning_type ptuning_v2 --pre_seq_len 4 --prefix_projection");
}

#[test]
fn thudms_prefix_in_half_precision_is_read() {
    let setup = Setup::new("--finetuning_type ptuning_v2 --pre_seq_len 4");
    for (name, dtype) in [("f16", DType::F16), ("bf16", DType::BF16)] {
        let half = |(name, tensor): (String, candle_core::Tensor)| (name, tensor.to_dtype(dtype).unwrap());
        setup.folder(name, &[("model.safetensors", setup.tensors().into_iter().map(half).collect())]);
        assert!(setup.ok(&format!("{EVALUATE} {name}")).starts_with("held-out loss "));
    }
}

/// A trainer writes the folder that the base was loaded from, and CodeGeeX2 has a key that nobody reads.
#[test]
fn thudms_prefix_of_a_32k_base_in_a_folder_of_any_name_is_read() {
    let setup = Setup::new("--finetuning_type ptuning_v2 --pre_seq_len 4");
    let long = |config: &mut serde_json::Value| {
        config["rope_ratio"] = 16.into();
        config["rotary_percent"] = 0.5.into();
    };
    change_json(&setup.path("model/config.json"), |config| {
        long(config);
        config["_name_or_path"] = "THUDM/chatglm2-6b-32k".into();
    });
    let dir = setup.folder("long", &[("pytorch_model.bin", setup.tensors())]);
    change_json(&dir.join("config.json"), |config| {
        long(config);
        config["_name_or_path"] = "/data/base".into();
    });
    assert!(setup.ok(&format!("{EVALUATE} long")).starts_with("held-out loss "));
    change_json(&dir.join("config.json"), |config| config["rope_ratio"] = 8.into());
    assert!(setup.refused(&format!("{EVALUATE} long")).contains("key `rope_ratio` is 8, expected 16, as the base has it"));
}

/// THUDM's train.sh quantizes the base to 4 bits, and the trainer saves that with the prefix.
#[test]
fn thudms_prefix_trained_on_a_quantized_base_is_read() {
    let setup = Setup::new("--finetuning_type ptuning_v2 --pre_seq_len 4");
    let dir = setup.folder("quantized", &[("pytorch_model.bin", setup.tensors())]);
    change_json(&dir.join("config.json"), |config| config["quantization_bit"] = 4.into());
    setup.assert_is_the_prefix("quantized");
}

#[test]
fn thudms_prefix_that_does_not_fit_is_refused_by_what_differs() {
    let setup = Setup::new("--finetuning_type ptuning_v2 --pre_seq_len 4 --prefix_projection");
    let tensors = setup.tensors();
    let mut said = String::new();
    let mut refused = |what: &str, change_of: &dyn Fn(&Path)| {
        let dir = setup.folder("changed", &[("model.safetensors", tensors.clone())]);
        change_of(&dir);
        let text = setup.refused(&format!("{EVALUATE} changed"));
        assert_eq!(setup.refused(&format!("{GENERATE} changed")), text);
        let import = format!("checkpoint import changed {PATHS} {SIZES} {} --output_dir new", setup.method);
        assert_eq!(setup.refused(&import), text, "{what}");
        said.push_str(&format!("{what}\n{text}\n"));
        std::fs::remove_dir_all(dir).unwrap();
    };
    let config = |key: &'static str, value: serde_json::Value| {
        move |dir: &Path| change_json(&dir.join("config.json"), |json| json[key] = value.clone())
    };
    refused("no projection in config.json", &config("prefix_projection", false.into()));
    refused("no length in config.json", &config("pre_seq_len", serde_json::Value::Null));
    refused("another length", &config("pre_seq_len", 5.into()));
    refused("another number of layers", &config("num_layers", 3.into()));
    refused("another number of groups", &config("multi_query_group_num", 1.into()));
    refused("another hidden size", &config("hidden_size", 128.into()));
    refused("another vocabulary", &config("padded_vocab_size", 65024.into()));
    refused("another epsilon", &config("layernorm_epsilon", 1e-6.into()));
    refused("another ratio", &config("rope_ratio", 2.into()));
    refused("a setting of next year", &config("prefix_gate", "tanh".into()));
    refused("no config.json", &|dir| std::fs::remove_file(dir.join("config.json")).unwrap());
    let weights = |change_of: fn(&mut Tensors)| move |dir: &Path| change(&dir.join("model.safetensors"), change_of);
    refused("no bias", &weights(|tensors| _ = tensors.remove("transformer.prefix_encoder.trans.0.bias")));
    refused("no embedding", &weights(|tensors| _ = tensors.remove("transformer.prefix_encoder.embedding.weight")));
    let more = |name: &'static str| {
        move |dir: &Path| {
            change(&dir.join("model.safetensors"), |tensors| {
                let bias = tensors["transformer.prefix_encoder.trans.0.bias"].clone();
                tensors.insert(name.to_owned(), bias);
            });
        }
    };
    refused("a tensor of the encoder too many", &more("transformer.prefix_encoder.trans.4.bias"));
    refused("a tensor of something else", &more("score.weight"));
    refused("a weight that is not the base's", &more("transformer.encoder.final_layernorm.weight"));
    refused("two prefixes", &|dir| write(&dir.join("pytorch_model.bin"), &tensors));
    refused("a file that is cut off", &|dir| {
        std::fs::OpenOptions::new().write(true).open(dir.join("model.safetensors")).unwrap().set_len(100).unwrap();
    });
    insta::assert_snapshot!("thudm_prefix_refused", said);
    assert!(!setup.path("new/checkpoint-0").exists());
}

#[test]
fn what_is_no_adapter_is_refused_by_what_is_missing() {
    let setup = Setup::new("--finetuning_type ptuning_v2 --pre_seq_len 4");
    let mut said = String::new();
    for (name, what) in [
        ("thudm/pytorch_model.bin", "a file of an adapter"),
        ("data", "a folder of rows"),
        ("model", "a base"),
        ("out", "a run's folder"),
        ("absent", "no folder"),
    ] {
        let text = setup.refused(&format!("{EVALUATE} {name}"));
        let import = format!("checkpoint import {name} {PATHS} {SIZES} {} --output_dir new", setup.method);
        assert_eq!(setup.refused(&import), text, "{name}");
        assert_eq!(setup.refused(&format!("export --merge --model_name_or_path model --output_dir merged --adapter {name}")), text);
        said.push_str(&format!("{what}\n{text}\n"));
    }
    // A prefix cannot be folded into weights, and is no LoRA.
    said.push_str(&setup.refused("export --merge --model_name_or_path model --output_dir merged --adapter thudm"));
    said.push_str(&setup.refused(&format!("checkpoint import thudm {PATHS} {SIZES} --finetuning_type lora --output_dir new")));
    insta::assert_snapshot!("no_adapter", said);
}

/// A folder as transformers from 4.35 on writes it, of the tiny preset.
#[test]
fn published_case_of_thudms_prefix_is_read() {
    let Some(case) = shared("cases/thudm-safetensors") else { return };
    let setup = Setup::new("--finetuning_type ptuning_v2 --pre_seq_len 4");
    copy(&case, &setup.path("case"));
    assert!(setup.ok(&format!("{EVALUATE} case")).starts_with("held-out loss "));
    setup.ok(&format!("checkpoint import case {PATHS} {SIZES} {} --output_dir imp", setup.method));
}
