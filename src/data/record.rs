//! From one raw row to an [`Example`]: columns by name, with every fault named.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::bad_rows::{BadRowKind, Place, RowError};
use super::error::nearest;
use super::rows::{Content, RawRow};
use super::{Example, RowOrigin};
use crate::json;

/// What to do with a row that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// End with an error that names the row.
    Stop,
    /// Leave the row out and count it.
    Skip,
}

/// Which columns hold what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    pub prompt: String,
    pub response: String,
    /// A list of [query, answer] pairs, oldest first (in CSV: as JSON text in the cell).
    pub history: Option<String>,
}

/// Turns the raw rows of one file into examples. Pure, so that threads can share it.
#[derive(Clone, Debug)]
pub struct RowParser {
    pub(super) file: Arc<Path>,
    pub(super) place: Place,
    pub(super) columns: Columns,
    /// Names of a CSV file's columns.
    pub(super) header: Vec<String>,
}

/// (prompt, response, history).
type RowText = (String, String, Vec<(String, String)>);

/// A fault before it has a place.
struct Fault {
    kind: BadRowKind,
    column: Option<String>,
    expected: String,
    found: String,
    hint: Option<String>,
}

impl Fault {
    fn new(kind: BadRowKind, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { kind, column: None, expected: expected.into(), found: found.into(), hint: None }
    }

    fn at(mut self, column: &str) -> Self {
        self.column = Some(column.to_owned());
        self
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl RowParser {
    /// One row as text.
    ///
    /// # Errors
    /// When the row is not UTF-8, not JSON, not an object, lacks a column, or a column has the wrong type, is empty or (history) not a
    /// list of pairs.
    pub fn parse(&self, raw: &RawRow) -> Result<Example, Box<RowError>> {
        let found = match &raw.content {
            Content::Line(line) => utf8(line, "line").and_then(json_line).and_then(|value| self.object_row(&value)),
            Content::Element(value) => self.object_row(value),
            Content::Cells(cells) => self.csv_row(cells),
        };
        let origin = || RowOrigin { file: Arc::clone(&self.file), row: raw.row };
        found
            .map(|(prompt, response, history)| Example { prompt, response, history, origin: origin() })
            .map_err(|fault| self.located(fault, raw.row))
    }

    /// An error about this file's row `row` that was found after parsing.
    pub(super) fn not_tokenized(&self, row: usize, message: String) -> Box<RowError> {
        self.located(Fault::new(BadRowKind::NotTokenized, "text that the tokenizer takes", message), row)
    }

    /// Tests a CSV header for the columns asked for.
    pub(super) fn check_header(&self) -> Result<(), Box<RowError>> {
        let wanted = [Some(("prompt", &self.columns.prompt)), Some(("response", &self.columns.response))];
        let history = self.columns.history.as_ref().map(|name| ("history", name));
        for (role, name) in wanted.into_iter().chain([history]).flatten() {
            if !self.header.contains(name) {
                return Err(self.located(missing(role, name, &self.header), 1));
            }
        }
        Ok(())
    }

    pub(super) fn bad_header(&self, bytes: &[u8]) -> Option<Box<RowError>> {
        utf8(bytes, "header").err().map(|fault| self.located(fault, 1))
    }

    fn located(&self, fault: Fault, row: usize) -> Box<RowError> {
        let Fault { kind, column, expected, found, hint } = fault;
        Box::new(RowError { kind, file: self.file.to_path_buf(), place: self.place, row, column, expected, found, hint })
    }

    fn object_row(&self, value: &Value) -> Result<RowText, Fault> {
        let Value::Object(object) = value else {
            return Err(Fault::new(BadRowKind::NotAnObject, "a JSON object", describe(value)));
        };
        let get = |role: &str, name: &str| object.get(name).ok_or_else(|| missing(role, name, &object.keys().cloned().collect::<Vec<_>>()));
        let text = |role: &str, name: &str| match get(role, name)? {
            Value::String(text) => not_empty(text, name),
            other => Err(Fault::new(BadRowKind::WrongType, "a string", describe(other)).at(name)),
        };
        let history = match &self.columns.history {
            Some(name) => history_pairs(get("history", name)?, name)?,
            None => Vec::new(),
        };
        Ok((text("prompt", &self.columns.prompt)?, text("response", &self.columns.response)?, history))
    }

    fn csv_row(&self, cells: &csv::ByteRecord) -> Result<RowText, Fault> {
        if cells.len() != self.header.len() {
            let expected = format!("{} fields as in the header", self.header.len());
            return Err(Fault::new(BadRowKind::FieldCount, expected, cells.len().to_string())
                .hint("put cells that hold commas, quotes or line breaks in double quotes"));
        }
        let cell = |role: &str, name: &str| {
            let i = self.header.iter().position(|h| h == name).ok_or_else(|| missing(role, name, &self.header))?;
            utf8(cells.get(i).unwrap_or_default(), "cell").map_err(|fault| fault.at(name))
        };
        let history = match &self.columns.history {
            Some(name) => match cell("history", name)?.trim() {
                "" => Vec::new(),
                text => history_pairs(&json_line(text).map_err(|fault| fault.at(name))?, name)?,
            },
            None => Vec::new(),
        };
        let text = |role: &str, name: &str| not_empty(cell(role, name)?, name);
        Ok((text("prompt", &self.columns.prompt)?, text("response", &self.columns.response)?, history))
    }
}

fn utf8<'a>(bytes: &'a [u8], what: &str) -> Result<&'a str, Fault> {
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        Fault::new(BadRowKind::InvalidUtf8, "UTF-8 text", format!("byte 0x{:02x} at byte {} of the {what}", bytes[at], at + 1))
            .hint("a file in another encoding can be converted: iconv -f GB18030 -t UTF-8")
    })
}

