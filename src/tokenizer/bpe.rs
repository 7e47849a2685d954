//! SentencePiece's BPE as a model of the `tokenizers` crate.
//!
//! Source: Kudo and Richardson 2018 (arXiv:1808.06226), and the behaviour of the `sentencepiece` library: the pair whose joined text has the highest score
//! merges first, the leftmost at equal scores; user-defined pieces are cut out beforehand and never merge; what is left without a piece becomes bytes.
//! A heap of candidates makes it O(n log n) in the text's length.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use tokenizers::{Model, Token};

use super::sp_model::{NUM_BYTES, Piece, PieceKind, SpModel};
use super::train::SpBpeTrainer;

/// The pieces of one model, indexed for tokenizing.
#[derive(Clone, Debug)]
pub struct SpBpe {
    model: SpModel,
    /// Pieces that merging may form: normal, user-defined and unused ones.
    mergeable: HashMap<Box<str>, u32>,
    /// Pieces that text never forms by merging: unknown, control, bytes.
    reserved: HashMap<Box<str>, u32>,
    /// User-defined pieces by first character, the longest first.
    user_defined: HashMap<char, Vec<Box<str>>>,
    longest_piece_bytes: usize,
    has_unused: bool,
}

/// A stretch of the text that is one piece so far; empty after it was merged into its left neighbour.
struct Symbol {
    start: u32,
    end: u32,
    /// Neighbours, or [`NONE`].
    prev: u32,
    next: u32,
    /// The piece that a merge formed, or [`NONE`].
    merged: u32,
    frozen: bool,
}

const NONE: u32 = u32::MAX;

impl Symbol {
    fn range(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// A possible merge: highest score first, then leftmost.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    score: i32,
    left: Reverse<u32>,
    right: u32,
    /// Length of both when the candidate was made: another length now means that it is out of date.
    bytes: u32,
    id: u32,
}

/// Unused pieces that two neighbours joined into, and how many bytes the left one had.
type Splits<'t> = HashMap<&'t str, usize>;

impl SpBpe {
    pub(super) fn new(model: SpModel) -> Self {
        let mut this = Self {
            mergeable: HashMap::with_capacity(model.pieces.len()),
            reserved: HashMap::with_capacity(NUM_BYTES + 3),
            user_defined: HashMap::new(),
            longest_piece_bytes: 0,
            has_unused: false,
            model,
        };
        for (id, piece) in (0u32..).zip(&this.model.pieces) {
            let text: Box<str> = piece.text.as_str().into();
            match piece.kind {
                PieceKind::Unknown | PieceKind::Control | PieceKind::Byte => {
                    this.reserved.insert(text, id);
                    continue;
                }
                PieceKind::UserDefined => {
                    if let Some(first) = text.chars().next() {
                        this.user_defined.entry(first).or_default().push(text.clone());
                    }
                }
                PieceKind::Unused => this.has_unused = true,
                PieceKind::Normal => {}
            }
            this.longest_piece_bytes = this.longest_piece_bytes.max(text.len());
            this.mergeable.insert(text, id);
        }
        for pieces in this.user_defined.values_mut() {
            pieces.sort_by_key(|piece| Reverse(piece.len()));
        }
        this
    }

    pub(super) fn pieces(&self) -> &[Piece] {
        &self.model.pieces
    }

    pub(super) fn sp_model(&self) -> &SpModel {
        &self.model
    }

    /// Cuts an escaped text into pieces and calls `emit` with each id and its bytes' range in `text`; the bytes of one character share its range.
    ///
    /// # Errors
    /// A text of 4 GiB or more; the reason is given.
    pub(super) fn segment(&self, text: &str, mut emit: impl FnMut(u32, Range<usize>)) -> Result<(), &'static str> {
        if u32::try_from(text.len()).is_err() {
            return Err("it has 4 GiB or more");
        }
        let mut symbols = self.split(text);
        let mut splits = Splits::new();
        let mut agenda = BinaryHeap::with_capacity(symbols.len());
        for right in 1..symbols.len() as u32 {
            agenda.extend(self.candidate(text, &symbols, right - 1, right, &mut splits));
        }
        while let Some(top) = agenda.pop() {
            let (left, right) = (top.left.0, top.right);
            let (a, b) = (&symbols[left as usize], &symbols[right as usize]);
            if a.start == a.end || b.start == b.end || b.end - a.start != top.bytes {
                continue;
            }
            let (end, next) = (b.end, b.next);
            symbols[right as usize].start = end;
            let a = &mut symbols[left as usize];
            (a.end, a.next, a.merged) = (end, next, top.id);
            let prev = a.prev;
            if next != NONE {
                symbols[next as usize].prev = left;
            }
            agenda.extend(self.candidate(text, &symbols, prev, left, &mut splits));
            agenda.extend(self.candidate(text, &symbols, left, next, &mut splits));
        }
        let mut index = if symbols.is_empty() { NONE } else { 0 };
        while index != NONE {
            let symbol = &symbols[index as usize];
            self.emit_symbol(text, symbol, &splits, &mut emit);
            index = symbol.next;
        }
        Ok(())
    }

