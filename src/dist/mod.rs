//! Ranks and their collectives. The only MPI (and later NCCL) in the house; knows no parameter.
//!
//! - [`ProcessGroup`]: the ranks of a job, what they tell each other, and how they end. [`Collectives`]: how they move tensors. [`Solo`],
//!   [`local`] (threads, for tests) and `Mpi` are both; [`connect()`] chooses.
//! - [`GradientSum`]: the sum of a step's gradients, whose bits do not depend on the world size: on each rank, or its shard of it; at the end,
//!   or part by part while the last slot's gradient is still being computed.
//! - [`Shards`], [`all_gather_shards`]: flat buffers, each rank with its own part of them.
//! - [`agree()`]: an error on some ranks becomes the same error on all. [`install_panic_hook`]: a panic on one ends all.
//! - [`Watched`]: a collective that lasts too long ends the job, naming the rank that does not come.
//! - [`plan_threads`]: how many threads a rank takes.

mod abort;
mod accumulate;
mod agree;
mod connect;
mod error;
mod host;
pub mod launcher;
pub mod local;
#[cfg(feature = "mpi")]
mod mpi;
mod overlap;
#[cfg(feature = "mpi")]
mod pieces;
mod reduce;
mod shards;
mod slots;
mod solo;
mod stall;
mod sum;
mod threads;
mod watch;
mod words;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

pub use abort::{Aborter, install_panic_hook};
pub use agree::{AgreedError, agree};
pub use connect::{Turn, connect, turn};
pub use error::DistError;
pub use shards::{Shards, Wire, all_gather_shards};
pub use slots::{Node, SlotScalars, SlotTree, gather_slots, gather_slots_and_notes};
pub use solo::Solo;
pub use sum::{GradientSum, Part, StepSum};
pub use threads::{Cores, Threads, install_thread_pool, plan_threads, threads_per_rank};
pub use watch::Watched;
pub use words::gather_words;

/// The ranks of a job: who they are, what they tell each other through host memory (losses, status, data), and how they end. Every rank calls
/// the same sequence of collectives.
pub trait ProcessGroup {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// Rank among the processes of this machine; chooses the device.
    fn local_rank(&self) -> usize;
    /// Number of processes on this machine; divides the cores.
    fn local_size(&self) -> usize;
    /// The same number on ranks of one machine, another on each machine.
    fn machine(&self) -> usize;

    /// Every rank's bytes, ordered by rank; lengths may differ.
    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, DistError>;
    fn barrier(&self) -> Result<(), DistError>;

    /// Calls `wait`, in which this rank waits for collectives of another thread of it. Every rank calls it, as if it were a collective: a rank
    /// that does not come is found as in one.
    fn wait(&self, _collective: &'static str, wait: &mut dyn FnMut()) {
        wait();
    }

    /// Tells whoever watches this rank which step it is at and what it does there.
    fn now_at(&self, _step: u64, _activity: &'static str) {}

    /// Ends the whole job at once, with `message` on stderr once, naming this rank.
    fn abort(&self, message: &str) -> !;
    /// What ends the whole job from anywhere in this process; none where ranks are threads and an unwinding one is caught.
    fn aborter(&self) -> Option<Aborter>;
}

/// What moves flat f32 tensors between the ranks of a group: MPI through host memory, NCCL between GPUs. Every rank calls the same sequence
/// with the same shapes. A result may share memory with this rank's own argument, never with another rank's.
pub trait Collectives {
    /// The ranks that take part.
    fn group(&self) -> &dyn ProcessGroup;

    /// `[n]` on each rank -> `[world_size, n]`, ordered by rank.
    fn all_gather(&self, mine: &Tensor) -> Result<Tensor, DistError>;
    /// `parts` `[n]` is the part for rank 0, then that for rank 1, and so on, `send[r]` elements for rank r; the result has `receive[s]` elements
    /// from each rank s, in the same order. What r sends to s is what s expects from r.
    fn all_to_all_v(&self, parts: &Tensor, send: &[usize], receive: &[usize]) -> Result<Tensor, DistError>;
    /// Sum over ranks of `[n]`, in the backend's own order (fast; bits depend on the world size).
    fn all_reduce(&self, mine: &Tensor) -> Result<Tensor, DistError>;
    /// Root's `[n]` on every rank. All ranks pass a tensor of the same shape.
    fn broadcast(&self, mine: &Tensor, root: usize) -> Result<Tensor, DistError>;
    /// What makes a second set of collectives of the same ranks, which do not meet these, for the thread that calls it. A collective: every rank
    /// asks for it and calls it, and this set rests meanwhile.
    fn duplicate(&self) -> Duplicate;

    /// Takes leave in good order; all ranks call it. A rank that ends without it has failed, and the launcher ends the others: so an
    /// error that only some ranks return can never leave the rest waiting.
    fn finish(self: Box<Self>);
}

/// Makes collectives of a group's ranks on the thread that calls it; see [`Collectives::duplicate`].
pub type Duplicate = Box<dyn FnOnce() -> Box<dyn Collectives> + Send>;

/// How gradients are summed over slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// One fixed tree over the slots: the same bits at any world size.
    SlotTree,
    /// Each rank sums its own slots, then one all-reduce in the backend's order.
    AllReduce,
}
