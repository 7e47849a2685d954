//! PyTorch's `.bin` files (`torch.save`): the zip format, the one before it, and a writer of the zip format.
//!
//! The pickle inside is run by a small machine that knows dictionaries, numbers, text and the few constructors that a file of
//! tensors needs; any other name is refused, and nothing is ever executed.

use std::collections::BTreeMap;

use super::safetensors::in_tensor;
use super::{ParseError, Placed};

mod legacy;
mod machine;
mod write;
mod zipped;

pub use legacy::{is_legacy, parse_legacy};
pub use write::to_bytes;
pub use zipped::{is_zip, parse_zip};

/// Places each tensor of a top-level dictionary. `storage` gives a storage's byte range in the file.
fn place<'a>(
    tensors: BTreeMap<&'a str, machine::TensorRecord<'a>>,
    mut storage: impl FnMut(&machine::StorageRef<'a>) -> Result<std::ops::Range<usize>, ParseError>,
) -> Result<BTreeMap<String, Placed>, ParseError> {
    tensors
        .into_iter()
        .map(|(name, t)| {
            let range = storage(&t.storage).map_err(|error| in_tensor(name, error))?;
            let placed = Placed::new(t.storage.dtype, t.shape, t.strides, range, t.offset).map_err(|error| in_tensor(name, error))?;
            Ok((name.to_owned(), placed))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::tensor_bytes;
    use candle_core::{Device, Tensor};

    fn two() -> BTreeMap<String, Tensor> {
        let a = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        BTreeMap::from([("b.weight".to_owned(), a.clone()), ("a".to_owned(), a.t().unwrap())])
    }

    /// A pickle of `{"a": VALUE}`.
    fn dictionary(value: &[u8]) -> Vec<u8> {
        [b"\x80\x02}X\x01\x00\x00\x00a", value, b"s."].concat()
    }

    const TENSOR: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89NtR";

    fn refusal(pickle: &[u8]) -> String {
        match machine::unpickle(pickle).and_then(machine::Unpickled::tensors) {
            Err(ParseError::Malformed(reason)) => reason,
            other => format!("{other:?}"),
        }
    }

    /// A legacy file with the given object pickle and one storage of `len` elements called "0".
    fn legacy(object: &[u8], len: u64, bytes: &[u8]) -> Vec<u8> {
        let head: &[u8] =
            b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}X\x0d\x00\x00\x00little_endian\x88s.";
        [head, object, b"\x80\x02](X\x01\x00\x00\x000e.", &len.to_le_bytes(), bytes].concat()
    }

    #[test]
    fn written_file_parses_to_the_same_shapes_and_bytes_each_time() {
        let file = to_bytes(&two()).unwrap();
        assert!(is_zip(&file));
        assert_eq!(file, to_bytes(&two()).unwrap());
        let placed = parse_zip(&file).unwrap();
        assert_eq!(placed.keys().collect::<Vec<_>>(), ["a", "b.weight"]);
        for (name, tensor) in two() {
            assert_eq!(placed[&name].shape, tensor.dims());
            assert_eq!(file[placed[&name].bytes.clone()], tensor_bytes(&tensor).unwrap());
            assert_eq!(placed[&name].bytes.start % 64, 0);
        }
    }

    #[test]
    fn legacy_file_reads_views_of_storages() {
        let view: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nByteStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08(X\x01\x00\x00\x00vK\x02K\x04ttQK\x01K\x02\x85K\x01\x85\x89NtR";
        let file = legacy(&dictionary(view), 8, &[0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(is_legacy(&file));
        let placed = parse_legacy(&file).unwrap();
        assert_eq!(file[placed["a"].bytes.clone()], [3, 4]);
    }

    #[test]
    fn state_dict_with_attributes_and_other_entries_gives_its_tensors() {
        let object = [
            b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x0bcollections\x8c\x0bOrderedDict\x93\x94)R(\x8c\x01x\x4b\x05\x8c\x01a"
                .as_slice(),
            TENSOR,
            b"u}\x8c\x09_metadata}sb.",
        ]
        .concat();
        let tensors = machine::unpickle(&object).unwrap().tensors().unwrap();
        assert_eq!((tensors.len(), &tensors["a"].shape), (1, &vec![2, 3]));
    }

    #[test]
    fn pickle_that_would_run_something_is_refused_by_name() {
        assert_eq!(refusal(b"cos\nsystem\n(X\x02\x00\x00\x00lstR."), "it asks for `os.system`, which a file of tensors has no need of");
        assert!(refusal(b"\x8c\x08builtins\x8c\x04eval\x93.").contains("`builtins.eval`"));
        assert!(refusal(b"(ios\nsystem\n.").contains("operation 0x69"));
    }

    #[test]
    fn hostile_pickles_are_refused_without_recursion_or_large_memory() {
        let deep = [vec![b')'], vec![0x85; 2_000_000], vec![b'.']].concat();
        assert!(refusal(&deep).contains("operations"));
        assert!(refusal(&[b"]".as_slice(), &vec![b'('; 900_000], b"."].concat()).contains("empty stack"));
        assert!(refusal(b"X\xff\xff\xff\xffabc.").contains("cut off"));
        assert!(refusal(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.").contains("cut off"));
        assert!(refusal(b"j\xff\xff\xff\xff.").contains("not there"));
        assert!(refusal(b"(0.").contains("empty stack"));
        assert!(refusal(b"]2a.").contains("single object"));
        assert!(refusal(b"N.").contains("plain value"));
        assert!(refusal(b"}.").contains("without any"));
        let many_copies =
            [b"ctorch\nSize\nq\x000(".as_slice(), &vec![b'N'; 100_000], b"\x85q\x01", &b"h\x00h\x01R".repeat(1000), b"."].concat();
        assert!(!refusal(&many_copies).is_empty());
    }

    #[test]
    fn tensor_beyond_its_storage_is_refused_by_name() {
        let whole = legacy(&dictionary(TENSOR), 6, &[0; 24]);
        assert_eq!(parse_legacy(&whole).unwrap()["a"].bytes.len(), 24);
        let error = parse_legacy(&legacy(&dictionary(TENSOR), 5, &[0; 20])).unwrap_err();
        assert_eq!(error, ParseError::new("tensor `a`: it reaches beyond storage `0`"));
        assert!(matches!(parse_legacy(&legacy(&dictionary(TENSOR), 6, &[0; 23])), Err(ParseError::Truncated { .. })));
        assert!(parse_legacy(&legacy(&dictionary(TENSOR), u64::MAX, &[0; 24])).is_err());
    }

    #[test]
    fn files_cut_or_changed_at_any_byte_never_panic() {
        for (file, parse) in [
            (to_bytes(&two()).unwrap(), parse_zip as fn(&[u8]) -> Result<BTreeMap<String, Placed>, ParseError>),
            (legacy(&dictionary(TENSOR), 6, &[0; 24]), parse_legacy),
        ] {
            for len in 0..file.len() {
                assert!(parse(&file[..len]).is_err(), "cut to {len} bytes");
            }
            for i in 0..file.len() {
                for value in [0, 1, b'(', b'R', 0x7f, 0xff] {
                    let mut changed = file.clone();
                    changed[i] = value;
                    if let Ok(placed) = parse(&changed) {
                        assert!(placed.values().all(|p| p.bytes.end <= changed.len()));
                    }
                }
            }
        }
    }
}
