//! Files of tensors: safetensors, `torch.save` now and before, whole and pickle by pickle.

use std::path::Path;

use candle_core::{DType, Device};
use glmddp::formats::{TensorFile, safetensors};

use crate::archive::{self, MODEL};
use crate::harness::{Bound, Target, as_it_is, fuzz, read_one};
use crate::mutate::{Dice, Folder};
use crate::tensors;

/// A byte of a pickle makes one value, or one object in the arena; a JSON value of two bytes in a header makes one of 72, and vectors double.
const BOUND: Bound = Bound { constant: 1 << 19, factor: 256 };
/// Tensors of a file whose content is read: each may be as large as the file.
const MAX_READ: usize = 32;

const PICKLE_WORDS: &[&[u8]] = &[
    b"(",
    b"t",
    b")",
    b"R",
    b"Q",
    b"s",
    b"u",
    b"]",
    b"}",
    b"a",
    b"e",
    b"d",
    b"l",
    b"2",
    b"0",
    b"1",
    b"b",
    b"q\x00",
    b"h\x00",
    b"r\0\0\0\x01",
    b"j\0\0\0\x01",
    b"\x94",
    b"\x85",
    b"\x86",
    b"\x87",
    b"N",
    b"\x88",
    b"K\xff",
    b"M\xff\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\x01\xff",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"\x8c\x01a",
    b"\x8d\0\0\0\0\0\0\0\x80",
    b"\x93",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nBoolStorage\n",
    b"ctorch\nSize\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch._tensor\nTensor\n",
    b".",
    b"\x80\x02",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    b"G\0\0\0\0\0\0\0\0",
    b"h\x00h\x00\x86q\x00",
];
pub const HEADER_WORDS: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"a\":",
    b"{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}",
    b"\"dtype\":\"F4\"",
    b"\"dtype\":\"F8_E4M3\"",
    b"\"BOOL\"",
    b"\"U64\"",
    b"\"I8\"",
    b"\"F64\"",
    b"\"shape\":[0]",
    b"\"shape\":[]",
    b"\"shape\":[4294967296,4294967296]",
    b"\"data_offsets\":[0,18446744073709551615]",
    b"\"__metadata__\":{\"format\":\"pt\"},",
    b"\\u0000",
    b"\xff",
    b"0,",
];
const ZIP_WORDS: &[&[u8]] = &[
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"\xff\xff\xff\xff",
    b"\x01\x00\x10\x00",
    b"../outside/",
    b"data.pkl",
    b"data/0",
    b"/",
];

fn file(bytes: Vec<u8>) -> Folder {
    Folder::from([(MODEL.to_owned(), bytes)])
}

/// Opens the file and reads what it holds, in each way that the program does.
fn read(dir: &Path) -> Result<(), String> {
    let file = TensorFile::open(&dir.join(MODEL)).map_err(|e| e.to_string())?;
    for name in file.names().take(MAX_READ) {
        let view = file.get(name).map_err(|e| e.to_string())?;
        let bytes = view.to_bytes();
        assert_eq!(bytes.len(), view.num_elements() * view.dtype().bitsize() / 8);
        if let Ok(tensor) = view.to_tensor(DType::F32, &Device::Cpu) {
            assert_eq!(tensor.dims(), view.shape());
        }
    }
    Ok(())
}

fn target(name: &'static str, seeds: Vec<Folder>, words: &[&'static [u8]], assemble: fn(Folder, &mut Dice) -> Folder) -> Target<'static> {
    Target { name, executions: 3000, seeds, words: words.to_vec(), assemble, bound: BOUND, read: Box::new(read) }
}

fn whole_safetensors() -> Vec<u8> {
    safetensors::to_bytes(&tensors(&[("a", &[2, 3]), ("b.weight", &[4]), ("empty", &[0]), ("scalar", &[])])).unwrap()
}

fn with_header(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

/// Headers that lie.
fn nasty_headers() -> Vec<Vec<u8>> {
    let one = |info: &str| with_header(&format!("{{\"a\":{{{info}}}}}"), 16);
    let deep = |open: &str, n: usize| with_header(&open.repeat(n), 0);
    vec![
        one("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]"),
        one("\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]"),
        one("\"dtype\":\"F32\",\"shape\":[0,18446744073709551615,2],\"data_offsets\":[0,0]"),
        one("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]"),
        one("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,18446744073709551615]"),
        one("\"dtype\":\"F4\",\"shape\":[32],\"data_offsets\":[0,16]"),
        one("\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]"),
        one("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]"),
        deep("{\"a\":", 50_000),
        deep("[", 200_000),
        with_header(&format!("{{\"__metadata__\":{{\"x\":{}1{}}}}}", "[".repeat(500), "]".repeat(500)), 0),
        [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        [&100_000_000u64.to_le_bytes()[..], b"{}"].concat(),
        b"\x02\0\0\0\0\0\0\0{}".to_vec(),
        vec![0; 7],
    ]
}

/// The header's length made to hold, but for one input in four.
fn right_length(mut folder: Folder, dice: &mut Dice) -> Folder {
    if let Some(bytes) = folder.get_mut(MODEL).filter(|bytes| bytes.len() > 8 && !dice.one_in(4)) {
        let end = bytes.iter().rposition(|&b| b == b'}').map_or(bytes.len(), |at| at + 1);
        let len = (end.saturating_sub(8) as u64).to_le_bytes();
        bytes[..8].copy_from_slice(&len);
    }
    folder
}

#[test]
fn safetensors_from_anyone_is_read_or_refused() {
    let seeds = std::iter::once(whole_safetensors()).chain(nasty_headers()).map(file).collect();
    fuzz(&target("safetensors", seeds, HEADER_WORDS, right_length));
}

#[test]
fn pickle_from_anyone_is_read_or_refused() {
    let seeds = std::iter::once(archive::entries()).chain(archive::nasty_pickles().iter().map(|pickle| archive::around(pickle))).collect();
    fuzz(&target("pickle", seeds, PICKLE_WORDS, archive::zip_model));
}

#[test]
fn archive_from_anyone_is_read_or_refused() {
    let seeds = std::iter::once(archive::archive()).chain(archive::nasty_archives()).map(file).collect();
    fuzz(&target("zip", seeds, ZIP_WORDS, as_it_is));
}

#[test]
fn legacy_pickles_from_anyone_are_read_or_refused() {
    fuzz(&target("legacy pickle", vec![file(archive::legacy())], PICKLE_WORDS, as_it_is));
}

/// The reader's answer to one file.
pub fn opened(bytes: Vec<u8>) -> Result<(), String> {
    read_one(&target("file", Vec::new(), &[], as_it_is), &file(bytes))
}

/// The reader's answer to a pickle in an archive that is otherwise whole.
pub fn unpickled(pickle: &[u8]) -> Result<(), String> {
    let folder = archive::zip_model(archive::around(pickle), &mut Dice::new(0, "", 0));
    opened(folder[MODEL].clone())
}

#[test]
fn pickle_that_asks_for_code_is_refused_by_its_name_and_runs_nothing() {
    let mark = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz-executed");
    let _ = std::fs::remove_file(&mark);
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "check_output"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("torch", "load"),
    ] {
        let error = unpickled(&archive::calling(module, name, &format!("touch {}", mark.display()))).unwrap_err();
        assert!(error.contains(&format!("asks for `{module}.{name}`")), "{error}");
    }
    assert!(!mark.exists());
}
