//! From an [`Example`] to a [`Sample`]: prompt, answer, end mark, and which of them are in the loss.

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::prompt::{Truncation, build_prompt, open_body, round_body, round_header};
use super::{Example, Sample, SampleRef};

/// Labels equal to this id are not targets, even in an answer (THUDM: `ignore_pad_token_for_loss`).
const PAD_ID: u32 = 0;

/// Guesses at the length of a cut before the search turns to halving.
const STRAIGHT_GUESSES: usize = 8;

/// The tokenizer, as far as data needs it.
pub trait Encode: Sync {
    /// Ids of `text` as plain text: no special id is added, none is recognized.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String>;
    /// Ids before every prompt: `[gMASK] sop`.
    fn prompt_prefix(&self) -> Vec<u32>;
    /// The id that ends an answer.
    fn eos(&self) -> u32;
    /// Hex sha256 of everything that decides the ids.
    fn identity(&self) -> String;
}

/// How long a row may become, and what is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Tokens of the prompt, `[gMASK] sop` included.
    pub max_source_length: usize,
    /// Tokens of the answer; eos comes on top.
    pub max_target_length: usize,
    pub truncation: Truncation,
}

/// A sample, and what had to be cut for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenized {
    pub sample: Sample,
    pub prompt_cut: bool,
    pub answer_cut: bool,
}

/// Makes samples of one tokenizer within given limits.
pub struct SampleMaker<'a> {
    tokenizer: &'a dyn Encode,
    limits: Limits,
    prefix: Vec<u32>,
}

impl<'a> SampleMaker<'a> {
    /// # Errors
    /// When a length is 0, or `max_source_length` cannot hold the template around one token of a question
    /// ([`Truncation::KeepAnswerMark`] only).
    pub fn new(tokenizer: &'a dyn Encode, limits: Limits) -> Result<Self, DataError> {
        for (key, value) in [("max_source_length", limits.max_source_length), ("max_target_length", limits.max_target_length)] {
            if value == 0 {
                return Err(DataError::Zero { key });
            }
        }
        let prefix = tokenizer.prompt_prefix();
        if limits.truncation == Truncation::KeepAnswerMark {
            let empty = tokenizer.encode(&build_prompt("", &[])).map_err(|message| DataError::Template { message })?;
            let needed = prefix.len() + empty.len();
            if needed >= limits.max_source_length {
                return Err(DataError::SourceTooShort { max_source_length: limits.max_source_length, needed });
            }
        }
        Ok(Self { tokenizer, limits, prefix })
    }

    /// # Errors
    /// What the tokenizer says.
    pub fn make(&self, example: &Example) -> Result<Tokenized, String> {
        let (mut ids, prompt_cut) = self.prompt(&example.prompt, &example.history)?;
        let (answer, answer_cut) = self.answer_ids(&example.response)?;
        let mut is_target = vec![false; ids.len()];
        ids.extend(answer);
        ids.push(self.tokenizer.eos());
        is_target.extend(ids[is_target.len()..].iter().map(|&id| id != PAD_ID));
        Ok(Tokenized { sample: Sample { ids, is_target }, prompt_cut, answer_cut })
    }

