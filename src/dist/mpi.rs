//! Ranks as MPI processes; tensors and bytes in host memory.
//!
//! MPI's counts are 32-bit: larger messages travel in pieces. Its errors are fatal (the library ends the job).

use std::mem::ManuallyDrop;
use std::time::Duration;

use candle_core::Tensor;
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::{Process, SimpleCommunicator};
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::{Aborter, Collectives, DistError, Duplicate, ProcessGroup, host, pieces};

/// Elements that one call of MPI moves at most, over all ranks.
const MAX_COUNT: usize = i32::MAX as usize;

/// How long a thread beside the computation sleeps before it looks again whether its message has come. A blocking call of MPI would spin
/// on a core that computes.
const POLL: Duration = Duration::from_micros(50);

pub(super) struct Mpi {
    /// All ranks. Never freed: that is a collective, and a rank that fails must be able to leave alone. Finalising MPI frees it.
    world: ManuallyDrop<SimpleCommunicator>,
    rank: usize,
    world_size: usize,
    local_rank: usize,
    local_size: usize,
    machine: usize,
    /// Finalises MPI when dropped, and that waits for all ranks: so only [`Collectives::finish`] drops it. None in a duplicate.
    universe: Option<ManuallyDrop<Universe>>,
    /// A duplicate: its thread sleeps while it waits.
    is_beside_computation: bool,
}

impl Mpi {
    /// Initialises MPI. Once a process.
    pub(super) fn initialise() -> Result<Self, DistError> {
        // Any thread may panic, and its hook calls MPI_Abort.
        let (universe, _) = mpi::initialize_with_threading(Threading::Multiple).ok_or(DistError::MpiInitialised)?;
        let world = universe.world();
        let (rank, world_size) = (world.rank() as usize, world.size() as usize);
        let neighbours = world.split_shared(world.rank());
        let (local_rank, local_size) = (neighbours.rank() as usize, neighbours.size() as usize);
        let mut machine = rank as u64;
        neighbours.process_at_rank(0).broadcast_into(&mut machine);
        drop(neighbours);
        let machine = machine as usize;
        let (world, universe) = (ManuallyDrop::new(world), Some(ManuallyDrop::new(universe)));
        Ok(Self { world, rank, world_size, local_rank, local_size, machine, universe, is_beside_computation: false })
    }

    fn root(&self, rank: usize) -> Process<'_> {
        self.world.process_at_rank(rank as i32)
    }

    /// Elements that each rank may give to a call that moves all ranks' at once.
    fn piece(&self) -> usize {
        (MAX_COUNT / self.world_size).max(1)
    }
}

impl ProcessGroup for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn local_rank(&self) -> usize {
        self.local_rank
    }

    fn local_size(&self) -> usize {
        self.local_size
    }

    fn machine(&self) -> usize {
        self.machine
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, DistError> {
        let mut lens = vec![0u64; self.world_size];
        self.world.all_gather_into(&(mine.len() as u64), &mut lens[..]);
        let lens: Vec<usize> = lens.into_iter().map(|len| len as usize).collect();
        Ok(pieces::all_gather_bytes(mine, &lens, self.piece(), |part, counts, starts, out| {
            self.world.all_gather_varcount_into(part, &mut PartitionMut::new(out, counts, starts));
        }))
    }

    fn barrier(&self) -> Result<(), DistError> {
        self.world.barrier();
        Ok(())
    }

    fn abort(&self, message: &str) -> ! {
        self.as_aborter().abort(message)
    }

    fn aborter(&self) -> Option<Aborter> {
        Some(self.as_aborter())
    }
}

impl Collectives for Mpi {
    fn group(&self) -> &dyn ProcessGroup {
        self
    }

    fn all_gather(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        let n = host::num_columns("all_gather", mine, None)?;
        let all = host::with_slice("all_gather", mine, |mine| {
            pieces::all_gather(mine, self.world_size, self.piece(), |part, out| self.world.all_gather_into(part, out))
        })?;
        host::tensor(all, (self.world_size, n), mine.device())
    }

    fn all_to_all_v(&self, parts: &Tensor, send: &[usize], receive: &[usize]) -> Result<Tensor, DistError> {
        host::check_parts(parts, send, receive, self.world_size)?;
        let total = receive.iter().sum::<usize>();
        if parts.elem_count().max(total) > MAX_COUNT {
            let (expected, found) = (format!("at most {MAX_COUNT} elements"), parts.elem_count().max(total).to_string());
            return Err(DistError::Argument { collective: "all_to_all_v", expected, found });
        }
        let counts = |lens: &[usize]| lens.iter().map(|&len| len as i32).collect::<Vec<_>>();
        let (send_starts, receive_starts) = (counts(&host::starts(send)), counts(&host::starts(receive)));
        let received = host::with_slice("all_to_all_v", parts, |parts| {
            let mut received = vec![0.0f32; total];
            let from = Partition::new(parts, counts(send), send_starts);
            let mut to = PartitionMut::new(&mut received[..], counts(receive), receive_starts);
            if self.is_beside_computation {
                mpi::request::scope(|scope| {
                    let mut request = self.world.immediate_all_to_all_varcount_into(scope, &from, &mut to);
                    while let Err(pending) = request.test() {
                        request = pending;
                        std::thread::sleep(POLL);
                    }
                });
            } else {
                self.world.all_to_all_varcount_into(&from, &mut to);
            }
            received
        })?;
        host::tensor(received, total, parts.device())
    }

    fn all_reduce(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        let n = host::num_columns("all_reduce", mine, None)?;
        let sum = host::with_slice("all_reduce", mine, |mine| {
            let mut sum = vec![0.0f32; n];
            for (part, sum) in mine.chunks(MAX_COUNT).zip(sum.chunks_mut(MAX_COUNT)) {
                self.world.all_reduce_into(part, sum, SystemOperation::sum());
            }
            sum
        })?;
        host::tensor(sum, n, mine.device())
    }

    fn broadcast(&self, mine: &Tensor, root: usize) -> Result<Tensor, DistError> {
        let n = host::num_columns("broadcast", mine, None)?;
        host::check_root(root, self.world_size)?;
        let mut data = host::with_slice("broadcast", mine, <[f32]>::to_vec)?;
        for part in data.chunks_mut(MAX_COUNT) {
            self.root(root).broadcast_into(part);
        }
        host::tensor(data, n, mine.device())
    }

    fn duplicate(&self) -> Duplicate {
        let &Self { rank, world_size, local_rank, local_size, machine, .. } = self;
        Box::new(move || {
            // A duplicate's own duplicates are of the same ranks too.
            let world = ManuallyDrop::new(SimpleCommunicator::world().duplicate());
            Box::new(Self { world, rank, world_size, local_rank, local_size, machine, universe: None, is_beside_computation: true })
        })
    }

    fn finish(self: Box<Self>) {
        drop(self.universe.map(ManuallyDrop::into_inner));
    }
}

impl Mpi {
    fn as_aborter(&self) -> Aborter {
        Aborter { rank: self.rank, world_size: self.world_size, end }
    }
}

/// Ends all processes of the job.
fn end(code: i32) -> ! {
    if mpi::environment::is_finalized() {
        std::process::exit(code);
    }
    SimpleCommunicator::world().abort(code)
}
