//! The small files of a model's folder that go along when a model is made from it, so that Python's `from_pretrained` loads the result.
//!
//! They are `NAMED` and all `*.py` in the folder itself. A file stays behind, with a reason, if it is too large, is no regular file, or
//! is a link that leads out of the folder (or out of the hub's cache, whose folders are made of links).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use super::ModelError;
use crate::json;

/// Files beside the configuration, the weights, `tokenizer.model` and the code: tokenizer, generation, licence.
const NAMED: [&str; 11] = [
    "LICENSE",
    "MODEL_LICENSE",
    "NOTICE",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
];
/// The largest there is, a `tokenizer.json` of 150,000 ids, has some 20 MB.
const MAX_BYTES: u64 = 64 << 20;
/// The published models have five files of code at most.
const MAX_CODE_FILES: usize = 64;
const CODE: &str = "py";
/// Files whose `auto_map` names code.
const MAPS: [&str; 2] = ["config.json", "tokenizer_config.json"];

/// What goes along, and what does not although it should.
#[derive(Debug, Default)]
pub struct HubFiles {
    /// Name and path, by name.
    files: BTreeMap<String, PathBuf>,
    /// Sentences for the user: what stays behind or is missing, and why it matters.
    pub notes: Vec<String>,
}

impl HubFiles {
    /// Looks through `dir`.
    ///
    /// # Errors
    /// When the folder or one of its JSON files cannot be read.
    pub fn of(dir: &Path) -> Result<Self, ModelError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            |source| ModelError::Io { path, source }
        };
        let mut found = Self::default();
        let mut names: Vec<String> =
            NAMED.map(str::to_owned).into_iter().filter(|name| dir.join(name).symlink_metadata().is_ok()).collect();
        let mut code: Vec<String> = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(io(dir))? {
            let name = entry.map_err(io(dir))?.file_name();
            // A name that is not UTF-8 is none that Python's import finds.
            code.extend(name.to_str().filter(|name| name.strip_suffix(".py").is_some_and(is_module)).map(str::to_owned));
        }
        code.sort();
        if code.len() > MAX_CODE_FILES {
            found.notes.push(format!("{}: only the first {MAX_CODE_FILES} of {} *.py files go along", dir.display(), code.len()));
        }
        names.extend(code.into_iter().take(MAX_CODE_FILES));
        for name in names {
            match allowed(dir, &name) {
                Ok(path) => _ = found.files.insert(name, path),
                Err(reason) => found.notes.push(format!("{} is left out: {reason}", dir.join(&name).display())),
            }
        }
        found.look_for_code(dir)?;
        Ok(found)
    }

    /// Every file's name and content.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(&self) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
        let read = |(name, path): (&String, &PathBuf)| {
            let bytes = std::fs::read(path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
            Ok((name.clone(), bytes))
        };
        self.files.iter().map(read).collect()
    }

    /// Notes which code is asked for and not there: by an `auto_map`, or by code that is there.
    fn look_for_code(&mut self, dir: &Path) -> Result<(), ModelError> {
        let mut asked: Vec<(String, String)> = Vec::new();
        for name in MAPS {
            let path = dir.join(name);
            if name == "config.json" || self.files.contains_key(name) {
                let text = std::fs::read(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
                let json = json::value(&text).map_err(|source| ModelError::Json { path: path.clone(), source })?;
                asked.extend(modules(&json).into_iter().map(|module| (module, format!("`auto_map` in {}", path.display()))));
            }
        }
        let mut seen = BTreeSet::new();
        let mut missing: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        while let Some((module, by)) = asked.pop() {
            if !seen.insert(module.clone()) {
                continue;
            }
            if !is_module(&module) {
                self.notes.push(format!("{by} names the code `{}`, which is no file of the folder: it is left out", module.escape_debug()));
            } else if let Some(path) = self.files.get(&format!("{module}.{CODE}")) {
                let text = std::fs::read(path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
                let by = dir.join(format!("{module}.{CODE}")).display().to_string();
                asked.extend(relative_imports(&text).into_iter().map(|module| (module, by.clone())));
            } else if dir.join(format!("{module}.{CODE}")).symlink_metadata().is_err() {
                missing.entry(by).or_default().insert(format!("{module}.{CODE}"));
            }
        }
        for (by, names) in missing {
            self.notes.push(format!(
                "{by} names {}, not in {}: transformers cannot load the new folder until the code is put there",
                Vec::from_iter(names).join(", "),
                dir.display()
            ));
        }
        Ok(())
    }
}

/// The modules that an `auto_map` takes from the folder itself: `modeling_chatglm` of `modeling_chatglm.ChatGLMModel`. What comes from
/// another repository (`org/name--file.Class`) does not have to be there.
fn modules(json: &Value) -> BTreeSet<String> {
    let entries = json.get("auto_map").and_then(Value::as_object).into_iter().flat_map(|map| map.values());
    let texts = entries.flat_map(|entry| match entry {
        Value::Array(list) => list.iter().filter_map(Value::as_str).collect::<Vec<_>>(),
        other => other.as_str().into_iter().collect(),
    });
    texts.filter(|text| !text.contains("--")).filter_map(|text| Some(text.rsplit_once('.')?.0.to_owned())).collect()
}

/// The modules that code imports from its own folder, as transformers finds them.
fn relative_imports(code: &[u8]) -> BTreeSet<String> {
    #[allow(clippy::unwrap_used, reason = "the pattern is a constant, and a test compiles it")]
    static IMPORT: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"(?m)^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)").unwrap());
    let text = String::from_utf8_lossy(code);
    let module = |found: regex::Captures| found.get(1).or(found.get(2)).map(|module| module.as_str().to_owned());
    IMPORT.captures_iter(&text).filter_map(module).collect()
}

