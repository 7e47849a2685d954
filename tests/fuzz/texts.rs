//! What is text: the tokenizer's pieces, rows, configurations, logs and reports.

use std::fmt::Display;
use std::path::Path;

use glmddp::compare::{Report, Shared};
use glmddp::config::{self, ConfigError, RunConfig};
use glmddp::data::DataError;
use glmddp::data::load::{CacheRequest, LoadRequest, load};
use glmddp::data::prompt::Truncation;
use glmddp::data::record::{Columns, OnBadRow};
use glmddp::data::tokenize::Limits;
use glmddp::data::{Alone, Encode};
use glmddp::model::shape::ModelShape;
use glmddp::telemetry::{EvalRecord, RunLog, StepRecord, logged_steps};
use glmddp::tokenizer::GlmTokenizer;
use sha2::{Digest, Sha256};

use crate::harness::{Bound, Target, as_it_is, fuzz, read_one};
use crate::mutate::{Dice, Folder, JSON_WORDS};

const TEXT_WORDS: &[&[u8]] = &[
    b"\"\"",
    b"\"\\ud800\"",
    b"\\u0000",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\n",
    b"0,",
    b"[],",
    b"{\"a\":",
    b"\"content\":\"x\",",
    b"\"summary\":\"y\"",
    b"\"history\":[[\"q\",\"a\"]]",
    b"1e999",
    b"-",
    b"\"../outside/x\"",
];

fn one(name: &str, bytes: impl AsRef<[u8]>) -> Folder {
    Folder::from([(name.to_owned(), bytes.as_ref().to_vec())])
}

fn text(error: impl Display) -> String {
    error.to_string()
}

pub fn tokenizer() -> Vec<u8> {
    let corpus = ["类型#裤*版型#宽松", "这款长裤，适合春季。the quick brown fox the fox"].map(str::to_owned);
    glmddp::tokenizer::train_small(&corpus, 280)
}

#[test]
fn tokenizer_from_anyone_is_read_or_refused() {
    const NAME: &str = "tokenizer.model";
    let whole = tokenizer();
    let field = |number: u8, bytes: &[u8]| [&[number << 3 | 2, bytes.len() as u8][..], bytes].concat();
    let user_defined = [&field(1, &[&field(1, "类型".as_bytes())[..], b"\x18\x04"].concat())[..], &whole].concat();
    let unused = [&whole[..], &field(1, &[&field(1, "fox".as_bytes())[..], b"\x18\x05"].concat())].concat();
    let seeds = [whole.clone(), user_defined, unused, vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], b"\x0a\x00".repeat(50_000), vec![0xff; 30]];
    fuzz(&Target {
        name: "tokenizer",
        executions: 1500,
        seeds: seeds.into_iter().map(|bytes| one(NAME, bytes)).collect(),
        words: vec![
            b"\x0a\x00",
            b"\x0a\x02\x0a\x00",
            b"\x15\x00\x00\xc0\x7f",
            b"\x18\x04",
            b"\x18\x05",
            b"\x18\x06",
            b"\x18\x02",
            b"\x12\x02\x18\x01",
            "<0x00>".as_bytes(),
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x0a\xff\xff\xff\xff\x0f",
            "▁".as_bytes(),
            b"\x1a\x02\x12\x00",
            b"\x0b",
            b"\x0c",
        ],
        assemble: as_it_is,
        // Two bytes can make an empty piece of 40, and its vector doubles; a piece that is kept stands in two tables.
        bound: Bound { constant: 1 << 19, factor: 64 },
        read: Box::new(|dir| {
            let tokenizer = GlmTokenizer::from_file(&dir.join(NAME)).map_err(text)?;
            let words = "类型#裤 fox\u{0}\n the";
            let ids = tokenizer.encode(words).map_err(text)?;
            tokenizer.decode(&ids);
            let all: Vec<u32> = (0..tokenizer.vocab_size() as u32 + 9).collect();
            tokenizer.decode_with_special(&all);
            assert!(all.iter().take(tokenizer.num_pieces()).all(|&id| tokenizer.piece(id).is_some()));
            tokenizer.check_fits(320).map_err(text)
        }),
    });
}

/// A byte a token.
struct Bytes;

impl Encode for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn prompt_prefix(&self) -> Vec<u32> {
        vec![300, 301]
    }

    fn eos(&self) -> u32 {
        302
    }

    fn identity(&self) -> String {
        "bytes".to_owned()
    }
}

fn request(dir: &Path, file: &str, on_bad_row: OnBadRow, history: bool) -> LoadRequest {
    LoadRequest {
        file: dir.join(file),
        columns: Columns { prompt: "content".into(), input: None, response: "summary".into(), history: history.then(|| "history".into()) },
        limits: Limits { max_source_length: 64, max_target_length: 32, truncation: Truncation::KeepAnswerMark },
        on_bad_row,
        max_samples: None,
        cache: None,
    }
}

