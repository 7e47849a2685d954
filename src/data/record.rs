//! From one raw row to an [`Example`]: columns by name, with every fault named.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::bad_rows::{BadRowKind, Place, RowError};
use super::column_use::{Beside, Holds, is_row_number};
use super::csv::{Cells, CsvFault, FaultKind};
use super::encoding;
use super::error::{DataError, nearest, shown_name};
use super::history::{self, Rounds, describe};
use super::nested;
use super::rows::{Content, RawRow};
use super::{Example, RowOrigin};
use crate::json;
use crate::shell;

/// What to do with a row that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// End with an error that names the row.
    Stop,
    /// Leave the row out and count it.
    Skip,
}

/// Column of the question, if no other is named (THUDM's AdvertiseGen).
pub const PROMPT_COLUMN: &str = "content";
/// Column of the answer, if no other is named.
pub const RESPONSE_COLUMN: &str = "summary";

/// Which columns hold what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    pub prompt: String,
    /// More of the question, appended to the prompt on a new line. A row may lack it.
    pub input: Option<String>,
    pub response: String,
    /// A list of [query, answer] pairs, oldest first, or a text that is one. A row may lack it.
    pub history: Option<String>,
}

impl Columns {
    /// Two roles that one column has, and its name, if there are such.
    pub fn shared(&self) -> Option<(&'static str, &'static str, &str)> {
        let optional = [("input", &self.input), ("history", &self.history)];
        let optional = optional.into_iter().filter_map(|(role, name)| Some((role, name.as_deref()?)));
        let all: Vec<(&str, &str)> =
            [("prompt", self.prompt.as_str()), ("response", self.response.as_str())].into_iter().chain(optional).collect();
        all.iter().enumerate().find_map(|(i, (role, name))| {
            let (other, _) = all[..i].iter().find(|(_, other)| other == name)?;
            Some((*other, *role, *name))
        })
    }

    /// # Errors
    /// When one column has two roles: the answer would stand in the question, or the question twice.
    pub fn expect_distinct(&self) -> Result<(), DataError> {
        match self.shared() {
            Some((first, second, name)) => Err(DataError::SharedColumn { first, second, name: name.to_owned() }),
            None => Ok(()),
        }
    }
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

/// One row as text, and what it holds beside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub example: Example,
    pub beside: Beside,
}

