//! Strict CSV (RFC 4180): a malformed row is a fault with its line, and never takes the rows after it along.
//!
//! A quoted cell may hold commas, doubled quotes and line breaks. Lines end in LF or CRLF; in CR if the header does (classic Mac files).
//! After a fault, reading continues at the line after the one where the row began.

use std::io::{self, BufRead, Read, Seek};

/// A longer row is taken for a quote that is not closed.
pub const MAX_ROW_BYTES: usize = 64 << 20;
/// Characters of a cell that a message quotes.
const SHOWN_CHARS: usize = 20;

/// The cells of one row, unquoted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cells {
    bytes: Vec<u8>,
    /// Cell i ends here and begins where the one before ends.
    ends: Vec<usize>,
}

impl Cells {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn get(&self, i: usize) -> Option<&[u8]> {
        let start = i.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied())?;
        Some(&self.bytes[start..*self.ends.get(i)?])
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).filter_map(|i| self.get(i))
    }

    /// What the cell that is being read holds so far.
    fn open(&self) -> &[u8] {
        &self.bytes[self.ends.last().copied().unwrap_or(0)..]
    }
}

/// What is malformed, in which cell (0-based).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvFault {
    pub cell: usize,
    pub kind: FaultKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The file ends inside a quoted cell.
    OpenQuote,
    /// `"x"y`: the text, and the line of the closing quote.
    TextAfterQuote {
        text: String,
        line: usize,
    },
    /// `x"y`: the text before the quote.
    QuoteInCell {
        before: String,
    },
    /// A CR or LF that ends no line of this file stands outside quotes.
    LineBreak {
        found: u8,
    },
    TooLong {
        max_bytes: usize,
    },
}

impl CsvFault {
    /// What was expected, what was found, and what to do, for a row that begins at line `row`.
    pub fn describe(&self, row: usize) -> (String, String, &'static str) {
        const DOUBLE: &str = "quote the whole cell, and write a quote inside it twice";
        let (expected, found, hint) = match &self.kind {
            FaultKind::OpenQuote => ("a quote that closes the cell", "the end of the file".to_owned(), DOUBLE),
            FaultKind::TextAfterQuote { text, line } => {
                let place = if *line == row { String::new() } else { format!(" in line {line}, where the quote of line {row} closes") };
                ("a comma or the end of the row after the closing quote", format!("`{text}`{place}"), DOUBLE)
            }
            FaultKind::QuoteInCell { before } => {
                ("no quote in a cell that does not begin with one", format!("a quote after `{before}`"), DOUBLE)
            }
            FaultKind::LineBreak { found } => {
                let (own, found) = if *found == b'\r' { ("LF or CRLF", "CR") } else { ("CR", "LF") };
                let expected = format!("lines that end in {own}, as the first does");
                return (expected, format!("a lone {found} outside quotes"), "put cells that hold line breaks in double quotes");
            }
            FaultKind::TooLong { max_bytes } => {
                return (format!("a row of at most {max_bytes} bytes"), "a longer one".to_owned(), "a quote may be open: close it");
            }
        };
        (expected.to_owned(), found, hint)
    }
}

/// One row of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvRow {
    /// 1-based line where it begins.
    pub line: usize,
    pub cells: Result<Cells, CsvFault>,
}

/// Reads rows one by one, from where `reader` stands.
pub struct CsvReader<R> {
    reader: R,
    line_end: u8,
    /// Lines read.
    line: usize,
    /// Of the next byte in the file.
    offset: u64,
    max_row_bytes: usize,
}

impl<R: BufRead + Seek> CsvReader<R> {
    /// # Errors
    /// When the reader has no position.
    pub fn new(mut reader: R, max_row_bytes: usize) -> io::Result<Self> {
        let offset = reader.stream_position()?;
        Ok(Self { reader, line_end: b'\n', line: 0, offset, max_row_bytes })
    }

