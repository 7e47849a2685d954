//! ChatGLM2's prompt template, as the published tokenizer's `build_prompt` has it.

use serde::{Deserialize, Serialize};

/// What happens to a prompt that is longer than `max_source_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// Cut inside the user's text (oldest history first), never the closing `答：`.
    KeepAnswerMark,
    /// Cut the end of the prompt, `答：` included, as the published code does.
    Published,
}

/// The text before the answer: earlier rounds, then `query` with an open `答：`. Rounds count from 1.
pub fn build_prompt(query: &str, history: &[(String, String)]) -> String {
    let mut text = String::new();
    for (i, (query, answer)) in history.iter().enumerate() {
        text.push_str(&round_header(i + 1));
        text.push_str(&round_body(query, answer));
    }
    text.push_str(&round_header(history.len() + 1));
    text.push_str(&open_body(query));
    text
}

/// How round `n` begins.
pub(super) fn round_header(n: usize) -> String {
    format!("[Round {n}]")
}

/// What stands behind the header of an earlier round, up to the next header.
pub(super) fn round_body(query: &str, answer: &str) -> String {
    format!("\n\n问：{query}\n\n答：{answer}\n\n")
}

/// What stands behind the header of the last round.
pub(super) fn open_body(query: &str) -> String {
    format!("\n\n问：{query}\n\n答：")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_with_history_counts_rounds_from_one_and_ends_open() {
        let history = [("甲".to_owned(), "乙".to_owned())];
        assert_eq!(build_prompt("丙", &history), "[Round 1]\n\n问：甲\n\n答：乙\n\n[Round 2]\n\n问：丙\n\n答：");
        assert_eq!(build_prompt("丙", &[]), "[Round 1]\n\n问：丙\n\n答：");
    }
}