/// Loads every file of rows in the folder in each way.
fn read_rows(dir: &Path) -> Result<(), String> {
    let mut answer = Err(format!("{} holds no rows", dir.display()));
    for file in ["rows.json", "rows.jsonl", "rows.csv"].into_iter().filter(|file| dir.join(file).exists()) {
        for (on_bad_row, history) in [(OnBadRow::Skip, true), (OnBadRow::Skip, false), (OnBadRow::Stop, false)] {
            let loaded = load(&request(dir, file, on_bad_row, history), &Bytes, &Alone);
            answer = loaded.map(|(set, _)| assert!(set.num_samples() > 0 && set.length_stats().is_some())).map_err(with_place);
        }
    }
    answer
}

/// A file without a good row says so by its first bad row.
fn with_place(error: DataError) -> String {
    let hint = error.hint().unwrap_or_default();
    format!("{error}\n{hint}")
}

#[test]
fn rows_from_anyone_are_read_or_refused() {
    let row = "{\"content\":\"类型#裤\",\"summary\":\"宽松的长裤。\",\"history\":[[\"q\",\"a\"]]}";
    let lines = format!("{row}\r\n\n{row}\n");
    let array = format!("[{row},\n{row}]");
    let csv = "content,summary,history\n类型#裤,\"宽松\n的\"\"长裤\",\"[[\"\"q\"\",\"\"a\"\"]]\"\r\nx,y,\n";
    let deep = "[".repeat(100_000);
    let nested = format!("{{\"content\":\"a\",\"summary\":\"b\",\"history\":{deep}");
    let numbers = format!("[{}0]", "0,".repeat(20_000));
    let seeds = vec![
        one("rows.jsonl", &lines),
        one("rows.json", &array),
        one("rows.json", &lines),
        one("rows.csv", csv),
        one("rows.json", &deep),
        one("rows.jsonl", &nested),
        one("rows.json", &numbers),
        one("rows.csv", ",".repeat(20_000)),
        one("rows.csv", format!("content,summary,history\n\"{}", "x\"\"".repeat(5000))),
        one("rows.jsonl", "{\"content\":\"a\",\"content\":\"b\",\"summary\":\"c\"}\n"),
        one("rows.jsonl", b"{\"content\":\"\xff\",\"summary\":\"c\"}\n"),
        one("rows.jsonl", "\n".repeat(10_000)),
    ];
    let words = [JSON_WORDS, TEXT_WORDS, &[b"\"", b",,", b"\r\n", b"content,summary,history\n", b"\r"]].concat();
    fuzz(&Target {
        name: "rows",
        executions: 2500,
        seeds,
        words,
        assemble: as_it_is,
        // An element `0,` of an array becomes a value of 72 bytes, a line `0` of two bytes a raw row, a message and a bad row; vectors double.
        bound: Bound { constant: 4 << 20, factor: 256 },
        read: Box::new(read_rows),
    });
}

/// Name of the cache's file for the rows of [`cached`].
fn cache_file(dir: &Path) -> Option<std::path::PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|e| e == "bin"))
}

#[test]
fn cached_rows_from_anyone_are_read_or_made_anew() {
    const CACHED: &str = "cached";
    let rows = "{\"content\":\"a\",\"summary\":\"b\"}\n".repeat(3);
    let load_cached = |dir: &Path, payload: Option<&[u8]>| {
        let cache = dir.join("cache");
        let request = LoadRequest {
            cache: Some(CacheRequest { dir: cache.clone(), overwrite: payload.is_none() }),
            ..request(dir, "rows.jsonl", OnBadRow::Stop, false)
        };
        std::fs::write(&request.file, &rows).unwrap();
        if let Some(payload) = payload {
            let made =
                load(&LoadRequest { cache: Some(CacheRequest { dir: cache.clone(), overwrite: true }), ..request.clone() }, &Bytes, &Alone);
            made.map_err(with_place)?;
            std::fs::write(cache_file(&cache).unwrap(), payload).unwrap();
        }
        let (set, used) = load(&request, &Bytes, &Alone).map_err(with_place)?;
        assert!(set.iter().all(|sample| sample.ids.len() == sample.is_target.len()));
        Ok::<_, String>((cache, used))
    };
    let dir = tempfile::tempdir().unwrap();
    let (cache, _) = load_cached(dir.path(), None).unwrap();
    let whole = std::fs::read(cache_file(&cache).unwrap()).unwrap();
    fuzz(&Target {
        name: "cached rows",
        executions: 100,
        seeds: vec![one(CACHED, &whole), one(CACHED, &whole[..45]), one(CACHED, [&whole[..40], &[0xff; 64]].concat())],
        words: vec![b"\xff\xff\xff\xff\xff\xff\xff\xff", b"{", b"\"total\":18446744073709551615"],
        assemble: |mut folder: Folder, dice: &mut Dice| {
            // The checksum behind the magic made to hold, but for one input in four.
            if let Some(bytes) = folder.get_mut(CACHED).filter(|bytes| bytes.len() > 40 && !dice.one_in(4)) {
                let sum = Sha256::digest(&bytes[40..]);
                bytes[8..40].copy_from_slice(&sum);
            }
            folder
        },
        bound: Bound { constant: 2 << 20, factor: 32 },
        read: Box::new(move |dir| {
            let Ok(payload) = std::fs::read(dir.join(CACHED)) else { return Err(format!("{} holds no cache", dir.display())) };
            match load_cached(dir, Some(&payload))?.1 {
                glmddp::data::load::CacheUse::Rebuilt { path, reason } => Err(format!("{}: {reason}", path.display())),
                _ => Ok(()),
            }
        }),
    });
}

