//! A SentencePiece model file: its pieces, and a check that its options are the ones we implement.
//!
//! Source: the field numbers and defaults of SentencePiece's published `sentencepiece_model.proto` (proto2).

use std::collections::HashSet;
use std::path::Path;

use super::error::TokenizerError;
use super::wire::{Fields, Value, WireError, Writer};

/// White space inside pieces is written as U+2581.
pub(super) const SPACE: char = '\u{2581}';
pub(super) const UNK: &str = "<unk>";
pub(super) const BOS: &str = "<s>";
pub(super) const EOS: &str = "</s>";
pub(super) const NUM_BYTES: usize = 256;

const MODEL_TYPE_BPE: u64 = 2;
const MODEL_TYPE_NAMES: [&str; 5] = ["0", "unigram", "bpe", "word", "char"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl PieceKind {
    fn from_code(code: u64) -> Option<Self> {
        Some(match code {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    fn code(self) -> u64 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    /// A merge with a higher score goes first; finite.
    pub score: f32,
    pub kind: PieceKind,
}

/// The pieces of a model that passed every check: texts are unique and not empty, all 256 bytes, one unknown piece and `</s>` are there.
#[derive(Clone, Debug)]
pub(super) struct SpModel {
    pub pieces: Vec<Piece>,
    pub unk: u32,
    pub eos: u32,
    /// Id of each byte's piece.
    pub bytes: Box<[u32; NUM_BYTES]>,
}

/// The name of a byte's piece: `<0x0A>`.
pub(super) fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The byte of such a name.
pub(super) fn byte_of_piece(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let well_formed = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    well_formed.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The options of the file that change what a text becomes, with protobuf's defaults.
struct Options {
    model_type: u64,
    byte_fallback: bool,
    whitespace_as_suffix: bool,
    normalizer: String,
    charsmap_bytes: usize,
    denormalizer_charsmap_bytes: usize,
    dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            model_type: 1,
            byte_fallback: false,
            whitespace_as_suffix: false,
            normalizer: String::new(),
            charsmap_bytes: 0,
            denormalizer_charsmap_bytes: 0,
            dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl SpModel {
    /// Reads and checks a file's bytes; `path` is for messages.
    ///
    /// # Errors
    /// Bytes that are not such a model, an option that we do not implement, or pieces that contradict each other.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        let not_sp = |reason: String| TokenizerError::NotSentencePiece { path: path.to_owned(), reason };
        if let Some(other) = recognise_other(bytes) {
            return Err(not_sp(other.to_owned()));
        }
        let mut pieces = Vec::new();
        let mut options = Options::default();
        let mut fields = Fields::new(bytes, 0);
        while let Some((number, value)) = fields.next_field().map_err(|e| not_sp(e.to_string()))? {
            let message = match (number, value) {
                (1..=3 | 5, Value::Bytes(message)) => message,
                (1..=3 | 5, _) => return Err(not_sp(format!("field {number} before byte {} is no message", fields.offset()))),
                _ => continue,
            };
            let base = fields.offset() - message.len();
            match number {
                1 => pieces.push(parse_piece(message, base).map_err(|e| not_sp(e.to_string()))?),
                2 => parse_trainer_spec(message, base, &mut options).map_err(|e| not_sp(e.to_string()))?,
                3 => parse_normalizer_spec(message, base, &mut options).map_err(|e| not_sp(e.to_string()))?,
                _ => options.denormalizer_charsmap_bytes = charsmap_bytes(message, base).map_err(|e| not_sp(e.to_string()))?,
            }
        }
        if pieces.is_empty() {
            return Err(not_sp("it has no pieces".to_owned()));
        }
        options.check(path)?;
        Self::from_pieces(pieces, path)
    }

    /// Checks the pieces and finds the ids that others need.
    pub fn from_pieces(pieces: Vec<Piece>, path: &Path) -> Result<Self, TokenizerError> {
        let bad = |id: usize, reason: String| TokenizerError::BadPiece { path: path.to_owned(), id, reason };
        let missing = |piece: String| TokenizerError::MissingPiece { path: path.to_owned(), piece };
        if u32::try_from(pieces.len()).is_err() {
            return Err(bad(pieces.len(), "is beyond the range of ids".to_owned()));
        }
        let mut seen = HashSet::with_capacity(pieces.len());
        let (mut unk, mut eos) = (None, None);
        let mut bytes = [None; NUM_BYTES];
        for (id, piece) in pieces.iter().enumerate() {
            if piece.text.is_empty() {
                return Err(bad(id, "is empty".to_owned()));
            }
            if !piece.score.is_finite() {
                return Err(bad(id, format!("has the score {}", piece.score)));
            }
            if !seen.insert(piece.text.as_str()) {
                return Err(bad(id, format!("`{}` is there twice", piece.text)));
            }
            match piece.kind {
                PieceKind::Unknown if unk.is_some() => return Err(bad(id, "is a second unknown piece".to_owned())),
                PieceKind::Unknown => unk = Some(id as u32),
                PieceKind::Control if piece.text == EOS => eos = Some(id as u32),
                PieceKind::Byte => {
                    let byte = byte_of_piece(&piece.text).ok_or_else(|| bad(id, format!("`{}` names no byte", piece.text)))?;
                    bytes[usize::from(byte)] = Some(id as u32);
                }
                _ => {}
            }
        }
        let mut byte_ids = Box::new([0; NUM_BYTES]);
        for (byte, id) in (0..=u8::MAX).zip(bytes) {
            byte_ids[usize::from(byte)] = id.ok_or_else(|| missing(byte_piece(byte)))?;
        }
        let unk = unk.ok_or_else(|| missing(UNK.to_owned()))?;
        let eos = eos.ok_or_else(|| missing(EOS.to_owned()))?;
        Ok(Self { unk, eos, bytes: byte_ids, pieces })
    }

    /// The file's bytes: what [`SpModel::parse`] and SentencePiece itself read.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = Writer::default();
        for piece in &self.pieces {
            let mut message = Writer::default();
            message.bytes_field(1, piece.text.as_bytes()).float_field(2, piece.score);
            if piece.kind != PieceKind::Normal {
                message.varint_field(3, piece.kind.code());
            }
            file.bytes_field(1, &message.finish());
        }
        let none = -1i64 as u64;
        let trainer_spec = Writer::default()
            .varint_field(3, MODEL_TYPE_BPE)
            .varint_field(4, self.pieces.len() as u64)
            .varint_field(24, 0)
            .varint_field(35, 1)
            .varint_field(40, u64::from(self.unk))
            .varint_field(41, 1)
            .varint_field(42, u64::from(self.eos))
            .varint_field(43, none)
            .bytes_field(45, UNK.as_bytes())
            .bytes_field(46, BOS.as_bytes())
            .bytes_field(47, EOS.as_bytes())
            .finish();
        let normalizer_spec = Writer::default()
            .bytes_field(1, b"identity")
            .bytes_field(2, b"")
            .varint_field(3, 1)
            .varint_field(4, 0)
            .varint_field(5, 1)
            .finish();
        file.bytes_field(2, &trainer_spec).bytes_field(3, &normalizer_spec).finish()
    }
}

/// Files that people take for a tokenizer.
fn recognise_other(bytes: &[u8]) -> Option<&'static str> {
    if bytes.is_empty() {
        Some("it is empty")
    } else if bytes.starts_with(b"version https://git-lfs") {
        Some("it is a Git LFS pointer")
    } else if bytes.trim_ascii_start().starts_with(b"{") {
        Some("it is JSON")
    } else if bytes.starts_with(b"PK\x03\x04") {
        Some("it is a zip archive")
    } else {
        None
    }
}

fn wrong_type(number: u32, fields: &Fields<'_>) -> WireError {
    WireError { offset: fields.offset(), reason: format!("field {number} has the wrong type") }
}

fn text(bytes: &[u8], fields: &Fields<'_>) -> Result<String, WireError> {
    let text =
        std::str::from_utf8(bytes).map_err(|_| WireError { offset: fields.offset(), reason: "text that is not UTF-8".to_owned() })?;
    Ok(text.to_owned())
}

fn parse_piece(message: &[u8], base: usize) -> Result<Piece, WireError> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    let mut fields = Fields::new(message, base);
    while let Some((number, value)) = fields.next_field()? {
        match (number, value) {
            (1, Value::Bytes(bytes)) => piece.text = text(bytes, &fields)?,
            (2, Value::Fixed32(bytes)) => piece.score = f32::from_le_bytes(bytes),
            (3, Value::Varint(code)) => {
                piece.kind = PieceKind::from_code(code)
                    .ok_or_else(|| WireError { offset: fields.offset(), reason: format!("unknown kind of piece {code}") })?;
            }
            (1..=3, _) => return Err(wrong_type(number, &fields)),
            _ => {}
        }
    }
    Ok(piece)
}

fn parse_trainer_spec(message: &[u8], base: usize, options: &mut Options) -> Result<(), WireError> {
    let mut fields = Fields::new(message, base);
    while let Some((number, value)) = fields.next_field()? {
        match (number, value) {
            (3, Value::Varint(code)) => options.model_type = code,
            (24, Value::Varint(flag)) => options.whitespace_as_suffix = flag != 0,
            (35, Value::Varint(flag)) => options.byte_fallback = flag != 0,
            (3 | 24 | 35, _) => return Err(wrong_type(number, &fields)),
            _ => {}
        }
    }
    Ok(())
}

fn parse_normalizer_spec(message: &[u8], base: usize, options: &mut Options) -> Result<(), WireError> {
    let mut fields = Fields::new(message, base);
    while let Some((number, value)) = fields.next_field()? {
        match (number, value) {
            (1, Value::Bytes(bytes)) => options.normalizer = text(bytes, &fields)?,
            (2, Value::Bytes(bytes)) => options.charsmap_bytes = bytes.len(),
            (3, Value::Varint(flag)) => options.dummy_prefix = flag != 0,
            (4, Value::Varint(flag)) => options.remove_extra_whitespaces = flag != 0,
            (5, Value::Varint(flag)) => options.escape_whitespaces = flag != 0,
            (1..=5, _) => return Err(wrong_type(number, &fields)),
            _ => {}
        }
    }
    Ok(())
}

fn charsmap_bytes(message: &[u8], base: usize) -> Result<usize, WireError> {
    let mut options = Options::default();
    parse_normalizer_spec(message, base, &mut options)?;
    Ok(options.charsmap_bytes)
}

impl Options {
    fn check(&self, path: &Path) -> Result<(), TokenizerError> {
        let model_type = usize::try_from(self.model_type).ok().and_then(|i| MODEL_TYPE_NAMES.get(i)).copied();
        let refused = |option, found: String, expected| Err(TokenizerError::Unsupported { path: path.to_owned(), option, found, expected });
        let flag = |option, found: bool, expected: bool| {
            if found == expected {
                return Ok(());
            }
            refused(option, found.to_string(), if expected { "true" } else { "false" })
        };
        if self.model_type != MODEL_TYPE_BPE {
            return refused("model_type", model_type.map_or_else(|| self.model_type.to_string(), str::to_owned), "bpe");
        }
        if self.charsmap_bytes > 0 || !matches!(self.normalizer.as_str(), "identity" | "") {
            return refused("normalizer", format!("`{}` with a table of {} bytes", self.normalizer, self.charsmap_bytes), "`identity`");
        }
        if self.denormalizer_charsmap_bytes > 0 {
            return refused("denormalizer", format!("a table of {} bytes", self.denormalizer_charsmap_bytes), "none");
        }
        flag("byte_fallback", self.byte_fallback, true)?;
        flag("add_dummy_prefix", self.dummy_prefix, true)?;
        flag("remove_extra_whitespaces", self.remove_extra_whitespaces, false)?;
        flag("escape_whitespaces", self.escape_whitespaces, true)?;
        flag("treat_whitespace_as_suffix", self.whitespace_as_suffix, false)
    }
}
