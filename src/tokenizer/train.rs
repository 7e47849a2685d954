//! Makes a small `tokenizer.model` of our own from a corpus, in the layout of ChatGLM's: `<unk>`, `<s>`, `</s>`, the 256 bytes, then merged pieces and single
//! characters whose score is minus their rank.

use std::collections::HashSet;
use std::path::Path;

use tokenizers::{AddedToken, Trainer};

use super::bpe::SpBpe;
use super::pipeline::escape;
use super::sp_model::{BOS, EOS, Piece, PieceKind, SpModel, UNK, byte_piece};
use super::train_merges::{Words, learn};

/// `<unk>`, `<s>`, `</s>` and the bytes.
const NUM_RESERVED: usize = 259;

/// Learns at most `vocab_pieces` pieces from `corpus` and returns the bytes of a `tokenizer.model`. The same corpus gives the same bytes; fewer pieces come out
/// of a corpus that has no more pairs to merge, and never fewer than the 259 reserved ones and `▁`.
pub fn train_small(corpus: &[String], vocab_pieces: usize) -> Vec<u8> {
    to_bytes(learnt_pieces(corpus, vocab_pieces))
}

/// As [`train_small`], then further single characters until there are `num_pieces`: for a model whose vocabulary is larger than what the
/// corpus teaches. The characters go by Unicode blocks (CJK, its extension A, Hangul, extension B: 81,472 of them), so that a text in
/// Chinese or Korean has at most one token a character.
pub fn train_filled(corpus: &[String], vocab_pieces: usize, num_pieces: usize) -> Vec<u8> {
    let mut pieces = learnt_pieces(corpus, vocab_pieces);
    let known: HashSet<String> = pieces.iter().map(|piece| piece.text.clone()).collect();
    let blocks = ['\u{4e00}'..='\u{9fff}', '\u{3400}'..='\u{4dbf}', '\u{ac00}'..='\u{d7a3}', '\u{20000}'..='\u{2a6df}'];
    let further = blocks.into_iter().flatten().map(String::from).filter(|text| !known.contains(text));
    for text in further.take(num_pieces.saturating_sub(pieces.len())) {
        let rank = pieces.len() - NUM_RESERVED;
        pieces.push(Piece { text, score: -(rank as f32), kind: PieceKind::Normal });
    }
    to_bytes(pieces)
}

fn to_bytes(pieces: Vec<Piece>) -> Vec<u8> {
    SpModel { pieces, unk: 0, eos: 2, bytes: Box::new(std::array::from_fn(|byte| byte as u32 + 3)) }.to_bytes()
}

fn learnt_pieces(corpus: &[String], vocab_pieces: usize) -> Vec<Piece> {
    let mut words = Words::default();
    for text in corpus {
        words.add(&escape(text));
    }
    pieces(&words, vocab_pieces)
}

fn pieces(words: &Words, vocab_pieces: usize) -> Vec<Piece> {
    let reserved = |text: &str, kind| Piece { text: text.to_owned(), score: 0.0, kind };
    let mut pieces = vec![reserved(UNK, PieceKind::Unknown), reserved(BOS, PieceKind::Control), reserved(EOS, PieceKind::Control)];
    pieces.extend((0..=u8::MAX).map(|byte| reserved(&byte_piece(byte), PieceKind::Byte)));
    let learnt = learn(words, vocab_pieces.saturating_sub(NUM_RESERVED).max(1));
    pieces.extend(learnt.into_iter().enumerate().map(|(rank, text)| Piece { text, score: -(rank as f32), kind: PieceKind::Normal }));
    pieces
}

/// The same training behind the `tokenizers` crate's interface.
#[derive(Clone, Debug)]
pub struct SpBpeTrainer {
    vocab_pieces: usize,
    words: Words,
}

impl SpBpeTrainer {
    pub fn new(vocab_pieces: usize) -> Self {
        Self { vocab_pieces, words: Words::default() }
    }
}

impl Trainer for SpBpeTrainer {
    type Model = SpBpe;

    fn should_show_progress(&self) -> bool {
        false
    }

    fn train(&self, model: &mut SpBpe) -> tokenizers::Result<Vec<AddedToken>> {
        *model = SpBpe::new(SpModel::from_pieces(pieces(&self.words, self.vocab_pieces), Path::new("trained model"))?);
        Ok(Vec::new())
    }

