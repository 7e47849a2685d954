//! The command that goes on with a run, from the one that started it.

use std::path::Path;

use super::environment;
use crate::dist::launcher::{ALONE, Claim, Spread};
use crate::shell;

/// Set by the scripts in `launch/`: the command that started all ranks, quoted for a shell.
const COMMAND: &str = "GLMDDP_COMMAND";
const LAUNCHERS: [&str; 5] = ["mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra"];
/// Options that a command that goes on must not have, or has anew.
const REPLACED: [&str; 2] = ["resume_from_checkpoint", "overwrite_output_dir"];

/// Where a command goes on by itself, as `compare` does, and where it must be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoesOn {
    ByItself,
    FromLatest,
}

/// The command of this job, quoted for a shell, so that it goes on.
pub fn command(goes_on: GoesOn) -> String {
    quoted(with_latest(words_of_job(), goes_on))
}

/// How to start the job of `claim` so that its processes find each other, or this one alone: with the command of this process.
pub fn connected(claim: &Claim) -> String {
    let own = own_words();
    let n = claim.num_processes.unwrap_or(2);
    const SRUN: &str = "start it with `srun --mpi=pmix` (or `--mpi=pmi2`), or with mpirun inside the allocation";
    let start = match (claim.launcher, claim.spread) {
        ("srun", _) if claim.speaks_mpi => return SRUN.to_owned(),
        ("srun", _) => SRUN.to_owned(),
        _ if claim.speaks_mpi => {
            return "use the mpirun of the MPI library that glmddp is linked with; `ldd $(command -v glmddp)` shows it".to_owned();
        }
        (_, Spread::Processes) => format!("start it with `mpirun -n {n} {own}`"),
        (_, Spread::Machines) => {
            format!("start it once for all machines with `mpirun -n {n} --hostfile hosts {own}` (launch/README.md, \"Several machines\")")
        }
    };
    format!("{start}; if no other process belongs to this one: `{ALONE}=1 {own}`")
}

/// How to start a command that one process does: without the launcher.
pub fn alone() -> String {
    let own = own_words();
    format!("start it without the launcher: `{own}`; if no other process belongs to this one: `{ALONE}=1 {own}`")
}

/// The command of this process, without what launchers of Python put before the arguments of a program.
fn own_words() -> String {
    let is_theirs = |word: &String| word.starts_with("--local_rank=") || word.starts_with("--local-rank=");
    quoted(environment::arguments().into_iter().filter(|word| !is_theirs(word)).collect())
}

/// The words of the command that started all ranks.
fn words_of_job() -> Vec<String> {
    if let Some(words) = environment::variable(COMMAND).and_then(|text| shlex::split(&text)) {
        return words;
    }
    let own = environment::arguments();
    let Some(size) = environment::launched_size() else { return own };
    let of_parent = environment::parents_arguments();
    let is_launcher = |words: &Vec<String>| {
        let name = words.first().and_then(|program| Path::new(program).file_name()?.to_str());
        name.is_some_and(|name| LAUNCHERS.contains(&name)) && words.ends_with(&own)
    };
    // On another machine than the launcher's, its options are not known.
    of_parent.filter(is_launcher).unwrap_or_else(|| {
        let launcher = if environment::is_slurm_step() { "srun" } else { "mpirun" };
        [launcher, "-n", &size.to_string()].into_iter().map(str::to_owned).chain(own.clone()).collect()
    })
}

fn with_latest(words: Vec<String>, goes_on: GoesOn) -> Vec<String> {
    if goes_on == GoesOn::ByItself {
        return words;
    }
    let name_of = |word: &str| Some(word.strip_prefix("--")?.split('=').next()?.replace('-', "_"));
    let mut kept = Vec::new();
    let mut words = words.into_iter().peekable();
    while let Some(word) = words.next() {
        match name_of(&word) {
            Some(name) if REPLACED.contains(&name.as_str()) => {
                if !word.contains('=') {
                    // Its value, where it stands apart.
                    words.next_if(|next| !next.starts_with("--"));
                }
            }
            _ => kept.push(word),
        }
    }
    kept.extend(["--resume_from_checkpoint", "latest"].map(str::to_owned));
    kept
}

fn quoted(words: Vec<String>) -> String {
    words.iter().map(|word| shell::quoted(word)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(command: &str) -> String {
        quoted(with_latest(shlex::split(command).unwrap(), GoesOn::FromLatest))
    }

    #[test]
    fn command_that_goes_on_has_the_arguments_of_the_run_and_resumes_once() {
        let commands = [
            "mpirun -n 2 glmddp train configs/demo.toml",
            "launch/mpirun.sh -n 4 --hostfile hosts glmddp train --config 'my configs/demo.toml' --output_dir \"it's here\"",
            "glmddp train --resume_from_checkpoint out/checkpoint-4 --max_steps 9 --overwrite_output_dir --seed=3",
            "glmddp train --resume-from-checkpoint=latest --overwrite_output_dir=true --lora_target 'a|b$' c.toml",
        ];
        insta::assert_snapshot!("commands_that_go_on", commands.map(from).join("\n"));
        assert_eq!(from(&from(commands[2])), from(commands[2]), "stopped again, the command stays the same");
        assert_eq!(with_latest(vec!["glmddp".to_owned()], GoesOn::ByItself), ["glmddp"]);
    }
}
