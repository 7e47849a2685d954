//! What the rows of a file hold in columns that no key names, and which rows lack a column that they may lack.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::DataError;
use super::error::{nearest, shown_name};
use super::history;
use super::record::Columns;
use crate::shell;

/// Columns that a message lists.
const LISTED: usize = 5;
/// Names under which data sets keep a second part of the question.
const INPUT_NAMES: [&str; 3] = ["input", "query", "context"];

/// Whether this is the number of a row in the index that pandas writes: under no name, read again under `Unnamed: 0`.
pub(super) fn is_row_number(name: &str, is_whole_number: impl Fn() -> bool) -> bool {
    (name.is_empty() || name.starts_with("Unnamed: ") || name.starts_with("__index_level_")) && is_whole_number()
}

/// What a cell that is not empty holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    Text,
    /// A list of rounds, or a text that is one.
    Rounds,
    Other,
}

impl Holds {
    /// None for an empty cell: `null`, white space, an empty list or object.
    pub fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Null => None,
            Value::String(text) => Self::of_text(text),
            Value::Array(list) if list.is_empty() => None,
            Value::Object(object) if object.is_empty() => None,
            Value::Array(_) => Some(if history::rounds_of(value).is_ok() { Self::Rounds } else { Self::Other }),
            _ => Some(Self::Other),
        }
    }

    pub fn of_text(text: &str) -> Option<Self> {
        let text = text.trim();
        match text {
            "" => None,
            // A text of a whole history is as good as its list.
            _ if text.starts_with(['[', '(']) && history::rounds_of_text(text).is_ok_and(|rounds| !rounds.is_empty()) => Some(Self::Rounds),
            _ => Some(Self::Text),
        }
    }
}

/// What one row holds beside its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// Columns that no key names and that are not empty.
    pub unused: Vec<(String, Holds)>,
    pub has_input: bool,
    pub has_history: bool,
}

/// The same, counted over the rows of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnUse {
    num_rows: usize,
    num_with_input: usize,
    num_with_history: usize,
    unused: BTreeMap<String, Count>,
}

/// Rows in which a column is not empty, and what it holds there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Count {
    rows: usize,
    texts: usize,
    rounds: usize,
}

impl ColumnUse {
    pub fn push(&mut self, row: &Beside) {
        self.num_rows += 1;
        self.num_with_input += usize::from(row.has_input);
        self.num_with_history += usize::from(row.has_history);
        for (name, holds) in &row.unused {
            // Most names are there already.
            if !self.unused.contains_key(name) {
                self.unused.insert(name.clone(), Count::default());
            }
            if let Some(count) = self.unused.get_mut(name) {
                count.rows += 1;
                count.texts += usize::from(*holds == Holds::Text);
                count.rounds += usize::from(*holds == Holds::Rounds);
            }
        }
    }

    pub fn append(&mut self, other: &Self) {
        self.num_rows += other.num_rows;
        self.num_with_input += other.num_with_input;
        self.num_with_history += other.num_with_history;
        for (name, count) in &other.unused {
            let own = self.unused.entry(name.clone()).or_default();
            own.rows += count.rows;
            own.texts += count.texts;
            own.rounds += count.rounds;
        }
    }

    /// Leaves a column out of the report.
    pub fn forget(&mut self, name: &str) {
        self.unused.remove(name);
    }

