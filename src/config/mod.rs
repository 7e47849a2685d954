//! What the user wrote ([`RunConfig`]) and what the program needs ([`Plan`]).
//!
//! A configuration file is overlaid by the command line ([`load`]), then resolved for a number of ranks ([`RunConfig::resolve`]). Every
//! value remembers where it came from, so that a message can name file and line.

pub mod arithmetic;
pub mod error;
pub mod foreign;
pub mod plan;
pub mod sections;
pub mod surprises;
pub mod values;

mod comparison;
mod file;
mod resolve;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use clap::Args;
use serde::{Deserialize, Serialize};
use toml::Value;

pub use comparison::{Comparison, load_comparison};
pub use error::{ConfigError, Place, Source};
pub use plan::Plan;
use sections::{BatchConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, ScheduleConfig};

/// Sections of a configuration file, in their order.
pub const SECTIONS: [&str; 6] = ["model", "data", "batch", "method", "optim", "run"];

/// A run as the user wrote it: every key may be absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, Args)]
#[serde(default)]
pub struct RunConfig {
    #[command(flatten)]
    pub model: ModelConfig,
    #[command(flatten)]
    pub data: DataConfig,
    #[command(flatten)]
    pub batch: BatchConfig,
    #[command(flatten)]
    pub method: MethodConfig,
    #[command(flatten)]
    pub optim: OptimConfig,
    #[command(flatten)]
    pub run: ScheduleConfig,
}

/// Where each given key came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources(BTreeMap<String, Source>);

impl Sources {
    fn insert(&mut self, key: &str, source: Source) {
        self.0.insert(key.to_owned(), source);
    }

    fn get(&self, key: &str) -> Option<&Source> {
        self.0.get(key)
    }

    /// `path` is `section.key`.
    fn place(&self, path: &str) -> Place {
        let key = path.rsplit('.').next().unwrap_or(path);
        Place { source: self.get(key).cloned().unwrap_or(Source::Default), key: path.to_owned() }
    }
}

/// A configuration file with the command line over it.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    pub config: RunConfig,
    pub sources: Sources,
    /// Lines to show the user once: keys that do nothing here.
    pub warnings: Vec<String>,
}

impl Loaded {
    /// The plan of this run on `world_size` ranks.
    ///
    /// # Errors
    /// When a needed key is absent, a value is out of its range, or the batch does not fit the ranks.
    pub fn resolve(&self, world_size: usize) -> Result<Plan, ConfigError> {
        self.config.resolve(world_size, &self.sources)
    }
}

/// Keys of which one, given on the command line, displaces the others of the file.
const ALTERNATIVES: [&[&str]; 4] = [
    &["gradient_accumulation_steps", "global_batch_size"],
    &["max_steps", "num_train_epochs"],
    &["warmup_steps", "warmup_ratio"],
    &["recompute", "gradient_checkpointing"],
];

/// Reads `file` (TOML or JSON) and lays `command_line` over it.
///
/// # Errors
/// When the file cannot be read or parsed, or holds a key that is unknown, misplaced, repeated, unsupported or of the wrong type.
pub fn load(file: Option<&Path>, command_line: &RunConfig) -> Result<Loaded, ConfigError> {
    let file::FileValues { mut values, mut sources, warnings } = file.map(file::read).transpose()?.unwrap_or_default();
    overlay(&mut values, &mut sources, flatten(command_line)?.into_iter().map(|(key, value)| (key, value, Source::CommandLine)).collect());
    let config = unflatten(values)?;
    let warnings = warnings.into_iter().chain(displaced(&config, &sources)).collect();
    Ok(Loaded { config, sources, warnings })
}

/// Keys that do nothing since another goes first.
fn displaced(config: &RunConfig, sources: &Sources) -> Vec<String> {
    let (run, optim) = (&config.run, &config.optim);
    let pairs = [
        ("run.num_train_epochs", "max_steps", run.num_train_epochs.is_some() && run.max_steps.is_some_and(|n| n != -1)),
        ("optim.warmup_ratio", "warmup_steps", optim.warmup_ratio.is_some() && optim.warmup_steps.is_some_and(|n| n > 0)),
    ];
    let displaced = pairs.into_iter().filter(|(.., is_displaced)| *is_displaced);
    displaced.map(|(path, first, _)| format!("`{path}` does nothing here: `{first}` goes first ({})", sources.place(path))).collect()
}

