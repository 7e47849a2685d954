//! ChatGLM's tokenizer: SentencePiece pieces, then special ids that are in no file.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use tokenizers::{PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl};

use super::bpe::SpBpe;
use super::error::TokenizerError;
use super::pipeline::{Joiner, SpDecoder, SpNormalizer, escape};
use super::sp_model::{PieceKind, SpModel, byte_of_piece};
use crate::digest::sha256_hex;

/// Words of the ids behind the last piece, in their order: ChatGLM2's five, then ChatGLM3's four roles.
const SPECIAL_WORDS: [&str; 9] =
    ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"];
const NUM_SPECIAL: usize = 5;
/// A larger file is no tokenizer: ChatGLM's has 1 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Embeddings are padded to a multiple of 128 times the tensor-parallel degree: 65,024 rows for ChatGLM2's 64,794 ids. More slack is another vocabulary.
const MAX_PADDING_ROWS: usize = 1024;

/// Normalizer, model and decoder in the `tokenizers` crate.
pub type SpPipeline = TokenizerImpl<SpBpe, SpNormalizer, PreTokenizerWrapper, PostProcessorWrapper, SpDecoder>;

/// ChatGLM3's roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoleIds {
    pub system: u32,
    pub user: u32,
    pub assistant: u32,
    pub observation: u32,
}

/// Text to ids and back. Special ids never come from text: `</s>` and `[gMASK]` in a text are plain characters.
#[derive(Debug, Clone)]
pub struct GlmTokenizer {
    pipeline: SpPipeline,
    path: PathBuf,
    sha256: String,
}

impl GlmTokenizer {
    /// Reads a `tokenizer.model`.
    ///
    /// # Errors
    /// No such file, a folder, a file that is no SentencePiece model, or one of another kind than ChatGLM's (unigram, normalizing, without byte fallback).
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let io = |source| TokenizerError::Io { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(io)?;
        if !metadata.is_file() {
            return Err(TokenizerError::NotAFile { path: path.to_owned() });
        }
        if metadata.len() > MAX_FILE_BYTES {
            return Err(TokenizerError::TooLarge { path: path.to_owned(), len: metadata.len(), limit: MAX_FILE_BYTES });
        }
        Self::from_bytes(&std::fs::read(path).map_err(io)?, path)
    }

