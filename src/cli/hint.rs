//! Hints of errors that several commands can have: an option that the command at hand lacks is said to be another command's.

use clap::CommandFactory;

use super::{Cli, argv};

/// `hint` for who typed `args` (the program's name first): behind each option in backticks that this command lacks stands the command that
/// has it, unless the hint has named that before.
pub fn of_this_command(hint: &str, args: &[String]) -> String {
    let mut command = Cli::command();
    command.build();
    let Some(this) = argv::subcommand(args.iter().skip(1).map(String::as_str), &command) else { return hint.to_owned() };
    let mut parts: Vec<String> = hint.split('`').map(str::to_owned).collect();
    // Every second part stands in backticks.
    for at in (1..parts.len()).step_by(2) {
        let Some(option) = option_of(&parts[at]).filter(|option| !has(this, option)) else { continue };
        let owner = [command.find_subcommand("train"), command.get_subcommands().find(|other| has(other, option))];
        let Some(owner) = owner.into_iter().flatten().find(|other| has(other, option)) else { continue };
        let owner = format!("glmddp {}", owner.get_name());
        let is_named = parts[..at].contains(&owner);
        if let (false, Some(behind)) = (is_named, parts.get_mut(at + 1)) {
            behind.insert_str(0, &format!(" of `{owner}`"));
        }
    }
    parts.join("`")
}

/// The name of the option with which a piece of code begins.
fn option_of(code: &str) -> Option<&str> {
    code.strip_prefix("--")?.split([' ', '=']).next()
}

fn has(command: &clap::Command, option: &str) -> bool {
    command.get_arguments().any(|arg| arg.get_long().is_some_and(|long| long.replace('_', "-") == option.replace('_', "-")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(command: &str, hint: &str) -> String {
        of_this_command(hint, &command.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn option_that_the_command_lacks_is_said_to_be_anothers() {
        let hint = "use an earlier checkpoint; `--resume_from_checkpoint latest` finds the newest whole one";
        assert_eq!(told("glmddp train", hint), hint);
        assert_eq!(told("glmddp checkpoint import a c.toml", hint), hint);
        let of_train = "use an earlier checkpoint; `--resume_from_checkpoint latest` of `glmddp train` finds the newest whole one";
        for command in ["glmddp checkpoint verify o", "glmddp checkpoint export o --output_dir x", "glmddp evaluate --validation_file f"] {
            assert_eq!(told(command, hint), of_train, "{command}");
        }
        assert_eq!(
            told("glmddp train", "give `--merge` or `--overwrite-output-dir`"),
            "give `--merge` of `glmddp export` or `--overwrite-output-dir`"
        );
        assert_eq!(told("glmddp train", "run `git lfs pull`; no `--such_option`"), "run `git lfs pull`; no `--such_option`");
        assert_eq!(told("glmddp", hint), hint);
        let named = "`glmddp tokenize` with `--row LINE` shows a row";
        assert_eq!(told("glmddp train", named), named);
    }
}
