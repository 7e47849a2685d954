//! What a checkpoint says about itself. `FORMAT.md` beside this file is its specification.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::formats::Dtype;

/// Version of the manifest and of the files beside it. Raised when an older program could misread them.
pub const FORMAT_VERSION: u32 = 2;

/// The most that a byte of a zstd frame can stand for: a block of 128 KiB that repeats one byte takes 4 bytes.
const MAX_RATIO: u64 = (128 << 10) / 4;

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
    /// Held-out loss after this very step, where it was computed and is finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    #[serde(flatten)]
    pub identity: Identity,
    /// The resolved run, for the reader.
    pub plan: Value,
    /// None where it was not finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probe>,
}

/// What model and parameters gave on a few fixed tokens when they were saved: whoever loads them can hold what they give against it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    pub rows: Vec<ProbeRow>,
    /// Mean over all targets of all rows, without dropout.
    pub loss: f64,
    /// Of each row, behind its last token but one: the logits of the row's first ids, eight at most.
    pub logits: Vec<f64>,
    /// What computed it: `cpu` or `cuda`. Earlier versions computed on a CPU, in float32.
    #[serde(default = "cpu")]
    pub device: String,
    /// The type of values in the computation.
    #[serde(default = "float32")]
    pub compute_dtype: String,
}

fn cpu() -> String {
    "cpu".to_owned()
}

fn float32() -> String {
    "float32".to_owned()
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeRow {
    pub ids: Vec<u32>,
    /// Places in `ids` of the tokens whose loss counts; each is predicted from those before it.
    pub targets: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format_version: u32,
    #[serde(flatten)]
    pub header: Header,
    /// `KIND.PARAMETER` -> what it is and where it lies.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// One a rank, in the order of the ranks.
    pub shards: Vec<ShardEntry>,
    /// Every other file of the checkpoint, by its path in it.
    pub files: BTreeMap<String, FileEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    pub shape: Vec<usize>,
    /// As safetensors writes it: F32, BF16, ...
    pub dtype: Dtype,
    /// One behind the other they are the elements in row-major order.
    pub pieces: Vec<PieceEntry>,
}

/// Elements of a tensor that lie in one shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceEntry {
    /// Index into `shards`.
    pub shard: usize,
    /// First element of the flattened tensor.
    pub start: usize,
    /// Behind the last.
    pub end: usize,
    /// Its name in the shard's safetensors file: the tensor's where it is all of it (in the tensor's shape), else `NAME@START..END` (1-D).
    pub stored_as: String,
    /// Of its bytes, little-endian.
    pub sha256: String,
}

/// A zstd frame around a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    pub file: String,
    pub bytes: u64,
    pub sha256: String,
    /// Bytes of the safetensors file in it.
    pub content_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub bytes: u64,
    pub sha256: String,
}

impl TensorEntry {
    /// None where the shape overflows.
    pub fn num_elements(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
    }
}

impl PieceEntry {
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// Shape in its shard.
    pub fn shape(&self, tensor: &str, entry: &TensorEntry) -> Vec<usize> {
        if self.stored_as == tensor { entry.shape.clone() } else { vec![self.end - self.start] }
    }
}

/// The name in a shard of elements `range` of a tensor of `num_elements`.
pub(super) fn stored_as(tensor: &str, range: &Range<usize>, num_elements: usize) -> String {
    if *range == (0..num_elements) { tensor.to_owned() } else { format!("{tensor}@{}..{}", range.start, range.end) }
}

/// Bytes of an element; none for a type that is no whole bytes.
pub(super) fn element_bytes(dtype: Dtype) -> Option<usize> {
    let bits = dtype.bitsize();
    (bits > 0 && bits.is_multiple_of(8)).then_some(bits / 8)
}

/// A plain relative path below a folder.
pub(super) fn is_inside(name: &str) -> bool {
    let path = Path::new(name);
    // A path that is not its own components joined has dots or doubled slashes in it.
    let plain: std::path::PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    !name.is_empty() && plain.as_os_str() == path.as_os_str()
}

impl Manifest {
    /// What `SHA256SUMS` says beside a manifest of this hash.
    pub(super) fn sums(&self, sha256: &str) -> String {
        let shards = self.shards.iter().map(|shard| (shard.file.as_str(), shard.sha256.as_str()));
        let files = self.files.iter().map(|(name, file)| (name.as_str(), file.sha256.as_str()));
        shards.chain(files).chain([(super::MANIFEST, sha256)]).map(|(name, sha256)| format!("{sha256}  {name}\n")).collect()
    }

