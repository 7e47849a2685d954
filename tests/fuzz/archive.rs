//! Archives and pickles as `torch.save` makes them, and as nobody should.

use std::io::{Cursor, Read, Write};

use glmddp::formats::torch_pickle;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::mutate::{Dice, Folder};
use crate::tensors;

pub const MODEL: &str = "model.bin";
/// Where the entries of [`MODEL`] stand in a folder before [`zip_model`].
const ENTRIES: &str = "entries/";

fn options() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Stored)
}

pub fn zip_of<'a>(entries: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(name, options()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// Joins `entries/*` to the archive [`MODEL`].
pub fn zip_model(mut folder: Folder, _: &mut Dice) -> Folder {
    let entries = folder.split_off(ENTRIES);
    let named = entries.iter().filter_map(|(name, bytes)| Some((name.strip_prefix(ENTRIES)?, bytes.as_slice())));
    folder.insert(MODEL.to_owned(), zip_of(named));
    folder
}

/// A whole file of `torch.save`.
pub fn archive() -> Vec<u8> {
    torch_pickle::to_bytes(&tensors(&[("a.weight", &[2, 3]), ("b", &[4]), ("scalar", &[])])).unwrap()
}

/// The same, entry by entry.
pub fn entries() -> Folder {
    let mut zip = ZipArchive::new(Cursor::new(archive())).unwrap();
    let mut folder = Folder::new();
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        folder.insert(format!("{ENTRIES}{}", entry.name().unwrap()), bytes);
    }
    folder
}

/// A whole archive around `pickle`, with a storage of 64 zeros called `0`.
pub fn around(pickle: &[u8]) -> Folder {
    let entry = |name: &str| format!("{ENTRIES}m/{name}");
    Folder::from([(entry("data.pkl"), pickle.to_vec()), (entry("byteorder"), b"little".to_vec()), (entry("data/0"), vec![0; 64])])
}

pub fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

pub fn int(value: u64) -> Vec<u8> {
    [b"\x8a\x09", &value.to_le_bytes()[..], b"\0"].concat()
}

fn tuple(values: &[u64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|&v| int(v)).collect(), b"t".to_vec()].concat()
}