/// The published model's, and the least.
const SHAPES: [ModelShape; 2] = [
    ModelShape::CHATGLM2_6B,
    ModelShape { layers: 1, hidden: 1, ffn: 1, heads: 1, groups: 1, kv: 4, vocab: 1, qkv_bias: false, linear_bias: true, final_norm: true },
];

const LEAST: &str = "model_name_or_path='m'\ntrain_file='t'\noutput_dir='o'\n";

fn read_config(dir: &Path) -> Result<(), String> {
    let placed = |error: ConfigError| match error.place().unwrap_or_default() {
        // Given nowhere, or by default: no file to name.
        place if place.starts_with("default of") || matches!(error, ConfigError::Missing { .. }) => {
            format!("{error}, not in {}", dir.display())
        }
        place => format!("{error}\n{place}\n{}", error.hint().unwrap_or_default()),
    };
    let path = ["run.toml", "run.json"].map(|name| dir.join(name)).into_iter().find(|path| path.exists());
    let path = path.ok_or_else(|| format!("{} holds no configuration", dir.display()))?;
    let comparison = config::load_comparison(Some(&path), &RunConfig::default()).map(drop).map_err(placed);
    let loaded = config::load(Some(&path), &RunConfig::default()).map_err(placed)?;
    for world_size in [2, 1] {
        let plan = loaded.resolve(world_size).map_err(placed)?;
        assert!(plan.batch.rows_per_step() >= world_size);
        for shape in &SHAPES {
            if let Ok(numbers) = config::arithmetic::plan_arithmetic(shape, &plan) {
                assert!(numbers.rank_bytes.total() >= numbers.rank_bytes.weights);
            }
        }
        config::arithmetic::plan_length(&plan, Some(1000));
    }
    if path.extension().is_some_and(|e| e == "toml") { comparison } else { Ok(()) }
}

#[test]
fn configuration_from_anyone_is_read_or_refused() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let shipped = |name: &str| one("run.toml", std::fs::read(configs.join(name)).unwrap());
    let json = "{\"model\":{\"model_name_or_path\":\"m\"},\"train_file\":\"t\",\"output_dir\":\"o\",\"global_batch_size\":6,\"learning_rate\":1e-2}";
    let with = |line: &str| one("run.toml", format!("{LEAST}{line}\n"));
    let huge = "9223372036854775807";
    let seeds = vec![
        with("seed = 1\nglobal_batch_size = 6"),
        shipped("ptuning_v2_adgen.toml"),
        shipped("lora_adgen.toml"),
        shipped("compare.toml"),
        one("run.json", json),
        one("run.json", "[".repeat(60_000)),
        one("run.json", "{\"model\":".repeat(6000)),
        with(&format!("x = {}", "[".repeat(60_000))),
        with(&format!("x = {}", "{a=".repeat(20_000))),
        with(&format!("{}a = 1", "a.".repeat(30_000))),
        with(&format!("[{}a]", "a.".repeat(30_000))),
        with(&format!("[[{}a]]", "a.".repeat(30_000))),
        with(&"k = 1\n".repeat(1000)),
        with(&format!("gradient_accumulation_steps = {huge}\nper_device_train_batch_size = {huge}")),
        with(&format!("max_source_length = {huge}\nmax_target_length = {huge}")),
        with(&format!("pre_seq_len = {huge}")),
        with(&format!("finetuning_type='lora'\nlora_rank = {huge}")),
        with("finetuning_type='lora'\nlora_target = '(a{1000}){1000}'"),
        with(&format!("finetuning_type='freeze'\nfreeze_trainable_layers = {huge}")),
        with(&format!("finetuning_type='p_tuning'\nencoder_hidden_size = {huge}\nnum_virtual_tokens = {huge}")),
        with("num_train_epochs = 1e300\nwarmup_ratio = 1.0"),
        with("stall_timeout = '99999999999999999999y'"),
        one("run.toml", b"seed = '\xff'"),
    ];
    fuzz(&configuration(seeds));
}

