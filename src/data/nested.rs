//! Rows in shapes that are not read: a dialogue as a list of turns, and rows in a list inside an object. What to write instead.

use serde_json::{Map, Value, json};

use super::error::shown_name;
use super::record::Columns;

/// Keys of a turn that say who speaks.
const SPEAKERS: [&str; 5] = ["role", "from", "speaker", "human", "assistant"];

/// What to write instead, if an entry of `object` is such a list.
pub(super) fn in_object(object: &Map<String, Value>, columns: &Columns) -> Option<String> {
    object.iter().find_map(|(name, value)| in_value(name, value, columns))
}

/// The same, of its entry `name`.
pub(super) fn in_value(name: &str, value: &Value, columns: &Columns) -> Option<String> {
    let first = value.as_array()?.first()?.as_object()?;
    let name = shown_name(name);
    if !SPEAKERS.iter().any(|speaker| first.contains_key(*speaker)) {
        let row = example(columns, None);
        return Some(format!(
            "rows in a list inside an object, as in {name}, are not read: write that list alone, or one row a line: {row}"
        ));
    }
    let (history, pass) = match &columns.history {
        Some(history) => (history.as_str(), ""),
        None => ("history", ", with `--history_column history`"),
    };
    let row = example(columns, Some(history));
    Some(format!(
        "turns in a list, as in {name}, are not read: write the last question and its answer, and the earlier rounds as pairs{pass}: {row}"
    ))
}

/// A row of the shape that is read.
fn example(columns: &Columns, history: Option<&str>) -> String {
    let Columns { prompt, response, .. } = columns;
    let pair = [(prompt.as_str(), json!("question")), (response.as_str(), json!("answer"))];
    let rounds = history.map(|name| (name, json!([["earlier question", "its answer"]])));
    // Not a map, which would sort them. `generate` may ask for no answer.
    let entries = pair.into_iter().take(if prompt == response { 1 } else { 2 }).chain(rounds);
    let entries: Vec<String> = entries.map(|(name, value)| format!("{}: {value}", Value::from(name))).collect();
    format!("{{{}}}", entries.join(", "))
}
