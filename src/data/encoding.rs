//! Which encoding a file that is not UTF-8 may have, and the command that converts it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::shell;

/// Bytes of a file's beginning that decide whether it is UTF-8.
const HEAD_BYTES: u64 = 1 << 16;

/// UTF-16 or UTF-32 by the first bytes of a file, as `iconv` names it: by a byte order mark, or by where the zero bytes of ASCII stand.
pub fn wide(head: &[u8]) -> Option<&'static str> {
    match head {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => return Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => return Some("UTF-16"),
        _ => {}
    }
    let zeros = |parity: usize| head.iter().skip(parity).step_by(2).filter(|&&byte| byte == 0).count();
    // Even Chinese text has commas, quotes and line ends; a lone zero byte is another fault.
    let enough = head.len().div_ceil(16);
    match (zeros(0), zeros(1)) {
        (0, n) if n >= enough.max(1) => Some("UTF-16LE"),
        (n, 0) if n >= enough.max(1) => Some("UTF-16BE"),
        _ => None,
    }
}

/// The command that writes `path` in UTF-8 to a file beside it.
pub fn conversion(from: &str, path: &Path) -> String {
    format!("iconv -f {from} -t UTF-8 {} > {}", shell::quoted_path(path), shell::quoted_path(&beside(path, "utf8")))
}

/// `rows.csv` -> `rows.utf8.csv`: a name for a changed copy.
pub fn beside(path: &Path, what: &str) -> PathBuf {
    let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    path.with_extension(format!("{what}{extension}"))
}

/// What to do with a file in which `bytes`, which are not UTF-8, were found.
pub fn hint(bytes: &[u8], path: &Path) -> String {
    if has_utf8_lines(path) {
        return "other rows of the file are UTF-8: correct this one".to_owned();
    }
    let (from, name) = match wide(bytes) {
        Some(from) => (from, from),
        None if is_gb18030(bytes) => ("GB18030", "GB18030 (Chinese Windows)"),
        None => ("ISO-8859-1", "Latin-1"),
    };
    format!("`{}` converts the file if it is in {name}", conversion(from, path))
}

/// Whether the file's first lines have one of UTF-8 that is not plain ASCII; text in another encoding hardly ever looks so.
fn has_utf8_lines(path: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut head));
    read.is_ok() && head.split(|&byte| byte == b'\n').any(|line| !line.is_ascii() && std::str::from_utf8(line).is_ok())
}

/// Whether `bytes` have the form of GB18030: one, two or four bytes a character.
fn is_gb18030(mut bytes: &[u8]) -> bool {
    loop {
        bytes = match bytes {
            [] => return true,
            [0x00..=0x7f, rest @ ..]
            | [0x81..=0xfe, 0x40..=0x7e | 0x80..=0xfe, rest @ ..]
            | [0x81..=0xfe, b'0'..=b'9', 0x81..=0xfe, b'0'..=b'9', rest @ ..] => rest,
            _ => return false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_bytes_mean_utf_16_and_other_bytes_what_they_form() {
        let le: Vec<u8> = "{\"类\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let be: Vec<u8> = "{\"类\": 1}".encode_utf16().flat_map(u16::to_be_bytes).collect();
        assert_eq!(
            [wide(&le), wide(&be), wide(b"\xff\xfea\0"), wide(b"\xfe\xff\0a")],
            ["UTF-16LE", "UTF-16BE", "UTF-16", "UTF-16"].map(Some)
        );
        assert_eq!([wide(b"\xff\xfe\0\0a\0\0\0"), wide(b"{\"a\"}"), wide(b"")], [Some("UTF-32"), None, None]);
        assert!(is_gb18030(b"a\xc0\xe0\xd0\xcd\x81\x30\x81\x30") && !is_gb18030(b"caf\xe9\"") && !is_gb18030(b"\xff\xc0"));
    }

    #[test]
    fn conversion_names_a_file_beside_with_the_same_extension() {
        let of = |path: &str| conversion("UTF-16", Path::new(path));
        assert_eq!(of("d/my rows.jsonl"), "iconv -f UTF-16 -t UTF-8 'd/my rows.jsonl' > 'd/my rows.utf8.jsonl'");
        assert_eq!(of("-rows"), "iconv -f UTF-16 -t UTF-8 ./-rows > ./-rows.utf8");
    }
}
