//! The dialogue template that a base was trained with, as far as its files say. Rows become text by ChatGLM2's alone.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use super::ModelError;
use super::family::Family;
use crate::digest::sha256_hex;
use crate::json;

/// What ChatGLM2's template puts before a question; a `chat_template` with it is the same in another form.
const QUESTION: &str = "问：";
/// The role that ChatGLM3 and GLM-4 have a special token for, and ChatGLM2 has not.
const ROLE: &str = "<|user|>";
/// Sha256 of CodeGeeX2-6B's tokenizer.model.
const CODEGEEX2_TOKENIZER: &str = "57d9fdbdfaa7cd8c0a3a38d7e8de2e6c31374b5dbc4dc4568d85585fe745812f";

/// A template that is not ChatGLM2's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherTemplate {
    /// Whose it is, where that is known.
    pub family: Option<Family>,
    /// What says so: a key or a text, and its file.
    pub seen: String,
}

impl fmt::Display for OtherTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = match self.family {
            Some(Family::ChatGlm3 | Family::Glm4) => ", with <|user|> and <|assistant|>",
            Some(Family::CodeGeeX2) => ", code behind a line such as `# language: Python`",
            Some(Family::ChatGlm2) | None => "",
        };
        let title = self.family.map_or("its own".to_owned(), |family| format!("{}'s", family.title()));
        write!(
            f,
            "this base was trained with another dialogue template, {title}{whose} ({}); this program formats rows with ChatGLM2's template \
             ([Round 1], 问：, 答：), as `glmddp tokenize` shows",
            self.seen
        )
    }
}

/// The template of the base in `dir` if a file there says that it is not ChatGLM2's. Files that are absent say nothing.
///
/// # Errors
/// When a file that is there cannot be read, or is not JSON.
pub fn other_template(dir: &Path) -> Result<Option<OtherTemplate>, ModelError> {
    let config = json_if_there(dir, "config.json")?;
    let tokenizer = json_if_there(dir, "tokenizer_config.json")?;
    let found = |family, seen: String| Ok(Some(OtherTemplate { family, seen }));
    let mut named = None;
    for (file, json, key) in [("config.json", &config, "_name_or_path"), ("tokenizer_config.json", &tokenizer, "name_or_path")] {
        let by_name = json.get(key).and_then(Value::as_str).and_then(|name| Some((Family::of(name)?, key, name)));
        // A file that was saved again has the hub's name here alone.
        let by_code = || json.get("auto_map").and_then(Family::of_auto_map).map(|(family, name)| (family, "auto_map", name));
        match by_name.or_else(by_code) {
            Some((family @ Family::ChatGlm2, ..)) => _ = named.get_or_insert(family),
            Some((family, "auto_map", name)) => {
                return found(Some(family), format!("`auto_map` takes the code of {name:?} in {}", dir.join(file).display()));
            }
            Some((family, key, name)) => return found(Some(family), format!("`{key}` is {name:?} in {}", dir.join(file).display())),
            None => {}
        }
    }
    if let Some(class) = tokenizer.get("tokenizer_class").and_then(Value::as_str).filter(|class| class.contains("ChatGLM4")) {
        let file = dir.join("tokenizer_config.json");
        return found(Some(Family::Glm4), format!("`tokenizer_class` is {class:?} in {}", file.display()));
    }
    if let Some(template) = tokenizer.get("chat_template").filter(|template| !is_blank(template) && !has_text(template, QUESTION)) {
        let family = has_text(template, ROLE).then_some(Family::ChatGlm3);
        return found(family, format!("`chat_template` in {}", dir.join("tokenizer_config.json").display()));
    }
    for (file, json) in [
        ("tokenizer_config.json", tokenizer),
        ("special_tokens_map.json", json_if_there(dir, "special_tokens_map.json")?),
        ("added_tokens.json", json_if_there(dir, "added_tokens.json")?),
    ] {
        if has_text(&json, ROLE) {
            return found(Some(Family::ChatGlm3), format!("the token {ROLE} in {}", dir.join(file).display()));
        }
    }
    if let Some(text) = bytes_if_there(dir, "chat_template.jinja")?
        && !text.trim_ascii().is_empty()
        && !contains(&text, QUESTION)
    {
        let family = contains(&text, ROLE).then_some(Family::ChatGlm3);
        return found(family, format!("the file {}", dir.join("chat_template.jinja").display()));
    }
    if bytes_if_there(dir, "tokenization_chatglm.py")?.is_some_and(|code| contains(&code, ROLE)) {
        return found(Some(Family::ChatGlm3), format!("the token {ROLE} in {}", dir.join("tokenization_chatglm.py").display()));
    }
    if bytes_if_there(dir, "tokenizer.model")?.is_some_and(|bytes| sha256_hex(bytes) == CODEGEEX2_TOKENIZER) {
        return found(Some(Family::CodeGeeX2), format!("{} is CodeGeeX2-6B's", dir.join("tokenizer.model").display()));
    }
    let folder = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let folder = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match Family::of(&folder) {
        Some(family) if named.is_none() && family != Family::ChatGlm2 => found(Some(family), format!("the folder's name, {folder}")),
        _ => Ok(None),
    }
}

fn bytes_if_there(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
    let path = dir.join(name);
    if path.is_file() { std::fs::read(&path).map(Some).map_err(|source| ModelError::Io { path, source }) } else { Ok(None) }
}

/// Null for a file that is not there.
fn json_if_there(dir: &Path, name: &str) -> Result<Value, ModelError> {
    let Some(text) = bytes_if_there(dir, name)? else { return Ok(Value::Null) };
    json::value(&text).map_err(|source| ModelError::Json { path: dir.join(name), source })
}

/// Whether a `chat_template`, a text or a list of `{"name": ..., "template": ...}`, holds no template.
fn is_blank(template: &Value) -> bool {
    match template {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.iter().all(|named| is_blank(named.get("template").unwrap_or(named))),
        Value::Object(object) => object.is_empty(),
        _ => false,
    }
}

/// Whether a string or a key anywhere in `json` has `text` in it.
fn has_text(json: &Value, text: &str) -> bool {
    match json {
        Value::String(own) => own.contains(text),
        Value::Array(list) => list.iter().any(|value| has_text(value, text)),
        Value::Object(object) => object.iter().any(|(key, value)| key.contains(text) || has_text(value, text)),
        _ => false,
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    String::from_utf8_lossy(bytes).contains(text)
}
