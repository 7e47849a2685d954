//! What can go wrong between ranks.

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
    #[error("started by {launcher} as {claimed} processes, but MPI found one: each would train alone and overwrite the others")]
    Unconnected { launcher: &'static str, claimed: usize },
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
            Self::Unconnected { launcher: "srun", .. } => {
                Some("start it with `srun --mpi=pmix` (or `--mpi=pmi2`), or with mpirun inside the allocation".into())
            }
            Self::Unconnected { .. } => {
                Some("use the mpirun of the MPI library that glmddp is linked with; `ldd $(command -v glmddp)` shows it".into())
            }
            _ => None,
        }
    }
}