    /// Reads the bytes of such a file; `path` is for messages.
    ///
    /// # Errors
    /// As [`GlmTokenizer::from_file`].
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        let model = SpBpe::new(SpModel::parse(bytes, path)?);
        let mut pipeline = SpPipeline::new(model);
        pipeline
            .with_normalizer(Some(SpNormalizer))
            .map_err(|e| TokenizerError::NotSentencePiece { path: path.to_owned(), reason: e.to_string() })?;
        pipeline.with_decoder(Some(SpDecoder));
        let sha256 = sha256_hex(bytes);
        Ok(Self { pipeline, path: path.to_owned(), sha256 })
    }

    /// The text's own ids, without any special id. An empty text has none. The same ids as [`GlmTokenizer::pipeline`]'s, without its offsets and strings.
    ///
    /// # Errors
    /// A text of 4 GiB or more.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        let encoded = self.pipeline.get_model().segment(&escape(text), |id, _| ids.push(id));
        encoded.map_err(|reason| TokenizerError::Encode { bytes: text.len(), reason: reason.to_owned() })?;
        Ok(ids)
    }

    /// The text of `ids`; special ids, `<unk>`, `<s>`, `</s>` and ids beyond the vocabulary (padding rows of the embedding) have none.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut joiner = Joiner::default();
        for &id in ids {
            self.join(&mut joiner, id, "");
        }
        joiner.finish()
    }

    /// As [`GlmTokenizer::decode`], with special ids as their words (`[gMASK]sop`, `</s>`) and ids beyond the vocabulary as `<|id 65000|>`.
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        let mut joiner = Joiner::default();
        for &id in ids {
            match self.piece(id) {
                Some(word) => self.join(&mut joiner, id, word),
                None => joiner.verbatim(&format!("<|id {id}|>")),
            }
        }
        joiner.finish()
    }

    fn join(&self, joiner: &mut Joiner, id: u32, special: &str) {
        match self.pieces().get(id as usize) {
            Some(piece) if piece.kind == PieceKind::Byte => match byte_of_piece(&piece.text) {
                Some(byte) => joiner.byte(byte),
                None => joiner.piece(&piece.text),
            },
            Some(piece) if !matches!(piece.kind, PieceKind::Control | PieceKind::Unknown) => joiner.piece(&piece.text),
            _ => joiner.verbatim(special),
        }
    }

    /// What a prompt starts with: `[gMASK] sop`.
    pub fn prompt_prefix(&self) -> [u32; 2] {
        [self.gmask(), self.sop()]
    }

    pub fn mask(&self) -> u32 {
        self.special(0)
    }

    pub fn gmask(&self) -> u32 {
        self.special(1)
    }

    pub fn smask(&self) -> u32 {
        self.special(2)
    }

    pub fn sop(&self) -> u32 {
        self.special(3)
    }

    pub fn eop(&self) -> u32 {
        self.special(4)
    }

    /// ChatGLM3's role ids; not part of [`GlmTokenizer::vocab_size`].
    pub fn role_ids(&self) -> RoleIds {
        RoleIds { system: self.special(5), user: self.special(6), assistant: self.special(7), observation: self.special(8) }
    }

    /// `</s>`: ends an answer.
    pub fn eos(&self) -> u32 {
        self.pipeline.get_model().sp_model().eos
    }

    /// `<unk>`, which ChatGLM pads with; no text yields it.
    pub fn pad(&self) -> u32 {
        self.pipeline.get_model().sp_model().unk
    }

    fn special(&self, index: u32) -> u32 {
        self.num_pieces() as u32 + index
    }

    fn pieces(&self) -> &[super::sp_model::Piece] {
        self.pipeline.get_model().pieces()
    }

    /// Pieces in the file.
    pub fn num_pieces(&self) -> usize {
        self.pieces().len()
    }

    /// Pieces and ChatGLM2's five special ids.
    pub fn vocab_size(&self) -> usize {
        self.num_pieces() + NUM_SPECIAL
    }

    /// The piece or special word of an id, with `▁` for a blank.
    pub fn piece(&self, id: u32) -> Option<&str> {
        let index = id as usize;
        match self.pieces().get(index) {
            Some(piece) => Some(&piece.text),
            None => SPECIAL_WORDS.get(index - self.num_pieces()).copied(),
        }
    }

    /// Of the file's bytes, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The file that this was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The `tokenizers` pipeline: normalizer, model and decoder.
    pub fn pipeline(&self) -> &SpPipeline {
        &self.pipeline
    }

    /// Checks that this is the tokenizer of a model with so many embedding rows.
    ///
    /// # Errors
    /// Ids without a row, or so many rows without an id that the model must have another vocabulary.
    pub fn check_fits(&self, padded_vocab_size: usize) -> Result<(), TokenizerError> {
        if Self::fitting_ids(padded_vocab_size).contains(&self.vocab_size()) {
            return Ok(());
        }
        Err(TokenizerError::OtherVocabulary { path: self.path.clone(), tokenizer: self.vocab_size(), model: padded_vocab_size })
    }

    /// How many ids the tokenizer of a model with `padded_vocab_size` embedding rows may have.
    pub fn fitting_ids(padded_vocab_size: usize) -> RangeInclusive<usize> {
        padded_vocab_size.saturating_sub(MAX_PADDING_ROWS - 1)..=padded_vocab_size
    }
}

#[cfg(test)]
#[path = "glm_tests.rs"]
mod tests;