    /// The first row; it decides what ends a line.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn header(&mut self) -> io::Result<Option<CsvRow>> {
        let start = self.offset;
        let row = self.next_row()?;
        let mac = matches!(&row, Some(CsvRow { cells: Err(CsvFault { kind: FaultKind::LineBreak { found: b'\r' }, .. }), .. }));
        if !mac {
            return Ok(row);
        }
        self.line_end = b'\r';
        self.seek(start, 0)?;
        self.next_row()
    }

    /// The next row that is not blank.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn next_row(&mut self) -> io::Result<Option<CsvRow>> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            if self.read_line(&mut bytes, self.max_row_bytes)? == 0 {
                return Ok(None);
            }
            if !bytes.trim_ascii().is_empty() {
                break;
            }
        }
        let (line, after_first) = (self.line, self.offset);
        let mut row = Partial::default();
        let mut left = self.max_row_bytes;
        loop {
            let done = if bytes.len() > left {
                Err(row.fault(FaultKind::TooLong { max_bytes: self.max_row_bytes }))
            } else {
                row.take_line(&bytes, self.line_end, self.line)
            };
            match done {
                Ok(true) => return Ok(Some(CsvRow { line, cells: Ok(row.cells) })),
                Ok(false) => {}
                Err(fault) => {
                    // A row of one line has been read to its end, and needs no way back.
                    if self.offset != after_first {
                        self.seek(after_first, line)?;
                    }
                    return Ok(Some(CsvRow { line, cells: Err(fault) }));
                }
            }
            left -= bytes.len();
            bytes.clear();
            if self.read_line(&mut bytes, left)? == 0 {
                let fault = row.fault(FaultKind::OpenQuote);
                self.seek(after_first, line)?;
                return Ok(Some(CsvRow { line, cells: Err(fault) }));
            }
        }
    }

    /// Appends a line with its end to `bytes`. Of a line of more than `max` bytes it keeps `max` + 1.
    fn read_line(&mut self, bytes: &mut Vec<u8>, max: usize) -> io::Result<usize> {
        let limit = max as u64 + 1;
        let mut read = (&mut self.reader).take(limit).read_until(self.line_end, bytes)?;
        if read as u64 == limit && bytes.last() != Some(&self.line_end) {
            read += self.reader.skip_until(self.line_end)?;
        }
        self.line += usize::from(read > 0);
        self.offset += read as u64;
        Ok(read)
    }

    fn seek(&mut self, offset: u64, line: usize) -> io::Result<()> {
        // Not `seek`, which would throw away what is buffered.
        self.reader.seek_relative(offset.cast_signed() - self.offset.cast_signed())?;
        (self.offset, self.line) = (offset, line);
        Ok(())
    }
}

/// Where a row stands between two bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    CellStart,
    Bare,
    Quoted,
    /// After a quote in a quoted cell: it closes the cell, or another follows and both stand for one.
    QuoteSeen,
}

#[derive(Default)]
struct Partial {
    cells: Cells,
    at: At,
}

impl Partial {
    fn fault(&self, kind: FaultKind) -> CsvFault {
        CsvFault { cell: self.cells.len(), kind }
    }

    fn end_cell(&mut self) {
        self.cells.ends.push(self.cells.bytes.len());
        self.at = At::CellStart;
    }

    /// Takes one line with its end, the `number`th of the file; true if the row ends with it.
    fn take_line(&mut self, line: &[u8], line_end: u8, number: usize) -> Result<bool, CsvFault> {
        let mut body = line.strip_suffix(&[line_end]).unwrap_or(line);
        while line_end == b'\n'
            && let Some(rest) = body.strip_suffix(b"\r")
        {
            body = rest;
        }
        for (i, &byte) in line.iter().enumerate() {
            if i >= body.len() && self.at != At::Quoted {
                break;
            }
            match (self.at, byte) {
                (At::CellStart, b'"') => self.at = At::Quoted,
                (At::Quoted, b'"') => self.at = At::QuoteSeen,
                (At::QuoteSeen, b'"') => {
                    self.cells.bytes.push(b'"');
                    self.at = At::Quoted;
                }
                (At::CellStart | At::Bare | At::QuoteSeen, b',') => self.end_cell(),
                (At::QuoteSeen, _) => {
                    let rest = body[i..].split(|&b| b == b',').next().unwrap_or_default();
                    return Err(self.fault(FaultKind::TextAfterQuote { text: shown(rest), line: number }));
                }
                (At::Bare, b'"') => return Err(self.fault(FaultKind::QuoteInCell { before: shown(self.cells.open()) })),
                (At::CellStart | At::Bare, b'\r' | b'\n') => return Err(self.fault(FaultKind::LineBreak { found: byte })),
                (At::CellStart, _) => {
                    self.cells.bytes.push(byte);
                    self.at = At::Bare;
                }
                (At::Bare | At::Quoted, _) => self.cells.bytes.push(byte),
            }
        }
        let is_whole = self.at != At::Quoted;
        if is_whole {
            self.end_cell();
        }
        Ok(is_whole)
    }
}

