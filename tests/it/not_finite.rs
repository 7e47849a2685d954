//! A NaN or an infinity where nothing trains: in a base, in an adapter, and computed from weights that are finite. No command gives a result.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use glmddp::checkpoint::{self, Flat, Part, RealDisk};
use glmddp::params::Layout;

use crate::cli_support::{ok, project, run};
use crate::tensor_files::{Tensors, change, change_json, copy, files, read, rewrite_model, set_element, with_element};

/// A folder with a tiny model in `model`, and rows in `data`.
struct Setup(tempfile::TempDir);

const PATHS: &str = "--model_name_or_path model --train_file data/train.jsonl --validation_file data/dev.jsonl";
const SIZES: &str = "--max_source_length 64 --max_target_length 64 --per_device_train_batch_size 2 --global_batch_size 4 --threads 1";
const EVALUATE: &str = "evaluate --model_name_or_path model --validation_file data/dev.jsonl --threads 1";
const GENERATE: &str = "generate --model_name_or_path model --file data/dev.jsonl --rows 2 --max_new_tokens 2 --threads 1";
const MERGE: &str = "export --merge --model_name_or_path model --threads 1 --output_dir merged";

impl Setup {
    fn new() -> Self {
        Self(project(20, 6))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn ok(&self, args: &str) -> String {
        ok(self.0.path(), args).stdout
    }

    /// What is said to a command that prints nothing.
    fn refused(&self, args: &str, code: i32) -> String {
        let ran = run(self.0.path(), args);
        assert_eq!((ran.code, ran.stdout.as_str()), (code, ""), "{args}: {}", ran.stderr);
        ran.stderr
    }

    fn train(&self, output: &str, args: &str) {
        self.ok(&format!("train --quiet {PATHS} {SIZES} --max_steps 2 --output_dir {output} {args}"));
    }
}

/// The first weight file of a folder or of those below it.
fn first_file(dir: &Path) -> PathBuf {
    let below = || std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).min();
    files(dir).into_iter().next().unwrap_or_else(|| first_file(&below().expect("weights")))
}

#[test]
fn base_that_is_not_finite_is_refused_by_every_command_with_the_tensor_named() {
    let setup = Setup::new();
    setup.train("lora", "--finetuning_type lora --lora_rank 2");
    setup.train("full", "--finetuning_type full");
    let commands = [
        EVALUATE.to_owned(),
        GENERATE.to_owned(),
        format!("{EVALUATE} --adapter lora/adapter"),
        format!("{MERGE} --adapter lora/adapter"),
        format!("train --quiet {PATHS} {SIZES} --max_steps 2 --output_dir new"),
        format!("compare --quiet {PATHS} {SIZES} --max_steps 2 --methods lora --output_dir new"),
        format!("checkpoint import lora/adapter {PATHS} {SIZES} --finetuning_type lora --lora_rank 2 --output_dir new"),
    ];
    let name = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight";
    copy(&setup.path("model"), &setup.path("good"));
    let mut said = Vec::new();
    for (file, dtype, value) in [
        ("model.safetensors", DType::F32, f32::NAN),
        ("model.safetensors", DType::F16, f32::INFINITY),
        ("model.safetensors", DType::BF16, f32::NEG_INFINITY),
        ("pytorch_model.bin", DType::F32, f32::NEG_INFINITY),
        ("pytorch_model.bin", DType::F16, f32::NAN),
    ] {
        std::fs::remove_dir_all(setup.path("model")).unwrap();
        copy(&setup.path("good"), &setup.path("model"));
        rewrite_model(&setup.path("model"), file, dtype);
        set_element(&setup.path("model").join(file), name, 131, value);
        let text = setup.refused(&commands[0], 2);
        for command in &commands {
            assert_eq!(setup.refused(command, 2), text, "{command}");
        }
        assert!(!setup.path("merged").exists() && !setup.path("new/checkpoint-0").exists());
        said.push(text);
    }
    insta::assert_snapshot!("base_that_is_not_finite", said.join("\n"));
}

