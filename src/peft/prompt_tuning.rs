//! Prompt tuning.

use serde::{Deserialize, Serialize};

/// What soft tokens start as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInit {
    /// N(0, 1): PEFT's RANDOM.
    Random,
    /// Rows of the word embedding: PEFT's SAMPLE_VOCAB.
    Vocab,
}
