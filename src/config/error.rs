//! What can be wrong with a configuration, and what the user can do about it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::paths::NotThere;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    File {
        path: Arc<std::path::Path>,
        /// 1-based.
        line: usize,
    },
    CommandLine,
    Default,
}

/// A key (`section.name`) and where its value came from: the `-->` line of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub source: Source,
    pub key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.key.rsplit('.').next().unwrap_or(&self.key);
        match &self.source {
            Source::File { path, line } => write!(f, "{}:{line}, key `{}`", path.display(), self.key),
            // An argument without a name.
            Source::CommandLine if name.starts_with('<') => write!(f, "command line, `{name}`"),
            Source::CommandLine => write!(f, "command line, `--{name}`"),
            Source::Default => write!(f, "default of `--{name}`"),
        }
    }
}

/// A configuration that cannot be run. All of them are the user's to mend.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read configuration file {}: {reason}", path.display())]
    Read { path: PathBuf, reason: String },
    #[error("cannot read configuration file: {0}")]
    NotThere(#[from] NotThere),
    #[error("configuration file is not valid {language}: {message}")]
    Syntax { path: PathBuf, line: usize, language: &'static str, message: String },
    #[error("unknown key `{key}`")]
    UnknownKey { key: String, nearest: Option<String>, place: Place },
    #[error("unknown section `[{section}]`")]
    UnknownSection { section: String, nearest: Option<String>, place: Place },
    #[error("key `{key}` stands in section `[{found}]`, expected `[{expected}]`")]
    WrongSection { key: String, found: String, expected: &'static str, place: Place },
    #[error("key `{key}` is given twice, in lines {first} and {second}")]
    Twice { key: String, first: usize, second: usize, place: Place },
    #[error("`{}` is {message}", place.key)]
    WrongType { message: String, place: Place },
    #[error("a value cannot be written as text: {message}")]
    NotText { message: String },
    #[error("`{key}` is not supported: {reason}")]
    Unsupported { key: String, reason: &'static str, place: Place },
    #[error("`{key}` is not given")]
    Missing { key: &'static str },
    #[error("`{}` is {value}, expected {expected}", place.key)]
    Value { value: String, expected: &'static str, place: Place },
    #[error("`{}` is `{value}`: {reason}", place.key)]
    Path { value: String, reason: String, place: Place },
    #[error("`{}` has no value: `{next}` looks like an option", place.key)]
    LooksLikeOption { next: String, place: Place },
    #[error("`{}` is given, but `{needs}` is not", place.key)]
    Needs { needs: &'static str, place: Place },
    #[error("`{}` contradicts `{other}`: {reason}", place.key)]
    Contradiction { other: &'static str, reason: String, place: Place },
    #[error("`{}` and `{other}` are both the column `{column}`", place.key)]
    SharedColumn { other: String, column: String, place: Place },
    #[error("`save_before_timeout` is slurm, but SLURM_JOB_END_TIME is {}", or_not_set(found))]
    NoJobEnd { found: String },
    #[error("no method of the comparison is called `{label}`")]
    UnknownLabel { label: String, hint: String, place: Place },
    #[error("`{}` names no method", place.key)]
    NoLabel { known: Vec<String>, place: Place },
    #[error("`{label}` cannot be the name of a method's folder")]
    BadLabel { label: String, place: Place },
    #[error("`{key}` is set for one method, but all methods of a comparison share it")]
    Shared { key: String, section: &'static str, place: Place },
    #[error("`{key}` is given for all methods of a comparison, but each has its own")]
    PerMethod { key: String, place: Place },
    #[error(
        "`{}` is {weight_decay}: a step at the learning rate {learning_rate} subtracts {} times each parameter, so that nothing learnt stays",
        place.key, one_decimal(learning_rate * weight_decay)
    )]
    TooMuchDecay { learning_rate: f64, weight_decay: f64, place: Place },
    #[error("`{}` is {rows}, which {world_size} ranks x micro-batch {micro} = {} does not divide", place.key, world_size * micro)]
    NotDivisible { rows: usize, world_size: usize, micro: usize, place: Place },
    #[error("`{}` is {rows}: {} slots of micro-batch {micro}, fewer than {world_size} ranks", place.key, rows / micro)]
    TooManyRanks { rows: usize, world_size: usize, micro: usize, place: Place },
}

impl ConfigError {
    /// What the message's `-->` line says.
    pub fn place(&self) -> Option<String> {
        match self {
            Self::Read { .. } | Self::NotThere(_) | Self::Missing { .. } | Self::NotText { .. } | Self::NoJobEnd { .. } => None,
            Self::Syntax { path, line, .. } => Some(format!("{}:{line}", path.display())),
            Self::UnknownKey { place, .. }
            | Self::UnknownSection { place, .. }
            | Self::WrongSection { place, .. }
            | Self::Twice { place, .. }
            | Self::WrongType { place, .. }
            | Self::Unsupported { place, .. }
            | Self::Value { place, .. }
            | Self::Path { place, .. }
            | Self::LooksLikeOption { place, .. }
            | Self::Needs { place, .. }
            | Self::Contradiction { place, .. }
            | Self::SharedColumn { place, .. }
            | Self::UnknownLabel { place, .. }
            | Self::NoLabel { place, .. }
            | Self::BadLabel { place, .. }
            | Self::Shared { place, .. }
            | Self::PerMethod { place, .. }
            | Self::TooMuchDecay { place, .. }
            | Self::NotDivisible { place, .. }
            | Self::TooManyRanks { place, .. } => Some(place.to_string()),
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::UnknownKey { nearest, .. } => match nearest {
                Some(name) => format!("did you mean `{name}`?"),
                None => "`glmddp train --help` lists all keys".to_owned(),
            },
            Self::UnknownSection { nearest: Some(name), .. } => format!("did you mean `[{name}]`?"),
            Self::UnknownSection { .. } => format!("sections are {}", super::SECTIONS.map(|s| format!("[{s}]")).join(" ")),
            Self::WrongSection { key, expected, .. } => format!("move `{key}` to `[{expected}]`, or above the first section"),
            Self::Twice { key, .. } => format!("leave one `{key}` out"),
            Self::Unsupported { key, .. } => format!("leave `{key}` out"),
            Self::Missing { key } => format!("add `{key}` to the configuration file or give `--{key}`"),
            Self::Needs { needs, .. } => format!("give `{needs}` as well"),
            Self::Contradiction { .. } => "leave one of the two out".to_owned(),
            Self::SharedColumn { .. } => "give each a column of its own".to_owned(),
            Self::Path { value, .. } if value.contains('$') => "write `$$` for a `$` that is part of a name".to_owned(),
            Self::NoJobEnd { .. } => {
                "give the time from the start, such as 3h55m; Slurm sets the variable in its jobs since version 23.02, to seconds since 1970"
                    .to_owned()
            }
            Self::UnknownLabel { hint, .. } => hint.clone(),
            Self::NoLabel { known, .. } => format!("give `--methods all`, or some of {}", known.join(",")),
            Self::BadLabel { .. } => "use letters, digits, `_` and `-`".to_owned(),
            Self::Shared { key, section, .. } => format!("move `{key}` to `[{section}]`"),
            Self::PerMethod { key, .. } => {
                format!("set `{key}` in `[methods.LABEL]` of the configuration file, as configs/compare.toml does")
            }
            Self::TooMuchDecay { learning_rate, .. } => {
                format!("use `--weight_decay {}` or less, or a lower `--learning_rate`", round_down(0.1 / learning_rate))
            }
            Self::NotDivisible { rows, world_size, micro, .. } => match divisible_neighbours(*rows, world_size * micro) {
                (0, above) => format!("use {above}"),
                (below, above) => format!("use {below} or {above}"),
            },
            Self::TooManyRanks { rows, world_size, micro, .. } => {
                format!("start {} ranks, or use {}", rows / micro, world_size * micro)
            }
            Self::LooksLikeOption { next, place } => {
                format!("if it is the value, write `--{}={next}`; else give the value before it", place.key)
            }
            Self::NotThere(error) => return error.hint(),
            Self::Read { .. }
            | Self::Syntax { .. }
            | Self::WrongType { .. }
            | Self::Value { .. }
            | Self::Path { .. }
            | Self::NotText { .. } => return None,
        })
    }
}

fn or_not_set(text: &str) -> String {
    if text.is_empty() { "not set".to_owned() } else { format!("`{text}`, which is no time") }
}

/// `1.2`, and `100000` where the decimal is 0.
fn one_decimal(x: f64) -> String {
    let text = format!("{x:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// `x` to one figure, not above it.
fn round_down(x: f64) -> f64 {
    let unit = 10f64.powf(x.log10().floor());
    let figure = (x / unit).floor();
    // Dividing by a whole power prints without a tail of digits.
    if unit < 1.0 { figure / unit.recip().round() } else { figure * unit }
}

/// The nearest multiples of `unit` on both sides of `rows`; 0 below the first.
fn divisible_neighbours(rows: usize, unit: usize) -> (usize, usize) {
    let below = rows / unit * unit;
    (below, below + unit)
}

/// The candidate most like `name`, if one is near enough to be meant.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|c| (strsim::jaro_winkler(name, c), c))
        .filter(|&(score, _)| score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c.to_owned())
}