#[test]
fn adapter_of_every_method_that_is_not_finite_is_refused_with_the_tensor_named() {
    let setup = Setup::new();
    for name in ["one", "two"] {
        setup.train(name, &format!("--finetuning_type adapter --adapter_name {name}"));
    }
    let mut said = Vec::new();
    for (i, args) in [
        "--finetuning_type ptuning_v2 --pre_seq_len 4",
        "--finetuning_type ptuning_v2 --pre_seq_len 4 --prefix_projection",
        "--finetuning_type prefix_tuning --pre_seq_len 4",
        "--finetuning_type prompt_tuning --num_virtual_tokens 4",
        "--finetuning_type p_tuning --num_virtual_tokens 4",
        "--finetuning_type lora --lora_rank 2 --use_rslora",
        "--finetuning_type lora --lora_rank 2 --use_dora",
        "--finetuning_type adapter --adapter_config houlsby",
        "--finetuning_type adapter_fusion --fusion_adapters one/adapter,two/adapter",
        "--finetuning_type ia3",
    ]
    .into_iter()
    .enumerate()
    {
        let output = format!("run-{i}");
        setup.train(&output, args);
        let adapter = setup.path(&output).join("adapter");
        let file = first_file(&adapter);
        let name = read(&file).keys().next_back().unwrap().clone();
        let value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i % 3];
        // As other programs write it: in half of the cases in 16 bits, and without what this program adds.
        change(&file, |tensors| {
            let dtype = [DType::F32, DType::F16, DType::BF16, DType::F32][i % 4];
            let tensor = with_element(&tensors[&name], 1, value).to_dtype(dtype).unwrap();
            tensors.insert(name.clone(), tensor);
        });
        let _ = std::fs::remove_file(adapter.join("glmddp.json"));
        let text = setup.refused(&format!("{EVALUATE} --adapter {output}/adapter"), 2);
        assert_eq!(setup.refused(&format!("{GENERATE} --adapter {output}/adapter"), 2), text);
        assert_eq!(setup.refused(&format!("{MERGE} --adapter {output}/adapter"), 2), text);
        // Of ptuning_v2 an import reads the other of the two formats, in which all is finite.
        if !args.contains("ptuning_v2") {
            let import = setup.refused(&format!("checkpoint import {output}/adapter {PATHS} {SIZES} {args} --output_dir new"), 2);
            assert_eq!(import, text, "{args}");
        }
        said.push(format!("{args}\n{text}"));
    }
    set_element(
        &first_file(&setup.path("one/adapter")),
        "transformer.encoder.layers.0.output_adapters.adapters.one.adapter_up.bias",
        3,
        f32::NAN,
    );
    let fusion = format!(
        "train --quiet {PATHS} {SIZES} --finetuning_type adapter_fusion --fusion_adapters one/adapter,two/adapter --output_dir new"
    );
    said.push(format!("a fusion of it\n{}", setup.refused(&fusion, 2)));
    insta::assert_snapshot!("adapter_that_is_not_finite", said.join("\n"));
}

#[test]
fn prefix_in_thudms_format_that_is_not_finite_is_refused() {
    let setup = Setup::new();
    let args = "--finetuning_type ptuning_v2 --pre_seq_len 4 --prefix_projection";
    setup.train("out", args);
    let adapter = setup.path("out/adapter");
    std::fs::remove_file(adapter.join("adapter_config.json")).unwrap();
    set_element(&adapter.join("pytorch_model.bin"), "transformer.prefix_encoder.trans.2.bias", 5, f32::NAN);
    let text = setup.refused(&format!("{EVALUATE} --adapter out/adapter"), 2);
    insta::assert_snapshot!("thudm_prefix_that_is_not_finite", text);
    assert_eq!(setup.refused(&format!("checkpoint import out/adapter {PATHS} {SIZES} {args} --output_dir new"), 2), text);
}

#[test]
fn loss_that_overflows_with_finite_weights_is_refused_with_the_rows_named() {
    let setup = Setup::new();
    setup.train("out", "--finetuning_type lora --lora_rank 2 --lora_target query_key_value");
    let file = setup.path("out/adapter/adapter_model.safetensors");
    change(&file, |tensors| tensors.values_mut().for_each(|tensor| *tensor = (tensor.ones_like().unwrap() * 1e30).unwrap()));
    std::fs::remove_file(setup.path("out/adapter/glmddp.json")).unwrap();
    insta::assert_snapshot!("evaluate_that_overflows", setup.refused(&format!("{EVALUATE} --adapter out/adapter"), 1));
    insta::assert_snapshot!("generate_that_overflows", setup.refused(&format!("{GENERATE} --adapter out/adapter"), 1));
    let prompt = "generate --model_name_or_path model --threads 1 --adapter out/adapter --prompt x";
    assert!(setup.refused(prompt, 1).starts_with("error: while answering the prompt\n"));
    // Folded into the base it is no number any more.
    let merged = setup.refused(&format!("{MERGE} --adapter out/adapter"), 2);
    assert!(merged.contains("cannot be written as f32: element 0 ([0, 0]) would be infinity"), "{merged}");
    assert!(!setup.path("merged").exists());

    // The base itself.
    let output_layer = "transformer.output_layer.weight";
    let shard = files(&setup.path("model")).into_iter().find(|path| read(path).contains_key(output_layer)).unwrap();
    change(&shard, |tensors| {
        let huge = (tensors[output_layer].ones_like().unwrap() * 3e38).unwrap();
        tensors.insert(output_layer.to_owned(), huge);
    });
    insta::assert_snapshot!("base_that_overflows", setup.refused(EVALUATE, 1));
    let compare = format!("compare --quiet {PATHS} {SIZES} --max_steps 2 --methods lora --output_dir new");
    assert!(setup.refused(&compare, 1).contains("the loss of held-out rows is not finite"));
}

