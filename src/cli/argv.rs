//! Puts the arguments into the one form that clap is told about.
//!
//! `--train-file` becomes `--train_file`; a value is joined to its option (`--prompt -5` -> `--prompt=-5`, `--prefix_projection true` ->
//! `--prefix_projection=true`), so that it is never taken for an option and a bare flag never swallows the argument behind it; `~` and `$NAME`
//! in paths become what they stand for; arguments of other programs are taken out, with a warning, or refused.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::iter::Peekable;

use crate::config::error::nearest;
use crate::config::foreign::{self, Arity, Idle};
use crate::config::values::truth;
use crate::config::{ConfigError, Place, Source, is_path, is_path_list};
use crate::paths;

/// Arguments ready for clap.
#[derive(Debug)]
pub struct Argv {
    pub args: Vec<OsString>,
    /// Lines about arguments that were taken out.
    pub warnings: Vec<String>,
}

/// Normalises `args` (the program's name first) for the subcommand of `command` that they name; `env` gives what paths name.
///
/// # Errors
/// When a subcommand that takes a run's keys is given one that is unknown or not supported, an option lacks its value, or a path cannot be
/// expanded.
pub fn normalise(args: Vec<OsString>, mut command: clap::Command, env: &dyn Fn(&str) -> Option<String>) -> Result<Argv, ConfigError> {
    command.build();
    let words = args.iter().skip(1).filter_map(|a| a.to_str());
    let Some(subcommand) = subcommand(words, &command) else { return Ok(Argv { args, warnings: Vec::new() }) };
    let options = Options::of(subcommand);
    let mut idle = Vec::new();
    let mut out = Vec::with_capacity(args.len());
    let mut rest = args.into_iter().peekable();
    out.extend(rest.next());
    while let Some(arg) = rest.next() {
        let Some(option) = arg.to_str().and_then(|a| a.strip_prefix("--")) else {
            let place = || on_command_line(options.positional.as_deref().unwrap_or_default());
            let is_path = options.positional.is_some();
            out.push(if is_path { expand(&arg, false, env, place)? } else { arg });
            continue;
        };
        if option.is_empty() {
            out.push(arg);
            out.extend(rest);
            break;
        }
        let (name, value) = option.split_once('=').map_or((option, None), |(n, v)| (n, Some(OsString::from(v))));
        let name = name.replace('-', "_");
        match options.takes(&name) {
            Some(Takes::Flag) => out.push(join(&name, value.as_deref())),
            Some(Takes::Truth) => {
                let value = value.and_then(|v| v.into_string().ok()).or_else(|| next_truth(&mut rest));
                let value = value.unwrap_or_else(|| "true".to_owned());
                let value = truth(&value).map_or(value, |truth| truth.to_string());
                out.push(join(&name, Some(OsStr::new(&value))));
            }
            Some(takes @ (Takes::Value | Takes::Path | Takes::Paths)) => {
                let value = value.or_else(|| rest.next_if(|next| options.is_value(next)));
                let value = match (value, rest.peek().and_then(|next| next.to_str())) {
                    (None, Some(next)) if options.looks_like_value(next) => {
                        return Err(ConfigError::LooksLikeOption { next: next.to_owned(), place: on_command_line(&name) });
                    }
                    (Some(value), _) if takes != Takes::Value => {
                        Some(expand(&value, takes == Takes::Paths, env, || on_command_line(&name))?)
                    }
                    (value, _) => value,
                };
                out.push(join(&name, value.as_deref()));
            }
            None if options.takes_run_keys() => idle.push(take_out(&name, value, &mut rest, &options)?),
            None => out.push(join(&name, value.as_deref())),
        }
    }
    Ok(Argv { args: out, warnings: foreign::warnings(&idle) })
}

/// The subcommand of `command` that `words` name, innermost; `command` is built.
pub fn subcommand<'c, 'w>(mut words: impl Iterator<Item = &'w str>, command: &'c clap::Command) -> Option<&'c clap::Command> {
    let mut subcommand = words.find_map(|name| command.find_subcommand(name))?;
    while let Some(inner) = words.find_map(|name| subcommand.find_subcommand(name)) {
        subcommand = inner;
    }
    Some(subcommand)
}

fn join(name: &str, value: Option<&OsStr>) -> OsString {
    let mut word = OsString::from(format!("--{name}"));
    if let Some(value) = value {
        word.push("=");
        word.push(value);
    }
    word
}

fn on_command_line(key: &str) -> Place {
    Place { source: Source::CommandLine, key: key.to_owned() }
}

