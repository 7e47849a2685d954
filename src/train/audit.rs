//! Ranks that must hold the same state show that they do: a 64-bit hash of each part is compared over them.
//!
//! A step costs the ranks nothing but the hashing of what they hold: they share one number, and only where it differs a number a part.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use candle_core::Tensor;
use rayon::prelude::*;
use twox_hash::XxHash3_64;

use super::TrainError;
use crate::dist::{DistError, ProcessGroup, gather_words};
use crate::kernels::host::{self, F32View};

/// Elements that are hashed as one piece, so that the threads share a large tensor.
const PIECE: usize = 1 << 18;
/// What the ranks tell each other.
const HASHES: &str = "hashes of its state";

/// Names and hashes of what all ranks must have alike, in the order in which a difference is looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprints(Vec<(String, u64)>);

impl Fingerprints {
    /// Numbers that are compared as they are.
    pub fn push_numbers(&mut self, name: &str, numbers: &[u64]) {
        self.0.push((name.to_owned(), hash_words(numbers)));
    }

    /// f32 tensors, by name.
    ///
    /// # Errors
    /// When a tensor is not contiguous f32, or cannot be read.
    pub fn push_tensors(&mut self, what: &str, tensors: &BTreeMap<String, Tensor>) -> candle_core::Result<()> {
        for (name, tensor) in tensors {
            self.0.push((format!("{what} `{name}`"), hash_tensor(tensor)?));
        }
        Ok(())
    }

    fn words(&self) -> Vec<u64> {
        self.0.iter().map(|(_, hash)| *hash).collect()
    }
}

fn hash_words(words: &[u64]) -> u64 {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    XxHash3_64::oneshot(&bytes)
}

/// Over the bits, piece by piece: the same at any number of threads. A NaN equals itself, and 0 is not -0.
fn hash_tensor(tensor: &Tensor) -> candle_core::Result<u64> {
    let on_host = host::on_host(tensor)?;
    let values = F32View::new(&on_host)?;
    let pieces: Vec<u64> = values.par_chunks(PIECE).map(|piece| XxHash3_64::oneshot(bytemuck::cast_slice(piece))).collect();
    Ok(hash_words(&pieces))
}

/// Compares all ranks' `mine`, which have the same names in the same order. Collective.
///
/// # Errors
/// On all ranks alike, when they differ: [`TrainError::RanksDiverged`] with the first part that does, and the ranks that are not with the
/// majority. Or when a collective fails.
pub fn audit(group: &dyn ProcessGroup, step: u64, mine: &Fingerprints) -> Result<(), TrainError> {
    let words = mine.words();
    let whole = gather_words(group, HASHES, &[hash_words(&words)])?;
    if whole.iter().all(|hash| *hash == whole[0]) {
        return Ok(());
    }
    let all = gather_words(group, HASHES, &words)?;
    if let Some(rank) = all.iter().position(|others| others.len() != words.len()) {
        let (expected, found) = (format!("{} bytes", words.len() * 8), all[rank].len() * 8);
        return Err(DistError::Message { rank, what: HASHES, expected, found }.into());
    }
    let differs = |part: usize| all.iter().any(|words| words.get(part) != all[0].get(part));
    let parts: Vec<usize> = (0..mine.0.len()).filter(|&part| differs(part)).collect();
    let Some(&first) = parts.first() else {
        let problem = "its hashes are those of the others, and their hash is not: its memory or processor is faulty".to_owned();
        let rank = whole.iter().position(|hash| *hash != whole[0]).unwrap_or(0);
        return Err(DistError::Slots { rank, problem }.into());
    };
    let hashes: Vec<u64> = all.iter().map(|words| words.get(first).copied().unwrap_or_default()).collect();
    Err(TrainError::RanksDiverged { step, verdict: verdict(&hashes), part: mine.0[first].0.clone(), others: parts.len() - 1 })
}