    /// The ids before an answer, and whether the text was cut for them.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn prompt(&self, query: &str, history: &[(String, String)]) -> Result<(Vec<u32>, bool), String> {
        let with_prefix = |text: Vec<u32>| self.prefix.iter().copied().chain(text).collect::<Vec<_>>();
        let max = self.limits.max_source_length;
        let room = max.saturating_sub(self.prefix.len());
        let mut ids = self.tokenizer.encode(&build_prompt(query, history))?;
        if ids.len() <= room {
            return Ok((with_prefix(ids), false));
        }
        if self.limits.truncation == Truncation::Published {
            let mut ids = with_prefix(ids);
            ids.truncate(max);
            return Ok((ids, true));
        }
        if !history.is_empty() {
            let kept;
            (kept, ids) = self.newest_rounds(query, history, room)?;
            if kept {
                return Ok((with_prefix(ids), true));
            }
        }
        let (_, ids) = longest_fit(query, ids.len(), room, |query| self.tokenizer.encode(&build_prompt(query, &[])))?;
        Ok((with_prefix(ids), true))
    }

    /// The ids of the prompt without the fewest oldest rounds, at least one, with which it has at most `room` ids, and whether there is
    /// such a prompt; if not, the ids without any round.
    ///
    /// The number of rounds is estimated from the rounds one by one, newest first, so that the work does not grow with the square of their
    /// number. No token of the published tokenizer stands in a header and its body at once, so that the estimate is exact; for any other
    /// the neighbours are tried.
    fn newest_rounds(&self, query: &str, history: &[(String, String)], room: usize) -> Result<(bool, Vec<u32>), String> {
        let encode_from = |oldest: usize| self.tokenizer.encode(&build_prompt(query, &history[oldest..]));
        let mut oldest = self.estimated_oldest(query, history, room)?;
        let mut ids = encode_from(oldest)?;
        while ids.len() > room && oldest < history.len() {
            oldest += 1;
            ids = encode_from(oldest)?;
        }
        if ids.len() > room {
            return Ok((false, ids));
        }
        while oldest > 1 {
            let more = encode_from(oldest - 1)?;
            if more.len() > room {
                break;
            }
            (oldest, ids) = (oldest - 1, more);
        }
        Ok((true, ids))
    }

    /// The first of the rounds that are kept if each has as many ids as it has alone; at least 1.
    fn estimated_oldest(&self, query: &str, history: &[(String, String)], room: usize) -> Result<usize, String> {
        let num_ids = |text: &str| self.tokenizer.encode(text).map(|ids| ids.len());
        let (bracket, line_break) = (num_ids("]")?, num_ids("\n")?);
        let num_body_ids = |body: String| Ok::<_, String>(num_ids(&format!("]{body}"))?.saturating_sub(bracket));
        let mut needed = num_ids(&round_header(1))? + num_body_ids(open_body(query))?;
        for (num_kept, (query, answer)) in (1..).zip(history[1..].iter().rev()) {
            // One more round gives the last one the next number.
            needed += num_ids(&format!("\n{}", round_header(num_kept + 1)))?.saturating_sub(line_break);
            needed += num_body_ids(round_body(query, answer))?;
            if needed > room {
                return Ok(history.len() + 1 - num_kept);
            }
        }
        Ok(1)
    }

    fn answer_ids(&self, answer: &str) -> Result<(Vec<u32>, bool), String> {
        let max = self.limits.max_target_length;
        let mut ids = self.tokenizer.encode(answer)?;
        if ids.len() <= max {
            return Ok((ids, false));
        }
        let num_ids = ids.len();
        ids.truncate(max);
        if self.limits.truncation == Truncation::Published {
            return Ok((ids, true));
        }
        // The same ids as published, unless they end inside a character that is written as several bytes.
        let (mut end, mut fit) = longest_fit(answer, num_ids, max, |text| self.tokenizer.encode(text))?;
        while !ids.starts_with(&fit) {
            end = answer[..end].char_indices().next_back().map_or(0, |(i, _)| i);
            fit = if end == 0 { Vec::new() } else { self.tokenizer.encode(&answer[..end])? };
        }
        Ok((fit, true))
    }
}

/// The longest beginning of `text`, in whole characters, whose ids are at most `max`: its length in bytes, and the ids. The whole text has
/// `num_ids`, more than `max`.
///
/// The ids are what the tokenizer makes of the shorter text, so they are what a user who typed it would give, and no character that takes
/// several ids is split.
fn longest_fit(
    text: &str,
    num_ids: usize,
    max: usize,
    encode: impl Fn(&str) -> Result<Vec<u32>, String>,
) -> Result<(usize, Vec<u32>), String> {
    let ends: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
    let mut best = encode("")?;
    let (mut fits, mut too_long, mut num_too_long) = (0, ends.len() - 1, num_ids);
    // Ids grow nearly evenly with characters: a few guesses on a straight line, then halving for texts where they do not.
    let mut guesses = 0;
    while fits + 1 < too_long {
        let span = too_long - fits;
        let step = if guesses < STRAIGHT_GUESSES { span * (max - best.len()) / (num_too_long - best.len()) } else { span / 2 };
        let middle = fits + step.clamp(1, span - 1);
        let ids = encode(&text[..ends[middle]])?;
        if ids.len() <= max {
            (fits, best) = (middle, ids);
        } else {
            (too_long, num_too_long) = (middle, ids.len());
        }
        guesses += 1;
    }
    Ok((ends[fits], best))
}