#[test]
fn merged_weight_that_its_dtype_cannot_hold_is_refused() {
    let setup = Setup::new();
    rewrite_model(&setup.path("model"), "model.safetensors", DType::F16);
    setup.train("out", "--finetuning_type lora --lora_rank 2 --lora_target dense");
    let file = setup.path("out/adapter/adapter_model.safetensors");
    change(&file, |tensors| tensors.values_mut().for_each(|tensor| *tensor = (tensor.ones_like().unwrap() * 300.0).unwrap()));
    change_json(&setup.path("out/adapter/glmddp.json"), |about| _ = about.as_object_mut().unwrap().remove("probe"));
    insta::assert_snapshot!("merge_that_overflows", setup.refused(&format!("{MERGE} --adapter out/adapter"), 2));
    assert!(!setup.path("merged").exists());
}

#[test]
fn run_whose_held_out_loss_or_update_is_not_finite_stops_and_exports_nothing() {
    let setup = Setup::new();
    let train = |rate: &str, held_out: &str| {
        let args = format!(
            "train --quiet --model_name_or_path model --train_file data/train.jsonl {held_out} {SIZES} --max_steps 1 --finetuning_type lora"
        );
        let args = format!("{args} --max_grad_norm 0 --learning_rate {rate} --output_dir out --overwrite_output_dir");
        let text = setup.refused(&args, 1);
        text[text.find("error: ").expect("an error")..].to_owned() // behind the step's line, which has times
    };
    insta::assert_snapshot!("held_out_loss_that_is_not_finite", train("1e30", "--validation_file data/dev.jsonl"));
    insta::assert_snapshot!("update_that_is_not_finite", train("1e39", ""));
    assert!(!setup.path("out/adapter").exists() && !setup.path("out/checkpoint-1").exists());
}

/// Writes the checkpoint of `output` once more into `bad`, with one parameter not finite.
fn spoil(setup: &Setup, output: &str) {
    let checkpoint = checkpoint::open(&RealDisk, &setup.path(output).join("checkpoint-2")).unwrap();
    let mut kinds: BTreeMap<String, Tensors> = BTreeMap::new();
    for (name, tensor) in checkpoint.tensors(&RealDisk).unwrap() {
        let (kind, name) = name.split_once('.').unwrap();
        kinds.entry(kind.to_owned()).or_default().insert(name.to_owned(), tensor);
    }
    let mut parameters = kinds.remove("parameter").unwrap();
    let layout = Layout::new(parameters.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect());
    let last = parameters.last_entry().unwrap();
    let spoilt = with_element(last.get(), 1, f32::NAN);
    *last.into_mut() = spoilt;
    let flat = |(kind, tensors): (String, Tensors)| Flat::copy(&kind, &layout.flatten(&tensors).unwrap()).unwrap();
    let flats = std::iter::once(("parameter".to_owned(), parameters)).chain(kinds).map(flat).collect();
    let files: Vec<_> = checkpoint.manifest.files.keys().map(|name| (name.clone(), checkpoint.file(&RealDisk, name).unwrap())).collect();
    let part = Part { range: 0..layout.num_elements(), flats };
    checkpoint::save(&RealDisk, &setup.path("bad"), &checkpoint.manifest.header, &layout, &[part], &files).unwrap();
}

#[test]
fn checkpoint_that_is_not_finite_is_neither_exported_nor_trained_on() {
    let setup = Setup::new();
    let mut said = Vec::new();
    for method in ["--finetuning_type lora --lora_rank 2", "--finetuning_type freeze --freeze_trainable_layers 1"] {
        setup.train("out", method);
        spoil(&setup, "out");
        let text = setup.refused("checkpoint export bad --output_dir exported --model_name_or_path model", 2);
        let resume =
            format!("train --quiet {PATHS} {SIZES} --max_steps 3 {method} --output_dir out --resume_from_checkpoint bad/checkpoint-2");
        assert_eq!(setup.refused(&resume, 2), text);
        assert!(!setup.path("exported").exists());
        said.push(text);
        std::fs::remove_dir_all(setup.path("out")).unwrap();
        std::fs::remove_dir_all(setup.path("bad")).unwrap();
    }
    insta::assert_snapshot!("checkpoint_that_is_not_finite", said.join("\n"));
}
