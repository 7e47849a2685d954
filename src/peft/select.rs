//! Which parts of the model a method is about, as PEFT's `target_modules` says it: a list of names, or one regular expression.

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

/// Memory of a compiled expression. One for a model's names takes some kilobytes; the library would allow 10 MB, which `(a{1000}){1000}` takes.
const MAX_PATTERN_BYTES: usize = 1 << 18;
/// Longest expression: before it is compiled, each of its bytes takes some hundred.
const MAX_PATTERN_LEN: usize = 1 << 12;

/// A list of names separated by commas, or a regular expression that a whole dotted name has to match. What holds a character that no name has
/// is an expression.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Selector(String);

/// What a [`Selector`] is made of.
enum Kind {
    /// Each matches a name that ends in it, from a dot on.
    Names(Vec<String>),
    Pattern(Box<Regex>),
}

impl Selector {
    /// # Errors
    /// When the text is empty or no valid expression: what is wrong with it.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.split(',').any(|name| name.trim().is_empty()) && !is_pattern(text) {
            return Err("a name is empty".to_owned());
        }
        let selector = Self(text.to_owned());
        selector.kind()?;
        Ok(selector)
    }

    pub fn text(&self) -> &str {
        &self.0
    }

    /// The names of a list; none for an expression.
    pub fn names(&self) -> Option<impl Iterator<Item = &str>> {
        (!is_pattern(&self.0)).then(|| self.0.split(',').map(str::trim))
    }

    fn kind(&self) -> Result<Kind, String> {
        if is_pattern(&self.0) {
            if self.0.len() > MAX_PATTERN_LEN {
                return Err(format!("the expression has {} bytes, expected at most {MAX_PATTERN_LEN}", self.0.len()));
            }
            let whole = RegexBuilder::new(&format!("^(?:{})$", self.0)).size_limit(MAX_PATTERN_BYTES).build().map_err(|e| e.to_string())?;
            return Ok(Kind::Pattern(Box::new(whole)));
        }
        Ok(Kind::Names(self.names().into_iter().flatten().map(str::to_owned).collect()))
    }

    /// Those of `names` that are meant, in their order: a listed name means what ends in it.
    ///
    /// # Errors
    /// When the expression is not valid, nothing is meant, or a listed name is none of these: what is wrong.
    pub fn select<'a>(&self, names: &[&'a str]) -> Result<Vec<&'a str>, String> {
        self.select_by(names, |name, part| name == part || name.strip_suffix(part).is_some_and(|rest| rest.ends_with('.')))
    }

    /// As [`Self::select`], but a listed name also means all that stands below it.
    ///
    /// # Errors
    /// As [`Self::select`].
    pub fn select_below<'a>(&self, names: &[&'a str]) -> Result<Vec<&'a str>, String> {
        self.select_by(names, |name, part| format!(".{name}.").contains(&format!(".{part}.")))
    }

    fn select_by<'a>(&self, names: &[&'a str], is_named: impl Fn(&str, &str) -> bool) -> Result<Vec<&'a str>, String> {
        let chosen: Vec<&str> = match self.kind()? {
            Kind::Pattern(pattern) => names.iter().copied().filter(|name| pattern.is_match(name)).collect(),
            Kind::Names(parts) => {
                if let Some(unknown) = parts.iter().find(|part| !names.iter().any(|name| is_named(name, part))) {
                    return Err(format!("nothing is called `{unknown}`"));
                }
                names.iter().copied().filter(|name| parts.iter().any(|part| is_named(name, part))).collect()
            }
        };
        if chosen.is_empty() { Err("nothing matches it".to_owned()) } else { Ok(chosen) }
    }
}

fn is_pattern(text: &str) -> bool {
    text.chars().any(|c| !(c.is_alphanumeric() || matches!(c, '_' | '.' | ',' | ' '))) || text == "."
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] =
        ["layers.0.attention.dense", "layers.0.mlp.dense_4h_to_h", "layers.1.attention.dense", "layers.11.attention.dense"];

    fn select(text: &str) -> Result<Vec<&'static str>, String> {
        Selector::new(text)?.select(&NAMES)
    }

    #[test]
    fn names_match_whole_parts_and_patterns_whole_names() {
        assert_eq!(select("dense").unwrap(), [NAMES[0], NAMES[2], NAMES[3]]);
        assert_eq!(select("dense, dense_4h_to_h").unwrap(), NAMES);
        assert_eq!(select("layers.1.attention.dense").unwrap(), [NAMES[2]]);
        assert_eq!(select(r".*\.1\..*").unwrap(), [NAMES[2]]);
        assert_eq!(Selector::new("layers.1,mlp").unwrap().select_below(&NAMES).unwrap(), [NAMES[1], NAMES[2]]);
        assert_eq!(select(r"layers\.(0|11)\.attention\.dense").unwrap(), [NAMES[0], NAMES[3]]);
    }

    #[test]
    fn selector_that_means_nothing_says_why() {
        assert_eq!(select("dense,densse").unwrap_err(), "nothing is called `densse`");
        assert_eq!(select("dense.*").unwrap_err(), "nothing matches it");
        assert_eq!(select("dense,,").unwrap_err(), "a name is empty");
        assert!(select("(dense").unwrap_err().contains("unclosed group"));
    }
}
