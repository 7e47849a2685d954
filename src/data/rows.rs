//! Reads the raw rows of a file one by one: JSON lines and CSV without holding the file, a JSON array whole.
//!
//! THUDM's `.json` files are JSON lines; the content decides before the extension does.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::bad_rows::{BadRows, Place};
use super::csv::{Cells, CsvFault, CsvReader, CsvRow, MAX_ROW_BYTES};
use super::encoding;
use super::error::DataError;
use super::nested;
use super::record::{Columns, Row, RowParser};
use crate::json;

/// Bytes of a file's beginning that decide about its encoding.
const SNIFFED_BYTES: usize = 64;
/// A longer first line is no beginning of an object over several lines.
const FIRST_LINE_BYTES: u64 = 1 << 12;
/// How files that are no text begin, what they are, and what to do.
const NO_TEXT: [(&[u8], &str, &str); 5] = [
    (b"PK\x03\x04", "a ZIP archive or an Excel table", "unpack it, or save the table as CSV in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel table", "save the table as CSV in UTF-8"),
    (b"\x1f\x8b", "a file that gzip compressed", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "a file that zstd compressed", "unpack it with unzstd"),
    (b"PAR1", "a Parquet file", "save its rows as JSON lines"),
];

/// How a file holds its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    JsonLines,
    /// One JSON array of objects.
    JsonArray,
    /// Comma-separated, with a header row.
    Csv,
}

/// A row as read, not yet looked into.
#[derive(Clone, Debug)]
pub struct RawRow {
    /// 1-based line or element.
    pub row: usize,
    pub(super) content: Content,
}

#[derive(Clone, Debug)]
pub(super) enum Content {
    Line(Vec<u8>),
    Element(Value),
    Cells(Result<Cells, CsvFault>),
}

enum Source {
    Lines { reader: BufReader<File>, line: usize },
    Elements(std::iter::Enumerate<std::vec::IntoIter<Value>>),
    Csv(CsvReader<BufReader<File>>),
}

/// The rows of an open file. As an iterator it gives their texts; a bad row is an error item, and the next call goes on behind it.
pub struct Rows {
    path: PathBuf,
    source: Source,
    parser: RowParser,
}

impl Rows {
    /// Opens `path` and finds its format.
    ///
    /// # Errors
    /// No such file, a directory, an empty file, an unknown format or encoding, a damaged JSON array, a CSV header that is malformed or
    /// lacks a column asked for.
    pub fn open(path: &Path, columns: &Columns) -> Result<Self, DataError> {
        let read = |source| DataError::Read { path: path.to_owned(), source };
        let mut file = open_file(path)?;
        let Sniffed { format, start, first } = sniff(&mut file, path)?;
        file.seek(SeekFrom::Start(start)).map_err(read)?;
        let mut reader = BufReader::with_capacity(1 << 16, file);
        if format == Format::JsonLines
            && let Some(hint) = one_object(&mut reader, columns).map_err(read)?
        {
            return Err(DataError::OneObject { path: path.to_owned(), hint });
        }
        reader.seek(SeekFrom::Start(start)).map_err(read)?;
        let place = if format == Format::JsonArray { Place::Element } else { Place::Line };
        let mut parser = RowParser { file: Arc::from(path), place, columns: columns.clone(), header: Vec::new() };
        let source = match format {
            Format::JsonLines => Source::Lines { reader, line: 0 },
            Format::JsonArray => Source::Elements(read_array(&mut reader, path)?.into_iter().enumerate()),
            Format::Csv => {
                let mut csv = CsvReader::new(reader, MAX_ROW_BYTES).map_err(read)?;
                let header = csv.header().map_err(read)?;
                let CsvRow { line, cells } = header.ok_or(DataError::NoRows { path: path.to_owned(), found: "blank lines" })?;
                parser.take_header(&cells, line).map_err(|error| match first {
                    b'{' => DataError::JsonInCsv { path: path.to_owned(), line, extension: "jsonl" },
                    b'[' => DataError::JsonInCsv { path: path.to_owned(), line, extension: "json" },
                    _ => DataError::BadHeader(error),
                })?;
                Source::Csv(csv)
            }
        };
        Ok(Self { path: path.to_owned(), source, parser })
    }

    /// Why a file of `num_rows` rows gave none that can be used.
    pub fn without_good(&self, num_rows: usize, bad_rows: BadRows) -> DataError {
        let path = self.path.clone();
        let found = match self.source {
            _ if num_rows > 0 => return DataError::NoGoodRows { path, bad_rows },
            Source::Lines { .. } => "blank lines",
            Source::Elements(_) => "an empty array",
            Source::Csv(_) => "a header alone",
        };
        DataError::NoRows { path, found }
    }

