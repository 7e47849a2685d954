//! Reads a configuration file: TOML, or JSON as THUDM's `main.py` takes it.
//!
//! A key may stand flat or in its section. Every key is checked as it is met, so that a message can name the line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use toml::Value;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::error::{ConfigError, Place, Source, nearest};
use super::foreign::{self, Idle};
use super::off::{self, Asks};
use super::{KeyTable, SECTIONS, Sources};
use crate::{json, paths};

/// The shipped files have some kilobytes. To find a key's line takes time by the length of the file, and that for each key.
const MAX_BYTES: u64 = 1 << 16;

/// The section whose tables are the methods of a comparison.
const METHODS: &str = "methods";

/// What a file says: checked values by key, and where each stands.
#[derive(Debug, Default)]
pub(super) struct FileValues {
    pub values: BTreeMap<String, Value>,
    pub sources: Sources,
    /// Keys that do nothing here.
    pub idle: Vec<Idle>,
}

/// One `key = value`, wherever it stood.
struct Entry {
    section: Option<String>,
    key: String,
    /// `None`: null.
    value: Option<Value>,
    line: usize,
}

/// A `[methods.LABEL]` table: what one method of a comparison has of its own.
#[derive(Debug)]
pub(super) struct MethodTable {
    pub label: String,
    pub place: Place,
    pub own: FileValues,
}

/// Reads the file of a run.
pub(super) fn read(path: &Path) -> Result<FileValues, ConfigError> {
    let (values, methods) = read_comparison(path)?;
    match methods.first() {
        Some(MethodTable { place: Place { source: Source::File { line, .. }, .. }, .. }) => Err(unknown_section(path, "methods", *line)),
        _ => Ok(values),
    }
}

/// Reads the file of a comparison: a run's, and `[methods.LABEL]` tables where it is TOML.
pub(super) fn read_comparison(path: &Path) -> Result<(FileValues, Vec<MethodTable>), ConfigError> {
    paths::expect_file(path)?;
    let failed = |reason: String| ConfigError::Read { path: path.to_owned(), reason };
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
    read.map_err(|e| failed(e.to_string()))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(failed(format!("it has more than {MAX_BYTES} bytes")));
    }
    if json::is_utf16(&bytes) {
        return Err(failed(json::UTF16.to_owned()));
    }
    let text = String::from_utf8(bytes)
        .map_err(|e| failed(format!("it is not UTF-8 text at byte {}; save it as UTF-8", e.utf8_error().valid_up_to() + 1)))?;
    let is_json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    if is_json { Ok((check(path, "", json_entries(path, &text)?)?, Vec::new())) } else { parse_toml(path, &text) }
}

/// As [`read_comparison`], of a text that stands at `path`.
pub(super) fn parse_toml(path: &Path, text: &str) -> Result<(FileValues, Vec<MethodTable>), ConfigError> {
    let (entries, tables) = toml_entries(path, text)?;
    let values = check(path, "", entries)?;
    let methods = tables.into_iter().map(|Table { label, line, entries }| {
        let key = format!("methods.{label}");
        let own = check(path, &format!("{key}."), entries)?;
        Ok(MethodTable { label, place: Place { source: Source::File { path: path.into(), line }, key }, own })
    });
    Ok((values, methods.collect::<Result<_, ConfigError>>()?))
}

/// A `[methods.LABEL]` table as written.
struct Table {
    label: String,
    line: usize,
    entries: Vec<Entry>,
}

fn toml_entries(path: &Path, text: &str) -> Result<(Vec<Entry>, Vec<Table>), ConfigError> {
    let line_of = |offset: usize| 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count();
    let syntax = |e: &toml::de::Error| {
        let twice = e.span().filter(|_| e.message() == "duplicate key").and_then(|span| text.get(span));
        ConfigError::Syntax {
            path: path.to_owned(),
            line: e.span().map_or(1, |s| line_of(s.start)),
            language: "TOML",
            message: twice.map_or(e.message().to_owned(), |key| format!("key `{key}` is given twice")),
        }
    };
    let document = DeTable::parse(text).map_err(|e| syntax(&e))?;
    let entry = |section: Option<&str>, key: &toml::Spanned<std::borrow::Cow<str>>, value: &toml::Spanned<DeValue>| {
        let line = line_of(key.span().start);
        let value = Value::deserialize(ValueDeserializer::from(value.clone())).map_err(|e| syntax(&e))?;
        Ok::<_, ConfigError>(Entry { section: section.map(str::to_owned), key: key.get_ref().to_string(), value: Some(value), line })
    };
    let keys = KeyTable::new();
    let (mut entries, mut tables) = (Vec::new(), Vec::new());
    for (key, value) in document.get_ref() {
        let name: &str = key.get_ref();
        let line = line_of(key.span().start);
        match value.get_ref().as_table() {
            Some(methods) if name == METHODS => {
                for (label, table) in methods {
                    let line = line_of(label.span().start);
                    let Some(table) = table.get_ref().as_table() else { return Err(unknown_section(path, name, line)) };
                    let mut entries = table.iter().map(|(k, v)| entry(None, k, v)).collect::<Result<Vec<_>, _>>()?;
                    entries.sort_by_key(|e| e.line);
                    tables.push(Table { label: label.get_ref().to_string(), line, entries });
                }
            }
            Some(_) if is_key(name, &keys) => entries.push(entry(None, key, value)?),
            Some(table) if !SECTIONS.contains(&name) && table.is_empty() => entries.push(entry(None, key, value)?),
            Some(_) if !SECTIONS.contains(&name) => return Err(unknown_section(path, name, line)),
            Some(table) => {
                for (k, v) in table {
                    entries.push(entry(Some(name), k, v)?);
                }
            }
            None => entries.push(entry(None, key, value)?),
        }
    }
    entries.sort_by_key(|e| e.line);
    tables.sort_by_key(|t| t.line);
    Ok((entries, tables))
}

