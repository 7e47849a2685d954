//! What can be wrong with a tokenizer.

use std::ops::RangeInclusive;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read the tokenizer {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not a file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} has {len} bytes, a tokenizer has at most {limit}", path.display())]
    TooLarge { path: PathBuf, len: u64, limit: u64 },
    #[error("{} is not a SentencePiece model: {reason}", path.display())]
    NotSentencePiece { path: PathBuf, reason: String },
    #[error("{}: piece {id} {reason}", path.display())]
    BadPiece { path: PathBuf, id: usize, reason: String },
    #[error("{}: `{option}` is {found}, expected {expected}", path.display())]
    Unsupported { path: PathBuf, option: &'static str, found: String, expected: &'static str },
    #[error("{}: the piece {piece} is missing", path.display())]
    MissingPiece { path: PathBuf, piece: String },
    #[error("the tokenizer {} has {tokenizer} ids, the model's embedding has {model} rows (`padded_vocab_size`)", path.display())]
    OtherVocabulary { path: PathBuf, tokenizer: usize, model: usize },
    #[error("the tokenizer {} has {ids} ids, the vocabulary of preset {preset} takes {} to {}", path.display(), fitting.start(), fitting.end())]
    OtherPreset { path: PathBuf, ids: usize, preset: String, fitting: RangeInclusive<usize> },
    #[error("cannot tokenize a text of {bytes} bytes: {reason}")]
    Encode { bytes: usize, reason: String },
}

impl TokenizerError {
    /// What to do about it, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NotAFile { .. } => "name the file itself: `tokenizer.model` of the model's folder",
            Self::TooLarge { .. } => "are these the weights? the tokenizer is `tokenizer.model`",
            Self::NotSentencePiece { reason, .. } if reason.contains("Git LFS") => "fetch the real file with `git lfs pull`",
            Self::NotSentencePiece { reason, .. } if reason.contains("JSON") => {
                "use `tokenizer.model` of the same folder, not `tokenizer.json` or `tokenizer_config.json`"
            }
            Self::NotSentencePiece { .. } | Self::BadPiece { .. } | Self::MissingPiece { .. } => {
                "the file may be cut off or of another model: download `tokenizer.model` again and compare its sha256"
            }
            Self::Unsupported { .. } => "glmddp reads the tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2",
            Self::OtherVocabulary { .. } => "use the `tokenizer.model` that lies beside the model's config.json",
            Self::OtherPreset { .. } => {
                "leave `--tokenizer` out, or take a preset whose vocabulary follows from the tokenizer: tiny or small"
            }
            Self::Io { .. } | Self::Encode { .. } => return None,
        };
        Some(hint.to_owned())
    }
}
