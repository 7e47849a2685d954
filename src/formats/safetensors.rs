//! safetensors: parsing a header into places, and writing.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};

use ::safetensors::tensor::{Metadata, SafeTensorError, SafeTensors, TensorInfo};
use candle_core::Tensor;

use super::view::row_major;
use super::{Dtype, FormatError, ParseError, Placed, file_dtype, tensor_bytes};
use crate::json;

/// Where each tensor lies in a file with these bytes.
///
/// # Errors
/// When the header is not valid or the file is shorter or longer than it says.
pub fn parse(file: &[u8]) -> Result<BTreeMap<String, Placed>, ParseError> {
    let (header_len, metadata) = SafeTensors::read_metadata(file).map_err(|error| explain(file, &error))?;
    let data_start = 8 + header_len;
    json::value(&file[8..data_start]).map_err(|error| ParseError::new(format!("its header: {error}")))?;
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let strides = row_major(&info.shape).ok_or_else(|| ParseError::new(format!("tensor `{name}` overflows")))?;
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let placed = Placed::new(info.dtype, info.shape.clone(), strides, range, 0).map_err(|error| in_tensor(&name, error))?;
            Ok((name, placed))
        })
        .collect()
}

/// The tensors of a file in memory: name -> (dtype, shape, bytes).
///
/// # Errors
/// What is wrong with the file, in words.
#[allow(clippy::type_complexity, reason = "a name for it would say no more")]
pub fn views(file: &[u8]) -> Result<BTreeMap<String, (Dtype, Vec<usize>, &[u8])>, String> {
    match parse(file) {
        Ok(placed) => Ok(placed.into_iter().map(|(name, p)| (name, (p.dtype, p.shape, &file[p.bytes]))).collect()),
        Err(ParseError::Malformed(reason)) => Err(reason),
        Err(ParseError::Truncated { expected, found }) => Err(format!("{found} bytes of {expected}")),
    }
}

pub(super) fn in_tensor(name: &str, error: ParseError) -> ParseError {
    match error {
        ParseError::Malformed(reason) => ParseError::Malformed(format!("tensor `{name}`: {reason}")),
        other @ ParseError::Truncated { .. } => other,
    }
}

/// A cut-off file is the common accident: say how many bytes there should be.
fn explain(file: &[u8], error: &SafeTensorError) -> ParseError {
    let found = file.len() as u64;
    let Some(header_len) = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)) else {
        return ParseError::Truncated { expected: 8, found };
    };
    let data_start = header_len.saturating_add(8);
    let looks_like_header = file.get(8) == Some(&b'{') && header_len <= 100_000_000;
    if looks_like_header && data_start > found {
        return ParseError::Truncated { expected: data_start, found };
    }
    let header = file.get(8..data_start as usize).and_then(|h| json::value(h).ok());
    let last_byte = header
        .as_ref()
        .and_then(|h| h.as_object())
        .and_then(|h| h.values().filter_map(|info| info.get("data_offsets")?.get(1)?.as_u64()).max());
    match (error, last_byte.and_then(|last| last.checked_add(data_start))) {
        (SafeTensorError::MetadataIncompleteBuffer, Some(expected)) if expected > found => ParseError::Truncated { expected, found },
        _ => ParseError::new(error.to_string()),
    }
}

/// A safetensors file of these tensors, with the metadata `format: pt` that Hugging Face's loaders ask for. Equal tensors give equal bytes.
///
/// # Errors
/// When a tensor cannot be read from its device or has a dtype that the format lacks.
pub fn to_bytes(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>, FormatError> {
    let fail = |name: &str, reason: String| FormatError::Write { name: name.to_owned(), reason };
    let mut announced = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let dtype = file_dtype(tensor.dtype()).ok_or_else(|| fail(name, format!("dtype {:?} cannot be written", tensor.dtype())))?;
        announced.push((name.clone(), dtype, tensor.dims().to_vec()));
    }
    // Wide types first, as the library does: each tensor is then aligned to its own type.
    announced.sort_by_key(|(_, dtype, _)| std::cmp::Reverse(*dtype));
    let mut file = Vec::new();
    write_streaming(&mut file, &announced, |i, out| out.write_all(&tensor_bytes(&tensors[&announced[i].0]).map_err(io::Error::other)?))
        .map_err(|e| fail("(any)", e.to_string()))?;
    Ok(file)
}

/// Name, dtype and shape of a tensor that is about to be written.
pub type Announced = (String, Dtype, Vec<usize>);

