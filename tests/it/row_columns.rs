//! Columns that no key uses are told; columns that a row may lack are no fault; a history is a list in any form.

use glmddp::data::load::{CacheRequest, LoadRequest, load};
use glmddp::data::{Alone, Dataset};

use crate::cli_support::{Ran, glmddp_in};
use crate::row_support::{Chars, Dir, request, texts};
use crate::support::shared;

const ALPACA: [(&str, &str, &str); 3] = [("Add.", "1 and 2", "3"), ("Say hi.", "", "hi"), ("Name it.", "a cat", "cat")];

/// The rows in each format.
fn alpaca(dir: &Dir) -> Vec<std::path::PathBuf> {
    let objects: Vec<String> =
        ALPACA.iter().map(|(q, i, a)| serde_json::json!({ "content": q, "input": i, "summary": a }).to_string()).collect();
    let cells: String = ALPACA.iter().map(|(q, i, a)| format!("{q},{i},{a}\n")).collect();
    vec![
        dir.file("a.jsonl", objects.join("\n")),
        dir.file("a.json", format!("[{}]", objects.join(","))),
        dir.file("a.csv", format!("content,input,summary\n{cells}")),
    ]
}

fn with_input(file: &std::path::Path) -> LoadRequest {
    let mut request = request(file);
    request.columns.input = Some("input".to_owned());
    request
}

fn with_history(file: &std::path::Path) -> LoadRequest {
    let mut request = request(file);
    request.columns.history = Some("history".to_owned());
    request
}

fn told(dir: &Dir, request: &LoadRequest) -> (Dataset, String) {
    let (set, _) = load(request, &Chars, &Alone).unwrap();
    let lines = set.column_use.report(&request.columns, &request.file).join("\n");
    (set, dir.hidden(&lines))
}

