//! Which pieces a corpus teaches: byte pair encoding over words (Sennrich et al. 2016, arXiv:1508.07909).
//!
//! Deterministic: equal counts go by the order of first appearance, and no hash map is walked.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::sp_model::SPACE;

/// A piece has at most so many characters.
const MAX_PIECE_CHARS: usize = 16;
/// A pair that occurs once teaches nothing.
const MIN_PAIR_COUNT: i64 = 2;

/// Words with their counts, in the order of first appearance.
#[derive(Clone, Debug, Default)]
pub(super) struct Words {
    index: HashMap<String, usize>,
    counted: Vec<(String, i64)>,
}

/// Characters of different kinds do not share a piece; a `▁` starts the word that follows it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Space,
    Han,
    Letter,
    Digit,
    Control,
    Other,
}

fn kind(c: char) -> Kind {
    match c {
        SPACE => Kind::Space,
        '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{323af}' => Kind::Han,
        c if c.is_control() => Kind::Control,
        c if c.is_numeric() => Kind::Digit,
        c if c.is_alphabetic() => Kind::Letter,
        _ => Kind::Other,
    }
}

impl Words {
    /// Counts the words of an escaped text. Control characters (newline, tab) are left to the byte pieces.
    pub fn add(&mut self, escaped: &str) {
        let mut start = 0;
        let mut previous = Kind::Control;
        for (at, c) in escaped.char_indices() {
            let kind = kind(c);
            if at > start && kind != previous && (previous != Kind::Space || kind == Kind::Control) {
                self.count(&escaped[start..at]);
                start = at;
            }
            if kind == Kind::Control {
                start = at + c.len_utf8();
            }
            previous = kind;
        }
        self.count(&escaped[start..]);
    }

    fn count(&mut self, word: &str) {
        if word.is_empty() {
            return;
        }
        match self.index.get(word) {
            Some(&index) => self.counted[index].1 += 1,
            None => {
                self.index.insert(word.to_owned(), self.counted.len());
                self.counted.push((word.to_owned(), 1));
            }
        }
    }

    /// All characters, the most frequent first; `▁` always leads.
    fn alphabet(&self) -> Vec<char> {
        let mut index = HashMap::from([(SPACE, 0)]);
        let mut counted = vec![(SPACE, i64::MAX)];
        for (word, count) in &self.counted {
            for c in word.chars().filter(|&c| c != SPACE) {
                let at = *index.entry(c).or_insert_with(|| {
                    counted.push((c, 0));
                    counted.len() - 1
                });
                counted[at].1 += count;
            }
        }
        counted.sort_by_key(|&(_, count)| Reverse(count));
        counted.into_iter().map(|(c, _)| c).collect()
    }
}

/// At most `max_pieces` pieces by rank: merged ones in the order of their merging, then single characters by frequency. The characters come first in the
/// budget, up to three quarters of it; the rest is for merges, and what these leave goes to further characters.
pub(super) fn learn(words: &Words, max_pieces: usize) -> Vec<String> {
    let alphabet = words.alphabet();
    let num_chars = alphabet.len().min((max_pieces * 3 / 4).max(1));
    let mut merger = Merger::new(words, &alphabet[..num_chars]);
    while merger.num_merged() < max_pieces - num_chars && merger.merge_best() {}
    let mut pieces = merger.into_merged();
    let room = max_pieces - pieces.len();
    pieces.extend(alphabet.iter().take(room).map(char::to_string));
    pieces
}

type Pair = (u32, u32);

struct PairStats {
    count: i64,
    /// Order of first appearance.
    order: u64,
    /// Words that had this pair at some time, with repetitions.
    words: Vec<usize>,
}

struct Merger {
    /// Text of each symbol; the alphabet first.
    texts: Vec<String>,
    symbol_of: HashMap<String, u32>,
    words: Vec<(Vec<u32>, i64)>,
    pairs: HashMap<Pair, PairStats>,
    /// (count, earlier first, pair); entries of a count that is no longer true are renewed when met.
    queue: BinaryHeap<(i64, Reverse<u64>, Pair)>,
    num_chars: usize,
}