fn json_line(line: &str) -> Result<Value, Fault> {
    json::value(line.as_bytes()).map_err(|error| {
        let text = error.to_string();
        let message = text.split(" at line ").next().unwrap_or_default();
        let fault = Fault::new(BadRowKind::BadJson, "JSON", format!("bad JSON at byte {}: {message}", error.column()));
        if error.is_eof() { fault.hint("JSON lines need each object whole on one line") } else { fault }
    })
}

fn missing(role: &str, name: &str, names: &[String]) -> Fault {
    let list: Vec<String> = names.iter().take(20).map(|n| format!("`{n}`")).collect();
    let found = if list.is_empty() { "no column".to_owned() } else { list.join(", ") };
    let fault = Fault::new(BadRowKind::MissingColumn, format!("column `{name}`"), found);
    match nearest(name, names) {
        Some(near) => fault.hint(format!("is `{near}` meant? then pass `--{role}_column {near}`")),
        None => fault.hint(format!("name the column with `--{role}_column`")),
    }
}

fn not_empty(text: &str, column: &str) -> Result<String, Fault> {
    if text.trim().is_empty() {
        let found = if text.is_empty() { "an empty string" } else { "nothing but white space" };
        return Err(Fault::new(BadRowKind::Empty, "text", found).at(column));
    }
    Ok(text.to_owned())
}

/// `null` stands for no history.
fn history_pairs(value: &Value, column: &str) -> Result<Vec<(String, String)>, Fault> {
    let bad = |found: String| Fault::new(BadRowKind::BadHistory, "a list of [query, answer] pairs of strings", found).at(column);
    let rounds = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(rounds) => rounds,
        other => return Err(bad(describe(other))),
    };
    let pair = |(i, round): (usize, &Value)| match round {
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(query), Value::String(answer)] => Ok((query.clone(), answer.clone())),
            [query, answer] => {
                let other = if query.is_string() { answer } else { query };
                Err(bad(format!("{} in round {}", describe(other), i + 1)))
            }
            other => Err(bad(format!("a list of length {} as round {}", other.len(), i + 1))),
        },
        other => Err(bad(format!("{} as round {}", describe(other), i + 1))),
    };
    rounds.iter().enumerate().map(pair).collect()
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => format!("the boolean {b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(a) => format!("a list of length {}", a.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}
