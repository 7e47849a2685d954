//! Checkpoints: a manifest that says anything, and shards whose frame or header does.

use std::path::Path;
use std::sync::LazyLock;

use candle_core::{Device, Tensor};
use glmddp::checkpoint::{self, Flat, Header, Identity, Part, Probe, ProbeRow, RealDisk};
use glmddp::digest::sha256_hex;
use glmddp::params::Layout;
use serde_json::{Value, json};

use crate::formats::HEADER_WORDS;
use crate::harness::{Bound, Target, fuzz, read_one};
use crate::mutate::{Dice, Folder, JSON_WORDS};

const MANIFEST: &str = "manifest.json";
const SUMS: &str = "SHA256SUMS";
const SHARD: &str = "state-00000-of-00002.safetensors.zst";
/// A file of the checkpoint that stands below a folder.
const EXTRA: &str = "adapter/adapter_config.json";
/// What a shard's frame holds, before it is compressed.
const CONTENT: &str = "content";
/// Blocks of a quarter of a megabyte are read, hashed and inflated; a frame's window is no larger than its content.
const BOUND: Bound = Bound { constant: 2 << 20, factor: 128 };
/// Tensors are also gathered in memory where their shards say that they hold less than this; a byte of a frame may stand for 32,768.
const GATHERED_BYTES: u64 = 1 << 20;

fn layout() -> Layout {
    Layout::new([("a", vec![]), ("m", vec![3, 4]), ("n", vec![2, 0])].map(|(name, shape)| (name.to_owned(), shape)).into())
}

/// A checkpoint of two ranks: 13 elements of two kinds, the matrix cut in two.
static WHOLE: LazyLock<Folder> = LazyLock::new(|| {
    let text = str::to_owned;
    let identity = Identity {
        method: text("lora"),
        sizes: [(text("lora_rank"), json!(2))].into(),
        base_fingerprint: text("aa"),
        tokenizer_sha256: text("bb"),
        template: text("chatglm2"),
    };
    let plan = json!({ "learning_rate": 0.02 });
    let probe = Some(Probe {
        rows: vec![ProbeRow { ids: vec![3, 1, 2], targets: vec![1, 2] }],
        loss: 0.5,
        logits: vec![0.25, -1.0],
        device: "cpu".to_owned(),
        compute_dtype: "float32".to_owned(),
    });
    let header = Header { step: 7, consumed_rows: 112, world_size: 2, eval_loss: None, identity, plan, probe };
    let part = |range: std::ops::Range<usize>| {
        let flat = Tensor::from_iter(range.clone().map(|at| at as f32), &Device::Cpu).unwrap();
        Part { flats: vec![Flat::copy("p", &flat).unwrap(), Flat::copy("m", &flat).unwrap()], range }
    };
    let dir = tempfile::tempdir().unwrap();
    let extra = [(EXTRA.to_owned(), b"{}".to_vec())];
    let path = checkpoint::save(&RealDisk, dir.path(), &header, &layout(), &[part(0..8), part(8..13)], &extra).unwrap();
    let names = [MANIFEST, SUMS, SHARD, "state-00001-of-00002.safetensors.zst", EXTRA];
    names.map(|name| (name.to_owned(), std::fs::read(path.join(name)).unwrap())).into()
});

/// Those that a manifest asks for: of shards, of files, and its own.
fn sums(manifest: &[u8]) -> Vec<u8> {
    let json: Value = serde_json::from_slice(manifest).unwrap_or_default();
    let line = |name: &str, entry: &Value| format!("{}  {name}\n", entry["sha256"].as_str().unwrap_or_default());
    let shards = json["shards"].as_array().into_iter().flatten().map(|entry| line(entry["file"].as_str().unwrap_or_default(), entry));
    let files = json["files"].as_object().into_iter().flatten().map(|(name, entry)| line(name, entry));
    let all: String = shards.chain(files).collect();
    format!("{all}{}  {MANIFEST}\n", sha256_hex(manifest)).into_bytes()
}

/// The whole checkpoint with this manifest, whose hash holds but for one input in eight.
fn with_manifest(mut folder: Folder, dice: &mut Dice) -> Folder {
    let manifest = folder.remove(MANIFEST).unwrap_or_default();
    let mut all = WHOLE.clone();
    if !dice.one_in(8) {
        all.insert(SUMS.to_owned(), sums(&manifest));
    }
    all.insert(MANIFEST.to_owned(), manifest);
    all
}

/// The whole checkpoint with this content in its first shard, in a frame that one time in four is damaged; the manifest is told of both.
fn with_content(mut folder: Folder, dice: &mut Dice) -> Folder {
    let content = folder.remove(CONTENT).unwrap_or_default();
    let mut frame = zstd::bulk::compress(&content, 1).unwrap();
    if dice.one_in(4) {
        let at = dice.below(frame.len());
        frame[at] ^= 1 << dice.below(8);
    }
    let mut manifest: Value = serde_json::from_slice(&WHOLE[MANIFEST]).unwrap();
    let shard = &mut manifest["shards"][0];
    (shard["bytes"], shard["sha256"], shard["content_bytes"]) = (json!(frame.len()), json!(sha256_hex(&frame)), json!(content.len()));
    let mut all = with_manifest(Folder::from([(MANIFEST.to_owned(), manifest.to_string().into_bytes())]), dice);
    all.insert(SHARD.to_owned(), frame);
    all
}