/// Whether this is the name of a module beside others: no path, nothing hidden.
fn is_module(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

/// Where the file `name` of `dir` lies, or why it stays behind.
fn allowed(dir: &Path, name: &str) -> Result<PathBuf, String> {
    let unreadable = |error: std::io::Error| format!("it cannot be read: {error}");
    let (real, folder) = (dir.join(name).canonicalize().map_err(unreadable)?, dir.canonicalize().map_err(unreadable)?);
    // The hub's cache: snapshots/REVISION/FILE is a link to blobs/HASH.
    let blobs = folder.parent().filter(|parent| parent.ends_with("snapshots")).map(|snapshots| snapshots.with_file_name("blobs"));
    if !real.starts_with(&folder) && !blobs.is_some_and(|blobs| real.starts_with(blobs)) {
        return Err(format!("it is a link to {}, outside of the folder; copy it if it belongs to the model", real.display()));
    }
    let metadata = real.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if metadata.len() > MAX_BYTES {
        return Err(format!("it has {} bytes, and at most {MAX_BYTES} are copied", metadata.len()));
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_of_the_folder_are_found_as_transformers_finds_them() {
        let code = b"import torch\nfrom .configuration_chatglm import A, B\n    from .quantization import quantize\nimport .tools\n\
                     from . import x\n# from .comment import y\nfrom transformers.utils import z\n";
        let found: Vec<String> = relative_imports(code).into_iter().collect();
        assert_eq!(found, ["configuration_chatglm", "quantization", "tools"]);
    }

    #[test]
    fn modules_are_those_that_auto_map_takes_from_the_folder() {
        let json = serde_json::json!({"auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "THUDM/chatglm2-6b--modeling_chatglm.ChatGLMModel",
            "AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", null],
            "X": "../../etc/passwd.X",
        }});
        assert_eq!(Vec::from_iter(modules(&json)), ["../../etc/passwd", "configuration_chatglm", "tokenization_chatglm"]);
        assert!(["", "..", "../x", "a/b", "a.b", "a b", ".hidden"].iter().all(|name| !is_module(name)));
    }
}
