//! What a checkpoint says about itself.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of the manifest and of the files beside it. Raised when an older program could misread them.
pub const FORMAT_VERSION: u32 = 1;

/// What a run and a checkpoint must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of the tuning method.
    pub method: String,
    /// Sizes of the method, name -> value.
    pub sizes: BTreeMap<String, Value>,
    /// sha256 of the base model's weights.
    pub base_fingerprint: String,
    pub tokenizer_sha256: String,
    /// Name of the prompt template.
    pub template: String,
}

/// What the saver knows; the rest of the manifest is computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Optimizer steps done.
    pub step: u64,
    /// Rows of the endless training stream consumed by all ranks: where the next step goes on.
    pub consumed_rows: u64,
    /// Ranks that saved it; a resume may have another number.
    pub world_size: usize,
    #[serde(flatten)]
    pub identity: Identity,
    /// The resolved run, for the reader.
    pub plan: Value,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format_version: u32,
    #[serde(flatten)]
    pub header: Header,
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Every other file of the checkpoint, by its path in it.
    pub files: BTreeMap<String, FileEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    pub shape: Vec<usize>,
    /// As safetensors writes it: F32, BF16, ...
    pub dtype: String,
    /// Of the elements in row-major order, little-endian.
    pub sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub bytes: u64,
    pub sha256: String,
}

/// One thing in which a checkpoint and a run differ so that the run cannot go on from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Which thing: `method`, a size's name, `base_fingerprint`, `tokenizer_sha256` or `template`.
    pub what: String,
    pub checkpoint: String,
    pub run: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is {} in the checkpoint and {} in this run", self.what, self.checkpoint, self.run)
    }
}

/// Every difference between a checkpoint's identity and a run's. Learning rate, world size and the rest of the plan may differ.
pub fn compare(manifest: &Manifest, run: &Identity) -> Vec<Mismatch> {
    let saved = &manifest.header.identity;
    let mut mismatches = Vec::new();
    let mut check = |what: &str, checkpoint: &str, run: &str| {
        if checkpoint != run {
            mismatches.push(Mismatch { what: what.to_owned(), checkpoint: checkpoint.to_owned(), run: run.to_owned() });
        }
    };
    check("method", &saved.method, &run.method);
    if saved.method == run.method {
        let names: std::collections::BTreeSet<&String> = saved.sizes.keys().chain(run.sizes.keys()).collect();
        let text = |sizes: &BTreeMap<String, Value>, name: &String| sizes.get(name).map_or("not there".to_owned(), Value::to_string);
        for name in names {
            check(name, &text(&saved.sizes, name), &text(&run.sizes, name));
        }
    }
    check("base_fingerprint", &saved.base_fingerprint, &run.base_fingerprint);
    check("tokenizer_sha256", &saved.tokenizer_sha256, &run.tokenizer_sha256);
    check("template", &saved.template, &run.template);
    mismatches
}
