//! Reads every JSON file of the program, as TOML files are read: a byte order mark at the start is passed over, and a key that one
//! object has twice is refused, at any depth. serde_json alone refuses the first and keeps the last value of the second.

use std::fmt;
use std::io::{self, Read};

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Error, Map, Number, Value};

/// UTF-8's byte order mark, which editors on Windows write.
const MARK: &[u8] = &[0xef, 0xbb, 0xbf];
const UTF16_MARKS: [&[u8]; 2] = [&[0xff, 0xfe], &[0xfe, 0xff]];
/// What is wrong with a text that [`is_utf16`].
pub const UTF16: &str = "it is UTF-16 text, expected UTF-8; save it as UTF-8";

/// What is said of NaN and infinity.
pub const NOT_IN_JSON: &str = "which JSON does not have";
/// Numbers that Python writes, and that are no JSON; one may have a minus before it.
const NUMBERS: [&str; 2] = ["NaN", "Infinity"];

/// What `text` says.
///
/// # Errors
/// When it is not JSON, or an object in it has a key twice. Names the place, and the key with its path.
pub fn value(text: &[u8]) -> Result<Value, Error> {
    let text = without_mark(text)?;
    whole(serde_json::Deserializer::from_slice(text)).map_err(|error| {
        let line = text.split(|&byte| byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
        let at = line.get(error.column().saturating_sub(1)..).unwrap_or_default();
        number_named(error, at)
    })
}

/// What `text` says, as a `T`.
///
/// # Errors
/// As [`value`], and when it is no `T`.
pub fn read<T: DeserializeOwned>(text: &[u8]) -> Result<T, Error> {
    value(text)?;
    serde_json::from_slice(without_mark(text)?)
}

/// As [`value`], read piece by piece from behind a byte order mark.
///
/// # Errors
/// As [`value`], and when `reader` fails.
pub fn from_reader(reader: impl Read) -> Result<Value, Error> {
    let mut reader = Last { reader, last: None };
    whole(serde_json::Deserializer::from_reader(&mut reader)).map_err(|error| {
        let mut at = Vec::from_iter(reader.last);
        // A reader that fails now has nothing to add.
        let _ = reader.reader.by_ref().take(16).read_to_end(&mut at);
        number_named(error, &at)
    })
}

/// A reader that knows the last byte that it gave.
struct Last<R> {
    reader: R,
    last: Option<u8>,
}

impl<R: Read> Read for Last<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(out)?;
        self.last = read.checked_sub(1).map_or(self.last, |end| out.get(end).copied());
        Ok(read)
    }
}

/// `error`, which says what stands there if that is one of [`NUMBERS`]; `at` begins where it was found. Behind a minus serde_json may have
/// taken one byte more.
fn number_named(error: Error, at: &[u8]) -> Error {
    match NUMBERS.iter().find(|number| at.starts_with(number.as_bytes()) || at.starts_with(&number.as_bytes()[1..])) {
        Some(number) => Error::custom(format!("`{number}`, {NOT_IN_JSON} at line {} column {}", error.line(), error.column())),
        None => error,
    }
}

/// Whether a text begins with a byte order mark of UTF-16.
pub fn is_utf16(text: &[u8]) -> bool {
    UTF16_MARKS.iter().any(|mark| text.starts_with(mark))
}

fn without_mark(text: &[u8]) -> Result<&[u8], Error> {
    if is_utf16(text) {
        return Err(Error::custom(UTF16));
    }
    Ok(text.strip_prefix(MARK).unwrap_or(text))
}

fn whole<'de, R: serde_json::de::Read<'de>>(mut json: serde_json::Deserializer<R>) -> Result<Value, Error> {
    let value = Unique(&Path::Top).deserialize(&mut json)?;
    json.end()?;
    Ok(value)
}

/// Where a value stands, from the inside out.
enum Path<'a> {
    Top,
    Key(&'a Path<'a>, &'a str),
    Element(&'a Path<'a>, usize),
}

/// `a.b[2].c`.
impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Top => Ok(()),
            Self::Key(Self::Top, key) => write!(f, "{}", key.escape_debug()),
            Self::Key(outer, key) => write!(f, "{outer}.{}", key.escape_debug()),
            Self::Element(outer, index) => write!(f, "{outer}[{index}]"),
        }
    }
}

