//! What a checkpoint costs: bytes and time of saving and loading, and what compresses it how well.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::{self, CheckpointError, Disk, Flat, Header, Identity, Part};
use crate::formats::tensor_bytes;
use crate::optim::{self, AdamW, AdamWConfig, Norm};
use crate::params::Layout;
use crate::rng::{KeyedRng, Stream};
use crate::train::TrainError;

/// Elements that one random key is for.
const BLOCK: usize = 1 << 16;
/// Steps of AdamW that give the moments their bits.
const STEPS: u64 = 3;
const MB: f64 = 1e6;

/// Parameters whose state is saved; a state has two moments beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchState {
    /// P-Tuning v2's table for ChatGLM2-6B, 128 virtual tokens: 7 MB of parameters.
    Prefix,
    /// The same behind a projection: 477 MB.
    Projection,
    /// 2 GB of parameters and moments together, in matrices of 4096 x 4096.
    TwoGigabytes,
    /// 5 GB of the same.
    FiveGigabytes,
}

impl BenchState {
    fn layout(self) -> Layout {
        const TABLE: [usize; 2] = [128, 28 * 2 * 2 * 128];
        let shapes: Vec<(String, Vec<usize>)> = match self {
            Self::Prefix => vec![("embedding.weight".to_owned(), TABLE.to_vec())],
            Self::Projection => vec![
                ("embedding.weight".to_owned(), TABLE.to_vec()),
                ("trans.0.bias".to_owned(), vec![4096]),
                ("trans.0.weight".to_owned(), vec![4096, TABLE[1]]),
                ("trans.2.bias".to_owned(), vec![TABLE[1]]),
                ("trans.2.weight".to_owned(), vec![TABLE[1], 4096]),
            ],
            Self::TwoGigabytes => matrices(10),
            Self::FiveGigabytes => matrices(25),
        };
        Layout::new(shapes.into_iter().collect())
    }
}

