//! Options and commands that messages name are there.

use std::collections::BTreeSet;

use clap::CommandFactory;
use glmddp::cli::Cli;

use crate::cli_support::glmddp_in;
use crate::docs_commands::refusal;
use crate::rust_source::sources;

/// Options of other programs that messages name.
const OF_OTHERS: &[&str] = &["mpi", "bind-to", "release", "launcher", "check", "nproc-per-node"];

/// What stands in backticks in the strings of the sources.
fn in_backticks() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for source in sources("src") {
        for (i, line) in source.code_and_strings.lines().enumerate() {
            let parts = line.split('`').skip(1).step_by(2);
            found.extend(parts.map(|part| (format!("{}:{}", source.path, i + 1), part.to_owned())));
        }
    }
    found
}

fn options(command: &clap::Command, found: &mut BTreeSet<String>) {
    found.extend(command.get_arguments().filter_map(|arg| Some(arg.get_long()?.replace('-', "_"))));
    command.get_subcommands().for_each(|sub| options(sub, found));
}

#[test]
fn options_that_messages_name_are_options() {
    let mut cli = Cli::command();
    cli.build();
    let mut known = BTreeSet::new();
    options(&cli, &mut known);
    let mut num_named = 0;
    for (place, code) in in_backticks() {
        let Some(name) = code.strip_prefix("--").and_then(|rest| rest.split([' ', '=']).next()) else { continue };
        if name.is_empty() || name.contains('{') || OF_OTHERS.contains(&name) {
            continue;
        }
        assert!(known.contains(&name.replace('-', "_")), "{place}: `{code}` is no option of any command");
        num_named += 1;
    }
    assert!(num_named > 5, "{num_named}");
}

#[test]
fn commands_that_messages_name_are_taken_by_the_program() {
    let mut num_named = 0;
    for (place, code) in in_backticks() {
        let is_pattern = ["...", "<", "{", "[", "…"].iter().any(|mark| code.contains(mark));
        let Some(at) = code.find("glmddp ").filter(|_| !is_pattern) else { continue };
        let words = shlex::split(&code[at..]).unwrap_or_default();
        assert_eq!(refusal(&words), None, "{place}: `{code}`");
        num_named += 1;
    }
    assert!(num_named > 5, "{num_named}");
}

/// A damaged checkpoint, looked at by a command that cannot resume.
#[test]
fn hint_of_a_command_that_lacks_the_option_names_the_one_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("out/checkpoint-2")).unwrap();
    let ran = glmddp_in(dir.path(), &["checkpoint", "inspect", "out/checkpoint-2"]);
    assert_eq!(ran.code, 2);
    insta::assert_snapshot!(ran.stderr, @r"
    error: out/checkpoint-2 is not a complete checkpoint: it has no manifest.json

    hint: use an earlier checkpoint; `glmddp train` with `--resume_from_checkpoint latest` finds the newest whole one
    ");
}
