//! Seeded mutations: an input is a pure function of target, seed and number.

use std::collections::BTreeMap;

use glmddp::rng::{KeyedRng, Stream, name_key};

/// Files by their path in a folder.
pub type Folder = BTreeMap<String, Vec<u8>>;

/// Numbers at which sizes, offsets and types turn over.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 40,
    (1 << 62) + 1,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_fff8,
    u64::MAX,
];
/// The same in text, and what is no number to all.
const NUMERALS: [&str; 16] = [
    "0",
    "-1",
    "1",
    "3",
    "255",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e-320",
    "1.5",
    "-0.0",
];
/// Longest run that a repetition makes (bytes).
const LONGEST_RUN: usize = 1 << 18;

/// A sequence of throws.
pub struct Dice {
    rng: KeyedRng,
    thrown: u64,
}

impl Dice {
    pub fn new(seed: u64, target: &str, number: u64) -> Self {
        Self { rng: KeyedRng::new(seed, Stream::DemoData, name_key(target).wrapping_add(number)), thrown: 0 }
    }

    /// Below `bound`, which must not be 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.thrown += 1;
        self.rng.below(self.thrown, u32::try_from(bound).unwrap_or(u32::MAX)) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        let longest = if self.one_in(4) { len - start } else { (len - start).min(16) };
        start..start + self.below(longest + 1)
    }
}

/// What JSON is made of, and numbers that are traps.
pub const JSON_WORDS: &[&[u8]] =
    &[b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"false", b"0", b"-1", b"18446744073709551615", b"1e300"];

/// Changes one to four things about `folder`; `words` are tokens of the format, `other` an input to take pieces from.
pub fn mutate(folder: &mut Folder, dice: &mut Dice, words: &[&[u8]], other: &Folder) {
    let names: Vec<String> = folder.keys().cloned().collect();
    for _ in 0..1 + dice.below(4) {
        let name = dice.of(&names).clone();
        if dice.one_in(200) {
            folder.remove(&name);
        }
        let Some(bytes) = folder.get_mut(&name) else { continue };
        let from = other.get(&name).map_or(&[][..], Vec::as_slice);
        change(bytes, dice, words, from);
    }
}

fn change(bytes: &mut Vec<u8>, dice: &mut Dice, words: &[&[u8]], other: &[u8]) {
    let len = bytes.len();
    match dice.below(12) {
        0 if len > 0 => bytes[dice.below(len)] ^= 1 << dice.below(8),
        1 if len > 0 => {
            let at = dice.below(len);
            bytes[at] = *dice.of(&[0, 1, b'\n', b'"', b'\\', b'{', b'}', b'[', b']', b',', b'.', 0x7f, 0x80, 0xc0, 0xff]);
        }
        2 => {
            let value = dice.of(&NUMBERS).to_le_bytes();
            let width = *dice.of(&[1, 2, 4, 8]);
            let at = dice.below(len + 1);
            for (place, byte) in bytes.iter_mut().skip(at).zip(&value[..width]) {
                *place = *byte;
            }
        }
        3 => bytes.truncate(dice.below(len + 1)),
        4 => drop(bytes.drain(dice.range(len))),
        5 => {
            let piece = bytes[dice.range(len)].to_vec();
            insert(bytes, dice, &piece);
        }
        6 if !other.is_empty() => {
            let piece = other[dice.range(other.len())].to_vec();
            insert(bytes, dice, &piece);
        }
        7 => replace_numeral(bytes, dice),
        8 | 9 if !words.is_empty() => {
            let word = dice.of(words).to_vec();
            if dice.one_in(2) {
                insert(bytes, dice, &word);
            } else {
                let range = dice.range(len);
                bytes.splice(range, word);
            }
        }
        10 if dice.one_in(4) => {
            let piece = if words.is_empty() || dice.one_in(2) { bytes[dice.range(len)].to_vec() } else { dice.of(words).to_vec() };
            let times = 1 << dice.below(18);
            let times = (LONGEST_RUN / piece.len().max(1)).min(times);
            insert(bytes, dice, &piece.repeat(times));
        }
        11 if len > 1 => {
            let (a, b) = (dice.range(len), dice.below(len));
            let piece: Vec<u8> = bytes.drain(a).collect();
            let at = b.min(bytes.len());
            bytes.splice(at..at, piece);
        }
        _ => {
            let byte = dice.below(256) as u8;
            insert(bytes, dice, &[byte]);
        }
    }
}

fn insert(bytes: &mut Vec<u8>, dice: &mut Dice, piece: &[u8]) {
    let at = dice.below(bytes.len() + 1);
    bytes.splice(at..at, piece.iter().copied());
}

/// Puts another number in the place of one that stands in text.
fn replace_numeral(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let starts: Vec<usize> = (0..bytes.len()).filter(|&at| is_digit(at) && (at == 0 || !is_digit(at - 1))).collect();
    if starts.is_empty() {
        return;
    }
    let start = *dice.of(&starts);
    let end = (start..).find(|&at| !is_digit(at)).unwrap_or(start);
    bytes.splice(start..end, dice.of(&NUMERALS).bytes());
}