    /// The start: one symbol a character or user-defined piece.
    fn split(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len() / 2 + 1);
        let mut start = 0;
        while let Some(first) = text[start..].chars().next() {
            let user_defined =
                self.user_defined.get(&first).and_then(|pieces| pieces.iter().find(|piece| text[start..].starts_with(piece.as_ref())));
            let end = start + user_defined.map_or(first.len_utf8(), |piece| piece.len());
            let index = symbols.len() as u32;
            let prev = if index == 0 { NONE } else { index - 1 };
            let next = if end < text.len() { index + 1 } else { NONE };
            symbols.push(Symbol { start: start as u32, end: end as u32, prev, next, merged: NONE, frozen: user_defined.is_some() });
            start = end;
        }
        symbols
    }

    fn candidate<'t>(&self, text: &'t str, symbols: &[Symbol], left: u32, right: u32, splits: &mut Splits<'t>) -> Option<Candidate> {
        if left == NONE || right == NONE {
            return None;
        }
        let (a, b) = (&symbols[left as usize], &symbols[right as usize]);
        let bytes = b.end - a.start;
        if a.frozen || b.frozen || bytes as usize > self.longest_piece_bytes {
            return None;
        }
        let joined = &text[a.start as usize..b.end as usize];
        let &id = self.mergeable.get(joined)?;
        let piece = &self.model.pieces[id as usize];
        if piece.kind == PieceKind::Unused {
            splits.insert(joined, a.range().len());
        }
        Some(Candidate { score: sortable(piece.score), left: Reverse(left), right, bytes, id })
    }

    /// Unused pieces fall apart again into what they were merged from; unknown and unused characters become bytes.
    fn emit_symbol(&self, text: &str, symbol: &Symbol, splits: &Splits<'_>, emit: &mut impl FnMut(u32, Range<usize>)) {
        if symbol.merged != NONE && !self.has_unused {
            return emit(symbol.merged, symbol.range());
        }
        let mut stack = vec![symbol.range()];
        while let Some(range) = stack.pop() {
            let piece = &text[range.clone()];
            let id = self.reserved.get(piece).or_else(|| self.mergeable.get(piece)).copied().filter(|&id| id != self.model.unk);
            let is_unused = id.is_some_and(|id| self.model.pieces[id as usize].kind == PieceKind::Unused);
            match (id, splits.get(piece)) {
                (Some(id), _) if !is_unused => emit(id, range),
                (Some(_), Some(&left_bytes)) => {
                    let middle = range.start + left_bytes;
                    stack.push(middle..range.end);
                    stack.push(range.start..middle);
                }
                _ => piece.bytes().for_each(|byte| emit(self.model.bytes[usize::from(byte)], range.clone())),
            }
        }
    }
}

/// Orders finite scores as integers; -0 equals 0.
fn sortable(score: f32) -> i32 {
    let bits = (score + 0.0).to_bits().cast_signed();
    bits ^ ((bits >> 31) & i32::MAX)
}