    /// The columns that a key names, a row may lack, and none has: (name, role).
    fn absent<'c>(&self, columns: &'c Columns) -> impl Iterator<Item = (&'c str, &'static str)> {
        let input = columns.input.as_deref().filter(|_| self.num_with_input == 0).map(|name| (name, "input"));
        let history = columns.history.as_deref().filter(|_| self.num_with_history == 0).map(|name| (name, "history"));
        input.into_iter().chain(history)
    }

    /// # Errors
    /// When no row has a column that is asked for, and an unused one has nearly its name.
    pub fn check(&self, columns: &Columns, path: &Path) -> Result<(), DataError> {
        let names: Vec<String> = self.unused.keys().cloned().collect();
        match self.absent(columns).find_map(|(name, role)| Some((name, role, nearest(name, &names)?))) {
            Some((name, role, near)) if self.num_rows > 0 => {
                Err(DataError::NoSuchColumn { path: path.to_owned(), name: name.to_owned(), role, near: near.to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// What to tell the user of the rows of `path`: a line for what is not used, one for each column that no row has.
    pub fn report(&self, columns: &Columns, path: &Path) -> Vec<String> {
        let path = path.display();
        let absent = self.absent(columns).filter(|_| self.num_rows > 0);
        let absent = absent.map(|(name, role)| format!("{path}: no row has the column {} (`{role}_column`)", shown_name(name)));
        self.unused_text(columns).map(|text| format!("{path}: {text}")).into_iter().chain(absent).collect()
    }

    fn unused_text(&self, columns: &Columns) -> Option<String> {
        let mut unused: Vec<(&str, Count)> = self.unused.iter().map(|(name, count)| (name.as_str(), *count)).collect();
        unused.sort_by_key(|(_, count)| std::cmp::Reverse(count.rows));
        let rows = if self.num_rows == 1 { "row" } else { "rows" };
        let mut text = match unused.as_slice() {
            [] => return None,
            [(name, count)] => {
                format!("column {} is not used and is not empty in {} of {} {rows}", shown_name(name), count.rows, self.num_rows)
            }
            _ => {
                let mut listed: Vec<String> =
                    unused.iter().take(LISTED).map(|(name, count)| format!("{} in {}", shown_name(name), count.rows)).collect();
                if unused.len() > LISTED {
                    listed.push(format!("{} more", unused.len() - LISTED));
                }
                format!("columns are not used and not empty: {}, of {} {rows}", listed.join(", "), self.num_rows)
            }
        };
        let names = |is: fn(&Count) -> bool| -> Vec<&str> {
            unused.iter().filter(|(name, count)| is(count) && shell::is_plain(name)).map(|(name, _)| *name).collect()
        };
        if columns.input.is_none() {
            // The name must say it: another text may well be the answer.
            let texts = names(|count| count.texts == count.rows);
            if let Some(name) = texts.iter().find(|name| INPUT_NAMES.contains(name)) {
                text += &format!("; `{}` appends it to the question", shell::option("input_column", name));
            }
        }
        if columns.history.is_none()
            && let Some(name) = names(|count| count.rounds == count.rows).first()
        {
            text += &format!("; `{}` takes it as the earlier rounds", shell::option("history_column", name));
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(input: Option<&str>, history: Option<&str>) -> Columns {
        Columns { prompt: "q".into(), input: input.map(Into::into), response: "a".into(), history: history.map(Into::into) }
    }

    fn row(unused: &[(&str, Holds)]) -> Beside {
        Beside { unused: unused.iter().map(|&(name, holds)| (name.to_owned(), holds)).collect(), has_input: false, has_history: false }
    }

    #[test]
    fn counts_of_two_shares_appended_equal_those_of_one_pass() {
        let rows: Vec<Beside> = (0..9)
            .map(|i| Beside {
                has_input: i % 2 == 0,
                has_history: i % 4 == 0,
                ..row(if i % 3 == 0 { &[("x", Holds::Text), ("y", Holds::Rounds)] } else { &[("x", Holds::Other)] })
            })
            .collect();
        let count = |rows: &[Beside]| {
            let mut all = ColumnUse::default();
            rows.iter().for_each(|row| all.push(row));
            all
        };
        for cut in 0..=9 {
            let mut first = count(&rows[..cut]);
            first.append(&count(&rows[cut..]));
            assert_eq!(first, count(&rows), "cut at {cut}");
        }
    }

    #[test]
    fn unused_columns_are_told_with_counts_and_the_keys_that_use_them() {
        let told = |rows: &[Beside], columns: &Columns| {
            let mut all = ColumnUse::default();
            rows.iter().for_each(|row| all.push(row));
            all.report(columns, Path::new("f")).join("\n")
        };
        let none = columns(None, None);
        let many: Vec<(String, Holds)> = (0..9).map(|i| (format!("c{i}"), Holds::Other)).collect();
        let all = [
            told(&[row(&[]), row(&[("input", Holds::Text)])], &none),
            told(&[row(&[("id", Holds::Text), ("input", Holds::Text), ("history", Holds::Rounds)])], &none),
            told(&[row(&[("my notes", Holds::Text)])], &none),
            told(&[row(&[("input", Holds::Text), ("n", Holds::Other)])], &columns(Some("input2"), None)),
            told(&[row(&[("-h", Holds::Rounds)])], &none),
            told(&[row(&[("", Holds::Text)])], &none),
            told(&[Beside { unused: many, ..Beside::default() }], &none),
            told(&[row(&[])], &columns(Some("x"), Some("y"))),
        ];
        insta::assert_snapshot!(all.join("\n"));
        assert_eq!(told(&[row(&[])], &none), "");
    }
}
