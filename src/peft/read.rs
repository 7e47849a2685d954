//! An exported adapter as a method again: for generation, evaluation, and whatever else needs no optimizer.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::adapter::Adapter;
use super::adapter_files;
use super::adapter_fusion::AdapterFusion;
use super::export::{self, ABOUT_FILE, ExportError, PEFT_CONFIG};
use super::ia3::Ia3;
use super::lora::Lora;
use super::prefix_tuning::PrefixTuning;
use super::prompt_tuning::PromptTuning;
use super::thudm::{ThudmFolder, ThudmPrefix};
use super::{MethodError, ON_CPU_ALONE, PeftMethod};
use crate::model::{ChatGlm2, family};

const CONFIG: &str = "config.json";
/// What `peft_type` may be.
const KINDS: &str = "\"LORA\", \"IA3\", \"PREFIX_TUNING\", \"PROMPT_TUNING\" or \"P_TUNING\"";

/// The base that an adapter is to act on.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    pub model: &'a ChatGlm2,
    /// Sha256 of the weights, as an export has it.
    pub fingerprint: &'a str,
    pub tokenizer_sha256: &'a str,
}

/// Reads the adapter in `dir`, in PEFT's format, that of the adapters library, or THUDM's. PEFT's prefix comes back as a plain table, whatever
/// computed it; a folder with a prefix in both formats is read as PEFT's.
///
/// An adapter without [`ABOUT_FILE`] was not exported by this program; nothing says what base it belongs to, and its sizes alone are checked.
///
/// # Errors
/// When `dir` holds no adapter or one of a kind that is not read, the adapter was trained on another base or tokenizer, a file is missing
/// or not whole, or sizes disagree.
pub fn read(dir: &Path, base: Base) -> Result<Box<dyn PeftMethod>, MethodError> {
    let mut method = read_method(dir, base)?;
    method.move_to(base.model)?;
    Ok(method)
}

/// Whether a GPU can compute the adapter in `dir`, as far as its configuration says; what cannot be read is reported by [`read`].
///
/// # Errors
/// With the reason.
pub fn gpu_support(dir: &Path) -> Result<(), &'static str> {
    let (path, is_fusion) = (dir.join(PEFT_CONFIG), dir.join(adapter_files::SETUP).exists());
    if is_fusion {
        return Err(ON_CPU_ALONE);
    }
    // Without a configuration it is THUDM's, which are prefixes; one that is broken is reported where it is read.
    let Ok(config) = export::read_json(&path) else { return Ok(()) };
    match config.get("peft_type").and_then(Value::as_str) {
        Some("LORA") if config.get("use_dora").and_then(Value::as_bool) != Some(true) => Ok(()),
        Some("PREFIX_TUNING") => Ok(()),
        _ => Err(ON_CPU_ALONE),
    }
}

fn read_method(dir: &Path, base: Base) -> Result<Box<dyn PeftMethod>, MethodError> {
    let path = dir.join(PEFT_CONFIG);
    let is_fusion = dir.join(adapter_files::SETUP).exists();
    if !path.exists() && !is_fusion {
        return match ThudmFolder::open(dir)? {
            Some(folder) => Ok(Box::new(read_thudm(&folder, dir, base)?.method(&base.model.config)?)),
            None => Err(export::no_adapter(dir).into()),
        };
    }
    expect_base(dir, base)?;
    if is_fusion {
        return Ok(Box::new(AdapterFusion::read(dir, &base.model.config)?));
    }
    let config = export::read_json(&path)?;
    // PEFT's adapters name their kind; those of the adapters library do not.
    if config.get("peft_type").is_none() {
        return Ok(Box::new(Adapter::read(dir, &base.model.config)?));
    }
    Ok(match config.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => Box::new(Lora::read_peft(dir, base.model)?),
        Some("IA3") => Box::new(Ia3::read_peft(dir, &base.model.config)?),
        Some("PREFIX_TUNING") => Box::new(PrefixTuning::read_peft(dir, &base.model.config)?),
        Some("PROMPT_TUNING" | "P_TUNING") => Box::new(PromptTuning::read_peft(dir, base.model)?),
        _ => return Err(export::key_error(&path, &config, "peft_type", KINDS.to_owned()).into()),
    })
}

