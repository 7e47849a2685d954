//! `glmddp checkpoint inspect`: what a checkpoint is, by its manifest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::report;
use super::text::columns;
use crate::checkpoint::{self, Checkpoint, CheckpointError, Disk, Identity, Named, RealDisk};
use crate::telemetry::{bytes, thousands};

/// Show what is in a checkpoint, or all checkpoints of a run
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct InspectArgs {
    /// A checkpoint, or the output_dir of a run
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Read the state and show the L2 norm and the largest value of each parameter
    #[arg(long)]
    pub stats: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Judged without reading the content.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// An undamaged manifest, and all files have their lengths.
    Whole,
    Damaged(String),
    Incomplete(String),
}

#[derive(Debug, Serialize)]
struct Row {
    path: PathBuf,
    state: State,
    step: Option<u64>,
    eval_loss: Option<f64>,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Group {
    tensors: usize,
    elements: usize,
    dtypes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Stats {
    name: String,
    norm: f64,
    max_abs: f64,
}

#[derive(Debug, Serialize)]
struct Inspected {
    path: PathBuf,
    state: State,
    step: u64,
    consumed_rows: u64,
    /// Where the number of training rows is known.
    epoch: Option<f64>,
    eval_loss: Option<f64>,
    world_size: usize,
    #[serde(flatten)]
    identity: Identity,
    /// Of all files.
    bytes: u64,
    /// Of the tensors.
    content_bytes: u64,
    files: usize,
    /// Kind -> its tensors.
    kinds: BTreeMap<String, Group>,
    stats: Option<Vec<Stats>>,
    /// When the manifest was written, as the file system has it.
    written: Option<String>,
}

pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let text = match checkpoint::named(&RealDisk, &args.path)? {
        Named::Checkpoint(path) => {
            let found = inspect(&checkpoint::open(&RealDisk, &path)?, args.stats)?;
            if args.json { format!("{}\n", serde_json::to_string(&found)?) } else { one_text(&found) }
        }
        Named::OutputDir(all) => {
            let rows: Vec<Row> = all.iter().map(|path| row(path)).collect();
            if args.json { format!("{}\n", serde_json::to_string(&rows)?) } else { table(&rows) }
        }
    };
    report::print(&text)?;
    Ok(())
}

fn state(checkpoint: &Checkpoint) -> State {
    if checkpoint.has_its_lengths(&RealDisk) {
        State::Whole
    } else {
        State::Damaged("a file is missing or has another length; `glmddp checkpoint verify` names it".to_owned())
    }
}

fn row(path: &Path) -> Row {
    let bytes = bytes_below(path);
    match checkpoint::open(&RealDisk, path) {
        Ok(opened) => {
            let header = &opened.manifest.header;
            Row { path: path.to_owned(), state: state(&opened), step: Some(header.step), eval_loss: header.eval_loss, bytes }
        }
        Err(error) => {
            let state = match error {
                CheckpointError::Incomplete { reason, .. } => State::Incomplete(reason),
                other => State::Damaged(other.to_string()),
            };
            Row { path: path.to_owned(), state, step: None, eval_loss: None, bytes }
        }
    }
}

/// Of all regular files, without following links.
fn bytes_below(path: &Path) -> u64 {
    if RealDisk.is_folder(path) {
        return RealDisk.list(path).unwrap_or_default().iter().map(|path| bytes_below(path)).sum();
    }
    RealDisk.len(path).unwrap_or(0)
}

fn inspect(checkpoint: &Checkpoint, with_stats: bool) -> anyhow::Result<Inspected> {
    let (manifest, header) = (&checkpoint.manifest, &checkpoint.manifest.header);
    let mut kinds: BTreeMap<String, Group> = BTreeMap::new();
    let mut content_bytes = 0;
    for (name, entry) in &manifest.tensors {
        let (kind, elements) = (name.split('.').next().unwrap_or(name), entry.num_elements().unwrap_or(0));
        content_bytes += (elements * entry.dtype.bitsize() / 8) as u64;
        let group = kinds.entry(kind.to_owned()).or_insert(Group { tensors: 0, elements: 0, dtypes: Vec::new() });
        group.tensors += 1;
        group.elements += elements;
        let dtype = format!("{:?}", entry.dtype);
        if !group.dtypes.contains(&dtype) {
            group.dtypes.push(dtype);
        }
    }
    let written = std::fs::metadata(checkpoint.path.join("manifest.json")).and_then(|metadata| metadata.modified());
    let train_rows = header.identity.sizes.get("train_rows").and_then(Value::as_f64).filter(|rows| *rows > 0.0);
    Ok(Inspected {
        path: checkpoint.path.clone(),
        state: state(checkpoint),
        step: header.step,
        consumed_rows: header.consumed_rows,
        epoch: train_rows.map(|rows| header.consumed_rows as f64 / rows),
        eval_loss: header.eval_loss,
        world_size: header.world_size,
        identity: header.identity.clone(),
        bytes: bytes_below(&checkpoint.path),
        content_bytes,
        files: manifest.files.len() + manifest.shards.len() + 2,
        kinds,
        stats: with_stats.then(|| stats(checkpoint)).transpose()?,
        written: written.ok().map(|time| humantime::format_rfc3339_seconds(time).to_string()),
    })
}

fn stats(checkpoint: &Checkpoint) -> anyhow::Result<Vec<Stats>> {
    let mut stats = Vec::new();
    for (name, tensor) in checkpoint.tensors(&RealDisk)? {
        let Some(name) = name.strip_prefix("parameter.") else { continue };
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let norm = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let max_abs = values.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max);
        stats.push(Stats { name: name.to_owned(), norm, max_abs });
    }
    Ok(stats)
}

