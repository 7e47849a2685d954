//! A [`Dataset`] as bytes, for the exchange between ranks and for the cache.
//!
//! Little-endian: number of samples u64, number of ids u64, bytes of the report u64; per sample its row u64; per sample its length u32; per
//! id the id in the low 31 bits and "in the loss" in the highest; then the report as JSON.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::bad_rows::BadRows;
use super::column_use::ColumnUse;
use super::{Dataset, SampleRef};

const TARGET_BIT: u32 = 1 << 31;

#[derive(Serialize, Deserialize)]
struct Report {
    bad_rows: BadRows,
    num_cut_prompts: usize,
    num_cut_answers: usize,
    column_use: ColumnUse,
}

/// # Errors
/// When an id needs more than 31 bits.
pub fn encode(set: &Dataset) -> Result<Vec<u8>, String> {
    let report = Report {
        bad_rows: set.bad_rows.clone(),
        num_cut_prompts: set.num_cut_prompts,
        num_cut_answers: set.num_cut_answers,
        column_use: set.column_use.clone(),
    };
    let report = serde_json::to_vec(&report).map_err(|e| e.to_string())?;
    let mut out = Vec::with_capacity(24 + 12 * set.num_samples() + 4 * set.num_tokens() + report.len());
    for n in [set.num_samples(), set.num_tokens(), report.len()] {
        out.extend((n as u64).to_le_bytes());
    }
    set.rows().iter().for_each(|row| out.extend(row.to_le_bytes()));
    set.iter().for_each(|sample| out.extend((sample.ids.len() as u32).to_le_bytes()));
    for sample in set.iter() {
        for (&id, &target) in sample.ids.iter().zip(sample.is_target) {
            if id >= TARGET_BIT {
                return Err(format!("token id {id} needs more than 31 bits"));
            }
            out.extend((id | if target { TARGET_BIT } else { 0 }).to_le_bytes());
        }
    }
    out.extend(report);
    Ok(out)
}

/// The inverse of [`encode`]; `file` is what the rows' origins name.
///
/// # Errors
/// When the bytes are not exactly one encoded set.
pub fn decode(bytes: &[u8], file: &Path) -> Result<Dataset, String> {
    let mut rest = bytes;
    let mut count = || -> Result<usize, String> {
        let n = u64::from_le_bytes(take(&mut rest, 8)?.try_into().map_err(|_| "short count")?);
        usize::try_from(n).map_err(|_| format!("impossible count {n}"))
    };
    let (num_samples, num_ids, report_bytes) = (count()?, count()?, count()?);
    let size = |n: usize, bytes: usize| n.checked_mul(bytes).ok_or_else(|| format!("impossible count {n}"));
    let rows = take(&mut rest, size(num_samples, 8)?)?;
    let lengths = take(&mut rest, size(num_samples, 4)?)?;
    let mut tokens = take(&mut rest, size(num_ids, 4)?)?;
    let report: Report = serde_json::from_slice(take(&mut rest, report_bytes)?).map_err(|e| format!("bad report: {e}"))?;
    if !rest.is_empty() {
        return Err(format!("{} bytes too many", rest.len()));
    }
    let mut set = Dataset::new(file);
    let (mut ids, mut is_target) = (Vec::new(), Vec::new());
    for (row, length) in rows.as_chunks::<8>().0.iter().zip(lengths.as_chunks::<4>().0) {
        let own = take(&mut tokens, size(u32::from_le_bytes(*length) as usize, 4)?)?;
        ids.clear();
        is_target.clear();
        for token in own.as_chunks::<4>().0 {
            let token = u32::from_le_bytes(*token);
            ids.push(token & !TARGET_BIT);
            is_target.push(token & TARGET_BIT != 0);
        }
        set.push(SampleRef { ids: &ids, is_target: &is_target }, u64::from_le_bytes(*row) as usize);
    }
    if !tokens.is_empty() {
        return Err(format!("{} ids belong to no sample", tokens.len() / 4));
    }
    Report {
        bad_rows: set.bad_rows,
        num_cut_prompts: set.num_cut_prompts,
        num_cut_answers: set.num_cut_answers,
        column_use: set.column_use,
    } = report;
    Ok(set)
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> Result<&'a [u8], String> {
    let (head, tail) = rest.split_at_checked(n).ok_or_else(|| format!("ends {} bytes too early", n - rest.len()))?;
    *rest = tail;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sample;

    fn set() -> Dataset {
        let mut set = Dataset::new(Path::new("f"));
        for (row, ids) in [(1, vec![64790, 64792, 5, 2]), (4, vec![]), (5, vec![1, 2])] {
            let is_target = (0..ids.len()).map(|i| i % 2 == 1).collect();
            set.push(Sample { ids, is_target }.as_ref(), row);
        }
        set.num_cut_answers = 2;
        set
    }

    #[test]
    fn decoded_set_equals_the_encoded_one() {
        assert_eq!(decode(&encode(&set()).unwrap(), Path::new("f")).unwrap(), set());
        let empty = Dataset::new(Path::new("f"));
        assert_eq!(decode(&encode(&empty).unwrap(), Path::new("f")).unwrap(), empty);
    }

    #[test]
    fn bytes_cut_anywhere_or_with_hostile_counts_are_refused() {
        let good = encode(&set()).unwrap();
        for n in 0..good.len() {
            assert!(decode(&good[..n], Path::new("f")).is_err(), "{n} bytes");
        }
        for field in 0..3 {
            for value in [0, 2, u64::MAX, u64::MAX / 8, 1 << 40] {
                let mut bad = good.clone();
                bad[8 * field..8 * field + 8].copy_from_slice(&value.to_le_bytes());
                assert!(decode(&bad, Path::new("f")).is_err(), "field {field} = {value}");
            }
        }
        assert!(decode(&[good.as_slice(), b"x"].concat(), Path::new("f")).is_err());
    }

    #[test]
    fn id_beyond_31_bits_is_refused() {
        let mut set = Dataset::new(Path::new("f"));
        set.push(Sample { ids: vec![1 << 31], is_target: vec![false] }.as_ref(), 1);
        assert!(encode(&set).unwrap_err().contains("31 bits"));
    }
}