/// Reads a value in which no object has a key twice.
struct Unique<'a>(&'a Path<'a>);

impl<'de> DeserializeSeed<'de> for Unique<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = elements.next_element_seed(Unique(&Path::Element(self.0, list.len())))? {
            list.push(element);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let at = Path::Key(self.0, &key);
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("key `{at}` is given twice")));
            }
            let value = entries.next_value_seed(Unique(&at))?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn refusal(text: &[u8]) -> String {
        value(text).unwrap_err().to_string()
    }

    #[test]
    fn json_with_unique_keys_is_what_serde_json_reads() {
        for text in [
            r#"{"b": 1, "a": [1, -2, 2.5, 1e300, null, true, "x\u00e9", {"b": {}, "a": []}], "18446744073709551615": 18446744073709551615}"#,
            "  [ ] ",
            "0.1",
            "\"text\"",
        ] {
            assert_eq!(value(text.as_bytes()).unwrap().to_string(), serde_json::from_str::<Value>(text).unwrap().to_string());
            assert_eq!(from_reader(text.as_bytes()).unwrap(), value(text.as_bytes()).unwrap());
        }
    }

    #[test]
    fn json_behind_a_byte_order_mark_is_read_and_utf16_is_named() {
        assert_eq!(value(b"\xef\xbb\xbf{\"a\": 1}").unwrap(), serde_json::json!({"a": 1}));
        assert_eq!(read::<BTreeMap<String, u8>>(b"\xef\xbb\xbf{\"a\": 1}").unwrap(), BTreeMap::from([("a".to_owned(), 1)]));
        assert_eq!(refusal(b"\xff\xfe{\0}\0"), "it is UTF-16 text, expected UTF-8; save it as UTF-8");
        assert_eq!(refusal(b"\xef\xbb\xbf"), "EOF while parsing a value at line 1 column 0");
    }

    #[test]
    fn json_key_given_twice_is_refused_with_its_path_at_any_depth() {
        assert_eq!(refusal(b"{\"a\": 1,\n \"a\": 1}"), "key `a` is given twice at line 2 column 4");
        assert_eq!(refusal(br#"{"a": [0, {"b": {"c": 1, "d": 2, "c": 3}}]}"#), "key `a[1].b.c` is given twice at line 1 column 36");
        assert_eq!(refusal(br#"[{"\u0061": 1, "a": 2}]"#), "key `[0].a` is given twice at line 1 column 18");
        assert_eq!(refusal(br#"{"a\n": 1, "a\n": 2}"#), "key `a\\n` is given twice at line 1 column 16");
        assert!(read::<BTreeMap<String, u8>>(br#"{"a": 1, "a": 2}"#).is_err());
        assert!(value(br#"{"a": {"b": 1}, "b": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}"#).is_ok());
    }

    #[test]
    fn number_of_python_that_is_no_json_is_named_with_its_place() {
        for (text, said) in [
            ("{\"a\": NaN}", "`NaN`, which JSON does not have at line 1 column 7"),
            ("[1,\n Infinity]", "`Infinity`, which JSON does not have at line 2 column 2"),
            ("{\"a\": [-Infinity]}", "`Infinity`, which JSON does not have at line 1 column 9"),
            ("NaN", "`NaN`, which JSON does not have at line 1 column 1"),
            ("[{\"a\": [0, -Infinity], \"b\": 1}]", "`Infinity`, which JSON does not have at line 1 column 13"),
            ("{\"a\": None}", "expected value at line 1 column 7"),
        ] {
            assert_eq!(refusal(text.as_bytes()), said);
            assert_eq!(from_reader(text.as_bytes()).unwrap_err().to_string(), said);
            assert_eq!(value(text.as_bytes()).unwrap_err().line(), 1 + text.matches('\n').count());
        }
    }

    #[test]
    fn json_that_is_damaged_is_refused_as_before() {
        assert_eq!(refusal(b"{\"a\": 1,\n}"), "trailing comma at line 2 column 1");
        assert_eq!(refusal(b"{} x"), "trailing characters at line 1 column 4");
        assert!(refusal("[".repeat(200).as_bytes()).starts_with("recursion limit exceeded"));
    }
}