/// What an exported adapter says of itself; none where it was not exported by this program.
///
/// # Errors
/// When the file cannot be read.
pub fn about(dir: &Path) -> Result<Option<Value>, ExportError> {
    export::read_about(dir)
}

/// What is said of an adapter in `dir` that was not exported by this program, if it names another base than the one in `base` calls itself.
/// Names are compared only if both are of models of the family: what a folder called `tiny` holds, no name tells.
///
/// # Errors
/// When a file of the adapter, or the base's config.json, cannot be read.
pub fn other_name(dir: &Path, base: &Path) -> Result<Option<String>, ExportError> {
    if export::read_about(dir)?.is_some() {
        return Ok(None); // it has the sha256 of its base
    }
    let Some((path, key, found)) = named_base(dir)? else { return Ok(None) };
    let config = base.join(CONFIG);
    if !config.exists() {
        return Ok(None); // loading the base will say so
    }
    let own = export::read_json(&config)?;
    let own = own.get("_name_or_path").and_then(Value::as_str).unwrap_or_default();
    let folder = base.canonicalize().unwrap_or_else(|_| base.to_owned());
    let folder = folder.to_string_lossy();
    let known: Vec<&str> = [own, &folder].into_iter().filter(|name| family::is_of_family(name)).collect();
    let is_same = |name: &&str| family::distinctive_name(name) == family::distinctive_name(&found);
    let Some(first) = known.first().filter(|_| family::is_of_family(&found) && !known.iter().any(is_same)) else { return Ok(None) };
    Ok(Some(format!(
        "{}: `{key}` is {found:?}, and the base {} calls itself {:?}: the adapter may be of another base; hold its loss against the \
         base's alone with `glmddp evaluate`",
        path.display(),
        base.display(),
        if *first == own { own } else { family::model_name(first) }
    )))
}

/// The base that an adapter names: file, key, name. A prefix in THUDM's format has its base's config.json.
fn named_base(dir: &Path) -> Result<Option<(PathBuf, &'static str, String)>, ExportError> {
    let adapter = dir.join(PEFT_CONFIG);
    let (path, keys): (PathBuf, &[&'static str]) = if adapter.exists() {
        (adapter, &["base_model_name_or_path", "model_name"])
    } else if dir.join(adapter_files::SETUP).exists() {
        (adapter_files::fusion_config(dir)?, &["model_name"])
    } else if dir.join(CONFIG).exists() {
        (dir.join(CONFIG), &["_name_or_path"])
    } else {
        return Ok(None);
    };
    let json = export::read_json(&path)?;
    let named = keys.iter().find_map(|key| Some((*key, json.get(*key)?.as_str()?.to_owned())));
    Ok(named.map(|(key, name)| (path, key, name)))
}

/// A prefix in THUDM's format, of this base.
///
/// # Errors
/// As [`read`].
pub(super) fn read_thudm(folder: &ThudmFolder, dir: &Path, base: Base) -> Result<ThudmPrefix, MethodError> {
    expect_base(dir, base)?;
    folder.expect_base(base)?;
    Ok(folder.prefix()?)
}

/// Tests that the adapter is of this base, where it says so.
///
/// # Errors
/// When it is of another, or what it says cannot be read.
pub fn expect_base(dir: &Path, base: Base) -> Result<(), ExportError> {
    let Some(about) = export::read_about(dir)? else { return Ok(()) };
    same(dir, &about, "base_fingerprint", "base model", base.fingerprint)?;
    same(dir, &about, "tokenizer_sha256", "tokenizer", base.tokenizer_sha256)
}

/// Tests what the adapter says of its base.
fn same(dir: &Path, about: &Value, key: &'static str, what: &'static str, expected: &str) -> Result<(), ExportError> {
    match about.get(key).and_then(Value::as_str) {
        Some(found) if found == expected => Ok(()),
        Some(found) => {
            Err(ExportError::OtherBase { path: dir.join(ABOUT_FILE), what, expected: expected.to_owned(), found: found.to_owned() })
        }
        None => Err(export::key_error(&dir.join(ABOUT_FILE), about, key, "a sha256".to_owned())),
    }
}