struct RowText {
    prompt: String,
    response: String,
    history: Rounds,
    beside: Beside,
}

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
    /// When the row is not UTF-8, not JSON, malformed CSV, not an object, lacks a column, or a column has the wrong type, is empty or
    /// (history) not a list of pairs.
    pub fn parse(&self, raw: &RawRow) -> Result<Row, Box<RowError>> {
        let found = match &raw.content {
            Content::Line(line) => self.utf8(line, "line").and_then(|line| self.json_line(line)).and_then(|value| self.object_row(&value)),
            Content::Element(value) => self.object_row(value),
            Content::Cells(Ok(cells)) => self.csv_row(cells),
            Content::Cells(Err(fault)) => Err(self.csv_fault(fault, raw.row)),
        };
        let RowText { prompt, response, history, beside } = found.map_err(|fault| self.located(fault, raw.row))?;
        let origin = RowOrigin { file: Arc::clone(&self.file), row: raw.row };
        Ok(Row { example: Example { prompt, response, history, origin }, beside })
    }

    /// An error about this file's row `row` that was found after parsing.
    pub(super) fn not_tokenized(&self, row: usize, message: String) -> Box<RowError> {
        self.located(Fault::new(BadRowKind::NotTokenized, "text that the tokenizer takes", message), row)
    }

    /// Takes the header of a CSV file, which stands at line `row`, and tests it for the columns asked for.
    pub(super) fn take_header(&mut self, cells: &Result<Cells, CsvFault>, row: usize) -> Result<(), Box<RowError>> {
        self.header = self.header_of(cells, row).map_err(|fault| self.located(fault, row))?;
        Ok(())
    }

    fn header_of(&self, cells: &Result<Cells, CsvFault>, row: usize) -> Result<Vec<String>, Fault> {
        let cells = cells.as_ref().map_err(|fault| quoted_names(fault).unwrap_or_else(|| self.csv_fault(fault, row)))?;
        let header: Vec<String> = cells.iter().map(|name| self.utf8(name, "header").map(str::to_owned)).collect::<Result<_, _>>()?;
        let Columns { prompt, input, response, history } = &self.columns;
        let optional = [("input", input), ("history", history)].into_iter().filter_map(|(role, name)| Some((role, name.as_ref()?)));
        for (role, name) in [("prompt", prompt), ("response", response)].into_iter().chain(optional) {
            match header.iter().filter(|found| *found == name).count() {
                1 => {}
                0 => {
                    let fault = excel_line(&header).or_else(|| other_separator([prompt, response], &header));
                    return Err(fault.unwrap_or_else(|| missing(role, name, &header)));
                }
                n => {
                    let fault = Fault::new(BadRowKind::MissingColumn, format!("one column {}", shown_name(name)), n.to_string());
                    return Err(fault.hint("give each column a name of its own"));
                }
            }
        }
        Ok(header)
    }

    fn located(&self, fault: Fault, row: usize) -> Box<RowError> {
        let Fault { kind, column, expected, found, hint } = fault;
        Box::new(RowError { kind, file: self.file.to_path_buf(), place: self.place, row, column, expected, found, hint })
    }

    fn utf8<'a>(&self, bytes: &'a [u8], what: &str) -> Result<&'a str, Fault> {
        std::str::from_utf8(bytes).map_err(|error| {
            let at = error.valid_up_to();
            let found = format!("byte 0x{:02x} at byte {} of the {what}", bytes[at], at + 1);
            Fault::new(BadRowKind::InvalidUtf8, "UTF-8 text", found).hint(encoding::hint(bytes, &self.file))
        })
    }

    fn csv_fault(&self, fault: &CsvFault, row: usize) -> Fault {
        let (expected, found, hint) = fault.describe(row);
        let mut located = Fault::new(BadRowKind::BadCsv, expected, found).hint(hint);
        located.column = self.header.get(fault.cell).cloned();
        located
    }

    fn is_used(&self, name: &str) -> bool {
        let Columns { prompt, input, response, history } = &self.columns;
        name == prompt || name == response || input.as_deref() == Some(name) || history.as_deref() == Some(name)
    }

    fn json_line(&self, line: &str) -> Result<Value, Fault> {
        json::value(line.as_bytes()).map_err(|error| {
            let text = error.to_string();
            let message = text.split(" at line ").next().unwrap_or_default();
            let fault = Fault::new(BadRowKind::BadJson, "JSON", format!("bad JSON at byte {}: {message}", error.column()));
            if text.contains(json::NOT_IN_JSON) {
                fault.hint("write null in its place")
            } else if line.contains('\r') {
                let (old, new) = (shell::quoted_path(&self.file), shell::quoted_path(&encoding::beside(&self.file, "lf")));
                fault.hint(format!("`tr '\\r' '\\n' < {old} > {new}` ends the lines with LF"))
            } else if error.is_eof() {
                fault.hint("JSON lines need each object whole on one line")
            } else {
                fault
            }
        })
    }

    fn object_row(&self, value: &Value) -> Result<RowText, Fault> {
        let Value::Object(object) = value else {
            return Err(Fault::new(BadRowKind::NotAnObject, "a JSON object", describe(value)));
        };
        let get = |role: &str, name: &str| {
            object.get(name).ok_or_else(|| {
                let fault = missing(role, name, &object.keys().cloned().collect::<Vec<_>>());
                match nested::in_object(object, &self.columns) {
                    Some(hint) => fault.hint(hint),
                    None => fault,
                }
            })
        };
        let text = |role: &str, name: &str| match get(role, name)? {
            Value::String(text) => not_empty(text, name),
            other => {
                let fault = Fault::new(BadRowKind::WrongType, "a string", describe(other)).at(name);
                Err(match nested::in_value(name, other, &self.columns) {
                    Some(hint) => fault.hint(hint),
                    None => fault,
                })
            }
        };
        let (input, history) = (entry(object, &self.columns.input), entry(object, &self.columns.history));
        let more = match input {
            None | Some((_, Value::Null)) => "",
            Some((_, Value::String(text))) => text,
            Some((name, other)) => return Err(Fault::new(BadRowKind::WrongType, "a string or null", describe(other)).at(name)),
        };
        let is_number = |value: &Value| value.is_u64() || value.as_str().is_some_and(is_whole_number);
        let unused = object.iter().filter(|(name, value)| !self.is_used(name) && !is_row_number(name, || is_number(value)));
        let beside = Beside {
            unused: unused.filter_map(|(name, value)| Some((name.clone(), Holds::of(value)?))).collect(),
            has_input: input.is_some(),
            has_history: history.is_some(),
        };
        let history =
            history.map_or(Ok(Rounds::new()), |(name, value)| history::rounds_of(value).map_err(|found| bad_history(name, found)))?;
        Ok(RowText {
            prompt: with_input(text("prompt", &self.columns.prompt)?, more),
            response: text("response", &self.columns.response)?,
            history,
            beside,
        })
    }

    fn csv_row(&self, cells: &Cells) -> Result<RowText, Fault> {
        if cells.len() != self.header.len() {
            let expected = format!("{} cells as in the header", self.header.len());
            let hint = if cells.len() > self.header.len() {
                "put cells that hold commas, quotes or line breaks in double quotes"
            } else {
                "an empty cell still needs its comma"
            };
            return Err(Fault::new(BadRowKind::FieldCount, expected, cells.len().to_string()).hint(hint));
        }
        let cell = |role: &str, name: &str| {
            let i = self.header.iter().position(|h| h == name).ok_or_else(|| missing(role, name, &self.header))?;
            self.utf8(cells.get(i).unwrap_or_default(), "cell").map_err(|fault| fault.at(name))
        };
        let more = self.columns.input.as_ref().map_or(Ok(""), |name| cell("input", name))?;
        let history = match &self.columns.history {
            Some(name) => history::rounds_of_text(cell("history", name)?).map_err(|found| bad_history(name, found))?,
            None => Rounds::new(),
        };
        let is_number = |cell: &[u8]| std::str::from_utf8(cell).is_ok_and(is_whole_number);
        let is_told = |(name, cell): &(&String, &[u8])| !self.is_used(name) && !is_row_number(name, || is_number(cell));
        let unused = self.header.iter().zip(cells.iter()).filter(is_told);
        let beside = Beside {
            unused: unused.filter_map(|(name, cell)| Some((name.clone(), Holds::of_text(&String::from_utf8_lossy(cell))?))).collect(),
            has_input: self.columns.input.is_some(),
            has_history: self.columns.history.is_some(),
        };
        let text = |role: &str, name: &str| not_empty(cell(role, name)?, name);
        Ok(RowText {
            prompt: with_input(text("prompt", &self.columns.prompt)?, more),
            response: text("response", &self.columns.response)?,
            history,
            beside,
        })
    }
}

