//! What can go wrong between a file of rows and a data set.

use std::io;
use std::path::{Path, PathBuf};

use super::bad_rows::{BadRows, RowError};
use super::encoding;
use crate::shell;

/// Characters of a column's name that a message shows.
const SHOWN_CHARS: usize = 60;

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("no such file\n  --> {}", path.display())]
    NotFound { path: PathBuf },
    #[error("expected a file of rows, found a directory\n  --> {}", path.display())]
    IsDirectory { path: PathBuf },
    #[error("cannot read: {source}\n  --> {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write: {source}\n  --> {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("expected rows, found {found}\n  --> {}", path.display())]
    NoRows { path: PathBuf, found: &'static str },
    #[error("no row of the file can be used: {bad_rows}")]
    NoGoodRows { path: PathBuf, bad_rows: BadRows },
    #[error("expected JSON lines, a JSON array or CSV, found a file that starts with {found}\n  --> {}", path.display())]
    UnknownFormat { path: PathBuf, found: String },
    #[error("expected JSON lines, a JSON array or CSV, found {found}\n  --> {}", path.display())]
    NotText { path: PathBuf, found: &'static str, hint: &'static str },
    /// In an encoding that `iconv` calls `found`.
    #[error("expected UTF-8 text, found {found}\n  --> {}", path.display())]
    Wide { path: PathBuf, found: &'static str },
    #[error("expected CSV, as the file's name says, found JSON\n  --> {}, line {line}", path.display())]
    JsonInCsv { path: PathBuf, line: usize, extension: &'static str },
    /// Over several lines.
    #[error("expected JSON lines, a JSON array or CSV, found one JSON object that is the whole file\n  --> {}", path.display())]
    OneObject { path: PathBuf, hint: String },
    /// Roles of one column.
    #[error("`{first}_column` and `{second}_column` are both {}", shown_name(name))]
    SharedColumn { first: &'static str, second: &'static str, name: String },
    /// A column that a row may lack, but that no row has.
    #[error("no row has the column {}\n  --> {}", shown_name(name), path.display())]
    NoSuchColumn { path: PathBuf, name: String, role: &'static str, near: String },
    #[error("expected a JSON array, found bad JSON: {message}\n  --> {}, line {line}, byte {column}", path.display())]
    BadArray { path: PathBuf, line: usize, column: usize, message: String },
    /// The first line of a CSV file.
    #[error(transparent)]
    BadHeader(Box<RowError>),
    #[error(transparent)]
    BadRow(Box<RowError>),
    #[error(
        "`max_source_length` is {max_source_length}, but a prompt with an empty question already has {needed} tokens \
         (`[gMASK] sop`, the round's header and `答：`)"
    )]
    SourceTooShort { max_source_length: usize, needed: usize },
    #[error("`{key}` is 0, expected at least 1")]
    Zero { key: &'static str },
    #[error("the tokenizer refused the prompt template: {message}")]
    Template { message: String },
    #[error("rank {rank} reads other rows than rank 0 (sha256 {found}, expected {expected})\n  --> {}", path.display())]
    OtherFile { path: PathBuf, rank: usize, expected: String, found: String },
    #[error("rank {rank} failed: {message}")]
    OtherRank { rank: usize, message: String },
    #[error("the ranks could not exchange their rows: {message}")]
    Exchange { message: String },
    #[error("the data set has {found} rows, expected at most {}", u32::MAX)]
    TooManyRows { found: usize },
    #[error("the file is there already and holds other rows\n  --> {}", path.display())]
    Exists { path: PathBuf },
    #[error("the loader's thread ended: {message}")]
    Loader { message: String },
}

impl DataError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { path } => {
                let name = path.file_name()?.to_string_lossy().into_owned();
                let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let files = files_of(dir);
                let near = path.with_file_name(nearest(&name, &files)?);
                Some(format!("is `{}` meant?", near.display()))
            }
            Self::IsDirectory { path } => {
                let rows = |name: &String| [".json", ".jsonl", ".csv"].iter().any(|end| name.ends_with(end));
                let files: Vec<String> = files_of(path).into_iter().filter(rows).take(5).map(|name| format!("`{name}`")).collect();
                Some(match files.as_slice() {
                    [] => "name a .jsonl, .json or .csv file".to_owned(),
                    files => format!("name one of its files: {}", files.join(", ")),
                })
            }
            Self::NoRows { .. } => Some("write one JSON object a line, a JSON array of objects, or CSV with a header row".to_owned()),
            Self::NoGoodRows { bad_rows, .. } => bad_rows.first.first()?.hint.clone(),
            Self::UnknownFormat { .. } => Some("name the file .jsonl, .json or .csv after what it holds".to_owned()),
            Self::NotText { hint, .. } => Some((*hint).to_owned()),
            Self::OneObject { hint, .. } => Some(hint.clone()),
            Self::SharedColumn { .. } => Some("give each a column of its own".to_owned()),
            Self::Wide { path, found } => Some(format!("`{}` converts it", encoding::conversion(found, path))),
            Self::JsonInCsv { path, extension, .. } => {
                let (old, new) = (shell::quoted_path(path), shell::quoted_path(&path.with_extension(extension)));
                Some(format!("`mv {old} {new}` names it after what it holds"))
            }
            Self::NoSuchColumn { role, near, .. } => {
                let option = shell::option(&format!("{role}_column"), near);
                Some(format!("is {} meant? then pass `{option}`", shown_name(near)))
            }
            Self::BadArray { .. } => {
                Some("a damaged array cannot be read past the damage; correct it, or write one object a line".to_owned())
            }
            Self::BadHeader(error) => error.hint.clone(),
            Self::BadRow(error) => {
                let skip = "`--on_bad_row skip` leaves such rows out and counts them";
                Some(error.hint.as_ref().map_or_else(|| skip.to_owned(), |hint| format!("{hint}; {skip}")))
            }
            Self::SourceTooShort { needed, .. } => Some(format!("use at least {}", needed + 1)),
            Self::OtherFile { .. } => Some("put the same file on every machine".to_owned()),
            Self::Exists { .. } => Some("name another directory, or pass `--overwrite`".to_owned()),
            _ => None,
        }
    }
}

/// The name most like `wanted` that can be pasted, if one is near enough to be meant.
pub(super) fn nearest<'a>(wanted: &str, names: &'a [String]) -> Option<&'a str> {
    let score = |name: &String| strsim::jaro_winkler(&wanted.to_lowercase(), &name.to_lowercase());
    let best = names.iter().filter(|name| shell::is_plain(name)).map(|name| (score(name), name)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= 0.75).then_some(best.1.as_str())
}

/// A column's name on one line, as a message shows it.
pub(super) fn shown_name(name: &str) -> String {
    if name.is_empty() {
        return "`` (without a name)".to_owned();
    }
    let mut shown = String::new();
    for c in name.chars().take(SHOWN_CHARS) {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    let more = if name.chars().nth(SHOWN_CHARS).is_some() { "..." } else { "" };
    format!("`{shown}{more}`")
}

fn files_of(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().filter(|e| e.path().is_file()).map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}
