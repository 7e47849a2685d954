//! Makes a ChatGLM2 with random weights in the hub's format: configuration, safetensors shards with an index, tokenizer.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::f16;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::config::ModelConfig;
use super::error::ModelError;
use crate::formats::{Dtype, safetensors};
use crate::rng::{KeyedRng, Stream, name_key};

/// Standard deviation of the weights.
const STD: f32 = 0.02;
/// Elements that are drawn from one sequence of random numbers.
const CHUNK: usize = 1 << 18;
/// Chunks that are in memory at a time.
const CHUNKS_IN_FLIGHT: usize = 16;
/// Largest shard of weights.
const MAX_SHARD_BYTES: usize = 2_000_000_000;

/// Which model to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// 2 layers of width 64, f32: for tests.
    Tiny,
    /// 8 layers of width 256, f32: trains on two CPU cores while one watches.
    Small,
    /// The published model's shape, f16, 12.5 GB.
    SixB,
}

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitOptions {
    pub preset: Preset,
    /// Another number of layers than the preset's.
    pub num_layers: Option<usize>,
    pub seed: u64,
}

impl InitOptions {
    fn sizes(&self) -> Sizes {
        let sizes = self.preset.sizes();
        Sizes { layers: self.num_layers.unwrap_or(sizes.layers), ..sizes }
    }
}

struct Sizes {
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv: usize,
    /// None: the tokenizer's ids, rounded up to a multiple of 64.
    vocabulary: Option<usize>,
    seq_length: usize,
    dtype: Dtype,
}

impl Preset {
    /// Embedding rows that the preset fixes; `None` where they follow from the tokenizer.
    pub fn vocabulary(self) -> Option<usize> {
        self.sizes().vocabulary
    }

    fn sizes(self) -> Sizes {
        match self {
            Self::Tiny => {
                Sizes { layers: 2, hidden: 64, ffn: 172, heads: 4, kv: 16, vocabulary: None, seq_length: 2048, dtype: Dtype::F32 }
            }
            Self::Small => {
                Sizes { layers: 8, hidden: 256, ffn: 688, heads: 4, kv: 64, vocabulary: None, seq_length: 2048, dtype: Dtype::F32 }
            }
            Self::SixB => Sizes {
                layers: 28,
                hidden: 4096,
                ffn: 13696,
                heads: 32,
                kv: 128,
                vocabulary: Some(65024),
                seq_length: 32768,
                dtype: Dtype::F16,
            },
        }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq)]
pub struct InitSummary {
    pub config: ModelConfig,
    pub num_parameters: u64,
    pub num_weight_bytes: u64,
    pub num_shards: usize,
}

/// Writes a model into `dir`, which must not exist or be empty. Equal arguments give equal bytes. `num_ids` is the number of ids of the
/// tokenizer `tokenizer_bytes`, special ids included; the caller sees to it that it fits [`Preset::vocabulary`].
///
/// Norms are 1, all else is N(0, 0.02). The folder gets its name when all of it is on disk.
///
/// # Errors
/// When the folder is taken or the disk fails.
pub fn init_model(dir: &Path, options: InitOptions, tokenizer_bytes: &[u8], num_ids: usize) -> Result<InitSummary, ModelError> {
    expect_free(dir)?;
    let name = dir.file_name().ok_or_else(|| ModelError::FolderTaken { path: dir.to_owned() })?.to_string_lossy();
    let temporary = dir.with_file_name(format!(".tmp-{name}-{}", std::process::id()));
    let result = fill(&temporary, options, tokenizer_bytes, num_ids).and_then(|summary| {
        std::fs::rename(&temporary, dir).map_err(|source| ModelError::Write { path: dir.to_owned(), source })?;
        Ok(summary)
    });
    if result.is_err() {
        _ = std::fs::remove_dir_all(&temporary);
    }
    result
}

/// Tests that a model may be written to `dir`.
///
/// # Errors
/// When it is there and no empty folder.
pub fn expect_free(dir: &Path) -> Result<(), ModelError> {
    if std::fs::symlink_metadata(dir).is_ok() && std::fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_some()) {
        return Err(ModelError::FolderTaken { path: dir.to_owned() });
    }
    Ok(())
}

fn fill(dir: &Path, options: InitOptions, tokenizer_bytes: &[u8], num_ids: usize) -> Result<InitSummary, ModelError> {
    let (config, shards) = write_all_but_weights(dir, options, tokenizer_bytes, num_ids)?;
    for (file, tensors) in &shards {
        write_file(&dir.join(file), |out| {
            safetensors::write_streaming(out, tensors, |t, out| write_weights(out, &tensors[t], options.seed))
        })?;
    }
    File::open(dir).and_then(|d| d.sync_all()).map_err(|source| ModelError::Write { path: dir.to_owned(), source })?;
    let (num_parameters, num_weight_bytes) = sizes_of(&shards);
    Ok(InitSummary { config, num_parameters, num_weight_bytes, num_shards: shards.len() })
}

