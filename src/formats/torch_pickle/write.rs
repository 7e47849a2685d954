//! Writes a dictionary of f32 tensors as `torch.save` would: zip, pickle protocol 2.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};

use candle_core::{DType, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::super::view::row_major;
use super::super::{FormatError, tensor_bytes};

/// Alignment of the storages in the file (bytes), as `torch.save` has it.
const ALIGNMENT: u16 = 64;

/// The bytes of a `pytorch_model.bin` with these tensors as f32. Equal tensors give equal bytes.
///
/// # Errors
/// When a tensor cannot be read from its device or is not a float.
pub fn to_bytes(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>, FormatError> {
    let fail = |name: &str, reason: String| FormatError::Write { name: name.to_owned(), reason };
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut entry = |name: &str, bytes: &[u8]| -> zip::result::ZipResult<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .with_alignment(ALIGNMENT)
            .large_file(bytes.len() as u64 >= u64::from(u32::MAX));
        zip.start_file(format!("pytorch_model/{name}"), options)?;
        Ok(zip.write_all(bytes)?)
    };
    entry("data.pkl", &pickle(tensors)).map_err(|e| fail("data.pkl", e.to_string()))?;
    entry("byteorder", b"little").map_err(|e| fail("byteorder", e.to_string()))?;
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        if !tensor.dtype().is_float() {
            return Err(fail(name, format!("dtype {:?} is not a float", tensor.dtype())));
        }
        let bytes = tensor.to_dtype(DType::F32).and_then(|t| tensor_bytes(&t)).map_err(|e| fail(name, e.to_string()))?;
        entry(&format!("data/{i}"), &bytes).map_err(|e| fail(name, e.to_string()))?;
    }
    entry("version", b"3\n").map_err(|e| fail("version", e.to_string()))?;
    Ok(zip.finish().map_err(|e| fail("(archive)", e.to_string()))?.into_inner())
}

/// `OrderedDict([(name, _rebuild_tensor_v2(storage i, 0, shape, strides, False, OrderedDict())), ...])`
fn pickle(tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let mut out = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        text(&mut out, name);
        out.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend_from_slice(b"ctorch\nFloatStorage\n");
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        int(&mut out, tensor.elem_count());
        out.extend_from_slice(b"tQ");
        int(&mut out, 0);
        tuple(&mut out, tensor.dims());
        tuple(&mut out, &row_major(tensor.dims()).unwrap_or_default());
        out.extend_from_slice(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend_from_slice(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// LONG1 with nine bytes: a non-negative number of 64 bits.
fn int(out: &mut Vec<u8>, value: usize) {
    out.extend_from_slice(b"\x8a\x09");
    out.extend_from_slice(&(value as u64).to_le_bytes());
    out.push(0);
}

fn tuple(out: &mut Vec<u8>, values: &[usize]) {
    out.push(b'(');
    values.iter().for_each(|&v| int(out, v));
    out.push(b't');
}