/// The beginning of some bytes, for a message.
fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(SHOWN_CHARS).collect::<String>().escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Found = Vec<(usize, Result<Vec<String>, FaultKind>)>;

    fn read_with(text: &str, max_row_bytes: usize) -> Found {
        let mut reader = CsvReader::new(io::Cursor::new(text.as_bytes().to_vec()), max_row_bytes).unwrap();
        let text = |cells: &Cells| cells.iter().map(|cell| String::from_utf8(cell.to_vec()).unwrap()).collect();
        let mut rows = Vec::new();
        let mut row = reader.header().unwrap();
        while let Some(CsvRow { line, cells }) = row {
            rows.push((line, cells.as_ref().map(text).map_err(|fault| fault.kind.clone())));
            row = reader.next_row().unwrap();
        }
        rows
    }

    fn read(text: &str) -> Found {
        read_with(text, MAX_ROW_BYTES)
    }

    fn good(line: usize, cells: &[&str]) -> (usize, Result<Vec<String>, FaultKind>) {
        (line, Ok(cells.iter().map(|&cell| cell.to_owned()).collect()))
    }

    #[test]
    fn well_formed_rows_keep_quotes_commas_and_line_breaks_of_quoted_cells() {
        assert_eq!(
            read("a,b\n1,\"x, \"\"y\"\"\nz\"\n\n,\"\"\n"),
            [good(1, &["a", "b"]), good(2, &["1", "x, \"y\"\nz"]), good(5, &["", ""])]
        );
        assert_eq!(read("a,b\r\n1,\"x\r\ny\"\r\n2,z"), [good(1, &["a", "b"]), good(2, &["1", "x\r\ny"]), good(4, &["2", "z"])]);
        assert_eq!(read("a,b\r1,\"x\ry\"\r2,z\r"), [good(1, &["a", "b"]), good(2, &["1", "x\ry"]), good(4, &["2", "z"])]);
        assert_eq!(read("\n  \na\n\"\"\"\"\n"), [good(3, &["a"]), good(4, &["\""])]);
        assert_eq!(read("a,b\r\r\n1,2\r\r\n"), [good(1, &["a", "b"]), good(2, &["1", "2"])]);
    }

    #[test]
    fn malformed_row_is_one_fault_and_the_rows_after_it_are_read() {
        let open = (2, Err(FaultKind::OpenQuote));
        assert_eq!(read("a,b\n1,\"x\n2,y\n3,z"), [good(1, &["a", "b"]), open, good(3, &["2", "y"]), good(4, &["3", "z"])]);
        let after = |line, text: &str, at| (line, Err(FaultKind::TextAfterQuote { text: text.into(), line: at }));
        assert_eq!(read("a\n\"x\"y\nz\n"), [good(1, &["a"]), after(2, "y", 2), good(3, &["z"])]);
        let rows = read("a,b\n1,\"x\n2,\"y, z\"\n3,w\n");
        assert_eq!(rows, [good(1, &["a", "b"]), after(2, "y", 3), good(3, &["2", "y, z"]), good(4, &["3", "w"])]);
        let inside = (2, Err(FaultKind::QuoteInCell { before: "5".into() }));
        assert_eq!(read("a\n5\" pipe\nz\n"), [good(1, &["a"]), inside, good(3, &["z"])]);
        assert_eq!(read("a,b\n1\r2,x\n3,y\n")[1].1, Err(FaultKind::LineBreak { found: b'\r' }));
        assert_eq!(read("a,b\r1,x\n3,y\r")[1].1, Err(FaultKind::LineBreak { found: b'\n' }));
        assert_eq!(read("\"a,b\n1,2\n")[0], (1, Err(FaultKind::OpenQuote)));
        assert_eq!(read("a,b\n1,\"x")[1], (2, Err(FaultKind::OpenQuote)));
    }

    #[test]
    fn row_that_is_too_long_is_one_fault_and_the_rows_after_it_are_read() {
        let long = |line| (line, Err(FaultKind::TooLong { max_bytes: 8 }));
        assert_eq!(read_with("a\n123456789012345678\nb\n", 8), [good(1, &["a"]), long(2), good(3, &["b"])]);
        assert_eq!(read_with("a\n\"x\n1234567\nb\n", 8), [good(1, &["a"]), long(2), good(3, &["1234567"]), good(4, &["b"])]);
        assert_eq!(read_with("a\n1234567\n", 8), [good(1, &["a"]), good(2, &["1234567"])]);
    }

    #[test]
    fn rows_behind_many_open_quotes_are_each_read_a_bounded_number_of_times() {
        struct Counting(io::Cursor<Vec<u8>>, std::rc::Rc<std::cell::Cell<usize>>);
        impl Read for Counting {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let n = self.0.read(out)?;
                self.1.set(self.1.get() + n);
                Ok(n)
            }
        }
        impl Seek for Counting {
            fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
                self.0.seek(to)
            }
        }
        for row in ["1,\"x\n", "1,\"\"\"x\n", "1,\"x\"\"\n", "1,\"\"\n1,\"x\n"] {
            let text = format!("a,b\n{}", row.repeat(20_000));
            let count = std::rc::Rc::new(std::cell::Cell::new(0));
            let file = Counting(io::Cursor::new(text.clone().into_bytes()), std::rc::Rc::clone(&count));
            let mut reader = CsvReader::new(io::BufReader::with_capacity(1 << 16, file), MAX_ROW_BYTES).unwrap();
            while reader.next_row().unwrap().is_some() {}
            assert!(count.get() < 12 * text.len(), "{row:?}: {} bytes read of {}", count.get(), text.len());
        }
    }
}