impl Model for SpBpe {
    type Trainer = SpBpeTrainer;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        let mut tokens = Vec::with_capacity(sequence.len() / 4 + 1);
        self.segment(sequence, |id, range| {
            tokens.push(Token::new(id, self.model.pieces[id as usize].text.clone(), (range.start, range.end)));
        })?;
        Ok(tokens)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.reserved.get(token).or_else(|| self.mergeable.get(token)).copied()
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.model.pieces.get(id as usize).map(|piece| piece.text.clone())
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        (0u32..).zip(&self.model.pieces).map(|(id, piece)| (piece.text.clone(), id)).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.model.pieces.len()
    }

    /// Writes `tokenizer.model` into `folder`.
    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        let name = prefix.map_or_else(|| "tokenizer.model".to_owned(), |prefix| format!("{prefix}-tokenizer.model"));
        let path = folder.join(name);
        std::fs::write(&path, self.model.to_bytes())?;
        Ok(vec![path])
    }

    fn get_trainer(&self) -> SpBpeTrainer {
        SpBpeTrainer::new(self.model.pieces.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::sp_model::{EOS, UNK, byte_piece};
    use super::*;

    fn model(extra: &[(&str, f32, PieceKind)]) -> SpBpe {
        let mut pieces = vec![
            Piece { text: UNK.into(), score: 0.0, kind: PieceKind::Unknown },
            Piece { text: EOS.into(), score: 0.0, kind: PieceKind::Control },
        ];
        pieces.extend((0..=255).map(|b| Piece { text: byte_piece(b), score: 0.0, kind: PieceKind::Byte }));
        pieces.extend(extra.iter().map(|&(text, score, kind)| Piece { text: text.into(), score, kind }));
        SpBpe::new(SpModel::from_pieces(pieces, Path::new("test")).unwrap())
    }

    fn cut(model: &SpBpe, text: &str) -> Vec<String> {
        model.tokenize(text).unwrap().into_iter().map(|t| t.value).collect()
    }

    #[test]
    fn sortable_scores_keep_their_order() {
        let scores = [-1e9, -2.0, -1.0, -f32::MIN_POSITIVE, 0.0, f32::MIN_POSITIVE, 1.5, 1e9];
        assert!(scores.windows(2).all(|w| sortable(w[0]) < sortable(w[1])));
        assert_eq!(sortable(-0.0), sortable(0.0));
    }

    #[test]
    fn merge_with_equal_scores_takes_the_leftmost() {
        use PieceKind::Normal;
        let model = model(&[("a", -9.0, Normal), ("aa", -1.0, Normal)]);
        assert_eq!(cut(&model, "aaa"), ["aa", "a"]);
        assert_eq!(cut(&model, "aaaaa"), ["aa", "aa", "a"]);
    }

    #[test]
    fn merge_with_higher_score_goes_first() {
        use PieceKind::Normal;
        let model = model(&[("a", -9.0, Normal), ("b", -9.0, Normal), ("c", -9.0, Normal), ("ab", -2.0, Normal), ("bc", -1.0, Normal)]);
        assert_eq!(cut(&model, "abc"), ["a", "bc"]);
    }

    #[test]
    fn unknown_character_becomes_its_bytes() {
        let model = model(&[("a", -9.0, PieceKind::Normal)]);
        assert_eq!(cut(&model, "a丂"), ["a", "<0xE4>", "<0xB8>", "<0x82>"]);
        assert_eq!(model.tokenize("a丂").unwrap()[3].offsets, (1, 4));
    }

    #[test]
    fn user_defined_piece_is_cut_out_longest_first_and_never_merges() {
        use PieceKind::{Normal, UserDefined};
        let model = model(&[
            ("a", -9.0, Normal),
            ("<|", 0.0, UserDefined),
            ("<|x|>", 0.0, UserDefined),
            ("a<|x|>", -1.0, Normal),
            ("aa", -2.0, Normal),
        ]);
        assert_eq!(cut(&model, "aa<|x|>aa<|"), ["aa", "<|x|>", "aa", "<|"]);
    }

    #[test]
    fn unused_piece_falls_apart_again() {
        use PieceKind::{Normal, Unused};
        let model = model(&[("a", -9.0, Normal), ("b", -9.0, Normal), ("c", -9.0, Unused), ("ab", -1.0, Unused), ("aba", -2.0, Unused)]);
        assert_eq!(cut(&model, "abac"), ["a", "b", "a", "<0x63>"]);
    }

    #[test]
    fn reserved_names_in_text_are_plain_text() {
        let model = model(&[("<", -9.0, PieceKind::Normal), (">", -9.0, PieceKind::Normal), ("s", -9.0, PieceKind::Normal)]);
        assert_eq!(cut(&model, "</s>"), ["<", "<0x2F>", "s", ">"]);
    }

    #[test]
    fn long_line_takes_linear_time() {
        let model = model(&[("a", -9.0, PieceKind::Normal), ("aa", -1.0, PieceKind::Normal), ("aaaa", -2.0, PieceKind::Normal)]);
        let line = "a".repeat(1 << 20);
        let started = std::time::Instant::now();
        assert_eq!(model.tokenize(&line).unwrap().len(), 1 << 18);
        assert!(started.elapsed().as_secs() < 20, "quadratic: {:?}", started.elapsed());
    }
}
