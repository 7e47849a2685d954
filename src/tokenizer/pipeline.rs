//! White space on the way in and out, as SentencePiece does it: text gets one leading `▁` and its blanks become `▁`; decoding undoes both.

use tokenizers::{Decoder, NormalizedString, Normalizer};

use super::sp_model::{SPACE, byte_of_piece};

/// Adds the dummy prefix and escapes blanks; changes nothing else (no NFKC, no trimming).
#[derive(Clone, Copy, Debug, Default)]
pub struct SpNormalizer;

impl Normalizer for SpNormalizer {
    fn normalize(&self, normalized: &mut NormalizedString) -> tokenizers::Result<()> {
        if normalized.is_empty() {
            return Ok(());
        }
        let space = SPACE.to_string();
        normalized.replace(' ', &space)?;
        normalized.prepend(&space);
        Ok(())
    }
}

/// What [`SpNormalizer`] makes of a text.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 4 + SPACE.len_utf8());
    if !text.is_empty() {
        escaped.push(SPACE);
    }
    escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
    escaped
}

/// Joins pieces into text; an empty piece stands for an id that has no text.
#[derive(Clone, Copy, Debug, Default)]
pub struct SpDecoder;

impl Decoder for SpDecoder {
    fn decode_chain(&self, tokens: Vec<String>) -> tokenizers::Result<Vec<String>> {
        let mut joiner = Joiner::default();
        for token in &tokens {
            match byte_of_piece(token) {
                Some(byte) => joiner.byte(byte),
                None => joiner.piece(token),
            }
        }
        Ok(vec![joiner.finish()])
    }
}

/// Builds a text from pieces. Only the first piece loses its leading `▁`; a run of byte pieces is read as UTF-8, each byte that fits nowhere becomes U+FFFD.
#[derive(Default)]
pub(super) struct Joiner {
    text: String,
    bytes: Vec<u8>,
    /// A first piece with a leading `▁` was seen, or text.
    begun: bool,
}

impl Joiner {
    pub fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    /// A piece with `▁` for blanks; an empty one separates runs of bytes.
    pub fn piece(&mut self, piece: &str) {
        self.flush();
        self.begun |= !self.text.is_empty();
        let shown = if self.begun { piece } else { piece.strip_prefix(SPACE).unwrap_or(piece) };
        self.begun |= shown.len() < piece.len();
        self.text.extend(shown.chars().map(|c| if c == SPACE { ' ' } else { c }));
    }

    /// Text that is taken as it is.
    pub fn verbatim(&mut self, text: &str) {
        self.flush();
        self.text.push_str(text);
    }

    pub fn finish(mut self) -> String {
        self.flush();
        self.text
    }

    fn flush(&mut self) {
        let mut rest = self.bytes.as_slice();
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    self.text.push_str(valid);
                    break;
                }
                Err(error) => {
                    let (valid, invalid) = rest.split_at(error.valid_up_to());
                    self.text.push_str(&String::from_utf8_lossy(valid));
                    self.text.push(char::REPLACEMENT_CHARACTER);
                    rest = &invalid[1..];
                }
            }
        }
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalized(text: &str) -> String {
        let mut normalized = NormalizedString::from(text);
        SpNormalizer.normalize(&mut normalized).unwrap();
        assert_eq!(normalized.get(), escape(text));
        normalized.get().to_owned()
    }

    fn joined(pieces: &[&str]) -> String {
        SpDecoder.decode(pieces.iter().map(|&p| p.to_owned()).collect()).unwrap()
    }

    #[test]
    fn normalizer_adds_one_prefix_and_keeps_every_blank() {
        assert_eq!(normalized(""), "");
        assert_eq!(normalized(" "), "▁▁");
        assert_eq!(normalized("  a  b "), "▁▁▁a▁▁b▁");
        assert_eq!(normalized("Ａ\u{3000}①\n"), "▁Ａ\u{3000}①\n");
    }

    #[test]
    fn decoder_strips_the_first_piece_only() {
        assert_eq!(joined(&["▁a", "▁b"]), "a b");
        assert_eq!(joined(&["▁", "▁", "a"]), " a");
        assert_eq!(joined(&["", "▁", "", "▁", "a"]), " a");
        assert_eq!(joined(&["<0x41>", "▁b"]), "A b");
    }

    #[test]
    fn decoder_replaces_each_stray_byte() {
        assert_eq!(joined(&["<0xE4>", "<0xB8>", "<0x84>", "<0x0A>"]), "丄\n");
        assert_eq!(joined(&["▁", "<0xE4>", "<0xB8>"]), "\u{fffd}\u{fffd}");
        assert_eq!(joined(&["<0xE4>", "", "<0xB8>", "<0x84>"]), "\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(joined(&["<0xe4>", "<0x+1>"]), "<0xe4><0x+1>");
    }
}
