//! What is wrong with a row, and how often that was seen.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Number of messages that a [`BadRows`] report keeps.
pub const KEPT_MESSAGES: usize = 5;

/// What the number of a row counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// 1-based line of the file.
    Line,
    /// 1-based element of a JSON array.
    Element,
}

/// Why a row cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadRowKind {
    InvalidUtf8,
    BadJson,
    /// A quote or a line break where CSV has none.
    BadCsv,
    NotAnObject,
    /// A CSV row with another number of fields than the header.
    FieldCount,
    MissingColumn,
    WrongType,
    Empty,
    BadHistory,
    /// The tokenizer refused the text.
    NotTokenized,
}

impl fmt::Display for BadRowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidUtf8 => "not UTF-8",
            Self::BadJson => "bad JSON",
            Self::BadCsv => "bad CSV",
            Self::NotAnObject => "not an object",
            Self::FieldCount => "other number of fields than the header",
            Self::MissingColumn => "missing column",
            Self::WrongType => "wrong type",
            Self::Empty => "empty text",
            Self::BadHistory => "history of the wrong shape",
            Self::NotTokenized => "not tokenized",
        })
    }
}

/// One row that cannot be used: what was expected, what was found, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct RowError {
    pub kind: BadRowKind,
    pub file: PathBuf,
    pub place: Place,
    pub row: usize,
    pub column: Option<String>,
    pub expected: String,
    pub found: String,
    pub hint: Option<String>,
}

impl fmt::Display for RowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Line => "line",
            Place::Element => "element",
        };
        write!(f, "expected {}, found {}\n  --> {}, {place} {}", self.expected, self.found, self.file.display(), self.row)?;
        match &self.column {
            Some(column) => write!(f, ", column `{column}`"),
            None => Ok(()),
        }
    }
}

/// The rows that were left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRows {
    pub total: usize,
    pub by_kind: BTreeMap<BadRowKind, usize>,
    /// The first [`KEPT_MESSAGES`] of the file.
    pub first: Vec<RowError>,
}

impl BadRows {
    pub fn push(&mut self, error: RowError) {
        self.total += 1;
        *self.by_kind.entry(error.kind).or_default() += 1;
        if self.first.len() < KEPT_MESSAGES {
            self.first.push(error);
        }
    }

    /// Takes in the report of the rows that follow this one's in the file.
    pub fn append(&mut self, later: Self) {
        self.total += later.total;
        for (kind, n) in later.by_kind {
            *self.by_kind.entry(kind).or_default() += n;
        }
        let room = KEPT_MESSAGES - self.first.len().min(KEPT_MESSAGES);
        self.first.extend(later.first.into_iter().take(room));
    }
}

impl fmt::Display for BadRows {
    /// `3 bad rows (2 bad JSON, 1 empty text)`, then the kept messages, one below the other.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<String> = self.by_kind.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        let rows = if self.total == 1 { "row" } else { "rows" };
        write!(f, "{} bad {rows} ({})", self.total, kinds.join(", "))?;
        for error in &self.first {
            write!(f, "\n{error}")?;
        }
        match self.total - self.first.len() {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(row: usize, kind: BadRowKind) -> RowError {
        RowError {
            kind,
            file: "a.jsonl".into(),
            place: Place::Line,
            row,
            column: None,
            expected: "a".into(),
            found: "b".into(),
            hint: None,
        }
    }

    #[test]
    fn bad_rows_of_two_shares_appended_equal_those_of_one_pass() {
        let all: Vec<_> = (0..9).map(|i| bad(i, if i % 3 == 0 { BadRowKind::Empty } else { BadRowKind::BadJson })).collect();
        let report = |rows: &[RowError]| {
            let mut report = BadRows::default();
            rows.iter().cloned().for_each(|e| report.push(e));
            report
        };
        for cut in 0..=9 {
            let mut first = report(&all[..cut]);
            first.append(report(&all[cut..]));
            assert_eq!(first, report(&all), "cut at {cut}");
        }
        assert_eq!(report(&all).first.len(), KEPT_MESSAGES);
    }
}
