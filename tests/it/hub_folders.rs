//! Exported model folders: the small files of the base's folder go along, so that they load as the base does, and what does not is said.

use std::path::Path;

use glmddp::formats::{Dtype, TensorFile};
use serde_json::{Value, json};

use crate::cli_support::ok;

/// What the program says on stderr, having done its work, without the lines of steps.
fn said(dir: &Path, args: &str) -> String {
    ok(dir, args).stderr.lines().filter(|line| !line.starts_with("step ")).map(|line| format!("{line}\n")).collect()
}

const RUN: &str = "train --model_name_or_path base --train_file data/train.jsonl --threads 1 --max_steps 1 --global_batch_size 4 --quiet";
const MERGE: &str = "export --merge --model_name_or_path base --adapter lora/adapter --output_dir merged";
const WEIGHTS: [&str; 3] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"];

/// A folder with a tiny base as the hub has one in `base`, its adapter in `lora`, and rows in `data`.
fn setup() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    said(dir.path(), "init-model --preset tiny --output_dir base");
    said(dir.path(), "demo-data --output_dir data --rows 8 --dev_rows 4");
    said(dir.path(), &format!("{RUN} --output_dir lora --finetuning_type lora"));
    for (name, text) in [
        ("configuration_chatglm.py", "class ChatGLMConfig: pass\n"),
        ("modeling_chatglm.py", "from .configuration_chatglm import ChatGLMConfig\n    from .quantization import quantize\n"),
        ("quantization.py", "def quantize(): pass\n"),
        ("tokenization_chatglm.py", "class ChatGLMTokenizer: pass\n"),
        ("tokenizer_config.json", r#"{"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", null]}}"#),
        ("special_tokens_map.json", "{}"),
        ("generation_config.json", "{}"),
        ("MODEL_LICENSE", "text\n"),
        ("README.md", "of the base\n"),
        ("optimizer.pt", "not of a model\n"),
    ] {
        std::fs::write(base.join(name), text).unwrap();
    }
    dir
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What is expected in an export beside the weights.
const SMALL: [&str; 11] = [
    "MODEL_LICENSE",
    "config.json",
    "configuration_chatglm.py",
    "generation_config.json",
    "glmddp.json",
    "modeling_chatglm.py",
    "quantization.py",
    "special_tokens_map.json",
    "tokenization_chatglm.py",
    "tokenizer.model",
    "tokenizer_config.json",
];

#[test]
fn every_exported_model_has_the_small_files_of_its_base() {
    let dir = setup();
    let dir = dir.path();
    let mut expected: Vec<&str> = SMALL.into_iter().chain(WEIGHTS).collect();
    expected.sort_unstable();
    assert_eq!(said(dir, MERGE), "");
    assert_eq!(said(dir, &format!("{RUN} --output_dir full --finetuning_type full")), "");
    assert_eq!(said(dir, &format!("{RUN} --output_dir freeze --finetuning_type freeze --freeze_trainable_layers 1")), "");
    assert_eq!(said(dir, "checkpoint export full/checkpoint-1 --model_name_or_path base --output_dir exported"), "");
    for folder in ["merged", "full/adapter", "freeze/adapter", "exported"] {
        assert_eq!(names(&dir.join(folder)), expected, "{folder}");
        for name in SMALL.iter().filter(|name| !["config.json", "glmddp.json"].contains(name)) {
            assert_eq!(std::fs::read(dir.join(folder).join(name)).unwrap(), std::fs::read(dir.join("base").join(name)).unwrap(), "{name}");
        }
        // It is a base again.
        said(dir, &format!("evaluate --model_name_or_path {folder} --validation_file data/dev.jsonl --threads 1"));
    }
}

#[test]
fn code_that_is_named_and_not_there_is_said_once() {
    let dir = setup();
    let (dir, base) = (dir.path(), dir.path().join("base"));
    let mut texts = String::new();
    std::fs::remove_file(base.join("quantization.py")).unwrap();
    texts += &said(dir, &format!("{MERGE}1"));
    std::fs::remove_file(base.join("tokenization_chatglm.py")).unwrap();
    std::fs::remove_file(base.join("modeling_chatglm.py")).unwrap();
    std::fs::remove_file(base.join("configuration_chatglm.py")).unwrap();
    texts += &said(dir, &format!("{MERGE}2"));
    let trained = said(dir, &format!("{RUN} --output_dir full --finetuning_type full"));
    assert!(texts.ends_with(&trained), "{trained}");
    // Code of another repository, and no code at all.
    let map = json!({"AutoModel": "THUDM/chatglm2-6b--modeling_chatglm.ChatGLMModel"});
    change_json(&base.join("config.json"), |config| config["auto_map"] = map.clone());
    std::fs::write(base.join("tokenizer_config.json"), "{}").unwrap();
    assert_eq!(said(dir, &format!("{MERGE}3")), "");
    insta::assert_snapshot!(texts, @r"
    warning: base/modeling_chatglm.py names quantization.py, not in base: transformers cannot load the new folder until the code is put there
    warning: `auto_map` in base/config.json names configuration_chatglm.py, modeling_chatglm.py, not in base: transformers cannot load the new folder until the code is put there
    warning: `auto_map` in base/tokenizer_config.json names tokenization_chatglm.py, not in base: transformers cannot load the new folder until the code is put there
    ");
}

fn change_json(path: &Path, change: impl Fn(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn nothing_from_outside_of_the_folder_and_nothing_huge_goes_along() {
    let dir = setup();
    let (dir, base) = (dir.path(), dir.path().join("base"));
    std::fs::write(dir.join("secret.py"), "password\n").unwrap();
    std::os::unix::fs::symlink("../secret.py", base.join("helper.py")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", base.join("NOTICE")).unwrap();
    std::os::unix::fs::symlink("absent", base.join("vocab.txt")).unwrap();
    std::os::unix::fs::symlink("quantization.py", base.join("alias.py")).unwrap();
    std::fs::create_dir(base.join("chat_template.json")).unwrap();
    std::fs::create_dir(base.join("folder.py")).unwrap();
    std::fs::File::create(base.join("tokenizer.json")).unwrap().set_len(65 << 20).unwrap();
    std::fs::write(base.join("..hidden.py"), "").unwrap();
    std::fs::write(base.join("a b.py"), "").unwrap();
    change_json(&base.join("config.json"), |config| {
        config["auto_map"] =
            json!({"AutoConfig": "../secret.Config", "AutoModel": "/etc/passwd.Model", "X": ["a/b.X", "x\u{1b}[31m.Y", "plain"]});
    });
    let text = said(dir, MERGE);
    let merged = names(&dir.join("merged"));
    let small: Vec<&str> = merged.iter().map(String::as_str).filter(|name| !WEIGHTS.contains(name)).collect();
    let mut expected: Vec<&str> = SMALL.into_iter().chain(["alias.py"]).collect();
    expected.sort_unstable();
    assert_eq!(small, expected);
    let root = dir.canonicalize().unwrap();
    insta::assert_snapshot!(text.replace(&root.display().to_string(), "ROOT"), @r#"
    warning: base/NOTICE is left out: it is a link to /etc/hostname, outside of the folder; copy it if it belongs to the model
    warning: base/chat_template.json is left out: it is not a regular file
    warning: base/tokenizer.json is left out: it has 68157440 bytes, and at most 67108864 are copied
    warning: base/vocab.txt is left out: it cannot be read: No such file or directory (os error 2)
    warning: base/folder.py is left out: it is not a regular file
    warning: base/helper.py is left out: it is a link to ROOT/secret.py, outside of the folder; copy it if it belongs to the model
    warning: `auto_map` in base/config.json names the code `x\u{1b}[31m`, which is no file of the folder: it is left out
    warning: `auto_map` in base/config.json names the code `a/b`, which is no file of the folder: it is left out
    warning: `auto_map` in base/config.json names the code `/etc/passwd`, which is no file of the folder: it is left out
    warning: `auto_map` in base/config.json names the code `../secret`, which is no file of the folder: it is left out
    "#);
}

#[test]
fn folder_of_the_hubs_cache_is_read_through_its_links() {
    let dir = setup();
    let dir = dir.path();
    let repository = dir.join("models--THUDM--chatglm2-6b");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/1a2b"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for name in names(&dir.join("base")) {
        std::fs::rename(dir.join("base").join(&name), blobs.join(&name)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(&name)).unwrap();
    }
    let text = said(dir, &MERGE.replace(" base ", " models--THUDM--chatglm2-6b/snapshots/1a2b "));
    assert_eq!(text, "");
    assert_eq!(names(&dir.join("merged")).len(), SMALL.len() + WEIGHTS.len());
}

#[test]
fn torch_dtype_of_an_export_is_that_of_its_weights() {
    let dir = setup();
    let (dir, base) = (dir.path(), dir.path().join("base"));
    let kind = |folder: &str| {
        let file = TensorFile::open(&dir.join(folder).join(WEIGHTS[0])).unwrap();
        let first = file.names().next().unwrap().to_owned();
        let config: Value = serde_json::from_slice(&std::fs::read(dir.join(folder).join("config.json")).unwrap()).unwrap();
        (file.get(&first).unwrap().dtype(), config["torch_dtype"].clone(), config["dtype"].clone())
    };
    // A config.json that has been wrong about its weights, with a mark at its start that Python does not read.
    change_json(&base.join("config.json"), |config| config["torch_dtype"] = json!("float16"));
    let text = std::fs::read(base.join("config.json")).unwrap();
    std::fs::write(base.join("config.json"), [b"\xef\xbb\xbf".as_slice(), &text].concat()).unwrap();
    said(dir, MERGE);
    assert_eq!(kind("merged"), (Dtype::F32, json!("float32"), Value::Null));
    std::fs::write(base.join("config.json"), text).unwrap();
    said(dir, &format!("{RUN} --output_dir full --finetuning_type full --torch_dtype bfloat16"));
    assert_eq!(kind("full/adapter"), (Dtype::BF16, json!("bfloat16"), Value::Null));
    // The key's new name.
    change_json(&base.join("config.json"), |config| {
        config.as_object_mut().unwrap().remove("torch_dtype");
        config["dtype"] = json!("float16");
    });
    said(dir, &format!("{MERGE}2"));
    assert_eq!(kind("merged2"), (Dtype::F32, Value::Null, json!("float32")));
}
