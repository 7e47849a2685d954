//! Samples against those of the published preprocessing, with the published tokenizer file.

use std::path::Path;
use std::sync::Arc;

use glmddp::data::load::{LoadRequest, load};
use glmddp::data::prompt::{Truncation, build_prompt};
use glmddp::data::record::{Columns, OnBadRow};
use glmddp::data::tokenize::{Limits, SampleMaker, render};
use glmddp::data::{Alone, Encode, Example, RowOrigin, Sample};
use glmddp::tokenizer::GlmTokenizer;
use serde_json::Value;

use crate::support::shared;

struct Glm(GlmTokenizer);

impl Encode for Glm {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.0.encode(text).map_err(|e| e.to_string())
    }

    fn prompt_prefix(&self) -> Vec<u32> {
        self.0.prompt_prefix().to_vec()
    }

    fn eos(&self) -> u32 {
        self.0.eos()
    }

    fn identity(&self) -> String {
        self.0.sha256().to_owned()
    }
}

fn tokenizer() -> Option<Glm> {
    Some(Glm(GlmTokenizer::from_file(&shared("chatglm2/tokenizer.model")?).unwrap()))
}

fn golden(name: &str) -> Option<Value> {
    Some(serde_json::from_slice(&std::fs::read(shared("golden/tokenizer")?.join(name)).unwrap()).unwrap())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn history(value: &Value) -> Vec<(String, String)> {
    value.as_array().into_iter().flatten().map(|round| (text(&round[0]), text(&round[1]))).collect()
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect()
}

fn example(prompt: &Value, response: &Value, history: Vec<(String, String)>) -> Example {
    let origin = RowOrigin { file: Arc::from(Path::new("golden")), row: 1 };
    Example { prompt: text(prompt), response: text(response), history, origin }
}

fn limits(source: &Value, target: &Value, truncation: Truncation) -> Limits {
    let length = |v: &Value| v.as_u64().unwrap() as usize;
    Limits { max_source_length: length(source), max_target_length: length(target), truncation }
}

/// The published row without its padding.
fn published(row: &Value) -> Sample {
    let num_real = row["n_real"].as_u64().unwrap() as usize;
    let (ids, labels) = (numbers(&row["input_ids"]), numbers(&row["labels"]));
    assert!(labels[num_real..].iter().all(|&l| l == -100));
    for (id, label) in ids.iter().zip(&labels) {
        assert!(*label == -100 || label == id);
    }
    Sample {
        ids: ids[..num_real].iter().map(|&id| id as u32).collect(),
        is_target: labels[..num_real].iter().map(|&label| label != -100).collect(),
    }
}

#[test]
fn prompts_of_dialogues_equal_the_published_ones() {
    let (Some(tokenizer), Some(golden)) = (tokenizer(), golden("prompts.json")) else { return };
    let cases = golden.as_array().unwrap();
    for case in cases {
        let prompt = build_prompt(case["query"].as_str().unwrap(), &history(&case["history"]));
        assert_eq!(prompt, text(&case["prompt"]));
        let ids: Vec<i64> = tokenizer.prompt_prefix().into_iter().chain(tokenizer.encode(&prompt).unwrap()).map(i64::from).collect();
        assert_eq!(ids, numbers(&case["ids"]), "{prompt}");
    }
    assert!(!cases.is_empty());
}

#[test]
fn samples_with_published_truncation_equal_the_published_ones() {
    let (Some(tokenizer), Some(golden)) = (tokenizer(), golden("samples.json")) else { return };
    let mut num_cut = 0;
    for (set, columns) in [(&golden, ["content", "summary"]), (&golden["chat"], ["prompt", "response"])] {
        let maker =
            |truncation| SampleMaker::new(&tokenizer, limits(&set["max_source_length"], &set["max_target_length"], truncation)).unwrap();
        let (as_published, ours) = (maker(Truncation::Published), maker(Truncation::KeepAnswerMark));
        for row in set["samples"].as_array().unwrap() {
            let example = example(&row[columns[0]], &row[columns[1]], history(&row["history"]));
            let made = as_published.make(&example).unwrap();
            assert_eq!(made.sample, published(row), "{}", example.prompt);
            assert_eq!(made.sample.as_ref().num_before_targets() as u64, row["n_prompt"].as_u64().unwrap());
            if made.prompt_cut {
                num_cut += 1;
            } else {
                assert_eq!(ours.make(&example).unwrap(), made, "both modes agree on a row that fits");
            }
        }
    }
    assert!(num_cut > 0, "no golden row is cut");
}

#[test]
fn prompts_cut_by_default_end_in_the_answer_mark_and_fill_the_limit() {
    let (Some(tokenizer), Some(golden)) = (tokenizer(), golden("samples.json")) else { return };
    let mut num_cut = 0;
    for max in [20, 33, 64] {
        let limits = Limits { max_source_length: max, max_target_length: 128, truncation: Truncation::KeepAnswerMark };
        let maker = SampleMaker::new(&tokenizer, limits).unwrap();
        for row in golden["samples"].as_array().unwrap() {
            let made = maker.make(&example(&row["content"], &row["summary"], Vec::new())).unwrap();
            let prompt = &made.sample.ids[..made.sample.as_ref().num_before_targets()];
            let shown = tokenizer.0.decode(prompt);
            assert!(shown.starts_with("[Round 1]\n\n问：类型#") && shown.ends_with("\n\n答："), "{shown}");
            assert!(prompt.len() <= max);
            if made.prompt_cut {
                num_cut += 1;
                assert_eq!(prompt.len(), max, "{shown}");
                assert_eq!(tokenizer.encode(&shown).unwrap(), prompt[2..], "the ids are those of the shorter text");
            }
        }
    }
    assert!(num_cut > 50, "{num_cut} rows were cut");
}

#[test]
fn advertisegen_file_loads_whole_with_the_known_token_counts() {
    let (Some(tokenizer), Some(file)) = (tokenizer(), shared("data/advertisegen/train.jsonl")) else { return };
    let request = LoadRequest {
        file,
        columns: Columns { prompt: "content".into(), input: None, response: "summary".into(), history: None },
        limits: Limits { max_source_length: 64, max_target_length: 128, truncation: Truncation::Published },
        on_bad_row: OnBadRow::Stop,
        max_samples: Some(2000),
        cache: None,
    };
    let (set, _) = load(&request, &tokenizer, &Alone).unwrap();
    let per_row = |n: usize| (n as f64 / set.num_samples() as f64).round();
    assert_eq!(set.num_samples(), 2000);
    assert_eq!((per_row(set.num_tokens()), per_row(set.num_targets())), (129., 78.), "REFERENCE: 51 prompt, 78 in the loss");
    let share = set.num_cut_prompts as f64 / 2000.;
    assert!((0.20..0.24).contains(&share), "REFERENCE: 22 % of the prompts are cut, here {share}");
    let whole = load(&LoadRequest { max_samples: None, ..request }, &tokenizer, &Alone).unwrap().0;
    assert_eq!((whole.num_samples(), whole.bad_rows.total), (4500, 0));
}

#[test]
fn dialogues_with_history_load_and_render() {
    let (Some(tokenizer), Some(file)) = (tokenizer(), shared("data/chat/oasst_zh.jsonl")) else { return };
    let request = LoadRequest {
        file,
        columns: Columns { prompt: "prompt".into(), input: None, response: "response".into(), history: Some("history".into()) },
        limits: Limits { max_source_length: 128, max_target_length: 64, truncation: Truncation::KeepAnswerMark },
        on_bad_row: OnBadRow::Stop,
        max_samples: None,
        cache: None,
    };
    let (set, _) = load(&request, &tokenizer, &Alone).unwrap();
    assert_eq!(set.num_samples(), 400);
    for sample in set.iter() {
        let prompt = tokenizer.0.decode(&sample.ids[..sample.num_before_targets()]);
        assert!(prompt.starts_with("[Round 1]\n\n问：") && prompt.ends_with("\n\n答：") && !prompt.contains('\u{fffd}'), "{prompt}");
        let answer = tokenizer.0.decode(&sample.ids[sample.num_before_targets()..sample.ids.len() - 1]);
        assert!(!answer.contains('\u{fffd}'), "{answer}");
    }
    let shown = render(set.sample(0), |ids| tokenizer.0.decode_with_special(ids));
    let first = set.sample(0);
    assert_eq!(shown.lines().count(), first.ids.len() + 1);
    assert!(shown.ends_with(&format!("{} in the loss (*)\n", first.num_targets())), "{shown}");
}