/// File name -> the tensors that are to be in it.
type Shards = Vec<(String, Vec<safetensors::Announced>)>;

/// Writes configuration, tokenizer and index of a model, and says which files of weights are to stand beside them. Arguments as of
/// [`init_model`].
///
/// # Errors
/// When the disk fails.
pub fn write_all_but_weights(
    dir: &Path,
    options: InitOptions,
    tokenizer_bytes: &[u8],
    num_ids: usize,
) -> Result<(ModelConfig, Shards), ModelError> {
    let sizes = options.sizes();
    let vocabulary = sizes.vocabulary.unwrap_or_else(|| num_ids.next_multiple_of(64));
    std::fs::create_dir_all(dir).map_err(|source| ModelError::Write { path: dir.to_owned(), source })?;
    write_json(&dir.join("config.json"), &hub_config(&sizes, vocabulary))?;
    write_file(&dir.join("tokenizer.model"), |out| out.write_all(tokenizer_bytes))?;
    let config = ModelConfig::load(dir)?;
    let shards = shards(&config, sizes.dtype);
    let num_shards = shards.len();
    let name = |i: usize| format!("model-{:05}-of-{num_shards:05}.safetensors", i + 1);
    let shards: Shards = shards.into_iter().enumerate().map(|(i, tensors)| (name(i), tensors)).collect();
    let places =
        shards.iter().flat_map(|(file, tensors)| tensors.iter().map(move |(tensor, ..)| (tensor.clone(), Value::from(file.clone()))));
    let mut weight_map: Map<String, Value> = places.collect();
    weight_map.sort_keys();
    let index = json!({"metadata": {"total_size": sizes_of(&shards).1}, "weight_map": weight_map});
    write_json(&dir.join("model.safetensors.index.json"), &index)?;
    Ok((config, shards))
}

/// Parameters and bytes.
fn sizes_of(shards: &Shards) -> (u64, u64) {
    let sizes = shards.iter().flat_map(|(_, tensors)| tensors).map(|(_, dtype, shape)| {
        let numel = shape.iter().product::<usize>() as u64;
        (numel, numel * dtype.bitsize() as u64 / 8)
    });
    sizes.fold((0, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1))
}

/// The hub's config.json, in its order.
fn hub_config(sizes: &Sizes, vocabulary: usize) -> Value {
    json!({
        "_name_or_path": "THUDM/chatglm2-6b",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification"
        },
        "add_bias_linear": false,
        "add_qkv_bias": true,
        "apply_query_key_layer_scaling": true,
        "apply_residual_connection_post_layernorm": false,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": true,
        "bias_dropout_fusion": true,
        "ffn_hidden_size": sizes.ffn,
        "fp32_residual_connection": false,
        "hidden_dropout": 0.0,
        "hidden_size": sizes.hidden,
        "kv_channels": sizes.kv,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": true,
        "multi_query_group_num": 2,
        "num_attention_heads": sizes.heads,
        "num_layers": sizes.layers,
        "original_rope": true,
        "padded_vocab_size": vocabulary,
        "post_layer_norm": true,
        "rmsnorm": true,
        "seq_length": sizes.seq_length,
        "use_cache": true,
        "torch_dtype": if sizes.dtype == Dtype::F16 { "float16" } else { "float32" },
        "transformers_version": "4.27.1",
        "tie_word_embeddings": false,
        "eos_token_id": 2,
        "pad_token_id": 0
    })
}