fn is_whole_number(text: &str) -> bool {
    text.trim().parse::<u64>().is_ok()
}

/// A column that a key names, if the row has it.
fn entry<'a>(object: &'a Map<String, Value>, name: &'a Option<String>) -> Option<(&'a str, &'a Value)> {
    let name = name.as_deref()?;
    Some((name, object.get(name)?))
}

/// The question and, where there is more of it, that on a new line.
fn with_input(prompt: String, more: &str) -> String {
    if more.trim().is_empty() { prompt } else { format!("{prompt}\n{more}") }
}

/// Separators that are not read, and what people call them.
const OTHER_SEPARATORS: [(char, &str); 3] = [(';', "semicolons"), ('\t', "tabs"), ('|', "bars")];

/// A header that another separator would cut: one cell with it inside, or a cell that it cuts all `wanted` columns out of.
fn other_separator(wanted: [&str; 2], header: &[String]) -> Option<Fault> {
    let is_cut = |separator: char| match header {
        [only] => only.contains(separator),
        _ => header.iter().any(|cell| wanted.iter().all(|name| cell.split(separator).any(|part| part.trim() == *name))),
    };
    let (_, separators) = OTHER_SEPARATORS.into_iter().find(|(separator, _)| is_cut(*separator))?;
    Some(match header.len() {
        1 => not_commas(separators, format!("one column, with {separators} in its name")),
        n => not_commas(separators, format!("{n} columns, one with {separators} in its name")),
    })
}

