//! Puts the arguments into the one form that clap is told about.
//!
//! `--train-file` becomes `--train_file`; a flag's value is joined to it (`--prefix_projection true` -> `--prefix_projection=true`), so that a
//! bare flag never swallows the argument behind it; arguments of other programs are taken out, with a warning, or refused.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::iter::Peekable;

use crate::config::error::nearest;
use crate::config::foreign::{self, Arity};
use crate::config::{ConfigError, Place, Source};

/// Arguments ready for clap.
#[derive(Debug)]
pub struct Argv {
    pub args: Vec<OsString>,
    /// Lines about arguments that were taken out.
    pub warnings: Vec<String>,
}

/// Normalises `args` (the program's name first) for the subcommand of `command` that they name.
///
/// # Errors
/// When a subcommand that takes a run's keys is given one that is unknown or not supported.
pub fn normalise(args: Vec<OsString>, mut command: clap::Command) -> Result<Argv, ConfigError> {
    command.build();
    let mut names = args.iter().skip(1).filter_map(|a| a.to_str());
    let Some(mut subcommand) = names.find_map(|name| command.find_subcommand(name)) else {
        return Ok(Argv { args, warnings: Vec::new() });
    };
    if let Some(inner) = names.find_map(|name| subcommand.find_subcommand(name)) {
        subcommand = inner;
    }
    let options = Options::of(subcommand);
    let mut argv = Argv { args: Vec::with_capacity(args.len()), warnings: Vec::new() };
    let mut rest = args.into_iter().peekable();
    while let Some(arg) = rest.next() {
        let Some(option) = arg.to_str().and_then(|a| a.strip_prefix("--")) else {
            argv.args.push(arg);
            continue;
        };
        if option.is_empty() {
            argv.args.push(arg);
            argv.args.extend(rest);
            break;
        }
        let (name, value) = option.split_once('=').map_or((option, None), |(n, v)| (n, Some(v.to_owned())));
        let name = name.replace('-', "_");
        match options.takes_optional_value(&name) {
            Some(true) => {
                let value = value.or_else(|| next_truth(&mut rest)).unwrap_or_else(|| "true".to_owned());
                argv.args.push(format!("--{name}={}", truth(&value).unwrap_or(&value)).into());
            }
            Some(false) => argv.args.push(join(&name, value)),
            None if options.takes_run_keys() => argv.warnings.extend(take_out(&name, value, &mut rest, &options)?),
            None => argv.args.push(join(&name, value)),
        }
    }
    Ok(argv)
}

fn join(name: &str, value: Option<String>) -> OsString {
    value.map_or_else(|| format!("--{name}"), |v| format!("--{name}={v}")).into()
}

/// `text` as true or false, in any spelling that Python's parsers take.
fn truth(text: &str) -> Option<&'static str> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "1" => Some("true"),
        "false" | "no" | "0" => Some("false"),
        _ => None,
    }
}

fn next_truth(rest: &mut Peekable<impl Iterator<Item = OsString>>) -> Option<String> {
    let value = truth(rest.peek()?.to_str()?)?;
    rest.next();
    Some(value.to_owned())
}

/// Takes an argument of another program and its values out; gives the warning that says so.
fn take_out(
    name: &str,
    value: Option<String>,
    rest: &mut Peekable<impl Iterator<Item = OsString>>,
    options: &Options,
) -> Result<Option<String>, ConfigError> {
    let place = Place { source: Source::CommandLine, key: name.to_owned() };
    let Some(argument) = foreign::find(name) else {
        return Err(ConfigError::UnknownKey { key: name.to_owned(), nearest: nearest(name, options.names()), place });
    };
    let is_value = |arg: &OsString| arg.to_str().is_none_or(|a| !a.starts_with("--"));
    let value = match (value, argument.arity) {
        (Some(value), _) => value,
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
    if !argument.accepts(&value) {
        return Err(ConfigError::Unsupported { key: name.to_owned(), reason: argument.reason, place });
    }
    Ok(Some(format!("`--{name}` does nothing here: {}", argument.reason)))
}

/// Long options of one subcommand -> whether the value may be left out.
struct Options(BTreeMap<String, bool>);

impl Options {
    fn of(command: &clap::Command) -> Self {
        let optional = |a: &clap::Arg| a.get_num_args().is_some_and(|n| n.min_values() == 0 && n.max_values() == 1);
        Self(command.get_arguments().filter_map(|a| Some((a.get_long()?.to_owned(), optional(a)))).collect())
    }

    fn takes_optional_value(&self, name: &str) -> Option<bool> {
        self.0.get(name).copied()
    }

    fn takes_run_keys(&self) -> bool {
        self.0.contains_key("model_name_or_path") && self.0.contains_key("learning_rate")
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}