fn configuration(seeds: Vec<Folder>) -> Target<'static> {
    Target {
        name: "configuration",
        executions: 1200,
        seeds,
        words: vec![
            b"[model]\n",
            b"[data]\n",
            b"[method]\n",
            b"[methods.a]\n",
            b"[run]\n",
            b"[[run]]\n",
            b"seed = ",
            b"lora_rank = ",
            b"finetuning_type = 'lora'\n",
            b"finetuning_type = 'prompt_tuning'\n",
            b"pre_seq_len = ",
            b"global_batch_size = ",
            b"max_steps = ",
            b"prefix_projection = true\n",
            b"a.b = 1\n",
            b"'",
            b"\"\"\"",
            b"\n",
            b"nan",
            b"inf",
            b"9223372036854775807",
            b"1979-05-27",
            b"{",
            b"}",
            b"[",
            b"]",
            b"=",
            b"#",
            b"\0",
            b"max_target_length = ",
            b"use_dora = true\n",
            b"stall_timeout = '1h'\n",
            b"true",
            b"-1",
        ],
        assemble: as_it_is,
        // Keys are few; a nested value of two bytes becomes one of 72 bytes in two trees. A pattern may take what the expression library allows.
        bound: Bound { constant: 2 << 20, factor: 256 },
        read: Box::new(read_config),
    }
}

/// The reader's answer to a configuration that has what is needed, and `lines`.
pub fn configured(lines: &str) -> Result<(), String> {
    read_one(&configuration(Vec::new()), &one("run.toml", format!("{LEAST}{lines}\n")))
}

#[test]
fn log_from_anyone_is_read_or_refused() {
    const NAME: &str = "trainer_log.jsonl";
    let dir = tempfile::tempdir().unwrap();
    let mut log = RunLog::open(dir.path()).unwrap();
    for step in 1..4 {
        log.step(&StepRecord { current_steps: step, loss: 0.5, ..StepRecord::default() }).unwrap();
        log.eval(&EvalRecord { current_steps: step, ..EvalRecord::default() }).unwrap();
    }
    let whole = std::fs::read(dir.path().join(NAME)).unwrap();
    let seeds = [whole, "{\"current_steps\":".repeat(2000).into_bytes(), vec![b'['; 100_000], b"0\n".repeat(10_000), b"\xff\n".to_vec()];
    fuzz(&Target {
        name: "training log",
        executions: 1000,
        seeds: seeds.into_iter().map(|bytes| one(NAME, bytes)).collect(),
        words: [JSON_WORDS, TEXT_WORDS].concat(),
        assemble: as_it_is,
        bound: Bound { constant: 1 << 19, factor: 128 },
        read: Box::new(|dir| {
            logged_steps(dir).map_err(text)?;
            RunLog::open(dir).and_then(|mut log| log.truncate_after(2)).map(|_| ()).map_err(text)
        }),
    });
}

#[test]
fn report_of_a_comparison_from_anyone_is_read_or_refused() {
    const NAME: &str = "compare.json";
    let shared: Shared = serde_json::from_value(serde_json::json!({
        "base_fingerprint": "a", "tokenizer_sha256": "b", "base_parameters": 1, "train_rows": 1, "train_tokens": 2, "held_out_rows": 1,
        "held_out_tokens": 2, "drift_rows": 1, "steps": 3, "rows_per_step": 1, "budget_tokens": 6,
    }))
    .unwrap();
    let whole = serde_json::to_vec_pretty(&Report::new(shared.clone())).unwrap();
    let seeds = [whole, b"{\"format_version\":2}".to_vec(), b"[".repeat(100_000), "{\"entries\":".repeat(1000).into_bytes()];
    fuzz(&Target {
        name: "report",
        executions: 1000,
        seeds: seeds.into_iter().map(|bytes| one(NAME, bytes)).collect(),
        words: [JSON_WORDS, TEXT_WORDS].concat(),
        assemble: as_it_is,
        bound: Bound { constant: 1 << 19, factor: 16 },
        read: Box::new(move |dir| {
            let path = dir.join(NAME);
            let text = std::fs::read(&path).unwrap_or_default();
            let report = Report::parse(&path, &text).map_err(|e| e.to_string())?;
            report.check_shared(&path, &shared).map_err(|e| e.to_string())
        }),
    });
}
