//! JSON files with a byte order mark, which is passed over, and with a key that is given twice, which is refused.

use std::path::Path;

use crate::cli_support::{Ran, ok, project, run};

const EVALUATE: &str = "evaluate --model_name_or_path model --validation_file data/dev.jsonl --adapter out/adapter --threads 1 --json";
/// A configuration file, and files of a model and of an adapter.
const FILES: [&str; 5] =
    ["run.json", "model/config.json", "model/model.safetensors.index.json", "out/adapter/adapter_config.json", "out/adapter/glmddp.json"];

/// The command that reads a file of [`FILES`].
fn reader(file: &str) -> &'static str {
    if file == "run.json" { "plan run.json" } else { EVALUATE }
}

/// A folder with a tiny model, rows, an adapter of one step and the configuration of a run.
fn setup() -> tempfile::TempDir {
    let dir = project(8, 4);
    let run = r#"{
  "model": {"model_name_or_path": "model"},
  "train_file": "data/train.jsonl",
  "output_dir": "out",
  "finetuning_type": "lora",
  "max_steps": 1,
  "threads": 1
}"#;
    std::fs::write(dir.path().join("run.json"), run).unwrap();
    ok(dir.path(), "train run.json --quiet");
    dir
}

/// What the program says when `file` is `text`, with the file put back.
fn with(dir: &Path, file: &str, text: &[u8]) -> Ran {
    let path = dir.join(file);
    let before = std::fs::read(&path).unwrap();
    std::fs::write(&path, text).unwrap();
    let ran = run(dir, reader(file));
    std::fs::write(&path, before).unwrap();
    ran
}

#[test]
fn json_files_with_a_byte_order_mark_are_read_as_without() {
    let dir = setup();
    let dir = dir.path();
    for file in FILES {
        let expected = ok(dir, reader(file)).stdout;
        let text = [b"\xef\xbb\xbf".as_slice(), &std::fs::read(dir.join(file)).unwrap()].concat();
        let ran = with(dir, file, &text);
        assert_eq!((ran.code, ran.stdout), (0, expected), "{file}: {}", ran.stderr);
    }
    let toml = "\u{feff}model_name_or_path = 'model'\ntrain_file = 'data/train.jsonl'\noutput_dir = 'out'\n";
    std::fs::write(dir.join("run.toml"), toml).unwrap();
    ok(dir, "plan run.toml");
    let rows = "\u{feff}{\"content\": \"a\", \"summary\": \"b\"}\n";
    std::fs::write(dir.join("data/dev.jsonl"), rows).unwrap();
    ok(dir, EVALUATE);
}

#[test]
fn json_files_in_utf16_are_refused_with_what_to_do() {
    let dir = setup();
    for file in FILES {
        let ran = with(dir.path(), file, b"\xff\xfe{\0}\0");
        assert_eq!(ran.code, 2, "{file}");
        assert!(ran.stderr.ends_with(": it is UTF-16 text, expected UTF-8; save it as UTF-8\n"), "{}", ran.stderr);
        assert!(ran.stderr.contains(file), "{}", ran.stderr);
    }
}

#[test]
fn json_files_with_a_key_twice_are_refused_by_its_name() {
    let dir = setup();
    let dir = dir.path();
    let mut texts = String::new();
    for (file, key) in [
        ("run.json", "\"max_steps\": 1"),
        ("run.json", "\"model_name_or_path\": \"model\""),
        ("model/config.json", "\"layernorm_epsilon\": 1e-5"),
        ("model/model.safetensors.index.json", "\"transformer.output_layer.weight\": \"model-00002-of-00002.safetensors\""),
        ("out/adapter/adapter_config.json", "\"lora_alpha\": 32"),
        ("out/adapter/glmddp.json", "\"train_rows\": 8"),
    ] {
        let text = std::fs::read_to_string(dir.join(file)).unwrap();
        let name = key.split(':').next().unwrap();
        let at = text.find(&format!("{name}:")).unwrap_or_else(|| panic!("{file} has no {name}: {text}"));
        let ran = with(dir, file, [&text[..at], key, ",\n", &text[at..]].concat().as_bytes());
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{file}: {}", ran.stderr);
        texts += &ran.stderr;
    }
    insta::assert_snapshot!(texts, @r"
    error: configuration file is not valid JSON: key `max_steps` is given twice at line 7 column 11
      --> run.json:7
    error: configuration file is not valid JSON: key `model.model_name_or_path` is given twice at line 3 column 20
      --> run.json:3
    error: model/config.json is not valid JSON: key `layernorm_epsilon` is given twice at line 27 column 19
    error: model/model.safetensors.index.json is not valid JSON: key `weight_map.transformer.output_layer.weight` is given twice at line 23 column 33
    error: out/adapter/adapter_config.json is not valid JSON: key `lora_alpha` is given twice at line 9 column 12
    error: out/adapter/glmddp.json is not valid JSON: key `sizes.train_rows` is given twice at line 11 column 12
    ");
}

#[test]
fn toml_file_with_a_key_twice_names_it_as_json_does() {
    let dir = tempfile::tempdir().unwrap();
    let mut texts = String::new();
    for text in ["seed = 1\nseed = 2\n", "[run]\nseed = 1\n\n[run]\nmax_steps = 2\n", "[optim]\n\"learning_rate\" = 1\nlearning_rate = 1\n"]
    {
        std::fs::write(dir.path().join("run.toml"), text).unwrap();
        let ran = run(dir.path(), "plan run.toml");
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
        texts += &ran.stderr;
    }
    insta::assert_snapshot!(texts, @r"
    error: configuration file is not valid TOML: key `seed` is given twice
      --> run.toml:2
    error: configuration file is not valid TOML: key `run` is given twice
      --> run.toml:4
    error: configuration file is not valid TOML: key `learning_rate` is given twice
      --> run.toml:3
    ");
}

#[test]
fn rows_and_tensors_with_a_name_twice_are_refused() {
    let dir = setup();
    let dir = dir.path();
    let mut texts = String::new();
    for (name, rows) in [
        ("twice.jsonl", "{\"content\": \"a\", \"summary\": \"b\"}\n{\"content\": \"a\", \"summary\": \"b\", \"content\": \"c\"}\n"),
        ("twice.json", "[{\"content\": \"a\", \"summary\": \"b\"},\n {\"content\": \"a\", \"content\": \"a\", \"summary\": \"b\"}]"),
    ] {
        std::fs::write(dir.join(name), rows).unwrap();
        let ran = run(dir, &format!("evaluate --model_name_or_path model --validation_file {name} --threads 1"));
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
        texts += &ran.stderr;
    }
    let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend_from_slice(&[0; 8]);
    std::fs::write(dir.join("model/model.safetensors"), file).unwrap();
    texts += &run(dir, "evaluate --model_name_or_path model --validation_file data/dev.jsonl --threads 1").stderr;
    insta::assert_snapshot!(texts, @r"
    error: expected JSON, found bad JSON at byte 42: key `content` is given twice
      --> twice.jsonl, line 2

    hint: `--on_bad_row skip` leaves such rows out and counts them
    error: expected a JSON array, found bad JSON: key `[1].content` is given twice
      --> twice.json, line 2, byte 28

    hint: a damaged array cannot be read past the damage; correct it, or write one object a line
    error: model/model.safetensors is not a whole safetensors file: its header: key `a` is given twice at line 1 column 57

    hint: download the file again; it did not arrive whole or is of another kind
    ");
}