    pub fn parser(&self) -> &RowParser {
        &self.parser
    }

    /// The next row that is not blank.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn next_raw(&mut self) -> Result<Option<RawRow>, DataError> {
        let read = |source| DataError::Read { path: self.path.clone(), source };
        match &mut self.source {
            Source::Lines { reader, line } => loop {
                let mut bytes = Vec::new();
                if reader.read_until(b'\n', &mut bytes).map_err(read)? == 0 {
                    return Ok(None);
                }
                *line += 1;
                bytes.truncate(bytes.trim_ascii_end().len());
                if !bytes.is_empty() {
                    return Ok(Some(RawRow { row: *line, content: Content::Line(bytes) }));
                }
            },
            Source::Elements(elements) => Ok(elements.next().map(|(i, value)| RawRow { row: i + 1, content: Content::Element(value) })),
            Source::Csv(csv) => {
                let row = csv.next_row().map_err(read)?;
                Ok(row.map(|CsvRow { line, cells }| RawRow { row: line, content: Content::Cells(cells) }))
            }
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Row, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let raw = self.next_raw().transpose()?;
        Some(raw.and_then(|raw| self.parser.parse(&raw).map_err(DataError::BadRow)))
    }
}

/// Opens a file of rows for reading.
pub(super) fn open_file(path: &Path) -> Result<File, DataError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => DataError::NotFound { path: path.to_owned() },
        _ => DataError::Read { path: path.to_owned(), source },
    };
    if std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Err(DataError::IsDirectory { path: path.to_owned() });
    }
    File::open(path).map_err(failed)
}

/// How a file begins.
struct Sniffed {
    format: Format,
    /// Offset of the first byte behind a byte order mark.
    start: u64,
    /// The first byte there that is no white space.
    first: u8,
}

fn sniff(file: &mut File, path: &Path) -> Result<Sniffed, DataError> {
    let failed = |source| DataError::Read { path: path.to_owned(), source };
    let mut head = Vec::with_capacity(SNIFFED_BYTES);
    file.take(SNIFFED_BYTES as u64).read_to_end(&mut head).map_err(failed)?;
    if let Some((_, found, hint)) = NO_TEXT.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return Err(DataError::NotText { path: path.to_owned(), found, hint });
    }
    if let Some(found) = encoding::wide(&head) {
        return Err(DataError::Wide { path: path.to_owned(), found });
    }
    let start = if head.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    file.seek(SeekFrom::Start(start)).map_err(failed)?;
    let first = BufReader::new(file).bytes().find(|byte| byte.as_ref().map_or(true, |byte| !byte.is_ascii_whitespace()));
    let Some(first) = first.transpose().map_err(failed)? else {
        let found = if head.is_empty() { "an empty file" } else { "nothing but white space" };
        return Err(DataError::NoRows { path: path.to_owned(), found });
    };
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let format = match (extension.as_str(), first) {
        ("csv" | "tsv", _) => Format::Csv,
        (_, b'[') => Format::JsonArray,
        (_, b'{') | ("json" | "jsonl" | "ndjson", _) => Format::JsonLines,
        _ => {
            let found = if first.is_ascii_graphic() { format!("`{}`", first as char) } else { format!("byte 0x{first:02x}") };
            return Err(DataError::UnknownFormat { path: path.to_owned(), found });
        }
    };
    Ok(Sniffed { format, start, first })
}

/// What to write instead of a file that is one object over several lines, with rows or turns in it.
fn one_object(reader: &mut BufReader<File>, columns: &Columns) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    reader.by_ref().take(FIRST_LINE_BYTES).read_until(b'\n', &mut line)?;
    if line.len() as u64 == FIRST_LINE_BYTES || !json::value(&line).is_err_and(|error| error.is_eof()) {
        return Ok(None);
    }
    let whole = json::from_reader(line.as_slice().chain(reader));
    let rest = whole.as_ref().ok().and_then(Value::as_object).filter(|object| !object.contains_key(&columns.prompt));
    Ok(rest.and_then(|object| nested::in_object(object, columns)))
}

fn read_array(reader: &mut BufReader<File>, path: &Path) -> Result<Vec<Value>, DataError> {
    let bad = |line, column, message| DataError::BadArray { path: path.to_owned(), line, column, message };
    let value = json::from_reader(reader).map_err(|error| {
        if error.is_io() {
            return DataError::Read { path: path.to_owned(), source: error.into() };
        }
        let text = error.to_string();
        let message = text.split(" at line ").next().unwrap_or_default().to_owned();
        bad(error.line(), error.column(), message)
    })?;
    match value {
        Value::Array(rows) => Ok(rows),
        _ => Err(bad(1, 1, "expected a list of rows".to_owned())), // `sniff` has seen its bracket
    }
}