/// A header whose quoted names stand beside another separator: `"content";"summary"`.
fn quoted_names(fault: &CsvFault) -> Option<Fault> {
    // As the fault shows it.
    let shown = |separator: char| separator.escape_debug().to_string();
    let is_at_quote = |separator: char| match &fault.kind {
        FaultKind::TextAfterQuote { text, .. } => text.trim_start().starts_with(&shown(separator)),
        FaultKind::QuoteInCell { before } => before.trim_end().ends_with(&shown(separator)),
        _ => false,
    };
    let (_, separators) = OTHER_SEPARATORS.into_iter().find(|(separator, _)| is_at_quote(*separator))?;
    Some(not_commas(separators, format!("{separators} between quoted names")))
}

fn not_commas(separators: &str, found: String) -> Fault {
    let fault = Fault::new(BadRowKind::MissingColumn, "columns separated by commas", found);
    fault.hint(format!("save the table with commas instead of {separators}, or as JSON lines"))
}

/// The line `sep=,` that Excel takes before a header.
fn excel_line(header: &[String]) -> Option<Fault> {
    let separator = match header {
        [first, rest] if rest.is_empty() && first.eq_ignore_ascii_case("sep=") => ",",
        [only] => only.get(..4).filter(|word| word.eq_ignore_ascii_case("sep=")).map(|_| &only[4..])?,
        _ => return None,
    };
    if let Some((_, separators)) = OTHER_SEPARATORS.into_iter().find(|(other, _)| separator.starts_with(*other)) {
        return Some(not_commas(separators, format!("Excel's line `sep={}`", separator.escape_debug())));
    }
    let fault =
        Fault::new(BadRowKind::MissingColumn, "the names of the columns", format!("Excel's line `sep={}`", separator.escape_debug()));
    Some(fault.hint("delete that line: only Excel reads it"))
}

fn missing(role: &str, name: &str, names: &[String]) -> Fault {
    let list: Vec<String> = names.iter().take(20).map(|n| shown_name(n)).collect();
    let found = if list.is_empty() { "no column".to_owned() } else { list.join(", ") };
    let fault = Fault::new(BadRowKind::MissingColumn, format!("column {}", shown_name(name)), found);
    let key = format!("{role}_column");
    match nearest(name, names) {
        Some(near) => fault.hint(format!("is {} meant? then pass `{}`", shown_name(near), shell::option(&key, near))),
        None => fault.hint(format!("name the column with `--{key}`")),
    }
}

fn not_empty(text: &str, column: &str) -> Result<String, Fault> {
    if text.trim().is_empty() {
        let found = if text.is_empty() { "an empty string" } else { "nothing but white space" };
        return Err(Fault::new(BadRowKind::Empty, "text", found).at(column));
    }
    Ok(text.to_owned())
}

fn bad_history(column: &str, found: String) -> Fault {
    let fault = Fault::new(BadRowKind::BadHistory, "a list of [query, answer] pairs of strings", found).at(column);
    fault.hint(r#"write it so: [["question", "answer"], ["question", "answer"]]"#)
}