/// Lays `over` = (key, value, source) over what is there; a key displaces its alternatives as well.
fn overlay(values: &mut BTreeMap<String, Value>, sources: &mut Sources, over: Vec<(String, Value, Source)>) {
    for group in ALTERNATIVES.iter().filter(|group| over.iter().any(|(key, ..)| group.contains(&key.as_str()))) {
        values.retain(|key, _| !group.contains(&key.as_str()));
        sources.0.retain(|key, _| !group.contains(&key.as_str()));
    }
    for (key, value, source) in over {
        sources.insert(&key, source);
        values.insert(key, value);
    }
}

/// Given keys and their values, without sections.
fn flatten(config: &RunConfig) -> Result<BTreeMap<String, Value>, ConfigError> {
    let table = toml::Table::try_from(config).map_err(|e| ConfigError::NotText { message: e.to_string() })?;
    Ok(table.into_iter().filter_map(|(_, section)| if let Value::Table(t) = section { Some(t) } else { None }).flatten().collect())
}

fn unflatten(values: BTreeMap<String, Value>) -> Result<RunConfig, ConfigError> {
    let keys = KeyTable::new();
    let mut table = toml::Table::new();
    for (key, value) in values {
        let section = keys.section_of(&key).unwrap_or_default();
        if let Value::Table(t) = table.entry(section).or_insert_with(|| Value::Table(toml::Table::new())) {
            t.insert(key, value);
        }
    }
    Value::Table(table).try_into().map_err(|e: toml::de::Error| ConfigError::NotText { message: e.message().to_owned() })
}

/// Which key belongs to which section, from the definitions in [`sections`].
struct KeyTable(Vec<(&'static str, String)>);

impl KeyTable {
    fn new() -> Self {
        fn keys<A: Args>() -> Vec<String> {
            A::augment_args(clap::Command::new("")).get_arguments().map(|a| a.get_id().to_string()).collect()
        }
        let by_section = [
            keys::<ModelConfig>(),
            keys::<DataConfig>(),
            keys::<BatchConfig>(),
            keys::<MethodConfig>(),
            keys::<OptimConfig>(),
            keys::<ScheduleConfig>(),
        ];
        Self(SECTIONS.into_iter().zip(by_section).flat_map(|(s, keys)| keys.into_iter().map(move |k| (s, k))).collect())
    }

    fn section_of(&self, key: &str) -> Option<&'static str> {
        self.0.iter().find(|(_, k)| k == key).map(|(s, _)| *s)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(_, k)| k.as_str())
    }
}

/// Whether `section.key` can hold `value`; the reason if not.
fn check_type(section: &str, key: &str, value: &Value) -> Result<(), String> {
    let inner = toml::Table::from_iter([(key.to_owned(), value.clone())]);
    let outer = Value::Table(toml::Table::from_iter([(section.to_owned(), Value::Table(inner))]));
    match outer.try_into::<RunConfig>() {
        Ok(_) => Ok(()),
        Err(e) => Err(plain_words(e.message())),
    }
}

/// serde's message with the names of Rust's types put in words.
fn plain_words(message: &str) -> String {
    let beginnings = ["invalid type: ", "invalid value: ", "unknown variant "];
    let message = beginnings.iter().find_map(|b| message.strip_prefix(b)).unwrap_or(message);
    let types = [
        ("usize", "a whole number of 0 or more"),
        ("u64", "a whole number of 0 or more"),
        ("i64", "a whole number"),
        ("f64", "a number"),
        ("a boolean", "true or false"),
        ("path string", "a path"),
        ("a string", "a text"),
    ];
    let worded =
        types.iter().find_map(|(rust, plain)| Some(format!("{}expected {plain}", message.strip_suffix(&format!("expected {rust}"))?)));
    worded.unwrap_or_else(|| message.to_owned())
}
