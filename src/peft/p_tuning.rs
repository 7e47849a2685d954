//! P-tuning.

use serde::{Deserialize, Serialize};

/// What computes the soft tokens, under PEFT's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EncoderKind {
    Mlp,
    Lstm,
}
