//! The texts of errors about rows, and what is done with bad rows on one rank and on several.

use std::path::PathBuf;
use std::sync::{Arc, Barrier, Mutex};

use glmddp::data::load::{CacheRequest, CacheUse, LoadRequest, load};
use glmddp::data::record::OnBadRow;
use glmddp::data::{Alone, BadRowKind, DataError, Dataset, Exchange};

use crate::row_support::{Chars, Dir, request};

/// Ranks as threads.
struct Threads {
    rank: usize,
    world_size: usize,
    board: Arc<(Barrier, Mutex<Vec<Vec<u8>>>)>,
}

impl Exchange for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, String> {
        let (barrier, board) = &*self.board;
        board.lock().unwrap()[self.rank] = mine.to_vec();
        barrier.wait();
        let all = board.lock().unwrap().clone();
        barrier.wait();
        Ok(all)
    }
}

type Loaded = Result<(Dataset, CacheUse), DataError>;

/// `request_of` may give each rank another request.
fn load_on(world_size: usize, request_of: impl Fn(usize) -> LoadRequest + Sync) -> Vec<Loaded> {
    let board = Arc::new((Barrier::new(world_size), Mutex::new(vec![Vec::new(); world_size])));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                let (group, request) = (Threads { rank, world_size, board: Arc::clone(&board) }, request_of(rank));
                scope.spawn(move || load(&request, &Chars, &group))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

const GOOD: &str = "{\"content\": \"类型#裤\", \"summary\": \"一条长裤。\"}\n";

fn good_lines(n: usize) -> String {
    (0..n).map(|i| format!("{{\"content\": \"类型#裤{i}\", \"summary\": \"一条长裤{i}。\"}}\n")).collect()
}

fn samples(set: &Dataset) -> Vec<(usize, Vec<u32>)> {
    (0..set.num_samples()).map(|i| (set.origin(i).row, set.sample(i).ids.to_vec())).collect()
}

#[test]
fn file_that_is_not_there_is_named_with_the_nearest_one() {
    let dir = Dir::new();
    dir.file("train.jsonl", GOOD);
    insta::assert_snapshot!("no_such_file", dir.error(&request(&dir.0.path().join("tran.jsonl"))));
}

#[test]
fn directory_instead_of_a_file_is_named_with_its_files() {
    let dir = Dir::new();
    dir.file("train.jsonl", GOOD);
    dir.file("dev.jsonl", GOOD);
    insta::assert_snapshot!("directory", dir.error(&request(dir.0.path())));
}

#[test]
fn files_without_rows_say_what_they_hold() {
    let dir = Dir::new();
    let all = [
        dir.error_of("a.jsonl", ""),
        dir.error_of("b.json", " \n\n \t"),
        dir.error_of("c.json", "[]"),
        dir.error_of("d.csv", "content,summary\n"),
        dir.error_of("e.jsonl", b"\xef\xbb\xbf"),
    ];
    insta::assert_snapshot!("files_without_rows", all.join("\n\n"));
}

#[test]
fn files_of_unknown_format_or_encoding_are_refused() {
    let dir = Dir::new();
    let all = [
        dir.error_of("a.txt", "content,summary\n"),
        dir.error_of("b.jsonl", b"\xff\xfe{\0"),
        dir.error_of("c.jsonl", [GOOD.as_bytes(), b"{\"content\": \"\xc0\xe0\"}"].concat()),
        dir.error_of("d.csv", b"content,summary\n\xc0\xe0,b\n"),
        dir.error_of("e.csv", b"content,summ\xe0ry\n"),
    ];
    insta::assert_snapshot!("unknown_format", all.join("\n\n"));
}

#[test]
fn bad_json_at_line_7_is_named() {
    let dir = Dir::new();
    let bad = format!("{}{{\"content\": \"类型#裤\" \"summary\": \"b\"}}\n{GOOD}", good_lines(6));
    insta::assert_snapshot!("bad_json", dir.error_of("train.json", bad));
}

#[test]
fn object_over_several_lines_is_explained() {
    let dir = Dir::new();
    insta::assert_snapshot!("object_over_lines", dir.error_of("train.json", "{\n  \"content\": \"a\",\n  \"summary\": \"b\"\n}\n"));
}

#[test]
fn damaged_array_is_named_by_line_and_byte() {
    let dir = Dir::new();
    insta::assert_snapshot!("bad_array", dir.error_of("train.json", "[\n{\"content\": \"a\", \"summary\": \"b\"}\n{"));
}

#[test]
fn missing_column_names_those_found_and_the_nearest() {
    let dir = Dir::new();
    let all = [
        dir.error_of("a.jsonl", format!("{GOOD}{{\"content\": \"a\", \"summaty\": \"b\"}}")),
        dir.error_of("b.jsonl", "{\"q\": \"a\", \"a\": \"b\"}"),
        dir.error_of("c.jsonl", "{}"),
        dir.error_of("d.csv", "id,Content,summary\n1,a,b\n"),
        dir.error_of("e.json", "[{\"content\": \"a\", \"summary\": \"b\"}, {\"content\": \"a\"}]"),
    ];
    insta::assert_snapshot!("missing_column", all.join("\n\n"));
}

#[test]
fn dialogues_and_rows_in_a_list_are_told_the_shape_that_is_read() {
    let dir = Dir::new();
    let turns = r#"[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]"#;
    let of_column = |name: &str, content: String, column: &str, history: Option<&str>| {
        let mut request = request(&dir.file(name, content));
        request.columns.prompt = column.to_owned();
        request.columns.history = history.map(str::to_owned);
        dir.error(&request)
    };
    let all = [
        dir.error_of("messages.jsonl", format!("{{\"messages\": {turns}}}\n")),
        dir.error_of("sharegpt.json", r#"[{"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]"#),
        dir.error_of("pairs.jsonl", r#"{"conversation": [{"human": "q", "assistant": "a"}]}"#),
        of_column("column.jsonl", format!("{{\"messages\": {turns}}}\n"), "messages", None),
        of_column("history.jsonl", format!("{{\"messages\": {turns}}}\n"), "q", Some("h")),
        dir.error_of("data.json", "{\"data\": [{\"content\": \"q\", \"summary\": \"a\"}]}"),
        dir.error_of("lines.json", "{\n  \"version\": 1,\n  \"data\": [\n    {\"content\": \"q\", \"summary\": \"a\"}\n  ]\n}\n"),
        dir.error_of("turns.json", format!("\u{feff}{{\n  \"conversations\": {turns}\n}}\n")),
        // One row, over several lines.
        dir.error_of("row.json", "{\n  \"content\": \"q\",\n  \"summary\": \"a\"\n}\n"),
    ];
    insta::assert_snapshot!("dialogues", all.join("\n\n"));
}

#[test]
fn numbers_that_are_no_json_are_named() {
    let dir = Dir::new();
    let row = |score: &str| format!("{{\"content\": \"q\", \"summary\": \"a\", \"score\": {score}}}");
    let all = [
        dir.error_of("a.jsonl", row("NaN")),
        dir.error_of("b.jsonl", format!("{GOOD}{}", row("-Infinity"))),
        dir.error_of("c.json", format!("[{},\n{}]", GOOD.trim_end(), row("NaN"))),
    ];
    insta::assert_snapshot!("numbers_that_are_no_json", all.join("\n\n"));
}

#[test]
fn wrong_types_and_empty_texts_say_what_was_found() {
    let dir = Dir::new();
    let row = |content: &str, summary: &str| format!("{{\"content\": {content}, \"summary\": {summary}}}");
    let all = [
        dir.error_of("a.jsonl", row("12", "\"b\"")),
        dir.error_of("b.jsonl", row("\"a\"", "[\"b\"]")),
        dir.error_of("c.jsonl", row("null", "\"b\"")),
        dir.error_of("d.jsonl", row("\"\"", "\"b\"")),
        dir.error_of("e.jsonl", row("\"a\"", "\" \\n\"")),
        dir.error_of("f.jsonl", format!("{GOOD}\n[\"a\", \"b\"]")),
        dir.error_of("g.jsonl", row("\"a\\u0000\"", "\"b\"")),
        dir.error_of("h.csv", "content,summary\na,b\nc,d,e\n"),
    ];
    insta::assert_snapshot!("wrong_types", all.join("\n\n"));
}

#[test]
fn history_of_the_wrong_shape_names_the_round() {
    let dir = Dir::new();
    let error = |name: &str, history: &str| {
        let file = dir.file(name, format!("{{\"content\": \"a\", \"summary\": \"b\"{history}}}"));
        let mut request = request(&file);
        request.columns.history = Some("history".into());
        dir.error(&request)
    };
    let all = [
        error("b.jsonl", ", \"history\": \"q\""),
        error("c.jsonl", ", \"history\": [[\"q\", \"a\"], [\"q\"]]"),
        error("d.jsonl", ", \"history\": [{\"q\": \"a\"}]"),
        error("e.jsonl", ", \"history\": [[\"q\", 1]]"),
        error("f.jsonl", ", \"history\": \"[['q' 'a']]\""),
    ];
    insta::assert_snapshot!("bad_history", all.join("\n\n"));
}

#[test]
fn limits_that_hold_no_template_are_refused() {
    let dir = Dir::new();
    let mut short = request(&dir.file("a.jsonl", GOOD));
    short.limits.max_source_length = 12;
    let mut zero = request(&short.file);
    zero.limits.max_target_length = 0;
    insta::assert_snapshot!("bad_limits", [dir.error(&short), dir.error(&zero)].join("\n\n"));
}

#[test]
fn skipped_rows_are_counted_and_the_first_are_kept() {
    let dir = Dir::new();
    let lines: String = (0..20)
        .map(|i| match i % 5 {
            1 => "{\"content\": 1, \"summary\": \"b\"}\n".to_owned(),
            3 => "{oops\n".to_owned(),
            _ => GOOD.to_owned(),
        })
        .collect();
    let mut request = request(&dir.file("a.jsonl", lines));
    request.on_bad_row = OnBadRow::Skip;
    let (set, _) = load(&request, &Chars, &Alone).unwrap();
    assert_eq!((set.num_samples(), set.bad_rows.total), (12, 8));
    assert_eq!(set.bad_rows.by_kind[&BadRowKind::BadJson], 4);
    insta::assert_snapshot!("skipped_rows", set.bad_rows.to_string().replace(&dir.0.path().display().to_string(), "DIR"));

    request.file = dir.file("b.jsonl", "{oops\n");
    insta::assert_snapshot!("no_good_row", dir.error(&request));
}

#[test]
fn formats_with_the_same_rows_give_the_same_samples() {
    let dir = Dir::new();
    let rows = [("a,b", "c\"d", "[[\"q\", \"r\"]]"), ("e\nf", "g", "[]"), ("类型", "h", "null")];
    let object = |(content, summary, history): &(&str, &str, &str)| {
        let history: serde_json::Value = serde_json::from_str(history).unwrap();
        serde_json::json!({ "id": 7, "content": content, "summary": summary, "history": history }).to_string()
    };
    let objects: Vec<String> = rows.iter().map(object).collect();
    let cell = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let csv: String = rows.iter().map(|(c, s, h)| format!("{},{},{}\r\n", cell(c), cell(s), cell(h))).collect();
    let bom = "\u{feff}";
    let files = [
        dir.file("a.jsonl", objects.join("\n")),
        dir.file("b.json", format!("{bom}\r\n{}\r\n\r\n", objects.join("\r\n"))),
        dir.file("c.json", format!("{bom}\n[{}]", objects.join(",\n"))),
        dir.file("d.txt", format!("[{}]\n", objects.join(","))),
        dir.file("e.csv", format!("content,summary,history\r\n{csv}")),
        dir.file("f.csv", format!("{bom}content,summary,history\n{}", csv.replace("\r\n", "\n\n").trim_end())),
    ];
    let of = |file: &PathBuf| {
        let mut request = request(file);
        request.columns.history = Some("history".into());
        samples(&load(&request, &Chars, &Alone).unwrap().0)
    };
    let ids = |file| of(file).into_iter().map(|(_, ids)| ids).collect::<Vec<_>>();
    let places = |file| of(file).into_iter().map(|(row, _)| row).collect::<Vec<_>>();
    assert!(files.iter().all(|file| ids(file) == ids(&files[0])));
    assert_eq!(places(&files[0]), [1, 2, 3]);
    assert_eq!(places(&files[1]), [2, 3, 4], "blank lines count");
    assert_eq!(places(&files[2]), [1, 2, 3], "elements");
    assert_eq!(places(&files[4]), [2, 3, 5], "a cell may hold a line break");
    assert_eq!(places(&files[5]), [2, 4, 7], "and blank lines count");
}

#[test]
fn samples_are_the_same_at_any_world_size_with_and_without_max_samples() {
    let dir = Dir::new();
    let lines: String = good_lines(23).lines().enumerate().map(|(i, l)| if i % 4 == 2 { "{\n".into() } else { format!("{l}\n") }).collect();
    let file = dir.file("a.jsonl", lines);
    for max_samples in [None, Some(1), Some(7), Some(16), Some(500)] {
        let request = LoadRequest { max_samples, on_bad_row: OnBadRow::Skip, ..request(&file) };
        let (alone, _) = load(&request, &Chars, &Alone).unwrap();
        assert_eq!(alone.num_samples(), max_samples.unwrap_or(17).min(17));
        for world_size in 2..6 {
            for (set, _) in load_on(world_size, |_| request.clone()).into_iter().map(Result::unwrap) {
                assert_eq!(set, alone, "{world_size} ranks, {max_samples:?}");
            }
        }
    }
}

#[test]
fn first_bad_row_of_the_file_is_the_error_of_every_rank() {
    let dir = Dir::new();
    let file = dir.file("a.jsonl", format!("{}{{\"content\": 1}}\n{}oops\n", good_lines(12), good_lines(5)));
    for world_size in 1..6 {
        for error in load_on(world_size, |_| request(&file)).into_iter().map(Result::unwrap_err) {
            let text = dir.text(&error);
            assert!(text.contains("expected a string, found the number 1") && text.contains("a.jsonl, line 13,"), "{text}");
        }
    }
}

#[test]
fn file_missing_or_different_on_one_rank_fails_on_all() {
    let dir = Dir::new();
    let (a, b) = (dir.file("a.jsonl", GOOD), dir.file("b.jsonl", good_lines(1)));
    let texts = |other: PathBuf| -> Vec<String> {
        let ranks = load_on(3, |rank| request(if rank == 1 { &other } else { &a }));
        ranks.into_iter().map(|r| dir.text(&r.unwrap_err())).collect()
    };
    let missing = texts(dir.0.path().join("zzz"));
    assert!(missing[0].starts_with("error: rank 1 failed: no such file") && missing[1].starts_with("error: no such file"), "{missing:?}");
    let different = texts(b);
    assert!(different[0].contains("rank 1 reads other rows than rank 0"), "{different:?}");
}

#[test]
fn cache_is_built_hit_and_keyed_by_what_decides_its_content() {
    let dir = Dir::new();
    let cache = dir.0.path().join("cache");
    let file = dir.file("a.jsonl", good_lines(9));
    let cached = |overwrite| LoadRequest { cache: Some(CacheRequest { dir: cache.clone(), overwrite }), ..request(&file) };
    let plain = load(&request(&file), &Chars, &Alone).unwrap().0;
    let used = |request: &LoadRequest| {
        let (set, used) = load(request, &Chars, &Alone).unwrap();
        assert!(set.num_tokens() <= plain.num_tokens());
        used
    };
    assert!(matches!(used(&cached(false)), CacheUse::Built(_)));
    let CacheUse::Hit(path) = used(&cached(false)) else { panic!("no hit") };
    assert!(matches!(used(&cached(true)), CacheUse::Built(_)));
    let mut other = cached(false);
    other.limits.max_target_length = 3;
    assert!(matches!(used(&other), CacheUse::Built(_)));
    assert!(matches!(used(&LoadRequest { max_samples: Some(2), ..cached(false) }), CacheUse::Built(_)));

    for (set, used) in load_on(3, |_| cached(false)).into_iter().map(Result::unwrap) {
        assert_eq!((set, used), (plain.clone(), CacheUse::Hit(path.clone())));
    }
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let ranks: Vec<_> = load_on(3, |_| cached(false)).into_iter().map(Result::unwrap).collect();
    assert!(ranks.iter().all(|(set, _)| *set == plain));
    assert_eq!(ranks[0].1, CacheUse::Rebuilt { path, reason: "is damaged: its checksum does not match".to_owned() });
    assert!(matches!(used(&cached(false)), CacheUse::Hit(_)));

    std::fs::write(&file, good_lines(8)).unwrap();
    assert!(matches!(used(&cached(false)), CacheUse::Built(_)), "other rows in the file");
}

#[test]
fn cache_that_cannot_be_written_does_not_stop_the_run() {
    let dir = Dir::new();
    let (file, not_a_dir) = (dir.file("a.jsonl", GOOD), dir.file("cache", "x"));
    let request = LoadRequest { cache: Some(CacheRequest { dir: not_a_dir, overwrite: false }), ..request(&file) };
    let (set, used) = load(&request, &Chars, &Alone).unwrap();
    assert_eq!(set.num_samples(), 1);
    assert!(matches!(used, CacheUse::NotKept { .. }), "{used:?}");
}
