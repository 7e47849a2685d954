//! Values on the command line that look like options, and numbers out of an option's range.

use std::path::Path;

use clap::{CommandFactory, Parser};
use glmddp::cli::{Cli, argv};

use crate::cli_support::glmddp_in;

/// The arguments as clap gets them.
fn normalised(args: &[&str]) -> Vec<String> {
    let args = args.iter().map(Into::into).collect();
    argv::normalise(args, Cli::command(), &|_| None).unwrap().args.into_iter().map(|arg| arg.into_string().unwrap()).collect()
}

#[test]
fn values_that_begin_with_a_dash_are_values() {
    for text in ["-5", "-5+3", "-x", "- a", "--- a", "-- was?", "--max_new_tokens is what?", "--5", "-", "-n 4"] {
        let args = ["glmddp", "generate", "--model_name_or_path", "m", "--prompt", text];
        assert_eq!(normalised(&args)[3], format!("--prompt={text}"));
        let glmddp::cli::Command::Generate(parsed) = Cli::try_parse_from(normalised(&args)).unwrap().command else { panic!("{text}") };
        assert_eq!(parsed.prompt.as_deref(), Some(text));
    }
    for text in ["--x", "--json", "-q", "--", "--help", "--prompt=a", ""] {
        let args = ["glmddp", "generate", "--model_name_or_path=m", &format!("--prompt={text}")];
        let glmddp::cli::Command::Generate(parsed) = Cli::try_parse_from(normalised(&args)).unwrap().command else { panic!("{text}") };
        assert_eq!(parsed.prompt.as_deref(), Some(text), "with `=` everything is a value");
    }
}

/// Each option of each command that takes a value gets the next word, whatever it begins with, and never an option of the command.
#[test]
fn every_option_of_every_command_takes_the_next_word() {
    let mut cli = Cli::command();
    cli.build();
    let mut num_options = 0;
    let mut commands: Vec<(Vec<&str>, &clap::Command)> = vec![(vec!["glmddp"], &cli)];
    while let Some((words, command)) = commands.pop() {
        commands.extend(
            command.get_subcommands().filter(|sub| sub.get_name() != "help").map(|sub| ([&words[..], &[sub.get_name()]].concat(), sub)),
        );
        if words.len() == 1 {
            continue;
        }
        for arg in command.get_arguments().filter(|arg| arg.get_num_args().is_some_and(|num| num.min_values() == 1)) {
            let Some(long) = arg.get_long() else { continue };
            let option = format!("--{}", long.replace('_', "-"));
            assert_eq!(normalised(&[&words[..], &[&option, "-1"]].concat()).last(), Some(&format!("--{long}=-1")), "{words:?}");
            let help = normalised(&[&words[..], &[&option, "--help"]].concat());
            assert_eq!(help[words.len()..], [format!("--{long}"), "--help".to_owned()], "{words:?}");
            num_options += 1;
        }
    }
    assert!(num_options > 150, "{num_options}");
}

#[test]
fn numbers_out_of_range_say_what_was_expected() {
    let mut texts = Vec::new();
    for args in [
        &["plan", "--seed", "-1"][..],
        &["plan", "--max-source-length", "-5"],
        &["plan", "--warmup_ratio", "a half"],
        &["plan", "--seed", "99999999999999999999"],
        &["plan", "--max_steps", "1.5"],
        &["evaluate", "--validation_file=d", "--model_name_or_path=m", "--threads", "-2"],
        &["generate", "--prompt=a", "--model_name_or_path=m", "--max_new_tokens", "0"],
        &["bench", "step", "--layers", "-1"],
        &["bench", "scaling", "--ranks", "0"],
        &["kernels", "check", "--repeat", "-3"],
        &["kernels", "bench", "--gpu", "-1"],
        &["checkpoint", "prune", "out", "--save_total_limit", "-1"],
        &["demo-data", "--output_dir=d", "--rows", "-4"],
        &["compare", "--drift_rows", "-1"],
        &["tokenize", "--row", "-1"],
    ] {
        let ran = glmddp_in(Path::new("/"), args);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args:?}");
        assert!(!ran.stderr.contains("unexpected argument"), "{args:?}: {}", ran.stderr);
        texts.push(ran.stderr);
    }
    insta::assert_snapshot!("numbers_out_of_range", texts.join("\n"));
}

#[test]
fn option_without_its_value_is_refused_before_the_next_is_swallowed() {
    let mut texts = Vec::new();
    for args in [
        &["generate", "--model_name_or_path=m", "--prompt", "--x"][..],
        &["generate", "--model_name_or_path=m", "--prompt", "--json"],
        &["plan", "--output_dir", "--max_steps", "4"],
        &["plan", "--output_dir", "--fp16", "false"],
        &["plan", "--output_dir", "--max_stepz", "4"],
        &["plan", "--seed"],
    ] {
        let ran = glmddp_in(Path::new("/"), args);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args:?}");
        texts.push(ran.stderr);
    }
    insta::assert_snapshot!("options_without_a_value", texts.join("\n"));
}
