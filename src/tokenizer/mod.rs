//! From text to token ids and back: a SentencePiece `tokenizer.model` inside the `tokenizers` crate.
//!
//! The file's protobuf is read by hand (`wire`, `sp_model`); `bpe` is SentencePiece's merge loop as a `tokenizers` model; `pipeline` holds the
//! white space rules of both directions; `glm` adds ChatGLM's special ids, which exist as ids only and never as text; `train` makes small models.
//!
//! What is absent on purpose: unigram models and text normalisation (NFKC). Such a file is refused by name.

mod bpe;
mod error;
mod glm;
mod pipeline;
mod sp_model;
mod train;
mod train_merges;
mod wire;

pub use bpe::SpBpe;
pub use error::TokenizerError;
pub use glm::{GlmTokenizer, RoleIds, SpPipeline};
pub use pipeline::{SpDecoder, SpNormalizer};
pub use train::{SpBpeTrainer, train_filled, train_small};