    /// Whether it describes a checkpoint at all: names stay inside the folder and stand for one thing each, pieces tile their tensors, and
    /// no size is one that the files could not hold. What says so is not trusted before.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        let mut names: BTreeSet<&str> = BTreeSet::from([super::MANIFEST, super::SUMS]);
        for ShardEntry { file, bytes, content_bytes, .. } in &self.shards {
            if !is_inside(file) || file.contains('/') {
                return Err(format!("shard `{file}` is not the name of a file"));
            }
            if *content_bytes > bytes.saturating_mul(MAX_RATIO) {
                return Err(format!("{file}: {bytes} bytes cannot hold {content_bytes}"));
            }
            if !names.insert(file) {
                return Err(format!("two files are called `{file}`"));
            }
        }
        for name in self.files.keys() {
            if !is_inside(name) {
                return Err(format!("file `{name}` is not a path inside a checkpoint"));
            }
            if !names.insert(name) {
                return Err(format!("two files are called `{name}`"));
            }
        }
        let mut room: Vec<u64> = self.shards.iter().map(|shard| shard.content_bytes).collect();
        let mut stored = BTreeSet::new();
        for (name, tensor) in &self.tensors {
            let size = element_bytes(tensor.dtype).ok_or_else(|| format!("tensor `{name}`: dtype {:?} is not supported", tensor.dtype))?;
            let num_elements = tensor.num_elements().ok_or_else(|| format!("tensor `{name}`: shape {:?} overflows", tensor.shape))?;
            let mut at = 0;
            for piece in &tensor.pieces {
                let in_piece = |what: String| format!("tensor `{name}`, elements {}..{}: {what}", piece.start, piece.end);
                if piece.start != at || piece.end <= at || piece.end > num_elements {
                    return Err(in_piece(format!("expected to start at {at} and to end at {num_elements} or before")));
                }
                let expected = stored_as(name, &piece.range(), num_elements);
                if piece.stored_as != expected {
                    return Err(in_piece(format!("expected to be stored as `{expected}`, found `{}`", piece.stored_as)));
                }
                let bytes = (piece.end - piece.start).checked_mul(size).map(|n| n as u64);
                let left = room.get_mut(piece.shard).ok_or_else(|| in_piece(format!("there is no shard {}", piece.shard)))?;
                *left = bytes.and_then(|n| left.checked_sub(n)).ok_or_else(|| in_piece(format!("shard {} is too small", piece.shard)))?;
                if !stored.insert((piece.shard, &piece.stored_as)) {
                    return Err(in_piece("its name stands twice in its shard".to_owned()));
                }
                at = piece.end;
            }
            if at != num_elements {
                return Err(format!("tensor `{name}`: elements {at}..{num_elements} are in no shard"));
            }
        }
        Ok(())
    }
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
        let names: BTreeSet<&String> = saved.sizes.keys().chain(run.sizes.keys()).collect();
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

#[cfg(test)]
mod tests {
    use super::super::testing::save_step;
    use super::super::{RealDisk, open};
    use super::*;

    #[test]
    fn mismatch_names_both_values_and_ignores_world_size_and_plan() {
        let dir = tempfile::tempdir().unwrap();
        let path = save_step(&RealDisk, dir.path(), 7).unwrap();
        let mut manifest = open(&RealDisk, &path).unwrap().manifest;
        let mut run = manifest.header.identity.clone();
        manifest.header.world_size = 3;
        manifest.header.plan = serde_json::json!({"learning_rate": 1.0});
        assert_eq!(compare(&manifest, &run), []);
        run.sizes.insert("pre_seq_len".to_owned(), 8.into());
        run.base_fingerprint = "cc".to_owned();
        let texts: Vec<String> = compare(&manifest, &run).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            ["`pre_seq_len` is 7 in the checkpoint and 8 in this run", "`base_fingerprint` is aa in the checkpoint and cc in this run"]
        );
        run.method = "lora".to_owned();
        assert_eq!(compare(&manifest, &run)[0].to_string(), "`method` is ptuning_v2 in the checkpoint and lora in this run");
    }
}
