//! Collectives in pieces, for a transport whose counts are limited (MPI's are 32-bit).
//!
//! `piece` is the number of elements that a rank may give to one call. A message of at most one piece travels without a copy.

use std::ops::Range;

/// Every rank's `mine` `[n]`, as `[world_size, n]`; `gather(part, out)` does it for one piece.
pub(super) fn all_gather(mine: &[f32], world_size: usize, piece: usize, mut gather: impl FnMut(&[f32], &mut [f32])) -> Vec<f32> {
    let n = mine.len();
    let mut all = vec![0.0; world_size * n];
    if n <= piece {
        gather(mine, &mut all);
        return all;
    }
    for at in (0..n).step_by(piece) {
        let part = &mine[at..n.min(at + piece)];
        let mut received = vec![0.0; world_size * part.len()];
        gather(part, &mut received);
        put_columns(&received, part.len(), &mut all, n, at);
    }
    all
}

/// Writes `part`, rows of `len` elements, into columns `at..` of `all`, rows of `n`.
fn put_columns(part: &[f32], len: usize, all: &mut [f32], n: usize, at: usize) {
    for (row, from) in part.chunks(len).enumerate() {
        all[row * n + at..][..len].copy_from_slice(from);
    }
}

/// Every rank's bytes, whose lengths are `lens`; `gather(part, counts, starts, out)` does it for one piece.
pub(super) fn all_gather_bytes(
    mine: &[u8],
    lens: &[usize],
    piece: usize,
    mut gather: impl FnMut(&[u8], &[i32], &[i32], &mut [u8]),
) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = lens.iter().map(|&len| Vec::with_capacity(len)).collect();
    for at in (0..lens.iter().copied().max().unwrap_or(0)).step_by(piece) {
        let part = |len: usize| -> Range<usize> { at.min(len)..(at + piece).min(len) };
        let counts: Vec<i32> = lens.iter().map(|&len| part(len).len() as i32).collect();
        let starts: Vec<i32> = counts.iter().scan(0, |end, count| Some(std::mem::replace(end, *end + count))).collect();
        let mut received = vec![0; counts.iter().sum::<i32>() as usize];
        gather(&mine[part(mine.len())], &counts, &starts, &mut received);
        for ((bytes, &start), &count) in all.iter_mut().zip(&starts).zip(&counts) {
            bytes.extend_from_slice(&received[start as usize..][..count as usize]);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths below, at and above multiples of the pieces.
    const LENGTHS: [usize; 6] = [0, 1, 4, 5, 8, 11];

    #[test]
    fn all_gather_in_pieces_of_any_size_equals_one_call() {
        for n in LENGTHS {
            let mine: Vec<f32> = (0..n).map(|i| i as f32).collect();
            // Rank r has what this rank has, plus 100 r.
            let gather = |part: &[f32], out: &mut [f32]| {
                let rows = (0..3).flat_map(|r| part.iter().map(move |x| x + 100.0 * r as f32));
                out.iter_mut().zip(rows).for_each(|(o, x)| *o = x);
            };
            let expected: Vec<f32> = (0..3).flat_map(|r| (0..n).map(move |i| (100 * r + i) as f32)).collect();
            for piece in [1, 4, 5, 100] {
                assert_eq!(all_gather(&mine, 3, piece, gather), expected, "{n} elements by {piece}");
            }
        }
    }

    #[test]
    fn bytes_of_uneven_ranks_in_pieces_equal_one_call() {
        let lens = [7, 0, 12, 5];
        let of_rank = |r: usize| (0..lens[r]).map(|i| (16 * r + i) as u8).collect::<Vec<_>>();
        for piece in [1, 5, 6, 100] {
            let mut at = 0;
            let gather = |part: &[u8], counts: &[i32], starts: &[i32], out: &mut [u8]| {
                assert_eq!(part, &of_rank(2)[at..(at + piece).min(12)]);
                for r in 0..4 {
                    let count = counts[r] as usize;
                    out[starts[r] as usize..][..count].copy_from_slice(&of_rank(r)[at.min(lens[r])..][..count]);
                }
                at += piece;
            };
            assert_eq!(all_gather_bytes(&of_rank(2), &lens, piece, gather), (0..4).map(of_rank).collect::<Vec<_>>());
        }
    }
}
