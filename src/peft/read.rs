//! An exported adapter as a method again: for generation, evaluation, and whatever else needs no optimizer.

use std::path::Path;

use serde_json::Value;

use super::adapter::Adapter;
use super::adapter_files;
use super::adapter_fusion::AdapterFusion;
use super::export::{self, ABOUT_FILE, ExportError, PEFT_CONFIG};
use super::ia3::Ia3;
use super::lora::Lora;
use super::prefix_tuning::PrefixTuning;
use super::prompt_tuning::PromptTuning;
use super::{MethodError, PeftMethod};
use crate::model::ChatGlm2;

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

/// Reads the adapter in `dir`, in PEFT's format or that of the adapters library. A prefix comes back as a plain table, whatever computed it.
///
/// An adapter without [`ABOUT_FILE`] was not exported by this program; nothing says what base it belongs to, and its sizes alone are checked.
///
/// # Errors
/// When `dir` holds no adapter or one of a kind that is not read, the adapter was trained on another base or tokenizer, a file is missing
/// or not whole, or sizes disagree.
pub fn read(dir: &Path, base: Base) -> Result<Box<dyn PeftMethod>, MethodError> {
    let path = dir.join(PEFT_CONFIG);
    let is_fusion = dir.join(adapter_files::SETUP).exists();
    if !path.exists() && !is_fusion {
        return Err(ExportError::NoAdapter { path }.into());
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

/// Tests that the adapter is of this base, where it says so.
pub(super) fn expect_base(dir: &Path, base: Base) -> Result<(), ExportError> {
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