/// The model's tensors in shards of at most 2 GB, and at least two.
pub fn shards(config: &ModelConfig, dtype: Dtype) -> Vec<Vec<safetensors::Announced>> {
    let shapes = config.parameter_shapes();
    let num_bytes = |shape: &[usize]| shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let half = shapes.values().map(|shape| num_bytes(shape)).sum::<usize>().div_ceil(2);
    let mut shards: Vec<Vec<safetensors::Announced>> = vec![Vec::new()];
    let mut filled = 0;
    for (name, shape) in shapes {
        let size = num_bytes(&shape);
        if filled > 0 && (filled + size > MAX_SHARD_BYTES || filled >= half) {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(shard) = shards.last_mut() {
            shard.push((name, dtype, shape));
        }
    }
    shards
}

/// Draws a tensor's values chunk by chunk; a chunk depends on seed, name and its place alone.
fn write_weights(out: &mut impl Write, (name, dtype, shape): &safetensors::Announced, seed: u64) -> io::Result<()> {
    let numel: usize = shape.iter().product();
    let chunks: Vec<usize> = (0..numel.div_ceil(CHUNK)).collect();
    let is_norm = name.ends_with("layernorm.weight");
    for batch in chunks.chunks(CHUNKS_IN_FLIGHT) {
        let drawn: Vec<Vec<u8>> = batch
            .par_iter()
            .map(|&chunk| {
                let len = CHUNK.min(numel - chunk * CHUNK);
                let values = if is_norm {
                    vec![1.0; len]
                } else {
                    let key = if chunk == 0 { name_key(name) } else { name_key(&format!("{name}#{chunk}")) };
                    KeyedRng::new(seed, Stream::ModelInit, key).normal(len).into_iter().map(|v| STD * v).collect()
                };
                match dtype {
                    Dtype::F16 => values.into_iter().map(|v| f16::from_f32(v).to_le_bytes()).collect::<Vec<_>>().into_flattened(),
                    _ => values.into_iter().map(f32::to_le_bytes).collect::<Vec<_>>().into_flattened(),
                }
            })
            .collect();
        drawn.iter().try_for_each(|bytes| out.write_all(bytes))?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    write_file(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

/// Writes a file and makes it durable.
fn write_file(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), ModelError> {
    let result = File::create(path).and_then(|file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        out.flush()?;
        out.get_ref().sync_all()
    });
    result.map_err(|source| ModelError::Write { path: PathBuf::from(path), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::WeightSource;
    use candle_core::{DType, Device};

    #[test]
    fn tiny_model_loads_back_and_is_the_same_each_time() {
        let root = tempfile::tempdir().unwrap();
        let fingerprint = |name: &str, seed| {
            let dir = root.path().join(name);
            let summary = init_model(&dir, InitOptions { preset: Preset::Tiny, num_layers: None, seed }, b"pieces", 300).unwrap();
            let shapes = summary.config.parameter_shapes();
            (WeightSource::open(&dir).unwrap().fingerprint(&shapes).unwrap(), summary)
        };
        let (first, summary) = fingerprint("a", 1);
        assert_eq!(summary.config.padded_vocab_size, 320);
        assert_eq!(summary.num_shards, 2);
        assert_eq!(first, fingerprint("b", 1).0);
        assert_ne!(first, fingerprint("c", 2).0);
        let weights = WeightSource::open(&root.path().join("a")).unwrap();
        let get = |name: &str, shape: &[usize]| weights.get(name, shape, DType::F32, &Device::Cpu).unwrap().flatten_all().unwrap();
        assert!(get("transformer.encoder.final_layernorm.weight", &[64]).to_vec1::<f32>().unwrap().iter().all(|&v| v == 1.0));
        let embedding = get("transformer.embedding.word_embeddings.weight", &[320, 64]).to_vec1::<f32>().unwrap();
        let variance = embedding.iter().map(|v| v * v).sum::<f32>() / embedding.len() as f32;
        assert!((variance.sqrt() / STD - 1.0).abs() < 0.02, "{variance}");
        assert_eq!(std::fs::read(root.path().join("a/tokenizer.model")).unwrap(), b"pieces");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 3, "no temporary folder is left");
    }

    #[test]
    fn folder_with_anything_in_it_is_refused_and_untouched() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("mine"), b"x").unwrap();
        let error = init_model(root.path(), InitOptions { preset: Preset::Tiny, num_layers: None, seed: 0 }, b"", 300).unwrap_err();
        assert!(matches!(error, ModelError::FolderTaken { .. }), "{error}");
        assert_eq!(std::fs::read(root.path().join("mine")).unwrap(), b"x");
        let empty = root.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        init_model(&empty, InitOptions { preset: Preset::Tiny, num_layers: None, seed: 0 }, b"", 300).unwrap();
    }

    #[test]
    fn real_shape_has_the_published_size_and_names() {
        let dir = tempfile::tempdir().unwrap();
        write_json(&dir.path().join("config.json"), &hub_config(&Preset::SixB.sizes(), 65024)).unwrap();
        let config = ModelConfig::load(dir.path()).unwrap();
        let shards = shards(&config, Dtype::F16);
        let numel: usize = shards.iter().flatten().map(|(_, _, shape)| shape.iter().product::<usize>()).sum();
        // The hub's index counts inv_freq (32 numbers) as the 200th tensor.
        assert_eq!((numel + 32) * 2, 12_487_168_064);
        assert_eq!(shards.iter().map(Vec::len).sum::<usize>(), 199);
        assert_eq!(shards.len(), 7);
        assert_eq!(config.prefix_width(), 14_336);
    }
}