fn state_text(state: &State) -> String {
    match state {
        State::Whole => "whole".to_owned(),
        State::Damaged(what) => format!("DAMAGED: {what}"),
        State::Incomplete(what) => format!("INCOMPLETE: {what}"),
    }
}

fn loss_text(loss: Option<f64>) -> String {
    loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"))
}

fn table(rows: &[Row]) -> String {
    let mut text =
        format!("{:<20} {:>10} {:>12}  state (lengths; `glmddp checkpoint verify` reads all)\n", "checkpoint", "eval loss", "on disk");
    for row in rows {
        let name = row.path.file_name().unwrap_or_default().to_string_lossy();
        text.push_str(&format!("{name:<20} {:>10} {:>12}  {}\n", loss_text(row.eval_loss), bytes(row.bytes), state_text(&row.state)));
    }
    text
}

fn one_text(found: &Inspected) -> String {
    let epoch = found.epoch.map_or(String::new(), |epoch| format!(", epoch {epoch:.2}"));
    let sizes: Vec<String> = found.identity.sizes.iter().map(|(name, value)| format!("{name} {}", short(value))).collect();
    let ranks = if found.world_size == 1 { "1 rank".to_owned() } else { format!("{} ranks", found.world_size) };
    let mut rows = vec![
        ("step", format!("{}: {} rows{epoch}", thousands(found.step), thousands(found.consumed_rows))),
        ("held-out loss", loss_text(found.eval_loss)),
        ("method", format!("{}: {}", found.identity.method, sizes.join(", "))),
        ("base", found.identity.base_fingerprint.clone()),
        ("tokenizer", found.identity.tokenizer_sha256.clone()),
        ("template", found.identity.template.clone()),
        ("saved", format!("{} by {ranks}", found.written.as_deref().unwrap_or("-"))),
        ("on disk", format!("{} in {} files; {} of state uncompressed", bytes(found.bytes), found.files, bytes(found.content_bytes))),
        ("state", format!("{} (by manifest and lengths; `glmddp checkpoint verify` reads all)", state_text(&found.state))),
    ];
    for (kind, group) in &found.kinds {
        let text = format!("{} tensors, {} elements, {}", group.tensors, thousands(group.elements as u64), group.dtypes.join(" "));
        rows.push((kind.as_str(), text));
    }
    let mut text = format!("{}\n", found.path.display());
    text.push_str(&columns(&rows.into_iter().map(|(label, text)| (label.to_owned(), text)).collect::<Vec<_>>()));
    if let Some(stats) = &found.stats {
        text.push_str("norm, largest value of the parameters\n");
        let rows = stats.iter().map(|s| (s.name.clone(), format!("{:.4e}  {:.4e}", s.norm, s.max_abs)));
        text.push_str(&columns(&rows.collect::<Vec<_>>()));
    }
    text
}

/// A long list is told by its length.
fn short(value: &Value) -> String {
    match value {
        Value::Array(items) if items.len() > 8 => format!("({} names)", items.len()),
        Value::String(hash) if hash.len() == 64 => format!("{}...", &hash.get(..8).unwrap_or(hash)),
        other => other.to_string(),
    }
}