fn matrices(num: usize) -> Vec<(String, Vec<usize>)> {
    (0..num).map(|i| (format!("layers.{i}.weight"), vec![4096, 4096])).collect()
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct SaveTimes {
    pub state_bytes: u64,
    pub stored_bytes: u64,
    /// For which training would stand still at the first save: copying the state into fresh memory.
    pub first_snapshot_ms: f64,
    /// The same at each later save, into the memory of the one before.
    pub snapshot_ms: f64,
    /// Hashing, compressing, writing, reading back, committing; beside training, on one thread.
    pub save_ms: f64,
    /// Reading, decompressing and checking all of it, on one thread.
    pub load_ms: f64,
    /// `checkpoint verify`: the same without keeping it.
    pub verify_ms: f64,
    /// Reading and hashing the stored bytes alone, on one thread: no check of all bytes takes less.
    pub hash_ms: f64,
}

impl SaveTimes {
    pub fn ratio(&self) -> f64 {
        self.state_bytes as f64 / self.stored_bytes as f64
    }

    pub fn megabytes_s(&self, ms: f64) -> f64 {
        self.state_bytes as f64 / MB / (ms / 1e3)
    }
}

/// Saves a state into `dir`, as one rank does, and loads it.
///
/// # Errors
/// When the disk fails.
pub fn save_and_load(disk: &dyn Disk, dir: &Path, state: BenchState) -> Result<SaveTimes, TrainError> {
    let layout = state.layout();
    let n = layout.num_elements();
    let (parameters, adamw) = trained(n)?;
    let mut snapshot = Vec::new();
    let mut snapshots_ms = [0.0; 2];
    for ms in &mut snapshots_ms {
        let started = Instant::now();
        let mut buffers = snapshot.drain(..).map(|flat: Flat| flat.bytes);
        let mut flats = vec![Flat::copy_in("parameter", &parameters, buffers.next().unwrap_or_default())?];
        for (kind, flat) in adamw.state(0..n)? {
            flats.push(Flat::copy_in(kind, &flat, buffers.next().unwrap_or_default())?);
        }
        drop(buffers);
        snapshot = flats;
        *ms = ms_since(started);
    }
    let [first_snapshot_ms, snapshot_ms] = snapshots_ms;
    drop((parameters, adamw));
    let identity = Identity {
        method: "bench".to_owned(),
        sizes: BTreeMap::new(),
        base_fingerprint: String::new(),
        tokenizer_sha256: String::new(),
        template: String::new(),
    };
    let header =
        Header { step: STEPS, consumed_rows: 0, world_size: 1, eval_loss: None, identity, plan: serde_json::Value::Null, probe: None };
    let part = Part { range: 0..n, flats: snapshot };
    let state_bytes = part.num_bytes();
    let started = Instant::now();
    let path = checkpoint::save(disk, dir, &header, &layout, &[part], &[])?;
    let save_ms = ms_since(started);
    let started = Instant::now();
    let saved = checkpoint::open(disk, &path)?;
    saved.flats(disk, &layout, &[("parameter", 0..n), ("exp_avg", 0..n), ("exp_avg_sq", 0..n)])?;
    let load_ms = ms_since(started);
    let started = Instant::now();
    if let Some(damage) = saved.damages(disk, &|_| ()).pop() {
        return Err(damage.into());
    }
    let verify_ms = ms_since(started);
    let started = Instant::now();
    saved.manifest.shards.iter().try_for_each(|shard| checkpoint::sum_of(disk, &path.join(&shard.file)).map(drop))?;
    let hash_ms = ms_since(started);
    let stored_bytes = saved.manifest.shards.iter().map(|shard| shard.bytes).sum();
    disk.remove(&path).map_err(|source| CheckpointError::Io { action: "remove", path, source })?;
    Ok(SaveTimes { state_bytes, stored_bytes, first_snapshot_ms, snapshot_ms, save_ms, load_ms, verify_ms, hash_ms })
}

fn ms_since(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}

/// Parameters and moments with the bits of training: normal values moved along normal gradients.
fn trained(n: usize) -> Result<(Tensor, AdamW), TrainError> {
    let normal = |key: u64| {
        let mut values = vec![0f32; n];
        values.par_chunks_mut(BLOCK).enumerate().for_each(|(i, block)| {
            let normal = KeyedRng::new(key, Stream::ParameterInit, i as u64).normal(block.len());
            block.iter_mut().zip(normal).for_each(|(value, normal)| *value = 0.02 * normal);
        });
        Tensor::from_vec(values, n, &Device::Cpu)
    };
    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let (parameters, mut adamw) = (normal(0)?, AdamW::new(config, 0..n, &Device::Cpu)?);
    for step in 1..=STEPS {
        let grads = normal(step)?;
        adamw.step(&parameters, &grads, &Norm::new(&optim::chunk_square_sums(&grads)?, None)?, 1e-3)?;
    }
    Ok((parameters, adamw))
}

/// One way to compress the tensors of a kind.
#[derive(Clone, Debug, Serialize)]
pub struct Compression {
    pub kind: String,
    pub bytes: u64,
    /// First all first bytes of the elements, then all second ones, ...
    pub byte_planes: bool,
    pub level: i32,
    pub ratio: f64,
    pub compress_megabytes_s: f64,
    pub decompress_megabytes_s: f64,
}

/// Compresses the tensors of a checkpoint, by kind, at each of `levels`, as they are and in byte planes.
///
/// # Errors
/// When the checkpoint is not whole.
pub fn compressions(disk: &dyn Disk, path: &Path, levels: &[i32]) -> Result<Vec<Compression>, TrainError> {
    let mut kinds: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (name, tensor) in checkpoint::open(disk, path)?.tensors(disk)? {
        let kind = name.split('.').next().unwrap_or(&name).to_owned();
        kinds.entry(kind).or_default().extend(tensor_bytes(&tensor)?);
    }
    let wrap = |source| CheckpointError::Io { action: "compress", path: path.to_owned(), source };
    let mut rows = Vec::new();
    for (kind, plain) in &kinds {
        let planes: Vec<u8> = (0..4).flat_map(|plane| plain.iter().skip(plane).step_by(4).copied()).collect();
        for (byte_planes, content) in [(false, plain), (true, &planes)] {
            for &level in levels {
                let started = Instant::now();
                let compressed = zstd::bulk::compress(content, level).map_err(wrap)?;
                let compress_s = started.elapsed().as_secs_f64();
                let started = Instant::now();
                zstd::bulk::decompress(&compressed, content.len()).map_err(wrap)?;
                let decompress_s = started.elapsed().as_secs_f64();
                let speed = |seconds: f64| content.len() as f64 / MB / seconds;
                rows.push(Compression {
                    kind: kind.clone(),
                    bytes: content.len() as u64,
                    byte_planes,
                    level,
                    ratio: content.len() as f64 / compressed.len() as f64,
                    compress_megabytes_s: speed(compress_s),
                    decompress_megabytes_s: speed(decompress_s),
                });
            }
        }
    }
    Ok(rows)
}