impl Merger {
    fn new(words: &Words, alphabet: &[char]) -> Self {
        let texts: Vec<String> = alphabet.iter().map(char::to_string).collect();
        let symbol_of: HashMap<String, u32> = texts.iter().cloned().zip(0..).collect();
        let mut merger =
            Self { num_chars: texts.len(), texts, symbol_of, words: Vec::new(), pairs: HashMap::new(), queue: BinaryHeap::new() };
        for (word, count) in &words.counted {
            for part in word.split(|c: char| !merger.symbol_of.contains_key(c.encode_utf8(&mut [0; 4]) as &str)) {
                let symbols: Vec<u32> =
                    part.chars().filter_map(|c| merger.symbol_of.get(c.encode_utf8(&mut [0; 4]) as &str)).copied().collect();
                if symbols.len() > 1 {
                    merger.words.push((symbols, *count));
                }
            }
        }
        for word in 0..merger.words.len() {
            merger.count_pairs(word);
        }
        merger
    }

    fn num_merged(&self) -> usize {
        self.texts.len() - self.num_chars
    }

    fn into_merged(mut self) -> Vec<String> {
        self.texts.split_off(self.num_chars)
    }

    /// Merges the most frequent pair; false when none is left.
    fn merge_best(&mut self) -> bool {
        while let Some((count, order, pair)) = self.queue.pop() {
            let now = self.pairs.get(&pair).map_or(0, |stats| stats.count);
            if now < MIN_PAIR_COUNT {
                continue;
            }
            if now != count {
                self.queue.push((now, order, pair));
                continue;
            }
            self.merge(pair);
            return true;
        }
        false
    }

    fn merge(&mut self, pair: Pair) {
        let text = format!("{}{}", self.texts[pair.0 as usize], self.texts[pair.1 as usize]);
        let symbol = match self.symbol_of.get(&text) {
            Some(&symbol) => symbol,
            None => {
                let symbol = self.texts.len() as u32;
                self.symbol_of.insert(text.clone(), symbol);
                self.texts.push(text);
                symbol
            }
        };
        let mut words = self.pairs.get_mut(&pair).map(|stats| std::mem::take(&mut stats.words)).unwrap_or_default();
        words.sort_unstable();
        words.dedup();
        for word in words {
            self.uncount_pairs(word);
            let symbols = &mut self.words[word].0;
            let mut merged = Vec::with_capacity(symbols.len());
            let mut rest = symbols.as_slice();
            while let Some((&first, tail)) = rest.split_first() {
                let joins = first == pair.0 && tail.first() == Some(&pair.1);
                merged.push(if joins { symbol } else { first });
                rest = if joins { &tail[1..] } else { tail };
            }
            *symbols = merged;
            self.count_pairs(word);
        }
    }

    fn uncount_pairs(&mut self, word: usize) {
        let (symbols, count) = &self.words[word];
        for pair in symbols.windows(2) {
            if let Some(stats) = self.pairs.get_mut(&(pair[0], pair[1])) {
                stats.count -= count;
            }
        }
    }

    fn count_pairs(&mut self, word: usize) {
        let (symbols, count) = &self.words[word];
        for pair in symbols.windows(2) {
            let pair = (pair[0], pair[1]);
            let num_chars = [pair.0, pair.1].map(|symbol| self.texts[symbol as usize].chars().count()).iter().sum::<usize>();
            if num_chars > MAX_PIECE_CHARS {
                continue;
            }
            let order = self.pairs.len() as u64;
            let stats = self.pairs.entry(pair).or_insert_with(|| PairStats { count: 0, order, words: Vec::new() });
            stats.count += count;
            stats.words.push(word);
            self.queue.push((stats.count, Reverse(stats.order), pair));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learnt(texts: &[&str], max_pieces: usize) -> Vec<String> {
        let mut words = Words::default();
        for text in texts {
            words.add(text);
        }
        learn(&words, max_pieces)
    }

    #[test]
    fn words_split_where_the_kind_of_character_changes() {
        let mut words = Words::default();
        words.add("▁ab▁▁12，白色\n▁x");
        let texts: Vec<&str> = words.counted.iter().map(|(word, _)| word.as_str()).collect();
        assert_eq!(texts, ["▁ab", "▁▁12", "，", "白色", "▁x"]);
    }

    #[test]
    fn merges_go_by_count_then_by_first_appearance() {
        assert_eq!(learnt(&["abab", "cd", "cd"], 9)[..2], ["ab", "cd"]);
        assert_eq!(learnt(&["cd", "cd", "abab"], 9)[..2], ["cd", "ab"]);
        assert_eq!(learnt(&["xyz", "xyz", "yz"], 10)[..2], ["yz", "xyz"]);
    }

    #[test]
    fn learning_without_pairs_fills_up_with_characters() {
        assert_eq!(learnt(&["a", "b", "b", "c"], 4), ["▁", "b", "a", "c"]);
        assert_eq!(learnt(&[], 4), ["▁"]);
    }
}
