//! The methods of a comparison: labels, and what each sets over a run that all of them share.
//!
//! A configuration file may have `[methods.LABEL]` tables with keys of `[method]` and `[optim]`. Where it has none, those of
//! `configs/compare.toml` hold, which are built in: the published recipes.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Value;

use super::error::nearest;
use super::file::{self, FileValues, MethodTable};
use super::foreign::{self, Idle};
use super::{ConfigError, KeyTable, Loaded, Place, RunConfig, Source, Sources, displaced, expand_paths, flatten, overlay, unflatten};

const BUILT_IN: &str = include_str!("../../configs/compare.toml");
const BUILT_IN_PATH: &str = "configs/compare.toml (built in)";
/// Sections of which a method may have keys of its own; all others decide which rows a step sees, and from what base.
const OWN_SECTIONS: [&str; 2] = ["method", "optim"];
/// A key of a shared section that no two methods want the same.
const LEARNING_RATE: &str = "learning_rate";
/// In a file it would make each call start anew.
const OVERWRITE: &str = "overwrite_output_dir";
const UNSUPPORTED: [(&str, &str); 3] = [
    ("resume_from_checkpoint", "a comparison goes on by itself where it stopped"),
    ("dump_batches", "each method would write the same file"),
    ("dump_initial", "each method would write the same file"),
];

/// A run that several methods share, and the methods.
#[derive(Debug)]
pub struct Comparison {
    values: BTreeMap<String, Value>,
    sources: Sources,
    methods: Vec<MethodTable>,
    /// Lines to show the user once: keys that do nothing here.
    pub warnings: Vec<String>,
}

/// Reads `file` and lays `command_line` over what all methods share.
///
/// # Errors
/// As [`super::load`]; and when a key stands on the wrong side of what is shared and what is a method's own.
pub fn load_comparison(file: Option<&Path>, command_line: &RunConfig) -> Result<Comparison, ConfigError> {
    let keys = KeyTable::new();
    let (FileValues { mut values, mut sources, mut idle }, mut methods) = file.map(file::read_comparison).transpose()?.unwrap_or_default();
    if methods.is_empty() {
        methods = file::parse_toml(Path::new(BUILT_IN_PATH), BUILT_IN)?.1;
    }
    let is_own = |key: &str| key == LEARNING_RATE || keys.section_of(key) == Some("method");
    values.retain(|key, _| {
        let reason = if is_own(key) {
            "each method of a comparison has its own"
        } else if key == OVERWRITE {
            "a comparison goes on where it stopped, unless the command line says so"
        } else {
            return true;
        };
        let place = sources.place(&format!("{}.{key}", keys.section_of(key).unwrap_or_default()));
        idle.push(Idle { key: key.clone(), reason: Some(reason), place });
        false
    });
    let over = flatten(command_line)?;
    if let Some(key) = over.keys().find(|key| is_own(key)) {
        return Err(ConfigError::PerMethod { key: key.clone(), place: command_line_place(key) });
    }
    overlay(&mut values, &mut sources, over.into_iter().map(|(key, value)| (key, value, Source::CommandLine)).collect());
    if let Some((key, reason)) = UNSUPPORTED.into_iter().find(|(key, _)| values.contains_key(*key)) {
        return Err(ConfigError::Unsupported { key: key.to_owned(), reason, place: sources.place(&format!("run.{key}")) });
    }
    for MethodTable { label, place, own } in &methods {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if label.is_empty() || !label.chars().all(is_plain) {
            return Err(ConfigError::BadLabel { label: label.clone(), place: place.clone() });
        }
        for key in own.values.keys() {
            if let Some(section) = keys.section_of(key).filter(|section| !OWN_SECTIONS.contains(section)) {
                let source = own.sources.get(key).cloned().unwrap_or(Source::Default);
                let place = Place { source, key: format!("{}.{key}", place.key) };
                return Err(ConfigError::Shared { key: key.clone(), section, place });
            }
        }
        idle.extend(own.idle.iter().cloned());
    }
    let shared = unflatten(values.clone())?;
    let warnings = foreign::warnings(&idle).into_iter().chain(displaced(&shared, &sources)).collect();
    Ok(Comparison { values, sources, methods, warnings })
}

impl Comparison {
    /// As [`Loaded::expand_paths`], of what all methods share and of what each has of its own.
    ///
    /// # Errors
    /// When a path cannot be expanded.
    pub fn expand_paths(&mut self, env: &dyn Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        expand_paths(&mut self.values, &self.sources, "", env)?;
        for MethodTable { place, own, .. } in &mut self.methods {
            expand_paths(&mut own.values, &own.sources, &format!("{}.", place.key), env)?;
        }
        Ok(())
    }

    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.methods.iter().map(|m| m.label.as_str())
    }

    /// The methods that `list` names: `all`, or labels separated by commas, each taken once.
    ///
    /// # Errors
    /// When a label is unknown or there is none.
    pub fn select(&self, list: &str) -> Result<Vec<(String, Loaded)>, ConfigError> {
        let known = || self.labels().map(str::to_owned).collect::<Vec<_>>();
        let mut chosen: Vec<&MethodTable> = Vec::new();
        if list.trim() == "all" {
            chosen.extend(&self.methods);
        } else {
            for label in list.split(',').map(str::trim).filter(|label| !label.is_empty()) {
                let Some(method) = self.methods.iter().find(|m| m.label == label) else {
                    let hint = match nearest(label, self.labels()) {
                        Some(label) => format!("did you mean `{label}`?"),
                        None => format!("there are {}", known().join(", ")),
                    };
                    return Err(ConfigError::UnknownLabel { label: label.to_owned(), hint, place: command_line_place("methods") });
                };
                if !chosen.iter().any(|m| m.label == label) {
                    chosen.push(method);
                }
            }
        }
        if chosen.is_empty() {
            return Err(ConfigError::NoLabel { known: known(), place: command_line_place("methods") });
        }
        chosen.into_iter().map(|method| Ok((method.label.clone(), self.with(method)?))).collect()
    }

    /// The run with one method's keys over it.
    fn with(&self, method: &MethodTable) -> Result<Loaded, ConfigError> {
        let (mut values, mut sources) = (self.values.clone(), self.sources.clone());
        let source = |key: &str| method.own.sources.get(key).cloned().unwrap_or(Source::Default);
        let own = method.own.values.iter().map(|(key, value)| (key.clone(), value.clone(), source(key)));
        overlay(&mut values, &mut sources, own.collect());
        Ok(Loaded { config: unflatten(values)?, sources, warnings: Vec::new() })
    }
}

fn command_line_place(key: &str) -> Place {
    Place { source: Source::CommandLine, key: key.to_owned() }
}
