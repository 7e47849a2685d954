//! What can go wrong between ranks.

use super::launcher::{ALONE, Claim};

/// A failed collective, or a job that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum DistError {
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    #[error("{collective} takes {expected}, found {found}")]
    Argument { collective: &'static str, expected: String, found: String },
    #[error("rank {rank} of {world_size} failed: {message}")]
    RankFailed { rank: usize, world_size: usize, message: String },
    #[error("ranks do not do the same: rank {rank} calls {found}, rank 0 calls {expected}")]
    Diverged { rank: usize, expected: String, found: String },
    #[error("rank {rank}: {problem}")]
    Slots { rank: usize, problem: String },
    #[error("started by {launcher} as {processes}, but this glmddp is built without MPI: each would train alone and overwrite the others")]
    WithoutMpi { launcher: &'static str, processes: String },
    #[error("started by {} as {}, but MPI found one: each would train alone and overwrite the others", claim.launcher, claim.processes())]
    Unconnected { claim: Claim },
    #[error("started by {} as {}, but this command runs in one: each would do the same in the same place", claim.launcher, claim.processes())]
    Repeated { claim: Claim },
    #[error("the environment variable {ALONE} is `{value}`, expected 1 or 0")]
    Alone { value: String },
    #[error("MPI is already initialised in this process")]
    MpiInitialised,
    #[error("rank {rank} sent {found} bytes as {what}, expected {expected}")]
    Message { rank: usize, what: &'static str, expected: String, found: usize },
    #[error("cannot start {threads} threads: {reason}")]
    ThreadPool { threads: usize, reason: String },
}

impl DistError {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::WithoutMpi { .. } => {
                Some("build it with `cargo build --release` (the feature `mpi` is on by default), or start it without a launcher".into())
            }
            Self::Alone { .. } => Some(format!("set {ALONE}=1 if no other process belongs to this one, else unset it")),
            _ => None,
        }
    }
}
