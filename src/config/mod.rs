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
mod off;
mod resolve;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use clap::{Args, ValueHint};
use serde::{Deserialize, Serialize};
use toml::Value;

use crate::paths;
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
    /// Puts what `~` and `$NAME` stand for into the paths that the file gave; those of the command line come expanded.
    ///
    /// # Errors
    /// When one cannot be expanded.
    pub fn expand_paths(&mut self, env: &dyn Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        let mut values = flatten(&self.config)?;
        expand_paths(&mut values, &self.sources, "", env)?;
        self.config = unflatten(values)?;
        Ok(())
    }

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
    let file::FileValues { mut values, mut sources, idle } = file.map(file::read).transpose()?.unwrap_or_default();
    overlay(&mut values, &mut sources, flatten(command_line)?.into_iter().map(|(key, value)| (key, value, Source::CommandLine)).collect());
    let config = unflatten(values)?;
    let warnings = foreign::warnings(&idle).into_iter().chain(displaced(&config, &sources)).collect();
    Ok(Loaded { config, sources, warnings })
}

/// Keys that do nothing since another takes precedence.
fn displaced(config: &RunConfig, sources: &Sources) -> Vec<String> {
    let (run, optim) = (&config.run, &config.optim);
    let pairs = [
        ("run.num_train_epochs", "max_steps", run.num_train_epochs.is_some() && run.max_steps.is_some_and(|n| n != -1)),
        ("optim.warmup_ratio", "warmup_steps", optim.warmup_ratio.is_some() && optim.warmup_steps.is_some_and(|n| n > 0)),
    ];
    let displaced = pairs.into_iter().filter(|(.., is_displaced)| *is_displaced);
    displaced.map(|(path, first, _)| format!("`{path}` does nothing here: `{first}` takes precedence ({})", sources.place(path))).collect()
}

/// As [`Loaded::expand_paths`]; `table` stands before the names of keys in messages.
fn expand_paths(
    values: &mut BTreeMap<String, Value>,
    sources: &Sources,
    table: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<(), ConfigError> {
    let keys = KeyTable::new();
    for (name, value) in values {
        let (Some(source @ Source::File { .. }), Some(key)) = (sources.get(name), keys.get(name).filter(|key| key.is_path)) else {
            continue;
        };
        let Some(text) = value.as_str() else { continue };
        let expanded = if key.is_list { paths::expand_list(text, env) } else { paths::expand(text, env) };
        let section = if table.is_empty() { format!("{}.", key.section) } else { table.to_owned() };
        let place = || Place { source: source.clone(), key: format!("{section}{name}") };
        let expanded = expanded.map_err(|reason| ConfigError::Path { value: text.to_owned(), reason, place: place() })?;
        *value = Value::String(expanded);
    }
    Ok(())
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

/// A key, as it is defined in [`sections`].
struct Key {
    section: &'static str,
    name: String,
    /// A path, or several separated by commas.
    is_path: bool,
    is_list: bool,
    is_bool: bool,
    /// The words that it takes, where it takes no others.
    words: Vec<String>,
}

/// Every key.
struct KeyTable(Vec<Key>);

impl KeyTable {
    fn new() -> Self {
        fn keys<A: Args>(section: &'static str) -> Vec<Key> {
            let key = |arg: &clap::Arg| {
                let words: Vec<String> = arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
                Key {
                    section,
                    name: arg.get_id().to_string(),
                    is_path: is_path(arg),
                    is_list: is_path_list(arg),
                    is_bool: words == ["true", "false"],
                    words,
                }
            };
            A::augment_args(clap::Command::new("")).get_arguments().map(key).collect()
        }
        let [model, data, batch, method, optim, run] = SECTIONS;
        let by_section = [
            keys::<ModelConfig>(model),
            keys::<DataConfig>(data),
            keys::<BatchConfig>(batch),
            keys::<MethodConfig>(method),
            keys::<OptimConfig>(optim),
            keys::<ScheduleConfig>(run),
        ];
        Self(by_section.into_iter().flatten().collect())
    }

    fn get(&self, name: &str) -> Option<&Key> {
        self.0.iter().find(|key| key.name == name)
    }

    fn section_of(&self, name: &str) -> Option<&'static str> {
        self.get(name).map(|key| key.section)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|key| key.name.as_str())
    }
}

/// Whether an argument, and so a key, is a path: its type says so, or its hint for a shell.
pub fn is_path(arg: &clap::Arg) -> bool {
    matches!(arg.get_value_hint(), ValueHint::AnyPath | ValueHint::FilePath | ValueHint::DirPath)
}

/// Whether it is several paths separated by commas.
pub fn is_path_list(arg: &clap::Arg) -> bool {
    is_path(arg) && arg.get_value_names().is_some_and(|names| names.iter().any(|name| name == "DIRS"))
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