/// A path, or several separated by commas, with what `~` and `$NAME` stand for. One that is not UTF-8 stays as it is.
fn expand(
    path: &OsStr,
    is_list: bool,
    env: &dyn Fn(&str) -> Option<String>,
    place: impl FnOnce() -> Place,
) -> Result<OsString, ConfigError> {
    let Some(text) = path.to_str() else { return Ok(path.to_owned()) };
    let expanded = if is_list { paths::expand_list(text, env) } else { paths::expand(text, env) };
    expanded.map(OsString::from).map_err(|reason| ConfigError::Path { value: text.to_owned(), reason, place: place() })
}

fn next_truth(rest: &mut Peekable<impl Iterator<Item = OsString>>) -> Option<String> {
    let value = truth(rest.peek()?.to_str()?)?;
    rest.next();
    Some(value.to_string())
}

/// Takes an argument of another program and its values out; gives what is said of it.
fn take_out(
    name: &str,
    value: Option<OsString>,
    rest: &mut Peekable<impl Iterator<Item = OsString>>,
    options: &Options,
) -> Result<Idle, ConfigError> {
    let place = on_command_line(name);
    let Some(argument) = foreign::find(name) else {
        return Err(ConfigError::UnknownKey { key: name.to_owned(), nearest: nearest(name, options.names()), place });
    };
    let is_value = |arg: &OsString| arg.to_str().is_none_or(|a| !a.starts_with("--"));
    let value = match (value, argument.arity) {
        (Some(value), _) => value.to_string_lossy().into_owned(),
        (None, Arity::Flag) => next_truth(rest).unwrap_or_else(|| "true".to_owned()),
        (None, Arity::One) => rest.next_if(is_value).map(|v| v.to_string_lossy().into_owned()).unwrap_or_default(),
        (None, Arity::Many) => {
            let mut values = Vec::new();
            while let Some(value) = rest.next_if(is_value) {
                values.push(value.to_string_lossy().into_owned());
            }
            values.join(" ")
        }
    };
    argument.judge(name, &value.into(), place)
}

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Flag,
    /// True or false, which may be left out.
    Truth,
    Value,
    Path,
    /// Paths separated by commas.
    Paths,
}

/// Options and positional arguments of one subcommand.
struct Options {
    long: BTreeMap<String, Takes>,
    short: Vec<char>,
    /// `<NAME>` of positional arguments that are paths, as all are where one is.
    positional: Option<String>,
}

impl Options {
    fn of(command: &clap::Command) -> Self {
        let value_name = |arg: &clap::Arg| arg.get_value_names().and_then(|names| Some(names.first()?.to_string()));
        let takes = |arg: &clap::Arg| match arg.get_num_args() {
            Some(num) if num.max_values() == 0 => Takes::Flag,
            Some(num) if num.min_values() == 0 => Takes::Truth,
            _ if is_path_list(arg) => Takes::Paths,
            _ if is_path(arg) => Takes::Path,
            _ => Takes::Value,
        };
        Self {
            long: command.get_arguments().filter_map(|arg| Some((arg.get_long()?.to_owned(), takes(arg)))).collect(),
            short: command.get_arguments().filter_map(clap::Arg::get_short).collect(),
            positional: command.get_positionals().find(|arg| is_path(arg)).and_then(value_name).map(|name| format!("<{name}>")),
        }
    }

    fn takes(&self, name: &str) -> Option<Takes> {
        self.long.get(name).copied()
    }

    /// Whether `word`, behind an option that needs a value, is that value: anything but what is written as an option.
    fn is_value(&self, word: &OsStr) -> bool {
        let Some(word) = word.to_str() else { return true };
        !is_long(word) && !self.is_short(word)
    }

    /// Whether `word` is written as an option and is none of this command, so that it may be a value.
    fn looks_like_value(&self, word: &str) -> bool {
        let name = word.trim_start_matches('-').split('=').next().unwrap_or_default().replace('-', "_");
        is_long(word) && !self.long.contains_key(&name) && !(self.takes_run_keys() && foreign::find(&name).is_some())
    }

    /// `-q`, `-vv`: nothing but short options of this command.
    fn is_short(&self, word: &str) -> bool {
        word.strip_prefix('-').is_some_and(|letters| !letters.is_empty() && letters.chars().all(|c| self.short.contains(&c)))
    }

    fn takes_run_keys(&self) -> bool {
        self.long.contains_key("model_name_or_path") && self.long.contains_key("learning_rate")
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.long.keys().map(String::as_str)
    }
}

/// `--name`, `--name=value`, or the `--` behind which no options come.
fn is_long(word: &str) -> bool {
    let Some(rest) = word.strip_prefix("--") else { return false };
    let name = rest.split('=').next().unwrap_or(rest);
    rest.is_empty()
        || (name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)))
}