    fn feed<I, S, F>(&mut self, iterator: I, process: F) -> tokenizers::Result<()>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
        F: Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
    {
        for text in iterator {
            for normalized in process(text.as_ref())? {
                self.words.add(&normalized);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::Model;

    use super::super::GlmTokenizer;
    use super::*;

    fn corpus() -> Vec<String> {
        let lines =
            ["类型#裙*颜色#白色", "这条白色的裙子，简约大方。", "a white skirt, a white shirt", "白色的裙子  很好", "tab\tand\nnewline"];
        lines.iter().chain(&lines).map(|&line| line.to_owned()).collect()
    }

    fn trained(vocab_pieces: usize) -> GlmTokenizer {
        GlmTokenizer::from_bytes(&train_small(&corpus(), vocab_pieces), Path::new("trained")).unwrap()
    }

    #[test]
    fn trained_model_has_chatglms_layout() {
        let tokenizer = trained(320);
        assert_eq!(tokenizer.num_pieces(), 320);
        assert_eq!([0, 1, 2, 3, 258].map(|id| tokenizer.piece(id)), [UNK, BOS, EOS, "<0x00>", "<0xFF>"].map(Some));
        assert_eq!((tokenizer.pad(), tokenizer.eos(), tokenizer.gmask(), tokenizer.sop()), (0, 2, 321, 323));
        let model = tokenizer.pipeline().get_model();
        assert_eq!(model.pieces()[259].score.to_bits(), (-0.0f32).to_bits());
        assert_eq!(model.pieces()[262].score, -3.0);
        assert!(model.token_to_id("白色").is_some() && model.token_to_id("▁white").is_some());
    }

    #[test]
    fn trained_model_decodes_what_it_encodes() {
        let tokenizer = trained(320);
        for text in corpus().iter().map(String::as_str).chain(["", " ", "  two  blanks ", "未见过的字 😀\r\n", "</s>[gMASK]<0x0A>", "ﬁ①Ａ"])
        {
            let ids = tokenizer.encode(text).unwrap();
            assert!(ids.iter().all(|&id| id > 2));
            assert_eq!(tokenizer.decode(&ids), text, "{ids:?}");
        }
    }

    #[test]
    fn training_twice_gives_the_same_bytes() {
        assert_eq!(train_small(&corpus(), 300), train_small(&corpus(), 300));
    }

    #[test]
    fn training_with_too_few_pieces_keeps_the_bytes() {
        for vocab_pieces in [0, 259, 260] {
            let tokenizer = GlmTokenizer::from_bytes(&train_small(&corpus(), vocab_pieces), Path::new("trained")).unwrap();
            assert_eq!((tokenizer.num_pieces(), tokenizer.piece(259)), (260, Some("▁")));
        }
        let empty = GlmTokenizer::from_bytes(&train_small(&[], 512), Path::new("trained")).unwrap();
        assert_eq!(empty.decode(&empty.encode("文 字").unwrap()), "文 字");
    }

    #[test]
    fn filled_model_has_the_pieces_that_were_asked_for_and_a_token_for_each_character() {
        let filled = |num_pieces| GlmTokenizer::from_bytes(&train_filled(&corpus(), 320, num_pieces), Path::new("filled")).unwrap();
        let tokenizer = filled(64_789);
        assert_eq!((tokenizer.num_pieces(), tokenizer.gmask(), tokenizer.sop()), (64_789, 64_790, 64_792));
        for text in corpus() {
            assert_eq!(tokenizer.encode(&text).unwrap(), trained(320).encode(&text).unwrap(), "learnt pieces go first");
        }
        for text in ["未见过的字", "한국어"] {
            assert_eq!(tokenizer.encode(text).unwrap().len(), text.chars().count() + 1);
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()), text);
        }
        assert_eq!(filled(0).num_pieces(), 320, "nothing is taken away");
    }

    #[test]
    fn trainer_of_the_tokenizers_crate_learns_the_same_pieces() {
        let mut tokenizer = trained(260).pipeline().clone();
        tokenizer.train(&mut SpBpeTrainer::new(320), corpus().into_iter()).unwrap();
        assert_eq!(tokenizer.get_model().pieces(), trained(320).pipeline().get_model().pieces());
    }
}