#[test]
fn unused_columns_are_told_in_every_format_from_the_cache_too() {
    let dir = Dir::new();
    let mut all = Vec::new();
    for file in alpaca(&dir) {
        let cache = Some(CacheRequest { dir: dir.0.path().join("cache"), overwrite: false });
        let request = LoadRequest { cache, ..request(&file) };
        let (_, first) = told(&dir, &request);
        assert_eq!(told(&dir, &request).1, first, "from the cache");
        all.push(first);
    }
    insta::assert_snapshot!(all.join("\n"), @r"
    DIR/a.jsonl: column `input` is not used and is not empty in 2 of 3 rows; `--input_column input` appends it to the question
    DIR/a.json: column `input` is not used and is not empty in 2 of 3 rows; `--input_column input` appends it to the question
    DIR/a.csv: column `input` is not used and is not empty in 2 of 3 rows; `--input_column input` appends it to the question
    ");
}

#[test]
fn row_numbers_that_pandas_writes_are_not_told() {
    let dir = Dir::new();
    for (name, text) in [
        ("nameless.csv", ",content,summary\n0,q,a\n1,r,b\n"),
        ("unnamed.csv", "Unnamed: 0.1,Unnamed: 0,content,summary\n0,0,q,a\n1,1,r,b\n"),
        ("rows.jsonl", "{\"Unnamed: 0\": 0, \"__index_level_0__\": 7, \"content\": \"q\", \"summary\": \"a\"}\n"),
    ] {
        assert_eq!(told(&dir, &request(&dir.file(name, text))).1, "", "{name}");
    }
    let text = told(&dir, &request(&dir.file("text.csv", ",content,summary\nx,q,a\n1,r,b\n"))).1;
    assert_eq!(text, "DIR/text.csv: column `` (without a name) is not used and is not empty in 1 of 2 rows");
}

#[test]
fn input_column_is_appended_where_it_is_not_empty() {
    let dir = Dir::new();
    for file in alpaca(&dir) {
        let (set, told) = told(&dir, &with_input(&file));
        let texts: Vec<String> = texts(&set).into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts[0], "[Round 1]\n\n问：Add.\n1 and 2\n\n答：3");
        assert_eq!(texts[1], "[Round 1]\n\n问：Say hi.\n\n答：hi");
        assert_eq!(told, "");
    }
    let lacks = dir.file("b.jsonl", "{\"content\":\"q\",\"summary\":\"a\"}\n{\"content\":\"r\",\"input\":null,\"summary\":\"b\"}\n");
    assert_eq!(texts(&load(&with_input(&lacks), &Chars, &Alone).unwrap().0).len(), 2, "a row may lack it");
    let number = dir.file("c.jsonl", "{\"content\":\"q\",\"input\":7,\"summary\":\"a\"}\n");
    insta::assert_snapshot!(dir.error(&with_input(&number)), @r"
    error: expected a string or null, found the number 7
      --> DIR/c.jsonl, line 1, column `input`

    hint: `--on_bad_row skip` leaves such rows out and counts them
    ");
}

#[test]
fn rows_without_a_history_have_none_in_every_format() {
    let dir = Dir::new();
    let row = |history: &str| format!("{{\"content\":\"q\",\"summary\":\"a\"{history}}}");
    let none = ["", ",\"history\":null", ",\"history\":[]", ",\"history\":\"\"", ",\"history\":\"null\"", ",\"history\":\"[]\""].map(row);
    let one =
        [r#","history":[["x","y"]]"#, r#","history":"[[\"x\",\"y\"]]""#, r#","history":"[['x', 'y']]""#, r#","history":"[('x', \"y\")]""#]
            .map(row);
    let objects = [none.as_slice(), one.as_slice()].concat();
    let cells = ["", "null", "[]", "None", "\"[[\"\"x\"\",\"\"y\"\"]]\"", "\"[['x', 'y']]\""];
    let csv: String = cells.iter().map(|cell| format!("q,a,{cell}\n")).collect();
    let with_round = |text: &str| text.starts_with("[Round 1]\n\n问：x\n\n答：y\n\n[Round 2]");
    for (file, num_without) in [
        (dir.file("a.jsonl", objects.join("\n")), none.len()),
        (dir.file("a.json", format!("[{}]", objects.join(","))), none.len()),
        (dir.file("a.csv", format!("content,summary,history\n{csv}")), 4),
    ] {
        let (set, told) = told(&dir, &with_history(&file));
        let found: Vec<bool> = texts(&set).iter().map(|(_, text)| with_round(text)).collect();
        assert_eq!(found, (0..found.len()).map(|i| i >= num_without).collect::<Vec<_>>(), "{file:?}");
        assert_eq!(told, "");
    }
}

#[test]
fn column_that_no_row_has_is_told_and_a_misspelt_one_is_an_error() {
    let dir = Dir::new();
    let without = dir.file("a.jsonl", "{\"content\":\"q\",\"summary\":\"a\"}\n");
    let misspelt = dir.file("b.jsonl", "{\"content\":\"q\",\"summary\":\"a\",\"histroy\":[[\"x\",\"y\"]]}\n");
    insta::assert_snapshot!(told(&dir, &with_history(&without)).1, @"DIR/a.jsonl: no row has the column `history` (`history_column`)");
    insta::assert_snapshot!(dir.error(&with_history(&misspelt)), @r"
    error: no row has the column `history`
      --> DIR/b.jsonl

    hint: is `histroy` meant? then pass `--history_column histroy`
    ");
}

/// A model and alpaca's rows in a folder.
fn project() -> Dir {
    let dir = Dir::new();
    let made = glmddp_in(dir.0.path(), &["init-model", "--preset", "tiny", "--output_dir", "tiny"]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    alpaca(&dir);
    dir
}

#[test]
fn every_command_that_reads_rows_tells_what_it_does_not_use() {
    let dir = project();
    let run = |line: &str| glmddp_in(dir.0.path(), &line.split_whitespace().collect::<Vec<_>>());
    let train = "--model_name_or_path tiny --train_file a.jsonl --validation_file a.csv --max_steps 1 --per_device_train_batch_size 1 \
        --global_batch_size 1 --finetuning_type lora";
    let commands = [
        format!("train {train} --output_dir out1"),
        format!("compare {} --methods lora --output_dir out2", train.replace(" --finetuning_type lora", "")),
        "tokenize --model_name_or_path tiny --train_file a.jsonl --output_dir x".to_owned(),
        "plan --model_name_or_path tiny --train_file a.jsonl --output_dir x".to_owned(),
        "evaluate --model_name_or_path tiny --validation_file a.jsonl".to_owned(),
        "generate --model_name_or_path tiny --file a.jsonl --max_new_tokens 1".to_owned(),
    ];
    let line = "column `input` is not used and is not empty in 2 of 3 rows; `--input_column input` appends it to the question";
    for command in commands {
        let Ran { code, stderr, .. } = run(&command);
        assert_eq!(code, 0, "{command}: {stderr}");
        assert_eq!(stderr.matches(&format!("a.jsonl: {line}")).count(), 1, "{command}: {stderr}");
        let two_files = command.contains("validation_file a.csv");
        assert_eq!(stderr.matches(&format!("a.csv: {line}")).count(), usize::from(two_files), "{command}: {stderr}");
        if !command.starts_with("train") && !command.starts_with("compare") {
            let used = run(&format!("{command} --input_column input"));
            assert!(used.code == 0 && !used.stderr.contains("is not used"), "{command}: {}", used.stderr);
        }
    }
}

#[test]
fn alpaca_and_history_cases_are_read_as_their_user_expects() {
    let (Some(alpaca), Some(history)) = (shared("cases/alpaca-input/alpaca.json"), shared("cases/history-missing/history_some.jsonl"))
    else {
        return;
    };
    let dir = Dir::new();
    let mut request = request(&alpaca);
    (request.columns.prompt, request.columns.response) = ("instruction".to_owned(), "output".to_owned());
    let (_, line) = told(&dir, &request);
    assert!(line.contains("column `input` is not used and is not empty in") && line.contains("`--input_column input`"), "{line}");
    assert!(load(&with_history(&history), &Chars, &Alone).unwrap().0.bad_rows.total == 0);
}
