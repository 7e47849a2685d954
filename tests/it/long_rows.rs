//! Long rows cost work in proportion to their length, and give the same tokens as a search that tries every cut.

use std::sync::atomic::{AtomicUsize, Ordering};

use glmddp::data::Encode;
use glmddp::data::prompt::{Truncation, build_prompt};
use glmddp::data::tokenize::{Limits, SampleMaker};
use glmddp::tokenizer::{GlmTokenizer, train_small};
use glmddp::train::adapters::Tokenizer;

use crate::row_support::Chars;
use crate::support::shared;

type Rounds = Vec<(String, String)>;

/// Counts the characters that are tokenized.
struct Counting<'a>(&'a dyn Encode, AtomicUsize);

impl Encode for Counting<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.1.fetch_add(text.chars().count(), Ordering::Relaxed);
        self.0.encode(text)
    }

    fn prompt_prefix(&self) -> Vec<u32> {
        self.0.prompt_prefix()
    }

    fn eos(&self) -> u32 {
        self.0.eos()
    }

    fn identity(&self) -> String {
        self.0.identity()
    }
}

fn maker(tokenizer: &dyn Encode, max_source_length: usize) -> SampleMaker<'_> {
    let limits = Limits { max_source_length, max_target_length: 16, truncation: Truncation::KeepAnswerMark };
    SampleMaker::new(tokenizer, limits).unwrap()
}

/// A small tokenizer, and the published one where it is there.
fn tokenizers() -> Vec<GlmTokenizer> {
    let corpus =
        ["[Round 1]\n\n问：今天天气怎么样\n\n答：很好 a white skirt", "[Round 12]\n\n问：12 and 3]\n\n答：]]\n[[ 15"].map(str::to_owned);
    let small = GlmTokenizer::from_bytes(&train_small(&corpus, 600), std::path::Path::new("small")).unwrap();
    let published = shared("chatglm2/tokenizer.model").map(|path| GlmTokenizer::from_file(&path).unwrap());
    std::iter::once(small).chain(published).collect()
}

/// A different text for each `seed`, with what could join the template's tokens.
fn text(seed: &mut u64, max_words: u64) -> String {
    const WORDS: [&str; 16] =
        ["天气", "好", "a", " white", "skirt ", "\n", "\n\n", "]", "[", "[Round 2]", "问：", "答：", "12", "😀", "  ", "。"];
    let mut next = |n: u64| {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) % n
    };
    (0..next(max_words)).map(|_| WORDS[next(16) as usize]).collect()
}

#[test]
fn long_history_keeps_the_rounds_that_a_search_over_every_cut_keeps() {
    for tokenizer in tokenizers() {
        let tokenizer = Tokenizer(&tokenizer);
        let mut seed = 7;
        let (mut num_shortened, mut num_without) = (0, 0);
        for case in 0..300 {
            let history: Rounds = (0..case % 14).map(|_| (text(&mut seed, 12), text(&mut seed, 20))).collect();
            let query = text(&mut seed, 16);
            let max = 24 + (case * 37) % 300;
            let maker = maker(&tokenizer, max);
            let room = max - 2;
            let every_cut = (0..=history.len()).find_map(|oldest| {
                let ids = tokenizer.encode(&build_prompt(&query, &history[oldest..])).unwrap();
                (ids.len() <= room).then_some((ids, oldest))
            });
            let (found, is_cut) = maker.prompt(&query, &history).unwrap();
            match every_cut {
                Some((ids, oldest)) => {
                    assert_eq!((&found[2..], is_cut), (ids.as_slice(), oldest > 0), "case {case}");
                    num_shortened += usize::from(oldest > 0);
                }
                None => {
                    assert_eq!((found, is_cut), maker.prompt(&query, &[]).unwrap(), "case {case}");
                    num_without += 1;
                }
            }
        }
        assert!(num_shortened > 100 && num_without > 5, "{num_shortened} {num_without}");
    }
}

#[test]
fn work_on_a_history_grows_with_its_length_and_not_with_its_square() {
    for tokenizer in tokenizers() {
        let (real, chars) = (Tokenizer(&tokenizer), Chars);
        for tokenizer in [&real as &dyn Encode, &chars] {
            for num_rounds in [10, 300, 3000] {
                let history: Rounds = (0..num_rounds).map(|i| (format!("问题{i} is it\n"), format!("回答{i}。"))).collect();
                let whole = build_prompt("今天怎么样", &history).chars().count();
                for max in [64, 1024, 20_000] {
                    let counting = Counting(tokenizer, AtomicUsize::new(0));
                    let maker = maker(&counting, max);
                    maker.prompt("今天怎么样", &history).unwrap();
                    let work = counting.1.into_inner();
                    assert!(work < 5 * whole + 200, "{num_rounds} rounds, {max} tokens: {work} characters tokenized of {whole}");
                }
            }
        }
    }
}

#[test]
fn work_on_a_long_question_or_answer_grows_with_its_length() {
    for tokenizer in tokenizers() {
        let tokenizer = Tokenizer(&tokenizer);
        for length in [1_000, 100_000] {
            for word in ["天", "a", "a b ", "\n", "😀"] {
                let long = word.repeat(length / word.chars().count());
                let counting = Counting(&tokenizer, AtomicUsize::new(0));
                let maker = maker(&counting, 64);
                let history = vec![("q".to_owned(), long.clone()), (long.clone(), "a".to_owned())];
                maker.prompt(&long, &history).unwrap();
                let work = counting.1.into_inner();
                assert!(work < 8 * 3 * length + 2000, "{word:?} {length}: {work} characters tokenized");
            }
        }
    }
}
