//! What a launcher tells a process before MPI is up, and how it was started.

use crate::dist::launcher;

/// One environment variable, where it is set and valid text.
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// This process's rank among those that a launcher of MPI processes started.
pub fn launched_rank() -> Option<usize> {
    launcher::speaking_mpi(&variable)?.rank
}

/// Whether this is the only process, or the first of those.
pub fn is_first_rank() -> bool {
    launched_rank().is_none_or(|rank| rank == 0)
}

/// Number of processes that a launcher of MPI processes started.
pub fn launched_size() -> Option<usize> {
    launcher::speaking_mpi(&variable)?.num_processes
}

/// When Slurm ends the job, in seconds since 1970; set since Slurm 23.02.
pub const SLURM_JOB_END_TIME: &str = "SLURM_JOB_END_TIME";

/// Whether srun started this process.
pub fn is_slurm_step() -> bool {
    variable("SLURM_STEP_ID").is_some()
}

/// The command that started this process; what is not UTF-8 in it is replaced.
pub fn arguments() -> Vec<String> {
    std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect()
}

/// The command that started the parent of this process; none where the system does not show it.
pub fn parents_arguments() -> Option<Vec<String>> {
    let parent = rustix::process::getppid()?;
    let words = std::fs::read(format!("/proc/{}/cmdline", parent.as_raw_nonzero())).ok()?;
    let words = words.strip_suffix(b"\0")?;
    Some(words.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
}
