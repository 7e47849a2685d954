//! A hint works when it is followed to the letter: each test takes the command out of the message, as a shell reads it, and runs it.

use crate::cli_support::{Ran, glmddp_in};
use crate::row_support::Dir;

const GOOD: &str = "{\"content\":\"q\",\"summary\":\"a\"}\n";
const EVALUATE: &str = "evaluate --model_name_or_path tiny --validation_file";
const GENERATE: &str = "generate --model_name_or_path tiny --max_new_tokens 1 --file";
const TOKENIZE: &str = "tokenize --model_name_or_path tiny --output_dir x --train_file";
const PLAN: &str = "plan --model_name_or_path tiny --output_dir x --train_file";
const TRAIN: &str =
    "train --model_name_or_path tiny --output_dir out --max_steps 1 --global_batch_size 1 --finetuning_type lora --train_file";
const COMPARE: &str = "compare --model_name_or_path tiny --output_dir out --max_steps 1 --global_batch_size 1 --methods lora --validation_file good.jsonl \
     --train_file";

/// A folder with a model and a good file of rows.
fn project() -> Dir {
    let dir = Dir::new();
    let made = glmddp_in(dir.0.path(), &["init-model", "--preset", "tiny", "--output_dir", "tiny"]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    dir.file("good.jsonl", GOOD);
    dir
}

fn run(dir: &Dir, words: &[String]) -> Ran {
    glmddp_in(dir.0.path(), &words.iter().map(String::as_str).collect::<Vec<_>>())
}

fn words(command: &str) -> Vec<String> {
    shlex::split(command).expect("words of a shell")
}

/// What stands between backticks in the hint, or in the warnings where there is no hint.
fn commands(stderr: &str) -> Vec<&str> {
    let text = stderr.split_once("hint: ").map_or(stderr, |(_, hint)| hint);
    text.split('`').skip(1).step_by(2).collect()
}

fn is_option(text: &str) -> bool {
    text.starts_with("--") && (text.contains("_column") || text.contains("on_bad_row"))
}

/// Runs `command FILE`, then follows its hint until there is none to follow: options are added, a command of the shell is run and gives
/// the file's new name. The first error and the last run.
fn followed(dir: &Dir, command: &str, file: &str) -> (String, Ran) {
    let mut args = words(command);
    args.push(file.to_owned());
    let at = args.len() - 1;
    let first = run(dir, &args);
    let mut last = Ran { code: first.code, stdout: String::new(), stderr: first.stderr.clone() };
    for _ in 0..4 {
        if last.code == 0 {
            break;
        }
        let stderr = last.stderr.clone();
        // Where there are several ways, the first is taken.
        let hint = commands(&stderr)
            .into_iter()
            .find(|text| ["iconv ", "tr ", "mv "].iter().any(|start| text.starts_with(start)) || is_option(text));
        let hint = hint.unwrap_or_else(|| panic!("{args:?}: no command in the hint\n{stderr}"));
        if hint.starts_with("--") {
            args.extend(words(hint));
        } else {
            let shell = std::process::Command::new("sh").args(["-c", hint]).current_dir(dir.0.path()).output().unwrap();
            assert!(shell.status.success(), "{hint}: {}", String::from_utf8_lossy(&shell.stderr));
            args[at] = words(hint).pop().unwrap();
        }
        last = run(dir, &args);
    }
    (first.stderr, last)
}

#[test]
fn hinted_column_is_found_whatever_its_name() {
    let dir = project();
    for (i, name) in
        [" summary", "summary ", "sum mary", "summary's", "summary\"", "$summary", "summary;", "-summary", "--summary", "Summary"]
            .into_iter()
            .enumerate()
    {
        let file = format!("{i}.csv");
        dir.file(&file, format!("content,\"{}\"\nq,a\n", name.replace('"', "\"\"")));
        let object = serde_json::json!({ "content": "q", name: "a" });
        let lines = format!("{i}.jsonl");
        dir.file(&lines, object.to_string());
        for (command, file) in [(EVALUATE, &file), (TOKENIZE, &file), (PLAN, &file), (EVALUATE, &lines), (TOKENIZE, &lines)] {
            let (first, last) = followed(&dir, command, file);
            assert!(first.contains("is `") && last.code == 0, "{name:?}, {command} {file}:\n{first}\n{}", last.stderr);
        }
    }
    dir.file("q.csv", "content of it\nq\n");
    assert_eq!(followed(&dir, GENERATE, "q.csv").1.code, 0);
}

#[test]
fn bad_rows_are_left_out_by_the_option_that_each_command_names() {
    let dir = project();
    dir.file("bad.jsonl", format!("{GOOD}oops\n{GOOD}"));
    dir.file("bad.csv", "content,summary\nq,a\n\"x\"y,b\nr,c\n");
    for command in [EVALUATE, GENERATE, TOKENIZE, TRAIN, COMPARE] {
        for file in ["bad.jsonl", "bad.csv"] {
            let _ = std::fs::remove_dir_all(dir.0.path().join("out"));
            let (first, last) = followed(&dir, command, file);
            assert!(first.contains("`--on_bad_row skip`") && last.code == 0, "{command} {file}:\n{first}\n{}", last.stderr);
        }
    }
}

#[test]
fn hinted_conversion_makes_the_file_readable() {
    let dir = project();
    let text = "{\"content\":\"类型#裤\",\"summary\":\"长裤。\"}\n";
    let csv = "content,summary\n类型,长裤\n";
    let wide = |text: &str, to: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(to).collect::<Vec<u8>>();
    let marked = |mark: &[u8], text: Vec<u8>| [mark, &text].concat();
    let files = [
        ("le.jsonl", wide(text, u16::to_le_bytes)),
        ("be.jsonl", wide(text, u16::to_be_bytes)),
        ("le.csv", wide(csv, u16::to_le_bytes)),
        ("marked le.csv", marked(b"\xff\xfe", wide(csv, u16::to_le_bytes))),
        ("marked be's.jsonl", marked(b"\xfe\xff", wide(text, u16::to_be_bytes))),
        ("gb.csv", b"content,summary\n\xc0\xe0\xd0\xcd,\xb3\xa4\xbf\xe3\n".to_vec()),
        ("latin.jsonl", b"{\"content\":\"caf\xe9\",\"summary\":\"a\"}\n".to_vec()),
        ("mac.jsonl", text.replace('\n', "\r").repeat(2).into_bytes()),
        ("json.csv", text.as_bytes().to_vec()),
        ("array.csv", format!("[{text}]").into_bytes()),
    ];
    let mut all = Vec::new();
    for (name, content) in files {
        dir.file(name, content);
        let (first, last) = followed(&dir, TOKENIZE, name);
        assert_eq!(last.code, 0, "{name}:\n{first}\n{}", last.stderr);
        let is_chinese = !name.starts_with("latin");
        assert!(!is_chinese || last.stdout.contains("类"), "{name}: {}", last.stdout);
        all.push(first);
    }
    insta::assert_snapshot!("conversions", all.join("\n"));
}

#[test]
fn table_with_other_separators_or_of_another_kind_is_named_and_no_column_is_offered() {
    let dir = project();
    dir.file("semicolon.csv", "content;summary\nq;a\n");
    dir.file("tab.csv", "content\tsummary\nq\ta\n");
    dir.file("tab.tsv", "content\tsummary\nq\ta\n");
    dir.file("bar.csv", "content|summary\nq|a\n");
    dir.file("table.csv", b"PK\x03\x04\x14\0\x06\0");
    dir.file("rows.jsonl", b"\x1f\x8b\x08\0\0\0\0\0");
    let mut all = Vec::new();
    for file in ["semicolon.csv", "tab.csv", "tab.tsv", "bar.csv", "table.csv", "rows.jsonl"] {
        let mut args = words(EVALUATE);
        args.push(file.to_owned());
        let ran = run(&dir, &args);
        assert!(ran.code == 2 && !ran.stderr.contains("_column"), "{file}: {}", ran.stderr);
        all.push(ran.stderr);
    }
    insta::assert_snapshot!("other_tables", all.join("\n"));
}

#[test]
fn warning_of_an_unused_column_names_options_that_use_it() {
    let dir = project();
    for (i, name) in ["input", "more input", "it's", "$x", "-i"].into_iter().enumerate() {
        let file = format!("{i}.jsonl");
        dir.file(&file, serde_json::json!({ "content": "q", name: "more", "rounds of it": [["x", "y"]], "summary": "a" }).to_string());
        for command in [EVALUATE, GENERATE, TOKENIZE, PLAN, TRAIN, COMPARE] {
            let _ = std::fs::remove_dir_all(dir.0.path().join("out"));
            let mut args = words(command);
            args.push(file.clone());
            let first = run(&dir, &args);
            let hinted: Vec<&str> = commands(&first.stderr).into_iter().filter(|text| is_option(text)).collect();
            // Only a name that is usual for a second part of the prompt is offered as one.
            let is_input = name == "input";
            assert_eq!((first.code, hinted.len()), (0, if is_input { 2 } else { 1 }), "{name:?}, {command}: {}", first.stderr);
            args.extend(hinted.into_iter().flat_map(words));
            let _ = std::fs::remove_dir_all(dir.0.path().join("out"));
            let last = run(&dir, &args);
            assert!(last.code == 0 && last.stderr.contains("not used") != is_input, "{args:?}: {}", last.stderr);
            assert!(!last.stderr.contains("`rounds of it` in"), "{args:?}: {}", last.stderr);
        }
    }
}
