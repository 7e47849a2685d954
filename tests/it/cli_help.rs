//! Help, completions, man page, doctor.

use std::path::Path;

use clap::CommandFactory;
use glmddp::cli::Cli;

use crate::cli_support::glmddp_in;

fn ok(args: &[&str]) -> String {
    let ran = glmddp_in(Path::new("."), args);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    ran.stdout
}

#[test]
fn command_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn help_lists_subcommands() {
    insta::assert_snapshot!("help", Cli::command().term_width(100).render_long_help());
}

#[test]
fn help_of_plan_lists_every_key_by_section() {
    let mut command = Cli::command().term_width(100);
    command.build();
    let plan = command.find_subcommand_mut("plan").unwrap();
    insta::assert_snapshot!("help_plan", plan.render_long_help());
}

#[test]
fn help_of_checkpoint_lists_its_commands_and_their_options() {
    let mut command = Cli::command().term_width(100);
    command.build();
    let checkpoint = command.find_subcommand_mut("checkpoint").unwrap();
    let mut text = checkpoint.render_long_help().to_string();
    for name in ["verify", "inspect", "diff", "export", "prune"] {
        text += &format!("\n$ glmddp checkpoint {name} --help\n{}", checkpoint.find_subcommand_mut(name).unwrap().render_long_help());
    }
    insta::assert_snapshot!("help_checkpoint", text);
}

#[test]
fn completions_of_every_shell_know_the_keys() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(ok(&["completions", shell]).contains("gradient_accumulation_steps"), "{shell}");
    }
}

#[test]
fn man_pages_of_all_subcommands_are_written() {
    assert!(ok(&["man"]).contains(".TH glmddp 1"));
    let dir = tempfile::tempdir().unwrap();
    ok(&["man", "--output-dir", dir.path().to_str().unwrap()]);
    assert!(std::fs::read_to_string(dir.path().join("glmddp-plan.1")).unwrap().contains("pre_seq_len"));
}

#[test]
fn doctor_as_text_and_json_looks_at_the_same_things() {
    let json: Vec<serde_json::Value> = serde_json::from_str(&ok(&["doctor", "--json"])).unwrap();
    let text = ok(&["doctor"]);
    assert!(json.len() >= 10);
    for finding in json {
        assert!(text.contains(finding["what"].as_str().unwrap()));
        assert_eq!(finding["status"] == "missing", finding["found"] == "not found");
        assert_eq!(finding["status"] == "good", finding["remedy"].is_null());
    }
}

#[test]
fn no_subcommand_is_the_users_fault() {
    assert_eq!(glmddp_in(Path::new("."), &[]).code, 2);
    assert_eq!(glmddp_in(Path::new("."), &["trian"]).code, 2);
}