/// A sample for the eye: a line a token with its place, id, whether it is in the loss (`*`) and its text, then one line of counts.
pub fn render(sample: SampleRef<'_>, decode: impl Fn(&[u32]) -> String) -> String {
    let mut text = String::new();
    for (i, (&id, &target)) in sample.ids.iter().zip(sample.is_target).enumerate() {
        text.push_str(&format!("{i:>5} {id:>6} {} {}\n", if target { '*' } else { ' ' }, decode(&[id]).escape_debug()));
    }
    let targets = sample.num_targets();
    text.push_str(&format!("{} tokens, {} before the answer, {targets} in the loss (*)\n", sample.ids.len(), sample.num_before_targets()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::RowOrigin;
    use std::path::Path;
    use std::sync::Arc;

    /// A dummy prefix, an id a character below U+10000, four ids (bytes) for each of the others.
    struct Chars;

    impl Encode for Chars {
        fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
            let mut ids = vec![3];
            for c in text.chars() {
                match c as u32 {
                    c if c < 0x1_0000 => ids.push(c + 1000),
                    c => ids.extend(c.to_be_bytes().map(|b| 10 + u32::from(b))),
                }
            }
            Ok(if text.is_empty() { Vec::new() } else { ids })
        }

        fn prompt_prefix(&self) -> Vec<u32> {
            vec![7, 8]
        }

        fn eos(&self) -> u32 {
            2
        }

        fn identity(&self) -> String {
            "chars".into()
        }
    }

    fn text(ids: &[u32]) -> String {
        let bytes: Vec<u32> = ids.iter().copied().filter(|&id| (10..1000).contains(&id)).collect();
        assert!(bytes.len().is_multiple_of(4), "a character was split: {ids:?}");
        ids.iter().filter(|&&id| id >= 1000).filter_map(|&id| char::from_u32(id - 1000)).collect()
    }

    fn example(prompt: &str, response: &str, history: &[(&str, &str)]) -> Example {
        let history = history.iter().map(|&(q, a)| (q.to_owned(), a.to_owned())).collect();
        let origin = RowOrigin { file: Arc::from(Path::new("x")), row: 1 };
        Example { prompt: prompt.into(), response: response.into(), history, origin }
    }

    fn make(truncation: Truncation, source: usize, target: usize, example: &Example) -> Tokenized {
        let limits = Limits { max_source_length: source, max_target_length: target, truncation };
        SampleMaker::new(&Chars, limits).unwrap().make(example).unwrap()
    }

    fn prompt_of(t: &Tokenized) -> &[u32] {
        &t.sample.ids[..t.sample.is_target.iter().position(|&x| x).unwrap()]
    }

    #[test]
    fn short_row_is_prefix_prompt_answer_eos_with_loss_on_the_last_two() {
        let t = make(Truncation::KeepAnswerMark, 64, 8, &example("甲", "乙", &[]));
        assert_eq!(text(&t.sample.ids), "[Round 1]\n\n问：甲\n\n答：乙");
        assert_eq!(t.sample.ids.last(), Some(&2));
        assert_eq!(t.sample.num_targets(), 3, "dummy prefix, answer, eos");
        assert!(!t.prompt_cut && !t.answer_cut);
    }

    #[test]
    fn long_query_keeps_the_answer_mark_and_fills_the_limit_exactly() {
        let query: String = ('一'..='丰').collect();
        for max in 21..60 {
            let t = make(Truncation::KeepAnswerMark, max, 8, &example(&query, "乙", &[]));
            let full = text(prompt_of(&t));
            assert!(full.ends_with("\n\n答："), "{full}");
            assert_eq!(prompt_of(&t).len(), max.min(2 + 1 + 18 + query.chars().count() - 1), "max {max}: {full}");
        }
    }

    #[test]
    fn long_query_of_byte_characters_is_never_split_inside_one() {
        let query = "😀".repeat(30);
        for max in 21..60 {
            let t = make(Truncation::KeepAnswerMark, max, 8, &example(&query, "乙", &[]));
            assert!(text(prompt_of(&t)).ends_with("\n\n答："));
            assert!(max - prompt_of(&t).len() < 4, "max {max}, used {}", prompt_of(&t).len());
        }
    }

    #[test]
    fn long_history_loses_its_oldest_rounds_before_the_query() {
        let e = example("丙丙", "丁", &[("甲甲甲甲甲甲", "一"), ("乙乙", "二")]);
        let t = make(Truncation::KeepAnswerMark, 50, 8, &e);
        assert_eq!(text(prompt_of(&t)), "[Round 1]\n\n问：乙乙\n\n答：二\n\n[Round 2]\n\n问：丙丙\n\n答：");
        let t = make(Truncation::KeepAnswerMark, 21, 8, &e);
        assert_eq!(text(prompt_of(&t)), "[Round 1]\n\n问：丙\n\n答：");
    }

    #[test]
    fn published_cut_loses_the_end_of_the_prompt() {
        let t = make(Truncation::Published, 10, 8, &example("甲乙丙丁", "乙", &[]));
        assert_eq!(text(prompt_of(&t)), "[Round ");
        assert!(t.prompt_cut);
    }

    #[test]
    fn long_answer_is_cut_before_eos_and_only_published_splits_a_character() {
        let e = example("甲", "一二😀三四五六", &[]);
        let answer = |truncation| {
            let t = make(truncation, 64, 5, &e);
            assert!(t.answer_cut);
            t.sample.ids[prompt_of(&t).len()..].to_vec()
        };
        assert_eq!(answer(Truncation::Published), [3, '一' as u32 + 1000, '二' as u32 + 1000, 10, 11, 2]);
        assert_eq!(answer(Truncation::KeepAnswerMark), [3, '一' as u32 + 1000, '二' as u32 + 1000, 2]);
    }

    #[test]
    fn pad_id_in_an_answer_is_no_target() {
        struct Pads;
        impl Encode for Pads {
            fn encode(&self, _: &str) -> Result<Vec<u32>, String> {
                Ok(vec![5, 0, 6])
            }
            fn prompt_prefix(&self) -> Vec<u32> {
                Vec::new()
            }
            fn eos(&self) -> u32 {
                2
            }
            fn identity(&self) -> String {
                String::new()
            }
        }
        let limits = Limits { max_source_length: 8, max_target_length: 8, truncation: Truncation::Published };
        let sample = SampleMaker::new(&Pads, limits).unwrap().make(&example("a", "b", &[])).unwrap().sample;
        assert_eq!(sample.ids, [5, 0, 6, 5, 0, 6, 2]);
        assert_eq!(sample.is_target, [false, false, false, true, false, true, true]);
    }

    #[test]
    fn limit_without_room_for_the_template_is_refused_with_a_length_that_works() {
        let limits = |max| Limits { max_source_length: max, max_target_length: 8, truncation: Truncation::KeepAnswerMark };
        let error = SampleMaker::new(&Chars, limits(10)).err().unwrap();
        let DataError::SourceTooShort { needed, .. } = error else { panic!("{error}") };
        assert!(SampleMaker::new(&Chars, limits(needed)).is_err() && SampleMaker::new(&Chars, limits(needed + 1)).is_ok());
    }

    #[test]
    fn rendered_sample_marks_what_is_in_the_loss() {
        let sample = Sample { ids: vec![7, 1010, 2], is_target: vec![false, false, true] };
        let shown = render(sample.as_ref(), |ids| char::from_u32(ids[0].saturating_sub(1000)).unwrap().to_string());
        assert_eq!(shown, "    0      7   \\0\n    1   1010   \\n\n    2      2 * \\0\n3 tokens, 2 before the answer, 1 in the loss (*)\n");
    }
}
