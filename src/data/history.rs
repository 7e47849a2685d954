//! Earlier rounds of a row: a list of [query, answer] pairs, as JSON, as JSON in a text, or as Python prints a list.

use serde_json::Value;

use crate::json;

/// Deeper lists are no history.
const MAX_DEPTH: usize = 8;

/// Earlier rounds, oldest first: (query, answer).
pub type Rounds = Vec<(String, String)>;

/// The rounds in `value`; `null` and an empty text stand for none.
///
/// # Errors
/// What was found instead.
pub fn rounds_of(value: &Value) -> Result<Rounds, String> {
    match value {
        Value::String(text) => rounds_of_text(text),
        other => pairs(other),
    }
}

/// The rounds in a text (a CSV cell, a JSON string).
///
/// # Errors
/// What was found instead.
pub fn rounds_of_text(text: &str) -> Result<Rounds, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(Rounds::new());
    }
    match json::value(text.as_bytes()) {
        Ok(value) => pairs(&value),
        Err(error) => match python_literal(text) {
            Some(value) => pairs(&value),
            None => {
                let message = error.to_string();
                let message = message.split(" at line ").next().unwrap_or_default();
                Err(format!("a text that is no list: bad JSON at byte {} of it: {message}", error.column()))
            }
        },
    }
}

fn pairs(value: &Value) -> Result<Rounds, String> {
    let rounds = match value {
        Value::Null => return Ok(Rounds::new()),
        Value::Array(rounds) => rounds,
        other => return Err(describe(other)),
    };
    let pair = |(i, round): (usize, &Value)| match round {
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(query), Value::String(answer)] => Ok((query.clone(), answer.clone())),
            [query, answer] => {
                let other = if query.is_string() { answer } else { query };
                Err(format!("{} in round {}", describe(other), i + 1))
            }
            other => Err(format!("a list of length {} as round {}", other.len(), i + 1)),
        },
        other => Err(format!("{} as round {}", describe(other), i + 1)),
    };
    rounds.iter().enumerate().map(pair).collect()
}

/// A value in words, for a message.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => format!("the boolean {b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(a) => format!("a list of length {}", a.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// What Python's `repr` writes of `None` and of lists and tuples of strings, as pandas does in a CSV cell. None for anything else.
fn python_literal(text: &str) -> Option<Value> {
    let mut rest = text;
    let value = literal(&mut rest, 0)?;
    rest.trim_start().is_empty().then_some(value)
}

fn literal(rest: &mut &str, depth: usize) -> Option<Value> {
    *rest = rest.trim_start();
    if let Some(tail) = rest.strip_prefix("None") {
        *rest = tail;
        return Some(Value::Null);
    }
    let open = rest.chars().next()?;
    *rest = &rest[open.len_utf8()..];
    let close = match open {
        '\'' | '"' => return string(rest, open).map(Value::String),
        '[' => ']',
        '(' => ')',
        _ => return None,
    };
    let mut values = Vec::new();
    loop {
        *rest = rest.trim_start();
        if let Some(tail) = rest.strip_prefix(close) {
            *rest = tail;
            return Some(Value::Array(values));
        }
        if depth == MAX_DEPTH {
            return None;
        }
        values.push(literal(rest, depth + 1)?);
        *rest = rest.trim_start();
        match rest.strip_prefix(',') {
            Some(tail) => *rest = tail,
            None if rest.starts_with(close) => {}
            None => return None,
        }
    }
}

/// A string behind its opening quote, up to its closing one.
fn string(rest: &mut &str, quote: char) -> Option<String> {
    let mut text = String::new();
    let mut chars = rest.chars();
    loop {
        match chars.next()? {
            c if c == quote => break,
            '\\' => text.push(escape(&mut chars)?),
            c => text.push(c),
        }
    }
    *rest = chars.as_str();
    Some(text)
}

/// The character of an escape that `repr` writes.
fn escape(chars: &mut std::str::Chars<'_>) -> Option<char> {
    let digits = match chars.next()? {
        c @ ('\\' | '\'' | '"') => return Some(c),
        'n' => return Some('\n'),
        'r' => return Some('\r'),
        't' => return Some('\t'),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => return None,
    };
    let mut code = 0;
    for _ in 0..digits {
        code = code * 16 + chars.next()?.to_digit(16)?;
    }
    char::from_u32(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(pairs: &[(&str, &str)]) -> Result<Rounds, String> {
        Ok(pairs.iter().map(|&(query, answer)| (query.to_owned(), answer.to_owned())).collect())
    }

    #[test]
    fn history_absent_empty_or_null_has_no_rounds() {
        for text in ["", " \n", "null", "[]", "None", "()", " [ ] "] {
            assert_eq!(rounds_of_text(text), rounds(&[]), "{text:?}");
            assert_eq!(rounds_of(&Value::String(text.to_owned())), rounds(&[]), "{text:?}");
        }
        assert_eq!(rounds_of(&Value::Null), rounds(&[]));
    }

    #[test]
    fn history_as_text_equals_the_list_in_json_and_in_python() {
        for text in [
            r#"[["q", "it's \"a\"\n"], ["甲", "乙"]]"#,
            r#"[['q', 'it\'s "a"\n'], ['甲', '乙']]"#,
            r#"[("q", "it's \x22a\x22\n"), ('\u7532', '\U00004e59')]"#,
            r#"([ 'q' , 'it\'s "a"\n', ], ('甲','乙',),)"#,
        ] {
            assert_eq!(rounds_of_text(text), rounds(&[("q", "it's \"a\"\n"), ("甲", "乙")]), "{text}");
        }
    }

    #[test]
    fn text_that_is_no_list_of_pairs_says_what_it_is() {
        let all = [
            "[['a' 'b']]",
            "[['a', 'b']",
            "[['a', 'b']] x",
            "[['a\\q', 'b']]",
            "nan",
            "7",
            "\"[]\"",
            "[['a', None]]",
            "['a', 'b']",
            "{'a': 'b'}",
            "[array(['a', 'b'], dtype=object)]",
            "hello",
        ];
        let found = all.map(|text| format!("{text}: {}", rounds_of_text(text).unwrap_err())).join("\n");
        insta::assert_snapshot!(found);
    }

    #[test]
    fn lists_in_lists_without_end_are_refused() {
        assert!(rounds_of_text(&"[".repeat(100_000)).is_err());
        assert!(rounds_of_text(&"(".repeat(100_000)).is_err());
    }
}
