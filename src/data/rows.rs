//! Reads the raw rows of a file one by one: JSON lines and CSV without holding the file, a JSON array whole.
//!
//! THUDM's `.json` files are JSON lines; the content decides before the extension does.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::Example;
use super::bad_rows::Place;
use super::error::DataError;
use super::record::{Columns, RowParser};
use crate::json;

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
    Cells(csv::ByteRecord),
}

enum Source {
    Lines { reader: BufReader<File>, line: usize },
    Elements(std::iter::Enumerate<std::vec::IntoIter<Value>>),
    Csv(csv::Reader<LineByLine>),
}

/// Hands out at most one line a call. So where a CSV record ends, the last line handed out is the record's last; the csv crate's own count is
/// one short behind CRLF and blank lines.
struct LineByLine {
    reader: BufReader<File>,
    /// Lines handed out with their end.
    ended: usize,
    /// A part of the next line is handed out.
    open: bool,
}

impl LineByLine {
    /// 1-based line of the last byte handed out.
    fn line(&self) -> usize {
        self.ended + usize::from(self.open)
    }
}

impl io::Read for LineByLine {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let ready = self.reader.fill_buf()?;
        let line = ready.iter().position(|&b| b == b'\n').map_or(ready, |end| &ready[..=end]);
        let n = line.len().min(out.len());
        out[..n].copy_from_slice(&line[..n]);
        if let Some(last) = line[..n].last() {
            self.open = *last != b'\n';
            self.ended += usize::from(!self.open);
        }
        self.reader.consume(n);
        Ok(n)
    }
}

/// The rows of an open file. As an iterator it gives examples; a bad row is an error item, and the next call goes on behind it.
pub struct Rows {
    path: PathBuf,
    source: Source,
    parser: RowParser,
}

impl Rows {
    /// Opens `path` and finds its format.
    ///
    /// # Errors
    /// No such file, a directory, an empty file, an unknown format, a damaged JSON array, a CSV header without a column asked for.
    pub fn open(path: &Path, columns: &Columns) -> Result<Self, DataError> {
        let read = |source| DataError::Read { path: path.to_owned(), source };
        let mut file = open_file(path)?;
        let (format, start) = sniff(&mut file, path)?;
        file.seek(SeekFrom::Start(start)).map_err(read)?;
        let mut reader = BufReader::with_capacity(1 << 16, file);
        let place = if format == Format::JsonArray { Place::Element } else { Place::Line };
        let mut parser = RowParser { file: Arc::from(path), place, columns: columns.clone(), header: Vec::new() };
        let source = match format {
            Format::JsonLines => Source::Lines { reader, line: 0 },
            Format::JsonArray => Source::Elements(read_array(&mut reader, path)?.into_iter().enumerate()),
            Format::Csv => {
                let mut csv = csv::ReaderBuilder::new().flexible(true).from_reader(LineByLine { reader, ended: 0, open: false });
                for name in csv.byte_headers().map_err(|e| read(e.into()))? {
                    if let Some(error) = parser.bad_header(name) {
                        return Err(DataError::BadHeader(error));
                    }
                    parser.header.push(String::from_utf8_lossy(name).into_owned());
                }
                parser.check_header().map_err(DataError::BadHeader)?;
                Source::Csv(csv)
            }
        };
        Ok(Self { path: path.to_owned(), source, parser })
    }

    pub fn format(&self) -> Format {
        match self.source {
            Source::Lines { .. } => Format::JsonLines,
            Source::Elements(_) => Format::JsonArray,
            Source::Csv(_) => Format::Csv,
        }
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
                let mut cells = csv::ByteRecord::new();
                if !csv.read_byte_record(&mut cells).map_err(|e| read(e.into()))? {
                    return Ok(None);
                }
                let breaks = cells.as_slice().iter().filter(|&&b| b == b'\n').count();
                let row = csv.get_ref().line().saturating_sub(breaks);
                Ok(Some(RawRow { row, content: Content::Cells(cells) }))
            }
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Example, DataError>;

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

/// Format and the offset of the first byte behind a byte order mark.
fn sniff(file: &mut File, path: &Path) -> Result<(Format, u64), DataError> {
    let mut reader = BufReader::new(file);
    let mut head = [0; 3];
    let mut len = 0;
    let mut first = None;
    for byte in io::Read::bytes(&mut reader) {
        let byte = byte.map_err(|source| DataError::Read { path: path.to_owned(), source })?;
        if len < head.len() {
            head[len] = byte;
        }
        len += 1;
        let in_mark = len <= 3 && [0xef, 0xbb, 0xbf].starts_with(&head[..len]);
        if !byte.is_ascii_whitespace() && !in_mark {
            first = Some(byte);
            break;
        }
    }
    if head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]) || (head[0] == 0xff && len == 1) || (head[0] == 0xfe && len == 1)
    {
        return Err(DataError::Utf16 { path: path.to_owned() });
    }
    let start = if head == [0xef, 0xbb, 0xbf] { 3 } else { 0 };
    let Some(first) = first else {
        let found = if len == 0 { "an empty file" } else { "nothing but white space" };
        return Err(DataError::NoRows { path: path.to_owned(), found });
    };
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let format = match (extension.as_str(), first) {
        ("csv", _) => Format::Csv,
        (_, b'[') => Format::JsonArray,
        (_, b'{') | ("json" | "jsonl" | "ndjson", _) => Format::JsonLines,
        _ => {
            let found = if first.is_ascii_graphic() { format!("`{}`", first as char) } else { format!("byte 0x{first:02x}") };
            return Err(DataError::UnknownFormat { path: path.to_owned(), found });
        }
    };
    Ok((format, start))
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
