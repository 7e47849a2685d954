//! The commands that the documents name, read from there, are commands that the program and the scripts take.

use std::ffi::OsString;
use std::path::Path;

use clap::CommandFactory;
use clap::Parser;
use clap::error::ErrorKind;
use glmddp::cli::{Cli, argv};

use crate::docs::PAGES;
use crate::rust_source::files_below;

/// What stands for something else in a command; a command with one of them is a pattern.
const PATTERNS: &[&str] = &["...", "|", "<", "[", "{", "$", "…"];

/// A command of a page: its words.
struct Named {
    place: String,
    words: Vec<String>,
}

/// Commands in code: indented by four spaces, in fences, or in `backticks`.
fn commands(page: &str, text: &str) -> Vec<Named> {
    let mut named = Vec::new();
    let mut is_fenced = false;
    for (number, line) in text.lines().enumerate() {
        is_fenced ^= line.trim_start().starts_with("```");
        let code: Vec<&str> =
            if is_fenced || line.starts_with("    ") { vec![line.trim()] } else { line.split('`').skip(1).step_by(2).collect() };
        let single = code.into_iter().flat_map(|code| code.split(" # ").next()).flat_map(|code| code.split([';', '&']));
        for command in single.map(str::trim).filter(|command| !PATTERNS.iter().any(|pattern| command.contains(pattern))) {
            let words = shlex::split(command).unwrap_or_default();
            named.push(Named { place: format!("{page}, line {}: {command}", number + 1), words });
        }
    }
    named
}

fn all_commands() -> Vec<Named> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let of = |page: &&str| commands(page, &std::fs::read_to_string(root.join(page)).unwrap());
    PAGES.iter().flat_map(of).collect()
}

/// The program's words, whatever starts it (`mpirun -n 4`, `launch/mpirun.sh`).
fn program_words(words: &[String]) -> Option<&[String]> {
    let at = words.iter().position(|word| word == "glmddp" || word.ends_with("/glmddp"))?;
    (words.len() > at + 1).then(|| &words[at..])
}

/// Why the program does not take these words. What a page leaves out is not looked for.
pub fn refusal(words: &[String]) -> Option<String> {
    let args: Vec<OsString> = words.iter().map(OsString::from).collect();
    let args = match argv::normalise(args, Cli::command(), &|_| Some("x".to_owned())) {
        Ok(argv) => argv.args,
        Err(error) => return Some(error.to_string()),
    };
    let error = Cli::try_parse_from(args).err()?;
    let is_left_out = matches!(
        error.kind(),
        ErrorKind::MissingRequiredArgument
            | ErrorKind::MissingSubcommand
            | ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    (!is_left_out).then(|| error.to_string())
}

#[test]
fn commands_of_the_documents_are_taken_by_the_program() {
    let commands = all_commands();
    let of_program: Vec<(&Named, &[String])> = commands.iter().filter_map(|named| Some((named, program_words(&named.words)?))).collect();
    assert!(of_program.len() > 20, "{} commands of the program in the documents", of_program.len());
    let refused: Vec<String> =
        of_program.iter().filter_map(|(named, words)| Some(format!("{}\n    {}", named.place, refusal(words)?.trim()))).collect();
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
fn commands_that_the_program_lacks_are_found() {
    let refused = |command: &str| refusal(&shlex::split(command).unwrap()).is_some();
    assert!(refused("glmddp trian --help") && refused("glmddp kernels check --repaet 3") && refused("glmddp kernels check --repeat many"));
    assert!(!refused("glmddp kernels check --repeat 3"));
}

/// The text of a script and of what it is made of: the files of the repository that it names.
fn text_of_script(root: &Path, script: &str) -> String {
    let own = std::fs::read_to_string(root.join(script)).unwrap_or_default();
    let mut text = own.clone();
    let files =
        [files_below(&root.join("scripts"), "sh"), files_below(&root.join("scripts"), "py"), files_below(&root.join("benches"), "py")];
    for file in files.concat() {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if own.contains(&name) {
            text += &std::fs::read_to_string(&file).unwrap();
        }
    }
    text
}

#[test]
fn options_of_scripts_in_the_documents_are_options_of_theirs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut unknown, mut num_scripts) = (Vec::new(), 0);
    for Named { place, words } in all_commands() {
        let Some(at) = words.iter().position(|word| word.starts_with("scripts/") && word.ends_with(".sh")) else { continue };
        num_scripts += 1;
        // It passes its arguments on to cargo.
        if words[at] == "scripts/lean_cuda.sh" {
            continue;
        }
        let text = text_of_script(root, &words[at]);
        let options = words[at..].iter().filter(|word| word.starts_with("--")).map(|word| word.split('=').next().unwrap());
        unknown.extend(options.filter(|option| !text.contains(*option)).map(|option| format!("{place}: no {option}")));
    }
    assert!(num_scripts > 15, "{num_scripts} scripts in the documents");
    assert!(unknown.is_empty(), "{}", unknown.join("\n"));
}
