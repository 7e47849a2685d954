//! Bases that were trained with another template than ChatGLM2's, and adapters that name another base: a warning, once a run.

use std::path::Path;

use serde_json::{Value, json};

use crate::cli_support::{ok, project, refused};
use crate::tensor_files::change_json;

const PLAN: &str = "plan --model_name_or_path model --train_file data/train.jsonl --max_steps 1 --global_batch_size 8 --output_dir out";
const EVALUATE: &str = "evaluate --model_name_or_path model --validation_file data/dev.jsonl --threads 1";

/// What the program says on stderr, having done its work.
fn said(dir: &Path, args: &str) -> String {
    ok(dir, args).stderr
}

fn call_base(dir: &Path, name: &str) {
    change_json(&dir.join("model/config.json"), |config| config["_name_or_path"] = json!(name));
}

#[test]
fn base_of_another_template_is_named_once_by_every_command_that_makes_prompts() {
    let dir = project(8, 4);
    let dir = dir.path();
    let run =
        "--model_name_or_path model --train_file data/train.jsonl --finetuning_type lora --threads 1 --max_steps 1 --global_batch_size 8";
    said(dir, &format!("train {run} --output_dir first --quiet"));
    std::fs::remove_file(dir.join("first/adapter/glmddp.json")).unwrap();
    assert_eq!(said(dir, EVALUATE), "");
    call_base(dir, "THUDM/chatglm3-6b");
    let warning = said(dir, PLAN);
    insta::assert_snapshot!(warning, @r#"warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (`_name_or_path` is "THUDM/chatglm3-6b" in model/config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows"#);
    for command in [
        EVALUATE.to_owned(),
        "generate --model_name_or_path model --prompt a --threads 1".to_owned(),
        "tokenize --model_name_or_path model --train_file data/train.jsonl --output_dir out".to_owned(),
        format!("train {run} --output_dir out --quiet"),
        format!("compare {run} --output_dir compared --validation_file data/dev.jsonl --quiet").replace("--finetuning_type lora", ""),
        format!("checkpoint import first/adapter {run} --output_dir imported"),
    ] {
        let said = said(dir, &command);
        assert_eq!(said.matches(&warning).count(), 1, "{command}: {said}");
    }
    // Folding an adapter into the weights makes no prompt.
    assert_eq!(
        said(dir, "export --merge --model_name_or_path model --adapter first/adapter --output_dir merged").matches("template").count(),
        0
    );
}

#[test]
fn template_is_known_by_any_file_of_the_folder() {
    let dir = project(8, 4);
    let (dir, model) = (dir.path(), dir.path().join("model"));
    let mut texts = String::new();
    let mut with = |name: &str, text: &str| {
        let path = model.join(name);
        let before = std::fs::read(&path).ok();
        std::fs::write(&path, text).unwrap();
        texts += &said(dir, PLAN);
        match before {
            Some(before) => std::fs::write(&path, before).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
    };
    with("tokenizer_config.json", r#"{"name_or_path": "/models/chatglm3-6b-32k"}"#);
    with("tokenizer_config.json", r#"{"tokenizer_class": "ChatGLM4Tokenizer"}"#);
    with("tokenizer_config.json", r#"{"chat_template": "{% for m in messages %}<|user|>{{ m }}{% endfor %}"}"#);
    with("tokenizer_config.json", r#"{"chat_template": "{% for m in messages %}USER: {{ m }}{% endfor %}"}"#);
    with("tokenizer_config.json", r#"{"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}"#);
    with("special_tokens_map.json", r#"{"additional_special_tokens": ["<|system|>", "<|user|>"]}"#);
    with("added_tokens.json", r#"{"<|user|>": 64795}"#);
    with("chat_template.jinja", "[gMASK]sop<|user|>");
    with("tokenization_chatglm.py", "role_special_tokens = [\"<|system|>\", \"<|user|>\"]");
    with("tokenizer_config.json", r#"{"auto_map": {"AutoTokenizer": ["THUDM/chatglm3-6b--tokenization_chatglm.ChatGLMTokenizer", null]}}"#);
    // ChatGLM2's own, in whatever form, and files that say nothing.
    with("tokenizer_config.json", r#"{"chat_template": ""}"#);
    with("tokenizer_config.json", r#"{"chat_template": [{"name": "default", "template": " "}]}"#);
    with("tokenizer_config.json", r#"{"auto_map": {"AutoTokenizer": ["THUDM/chatglm2-6b--tokenization_chatglm.ChatGLMTokenizer", null]}}"#);
    with("chat_template.jinja", "\n");
    with("tokenizer_config.json", r#"{"chat_template": "[Round 1]\n\n问：{{ m }}\n\n答：", "name_or_path": "THUDM/chatglm2-6b"}"#);
    with("tokenizer_config.json", "{}");
    with("chat_template.jinja", "[Round 1]\n\n问：{{ m }}\n\n答：");
    with("tokenization_chatglm.py", "class ChatGLMTokenizer: pass");
    call_base(dir, "THUDM/codegeex2-6b");
    texts += &said(dir, PLAN);
    // A file that was saved again has the hub's name in `auto_map` alone.
    call_base(dir, "");
    let code = json!({"AutoConfig": "THUDM/chatglm3-6b--configuration_chatglm.ChatGLMConfig"});
    change_json(&model.join("config.json"), |config| config["auto_map"] = code.clone());
    texts += &said(dir, PLAN);
    call_base(dir, "THUDM/chatglm2-6b");
    texts += &said(dir, PLAN);
    change_json(&model.join("config.json"), |config| _ = config.as_object_mut().unwrap().remove("auto_map"));
    // A folder's name is asked last, and only if nothing else names the model.
    call_base(dir, "");
    std::fs::rename(&model, dir.join("chatglm3-6b")).unwrap();
    texts += &said(dir, &PLAN.replace(" model ", " chatglm3-6b "));
    std::fs::rename(dir.join("chatglm3-6b"), &model).unwrap();
    for name in ["", "THUDM/chatglm2-6b-32k", "/home/chatglm3/models/mine"] {
        call_base(dir, name);
        change_json(&model.join("config.json"), |config| config["rope_ratio"] = json!(1));
        assert_eq!(said(dir, PLAN), "", "{name}");
    }
    insta::assert_snapshot!(texts, @r#"
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (`name_or_path` is "/models/chatglm3-6b-32k" in model/tokenizer_config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, GLM-4's, with <|user|> and <|assistant|> (`tokenizer_class` is "ChatGLM4Tokenizer" in model/tokenizer_config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (`chat_template` in model/tokenizer_config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, its own (`chat_template` in model/tokenizer_config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (the token <|user|> in model/tokenizer_config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (the token <|user|> in model/special_tokens_map.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (the token <|user|> in model/added_tokens.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (the file model/chat_template.jinja); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (the token <|user|> in model/tokenization_chatglm.py); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (`auto_map` takes the code of "THUDM/chatglm3-6b" in model/tokenizer_config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, CodeGeeX2's, code behind a line such as `# language: Python` (`_name_or_path` is "THUDM/codegeex2-6b" in model/config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (`auto_map` takes the code of "THUDM/chatglm3-6b" in model/config.json); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    warning: this base was trained with another dialogue template, ChatGLM3's, with <|user|> and <|assistant|> (the folder's name, chatglm3-6b); this program formats rows with ChatGLM2's template ([Round 1], 问：, 答：), as `glmddp tokenize` shows
    "#);
}

#[test]
fn file_of_the_tokenizer_that_is_not_json_is_refused_by_name() {
    let dir = project(8, 4);
    let path = dir.path().join("model/tokenizer_config.json");
    let mut texts = String::new();
    for text in ["{\"a\": 1, \"a\": 2}", "{"] {
        std::fs::write(&path, text).unwrap();
        texts += &refused(dir.path(), EVALUATE);
    }
    insta::assert_snapshot!(texts, @r"
    error: model/tokenizer_config.json is not valid JSON: key `a` is given twice at line 1 column 12
    error: model/tokenizer_config.json is not valid JSON: EOF while parsing an object at line 1 column 1
    ");
}

#[test]
fn adapter_that_names_another_base_is_taken_with_a_warning() {
    let dir = project(8, 4);
    let dir = dir.path();
    said(
        dir,
        "train --model_name_or_path model --train_file data/train.jsonl --output_dir out --finetuning_type lora --threads 1 --max_steps 1 --global_batch_size 8 --quiet",
    );
    let with_adapter = format!("{EVALUATE} --adapter out/adapter");
    let names = |adapter: Value, base: &str| {
        change_json(&dir.join("out/adapter/adapter_config.json"), |config| config["base_model_name_or_path"] = adapter.clone());
        call_base(dir, base);
        said(dir, &with_adapter)
    };
    // Its glmddp.json has the base's sha256, which says more than names.
    assert_eq!(names(json!("THUDM/chatglm2-6b-32k"), "THUDM/chatglm2-6b"), "");
    std::fs::remove_file(dir.join("out/adapter/glmddp.json")).unwrap();
    insta::assert_snapshot!(names(json!("/data/chatglm2-6b-int4/"), "THUDM/chatglm2-6b"), @r#"warning: out/adapter/adapter_config.json: `base_model_name_or_path` is "/data/chatglm2-6b-int4/", and the base model calls itself "THUDM/chatglm2-6b": the adapter may be of another base; hold its loss against the base's alone with `glmddp evaluate`"#);
    for (adapter, base) in [("someone/medical-glm", "THUDM/chatglm2-6b"), ("THUDM/chatglm2-6b-32k", "/models/chatglm2-6b")] {
        let text = names(json!(adapter), base);
        assert!(text.contains(adapter) && text.contains(base) && text.starts_with("warning: "), "{text}");
    }
    // The same model, and names that tell nothing.
    for (adapter, base) in [
        (json!("THUDM/chatglm2-6b"), "/models/ChatGLM2_6B"),
        (json!("models--THUDM--chatglm2-6b/snapshots/1a2b"), "THUDM/chatglm2-6b"),
        (json!("chatglm2"), "THUDM/chatglm2-6b"),
        (json!("/data/THUDM_chatglm2-6b-hf"), "chatglm2-6b"),
        (json!("/models/tiny"), "THUDM/chatglm2-6b"),
        (json!("THUDM/chatglm2-6b"), ""),
        (json!(""), "THUDM/chatglm2-6b"),
        (Value::Null, "THUDM/chatglm2-6b"),
    ] {
        assert_eq!(names(adapter.clone(), base), "", "{adapter} {base}");
    }
}

#[test]
fn adapters_of_a_fusion_are_held_against_the_runs_base() {
    let dir = project(8, 4);
    let dir = dir.path();
    let run = "train --model_name_or_path model --train_file data/train.jsonl --threads 1 --max_steps 1 --global_batch_size 8 --quiet";
    for name in ["a", "b"] {
        said(dir, &format!("{run} --output_dir {name} --finetuning_type adapter --adapter_config pfeiffer --adapter_name {name}"));
    }
    said(dir, "init-model --preset tiny --output_dir other --seed 9");
    let fuse = format!("{run} --output_dir fused --finetuning_type adapter_fusion --fusion_adapters a/adapter,b/adapter");
    let text = refused(dir, &fuse.replace(" model ", " other "));
    let hashes = text.split(|c: char| !c.is_ascii_hexdigit()).filter(|word| word.len() == 64);
    insta::assert_snapshot!(hashes.fold(text.clone(), |text, hash| text.replace(hash, "HASH")), @r"
    error: a/adapter/glmddp.json: the adapter was trained on base model HASH, and this is base model HASH

    hint: give the base that the adapter was trained on; adapter_config.json names its folder
    ");
    said(dir, &format!("{fuse} --overwrite_output_dir"));
}