/// The start of a safetensors file in which these tensors stand in the order given: the header and its length. Their types must not become
/// wider along it.
///
/// # Errors
/// When sizes overflow.
pub fn header(tensors: &[Announced]) -> io::Result<Vec<u8>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
    let mut end = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for (name, dtype, shape) in tensors {
        let start = end;
        end = num_bytes(*dtype, shape).and_then(|n| n.checked_add(start)).ok_or_else(|| invalid(format!("tensor `{name}` overflows")))?;
        infos.push((name.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (start, end) }));
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(|e| invalid(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}

fn num_bytes(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(dtype.bitsize() / 8, |n, &d| n.checked_mul(d))
}

/// The tensors of a header (without its length), in the order in which they stand one behind the other.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse_header(json: &[u8]) -> Result<Vec<Announced>, String> {
    let metadata: Metadata = json::read(json).map_err(|e| e.to_string())?;
    let infos = metadata.tensors();
    let named = |name: String| infos.get(&name).map(|info| (name, info.dtype, info.shape.clone()));
    Ok(metadata.offset_keys().into_iter().filter_map(named).collect())
}

/// Writes a safetensors file whose content is made while it is written: `fill(i, out)` writes the bytes of tensor `i`. Tensors stand in
/// the file in the order given; their types must not become wider along it.
///
/// # Errors
/// When writing fails, sizes overflow, or a tensor's content has not the announced length.
pub fn write_streaming<W: Write>(
    out: &mut W,
    tensors: &[Announced],
    mut fill: impl FnMut(usize, &mut Counted<'_, W>) -> io::Result<()>,
) -> io::Result<()> {
    out.write_all(&header(tensors)?)?;
    for (i, (name, dtype, shape)) in tensors.iter().enumerate() {
        let mut counted = Counted { out, num_bytes: 0 };
        fill(i, &mut counted)?;
        if Some(counted.num_bytes) != num_bytes(*dtype, shape) {
            let reason = format!("tensor `{name}` has {} bytes, announced as {dtype:?} {shape:?}", counted.num_bytes);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
    }
    out.flush()
}

/// Counts what is written through it.
#[derive(Debug)]
pub struct Counted<'a, W> {
    out: &'a mut W,
    num_bytes: usize,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.num_bytes += n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn two() -> BTreeMap<String, Tensor> {
        let a = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        BTreeMap::from([("b".to_owned(), a.clone()), ("a".to_owned(), a.to_dtype(DType::F16).unwrap().t().unwrap())])
    }

    #[test]
    fn written_file_parses_to_the_same_shapes_and_bytes_each_time() {
        let file = to_bytes(&two()).unwrap();
        assert_eq!(file, to_bytes(&two()).unwrap());
        let placed = parse(&file).unwrap();
        assert_eq!(placed["a"].shape, [3, 2]);
        assert_eq!(file[placed["b"].bytes.clone()], tensor_bytes(&two()["b"]).unwrap());
    }

    #[test]
    fn streamed_file_parses_and_a_wrong_length_is_refused() {
        let tensors = [("a".to_owned(), Dtype::F16, vec![2, 3]), ("b".to_owned(), Dtype::F32, vec![1])];
        let mut file = Vec::new();
        write_streaming(&mut file, &tensors, |i, out| out.write_all(&vec![i as u8; [12, 4][i]])).unwrap();
        let placed = parse(&file).unwrap();
        assert_eq!(file[placed["b"].bytes.clone()], [1; 4]);
        assert!(write_streaming(&mut Vec::new(), &tensors, |_, out| out.write_all(&[0; 12])).is_err());
    }

    #[test]
    fn file_cut_at_any_byte_is_refused_without_a_panic() {
        let file = to_bytes(&two()).unwrap();
        for len in 0..file.len() {
            assert!(parse(&file[..len]).is_err(), "{len}");
        }
        assert_eq!(
            parse(&file[..file.len() - 5]),
            Err(ParseError::Truncated { expected: file.len() as u64, found: file.len() as u64 - 5 })
        );
        assert_eq!(parse(&file[..20]).map_err(|e| matches!(e, ParseError::Truncated { .. })), Err(true));
    }

    #[test]
    fn file_with_any_byte_changed_is_refused_or_read_within_its_bounds() {
        let file = to_bytes(&two()).unwrap();
        for i in 0..file.len() {
            for value in [0, b'"', b'9', 0xff] {
                let mut broken = file.clone();
                broken[i] = value;
                if let Ok(placed) = parse(&broken) {
                    assert!(placed.values().all(|p| p.bytes.end <= broken.len()));
                }
            }
        }
    }
}
