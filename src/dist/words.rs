//! Numbers that the ranks tell each other, over the plane of bytes.

use super::{DistError, ProcessGroup};

/// Every rank's words, ordered by rank; their numbers may differ. `what` says in an error what they are.
///
/// # Errors
/// When the collective fails, or a rank sends what are no words.
pub fn gather_words(group: &dyn ProcessGroup, what: &'static str, mine: &[u64]) -> Result<Vec<Vec<u64>>, DistError> {
    let bytes: Vec<u8> = mine.iter().flat_map(|word| word.to_le_bytes()).collect();
    let words = group.all_gather_bytes(&bytes)?.into_iter().enumerate().map(|(rank, bytes)| match bytes.as_chunks::<8>() {
        (words, []) => Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect()),
        _ => Err(DistError::Message { rank, what, expected: "a multiple of 8 bytes".to_owned(), found: bytes.len() }),
    });
    words.collect()
}