/// Who is wrong, from each rank's hash of one part.
fn verdict(hashes: &[u64]) -> String {
    let mut groups: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (rank, hash) in hashes.iter().enumerate() {
        groups.entry(*hash).or_default().push(rank);
    }
    let majority = groups.iter().find(|(_, ranks)| 2 * ranks.len() > hashes.len()).map(|(hash, _)| *hash);
    if let Some(majority) = majority {
        let wrong: Vec<usize> = (0..hashes.len()).filter(|&rank| hashes[rank] != majority).collect();
        let verb = if wrong.len() == 1 { "differs" } else { "differ" };
        return format!("{} {verb} from the other {} ranks", named(&wrong), hashes.len() - wrong.len());
    }
    let mut groups: Vec<Vec<usize>> = groups.into_values().collect();
    groups.sort();
    let mut text = groups.iter().map(|ranks| named(ranks)).collect::<Vec<_>>().join(" and ");
    let _ = write!(text, " differ, and no majority tells who is right");
    text
}

fn named(ranks: &[usize]) -> String {
    let list = ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if ranks.len() == 1 { format!("rank {list}") } else { format!("ranks {list}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::local;
    use candle_core::Device;

    fn tensors(values: &[(&str, &[f32])]) -> BTreeMap<String, Tensor> {
        values.iter().map(|(name, v)| ((*name).to_owned(), Tensor::new(*v, &Device::Cpu).unwrap())).collect()
    }

    /// What each rank returns where rank r has the value `second[r]` in parameter `b` and its moment.
    fn audited(second: &[f32]) -> Vec<String> {
        local::run(second.len(), |g| {
            let mut mine = Fingerprints::default();
            mine.push_numbers("the seed", &[42]);
            mine.push_tensors("parameter", &tensors(&[("a", &[1.0, 2.0]), ("b", &[0.5, second[g.rank()]])]))?;
            mine.push_tensors("moment", &tensors(&[("exp_avg.b", &[second[g.rank()]])]))?;
            audit(g, 40, &mine)
        })
        .into_iter()
        .map(|outcome| outcome.map_or_else(|e| e.to_string(), |()| "alike".to_owned()))
        .collect()
    }

    #[test]
    fn ranks_with_the_same_state_pass() {
        assert_eq!(audited(&[f32::NAN; 3]), ["alike"; 3]);
        assert_eq!(audited(&[1.0]), ["alike"]);
    }

    #[test]
    fn rank_that_differs_is_named_on_all_ranks_with_the_first_tensor() {
        for (values, name) in [
            (&[1.0, 1.0, 1.000_000_1][..], "one_of_three"),
            (&[1.0, 2.0, 1.0, 2.0, 1.0], "two_of_five"),
            (&[0.0, -0.0], "two_ranks"),
            (&[1.0, 2.0, 2.0, 1.0], "no_majority"),
        ] {
            let said = audited(values);
            assert!(said.iter().all(|text| *text == said[0]), "{said:?}");
            insta::assert_snapshot!(format!("diverged_{name}"), said[0]);
        }
    }

    #[test]
    fn numbers_come_before_tensors() {
        let all = local::run(3, |g| {
            let mut mine = Fingerprints::default();
            mine.push_numbers("the seed", &[42 + u64::from(g.rank() == 1)]);
            mine.push_tensors("parameter", &tensors(&[("a", &[g.rank() as f32])]))?;
            audit(g, 0, &mine)
        });
        insta::assert_snapshot!("diverged_seed", all[0].as_ref().unwrap_err());
    }

    #[test]
    fn hash_of_a_large_tensor_sees_each_piece_and_its_place() {
        let n = 2 * PIECE + 3;
        let hash = |at: Option<usize>| {
            let mut values = vec![0f32; n];
            at.iter().for_each(|&at| values[at] = 1.0);
            hash_tensor(&Tensor::from_vec(values, n, &Device::Cpu).unwrap()).unwrap()
        };
        let mut hashes: Vec<u64> = [None, Some(0), Some(PIECE), Some(2 * PIECE), Some(n - 1)].into_iter().map(hash).collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 5);
    }
}