/// All that a resume and `verify` do; the answer of the strictest.
fn read(dir: &Path) -> Result<(), String> {
    let text = |error: checkpoint::CheckpointError| error.to_string();
    let checkpoint = checkpoint::open(&RealDisk, dir).map_err(text)?;
    let layout = layout();
    let flats = checkpoint.flats(&RealDisk, &layout, &[("p", 0..layout.num_elements()), ("m", 2..9)]);
    if checkpoint.manifest.shards.iter().all(|shard| shard.content_bytes < GATHERED_BYTES) {
        checkpoint.tensors(&RealDisk).map_err(text)?;
    }
    checkpoint.verify(&RealDisk).map_err(text)?;
    flats.map(drop).map_err(text)
}

fn target(name: &'static str, seeds: Vec<Folder>, words: &[&'static [u8]], assemble: fn(Folder, &mut Dice) -> Folder) -> Target<'static> {
    Target { name, executions: 1000, seeds, words: words.to_vec(), assemble, bound: BOUND, read: Box::new(read) }
}

fn manifest(text: impl AsRef<[u8]>) -> Folder {
    Folder::from([(MANIFEST.to_owned(), text.as_ref().to_vec())])
}

/// The whole manifest with `to` in the place of each `from`.
fn forged(from: &str, to: &str) -> Folder {
    let text = String::from_utf8(WHOLE[MANIFEST].clone()).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    manifest(text.replace(from, to))
}

#[test]
fn manifest_from_anyone_is_read_or_refused() {
    let seeds = vec![
        manifest(&WHOLE[MANIFEST]),
        forged(SHARD, "../outside/state"),
        forged(SHARD, "/dev/zero"),
        forged(EXTRA, "../outside/adapter_config.json"),
        forged(EXTRA, "adapter/../../outside/adapter_config.json"),
        forged("\"content_bytes\": ", "\"content_bytes\": 9"),
        forged("\"content_bytes\": ", "\"content_bytes\": 18446744073709551615, \"x\": "),
        forged("\"end\": ", "\"end\": 9223372036854775807, \"x\": "),
        forged("\"shard\": ", "\"shard\": 18446744073709551615, \"x\": "),
        forged("\"F32\"", "\"F4\""),
        forged("\"F32\"", "\"F64\""),
        manifest("[".repeat(100_000)),
        manifest("{\"format_version\":2,\"tensors\":".repeat(200)),
        manifest(format!("{{\"format_version\":2,\"shards\":[{}0]}}", "0,".repeat(50_000))),
        manifest("{\"format_version\":1}"),
        manifest("{\"format_version\":2.0}"),
        manifest([0xff; 9]),
    ];
    const WORDS: &[&[u8]] = &[
        b"\"F4\"",
        b"\"F64\"",
        b"\"BOOL\"",
        b"\"shape\": [9223372036854775808, 0, 4]",
        b"\"shape\": []",
        b"\"pieces\": []",
        b"\"..\"",
        b"\"../outside/state\"",
        b"\"files\": {}",
        b"\"tensors\": {}",
        b"\"p.a\"",
        b"\"start\": ",
        b"\"end\": ",
        b"\"stored_as\": ",
        b"\"shard\": 1",
        b"\"SHA256SUMS\"",
        b"\"manifest.json\"",
    ];
    fuzz(&target("manifest", seeds, &[JSON_WORDS, WORDS].concat(), with_manifest));
}

#[test]
fn shard_from_anyone_is_read_or_refused() {
    let content = |bytes: &[u8]| Folder::from([(CONTENT.to_owned(), bytes.to_vec())]);
    let whole = zstd::stream::decode_all(&WHOLE[SHARD][..]).unwrap();
    let long = [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat();
    let deep = "{\"a\":".repeat(20_000);
    let deep = [&(deep.len() as u64).to_le_bytes()[..], deep.as_bytes()].concat();
    let seeds = vec![content(&whole), content(&long), content(&deep), content(&whole[..7]), content(b""), content(&vec![0; 1 << 20])];
    fuzz(&target("shard", seeds, HEADER_WORDS, with_content));
}

#[test]
fn checkpoint_that_names_a_file_outside_of_it_is_refused_by_that_name() {
    let target = target("outside", Vec::new(), &[], with_manifest);
    for (from, to) in [(SHARD, "../outside/state"), (EXTRA, "/etc/passwd"), (EXTRA, "adapter/../../outside/x")] {
        let mut folder = WHOLE.clone();
        folder.extend(forged(from, to));
        folder.insert(SUMS.to_owned(), sums(&folder[MANIFEST]));
        let error = read_one(&target, &folder).unwrap_err();
        assert!(error.contains(&format!("`{to}` is not ")), "{error}");
    }
}