/// A tensor of storage `0`, which is said to have `len` elements.
pub fn tensor(len: u64, offset: u64, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        int(len),
        b"tQ".to_vec(),
        int(offset),
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

/// A dictionary with one tensor `a`.
pub fn dict_of(tensor: &[u8]) -> Vec<u8> {
    [b"\x80\x02}", &text("a")[..], tensor, b"s."].concat()
}

/// `a` is what `os.system(command)` and its like give.
pub fn calling(module: &str, name: &str, argument: &str) -> Vec<u8> {
    let call = [format!("c{module}\n{name}\n(").into_bytes(), text(argument), b"tR".to_vec()].concat();
    dict_of(&call)
}

/// A long name, remembered, under which one tensor stands `times` times.
pub fn repeated_name(name_bytes: usize, times: usize) -> Vec<u8> {
    let mut pickle = b"\x80\x02".to_vec();
    pickle.extend(text(&"n".repeat(name_bytes)));
    pickle.extend(b"q\x00".iter().chain(&tensor(16, 0, &[4], &[1])).chain(b"q\x01}("));
    pickle.extend(b"h\x00h\x01".repeat(times));
    pickle.extend(b"u.");
    pickle
}

/// Pickles that are refused, or read without harm.
pub fn nasty_pickles() -> Vec<Vec<u8>> {
    let t = |len, offset, shape: &[u64], strides: &[u64]| dict_of(&tensor(len, offset, shape, strides));
    vec![
        t(16, 0, &[4, 4], &[4, 1]),
        t(16, 4, &[2, 2], &[1, 2]),
        t(16, 0, &[1 << 40], &[0]),
        t(16, 0, &[1 << 32, 1 << 32], &[0, 0]),
        t(16, u64::MAX, &[1], &[1]),
        t(u64::MAX, 0, &[4], &[1]),
        t(1 << 62, 0, &[1 << 62], &[1]),
        t(16, 0, &[1; 64], &[1; 64]),
        t(16, 0, &[0, u64::MAX], &[u64::MAX, u64::MAX]),
        calling("os", "system", "exit 1"),
        calling("posix", "system", "exit 1"),
        calling("builtins", "eval", "1"),
        calling("torch", "load", "../outside/model.bin"),
        calling("collections", "OrderedDict", "x"),
        repeated_name(1000, 500),
        // A list that holds itself, and tuples of tuples of it.
        [b"\x80\x02]q\x00h\x00a".to_vec(), b"h\x00h\x00\x86q\x00".repeat(500), b".".to_vec()].concat(),
        [b"\x80\x02".to_vec(), b"(".repeat(20_000), b"t".repeat(20_000), b".".to_vec()].concat(),
        [b"\x80\x02".to_vec(), b"]".repeat(20_000), b"a".repeat(19_999), b".".to_vec()].concat(),
        [b"\x80\x02}".to_vec(), b")".repeat(20_000), b".".to_vec()].concat(),
        // Lengths beyond the file.
        b"\x80\x02X\xff\xff\xff\xff.".to_vec(),
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.".to_vec(),
        b"\x80\x02\x8b\xff\xff\xff\xff.".to_vec(),
        b"\x80\x02X\x02\0\0\0\xff\xfeq\x00.".to_vec(),
    ]
}

/// Archives that are no file of tensors.
pub fn nasty_archives() -> Vec<Vec<u8>> {
    let pickle = dict_of(&tensor(16, 0, &[4], &[1]));
    let with = |storage: &str| zip_of([("m/data.pkl", &pickle[..]), (storage, &[0; 64])]);
    let mut linked = ZipWriter::new(Cursor::new(Vec::new()));
    linked.add_symlink("m/data.pkl", "../outside/model.bin", options()).unwrap();
    // Claims of the last record: as many entries, as large a directory, as far behind.
    let claim = |at: usize, bytes: &[u8]| {
        let mut archive = with("m/data/0");
        let end = archive.len() - 22 + at;
        archive[end..end + bytes.len()].copy_from_slice(bytes);
        archive
    };
    vec![
        with("m/data/0"),
        with("../outside/data/0"),
        with("/m/data/0"),
        with("m/../../outside/model.bin"),
        zip_of([("a/data.pkl", &pickle[..]), ("b/data.pkl", b"."), ("a/data/0", &[0; 64])]),
        zip_of([("data.pkl", &pickle[..])]),
        zip_of((0..300).map(|_| ("", &[][..])).take(1)),
        linked.finish().unwrap().into_inner(),
        claim(8, &[0xff; 4]),
        claim(12, &[0xff; 4]),
        claim(16, &[0xff; 4]),
        claim(8, &[0xff; 12]),
        bomb(),
    ]
}

/// A compressed entry of much more than its size, by its header; the program never inflates.
fn bomb() -> Vec<u8> {
    let mut archive = zip_of([("m/data.pkl", &[b'.'; 100][..])]);
    let central = archive.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    archive[8] = 8; // deflate
    archive[central + 10] = 8;
    archive[22..26].copy_from_slice(&u32::MAX.to_le_bytes());
    archive[central + 24..central + 28].copy_from_slice(&u32::MAX.to_le_bytes());
    archive
}

/// The format before the archives: five pickles, then the storages.
pub fn legacy() -> Vec<u8> {
    let mut file = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}".to_vec();
    file.extend(text("little_endian"));
    file.extend(b"\x88s.");
    let view = tensor(16, 0, &[2, 2], &[2, 1]);
    file.extend(dict_of(&view));
    file.extend(b"\x80\x02]");
    file.extend(text("0"));
    file.extend(b"a.");
    file.extend(16u64.to_le_bytes());
    file.extend([0; 64]);
    file
}
