//! The zip format of `torch.save`: `NAME/data.pkl` and one uncompressed entry a storage.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

use super::super::{ParseError, Placed};
use super::{machine, place};

pub fn is_zip(file: &[u8]) -> bool {
    file.starts_with(b"PK\x03\x04")
}

/// Where each tensor lies in a file with these bytes.
///
/// # Errors
/// When the archive is cut off, compressed, encrypted or not one of `torch.save`, or its pickle is not a dictionary of tensors.
pub fn parse_zip(file: &[u8]) -> Result<BTreeMap<String, Placed>, ParseError> {
    let entries = entries(file)?;
    let mut pickles = entries.iter().filter(|(name, _)| name.ends_with("/data.pkl"));
    let (name, pickle) =
        pickles.next().ok_or_else(|| ParseError::new("the archive holds no `data.pkl`, so `torch.save` did not make it"))?;
    if let Some((other, _)) = pickles.next() {
        return Err(ParseError::new(format!("the archive holds `{name}` and `{other}`, and `torch.save` writes one")));
    }
    let root = name.strip_suffix("data.pkl").unwrap_or_default();
    if let Some(order) = entries.get(&format!("{root}byteorder")).map(|range| &file[range.clone()])
        && order != b"little"
    {
        return Err(ParseError::new(format!("its byte order is {:?}, expected little", String::from_utf8_lossy(order))));
    }
    let tensors = machine::unpickle(&file[pickle.clone()])?.tensors()?;
    place(tensors, |storage| {
        let name = format!("{root}data/{}", storage.key);
        let range = entries.get(&name).ok_or_else(|| ParseError::new(format!("the archive holds no entry `{name}`")))?;
        let expected = storage.len.checked_mul(storage.dtype.bitsize() / 8);
        if expected != Some(range.len()) {
            return Err(ParseError::new(format!(
                "entry `{name}` has {} bytes, expected {} of {:?}",
                range.len(),
                storage.len,
                storage.dtype
            )));
        }
        Ok(range.clone())
    })
}

/// Byte ranges of all entries by name.
fn entries(file: &[u8]) -> Result<BTreeMap<String, Range<usize>>, ParseError> {
    let broken = |error: zip::result::ZipError| ParseError::new(format!("{error} (file of {} bytes)", file.len()));
    let mut archive = ZipArchive::new(Cursor::new(file)).map_err(broken)?;
    let mut ranges = BTreeMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(ParseError::new(format!("entry `{name}` is compressed or encrypted, which `torch.save` never does")));
        }
        let range = entry.data_start().and_then(|start| {
            let (start, len) = (usize::try_from(start).ok()?, usize::try_from(entry.size()).ok()?);
            Some(start..start.checked_add(len)?)
        });
        match range.filter(|range| range.end <= file.len()) {
            Some(range) => ranges.insert(name, range),
            None => return Err(ParseError::new(format!("entry `{name}` reaches beyond the end of the file"))),
        };
    }
    Ok(ranges)
}
