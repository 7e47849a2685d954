//! `torch.save` as it was before PyTorch 1.6: five pickles one behind the other (magic number, protocol, system, object,
//! storage keys), then each storage as its length (i64) and its bytes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::super::{ParseError, Placed};
use super::machine::{Unpickled, unpickle};
use super::place;

/// A protocol 2 pickle of the number 0x1950a86a20f9469cfc6c.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
const PROTOCOL: i128 = 1001;

pub fn is_legacy(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// Where each tensor lies in a file with these bytes.
///
/// # Errors
/// When the file is cut off or malformed, was written on a big-endian machine, or does not hold a dictionary of tensors.
pub fn parse_legacy(file: &[u8]) -> Result<BTreeMap<String, Placed>, ParseError> {
    let mut at = MAGIC.len();
    let mut next = || -> Result<Unpickled<'_>, ParseError> {
        let pickle = unpickle(file.get(at..).unwrap_or_default())?;
        at += pickle.len;
        Ok(pickle)
    };
    if next()?.int() != Some(PROTOCOL) {
        return Err(ParseError::new(format!("its protocol is not {PROTOCOL}")));
    }
    if next()?.flag("little_endian") != Some(true) {
        return Err(ParseError::new("it was not written on a little-endian machine"));
    }
    let object = next()?;
    let element_bytes: HashMap<&str, usize> = object.storages().map(|s| (s.key, s.dtype.bitsize() / 8)).collect();
    let tensors = object.tensors()?;
    let keys = next()?.texts().ok_or_else(|| ParseError::new("its list of storages is not a list of names"))?;
    let ranges = storage_ranges(file, at, &keys, &element_bytes)?;
    place(tensors, |storage| {
        let whole = ranges.get(storage.key).ok_or_else(|| ParseError::new(format!("storage `{}` is not in the file", storage.key)))?;
        let size = storage.dtype.bitsize() / 8;
        let view = storage.view_offset.checked_mul(size).zip(storage.len.checked_mul(size));
        let range = view.and_then(|(skip, len)| {
            let start = whole.start.checked_add(skip)?;
            Some(start..start.checked_add(len)?)
        });
        range.filter(|range| range.end <= whole.end).ok_or_else(|| ParseError::new(format!("it reaches beyond storage `{}`", storage.key)))
    })
}

fn storage_ranges<'a>(
    file: &[u8],
    mut at: usize,
    keys: &[&'a str],
    element_bytes: &HashMap<&str, usize>,
) -> Result<HashMap<&'a str, Range<usize>>, ParseError> {
    let found = file.len() as u64;
    let mut ranges = HashMap::new();
    for &key in keys {
        let size = *element_bytes.get(key).ok_or_else(|| ParseError::new(format!("nothing uses its storage `{key}`")))?;
        let header = file.get(at..).and_then(|rest| rest.first_chunk::<8>());
        let len = u64::from_le_bytes(*header.ok_or(ParseError::Truncated { expected: at as u64 + 8, found })?);
        let start = at + 8;
        let end = usize::try_from(len).ok().and_then(|len| start.checked_add(len.checked_mul(size)?));
        let end = end.ok_or_else(|| ParseError::new(format!("the length of storage `{key}` overflows")))?;
        if end > file.len() {
            return Err(ParseError::Truncated { expected: end as u64, found });
        }
        ranges.insert(key, start..end);
        at = end;
    }
    Ok(ranges)
}