fn json_entries(path: &Path, text: &str) -> Result<Vec<Entry>, ConfigError> {
    let syntax = |line: usize, message: String| ConfigError::Syntax { path: path.to_owned(), line, language: "JSON", message };
    let document = json::value(text.as_bytes()).map_err(|e| syntax(e.line().max(1), e.to_string()))?;
    let Some(document) = document.as_object() else { return Err(syntax(1, "expected an object at the top".to_owned())) };
    let line_of = |key: &str| 1 + text.lines().position(|l| l.contains(&format!("\"{key}\""))).unwrap_or(0);
    let mut entries = Vec::new();
    let mut push = |section: Option<&str>, key: &str, value: &serde_json::Value| {
        let line = line_of(key);
        let value = toml_value(value).map_err(|e| syntax(line, e.to_string()))?;
        entries.push(Entry { section: section.map(str::to_owned), key: key.to_owned(), value, line });
        Ok::<_, ConfigError>(())
    };
    let keys = KeyTable::new();
    for (key, value) in document {
        match value.as_object() {
            Some(_) if is_key(key, &keys) => push(None, key, value)?,
            Some(table) if !SECTIONS.contains(&key.as_str()) && table.is_empty() => push(None, key, value)?,
            Some(_) if !SECTIONS.contains(&key.as_str()) => return Err(unknown_section(path, key, line_of(key))),
            Some(table) => table.iter().try_for_each(|(k, v)| push(Some(key), k, v))?,
            None => push(None, key, value)?,
        }
    }
    Ok(entries)
}

/// Whether a table called `name` is the value of a key, ours or another program's, and no section.
fn is_key(name: &str, keys: &KeyTable) -> bool {
    !SECTIONS.contains(&name) && (keys.get(name).is_some() || foreign::find(name).is_some())
}

/// JSON's value as TOML's, which has no null: `None`, and left out of arrays and objects.
fn toml_value(value: &serde_json::Value) -> Result<Option<Value>, toml::ser::Error> {
    use serde_json::Value as Json;
    Ok(Some(match value {
        Json::Null => return Ok(None),
        Json::Array(values) => {
            let values: Result<Vec<Option<Value>>, _> = values.iter().map(toml_value).collect();
            Value::Array(values?.into_iter().flatten().collect())
        }
        Json::Object(object) => {
            let mut table = toml::Table::new();
            for (key, value) in object {
                if let Some(value) = toml_value(value)? {
                    table.insert(key.clone(), value);
                }
            }
            Value::Table(table)
        }
        plain => Value::try_from(plain)?,
    }))
}

fn unknown_section(path: &Path, section: &str, line: usize) -> ConfigError {
    let place = Place { source: Source::File { path: path.into(), line }, key: section.to_owned() };
    ConfigError::UnknownSection { section: section.to_owned(), nearest: nearest(section, SECTIONS.into_iter()), place }
}

/// `table` stands before the names of keys in messages.
fn check(path: &Path, table: &str, entries: Vec<Entry>) -> Result<FileValues, ConfigError> {
    let keys = KeyTable::new();
    let path: Arc<Path> = path.into();
    let mut file = FileValues::default();
    for Entry { section, key, value, line } in entries {
        let source = Source::File { path: path.clone(), line };
        let written = section.as_ref().map_or_else(|| format!("{table}{key}"), |s| format!("{s}.{key}"));
        let Some(known) = keys.get(&key) else {
            let place = Place { source, key: written };
            let is_empty_section = section.is_none() && SECTIONS.contains(&key.as_str()) && asks_nothing(value.as_ref());
            if !is_empty_section {
                file.idle.push(pass_over(&key, value, &keys, place)?);
            }
            continue;
        };
        let expected = known.section;
        if let Some(found) = section.filter(|s| s != expected) {
            return Err(ConfigError::WrongSection { key, found, expected, place: Place { source, key: written } });
        }
        let place = Place { source, key: if table.is_empty() { format!("{expected}.{key}") } else { written } };
        let value = value.map_or(Ok(None), |value| off::meant(known, value));
        let value = value.map_err(|message| ConfigError::WrongType { message, place: place.clone() })?;
        let Some(value) = value else { continue };
        if let Some(Source::File { line: first, .. }) = file.sources.get(&key) {
            return Err(ConfigError::Twice { key, first: *first, second: line, place });
        }
        file.sources.insert(&key, place.source);
        file.values.insert(key, value);
    }
    Ok(file)
}

fn asks_nothing(value: Option<&Value>) -> bool {
    value.is_none_or(|value| Asks::of(value) == Asks::Nothing)
}

/// What is said of a key of other programs, or why it is refused, or that nobody knows it. Null and what is empty ask for nothing of anybody.
fn pass_over(key: &str, value: Option<Value>, keys: &KeyTable, place: Place) -> Result<Idle, ConfigError> {
    match (foreign::find(key), value) {
        (None, value) if asks_nothing(value.as_ref()) => Ok(Idle { key: key.to_owned(), reason: None, place }),
        (_, None) => Ok(Idle { key: key.to_owned(), reason: None, place }),
        (Some(argument), Some(value)) => argument.judge(key, &value, place),
        (None, Some(_)) => Err(ConfigError::UnknownKey { key: key.to_owned(), nearest: nearest(key, keys.names()), place }),
    }
}
