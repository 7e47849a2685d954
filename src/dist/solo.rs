//! One process alone.

use candle_core::Tensor;

use super::{Aborter, Collectives, DistError, Duplicate, ProcessGroup, host};

/// A group of one rank. No case of its own anywhere else: every caller uses the trait.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl ProcessGroup for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn local_rank(&self) -> usize {
        0
    }

    fn local_size(&self) -> usize {
        1
    }

    fn machine(&self) -> usize {
        0
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, DistError> {
        Ok(vec![mine.to_vec()])
    }

    fn barrier(&self) -> Result<(), DistError> {
        Ok(())
    }

    fn abort(&self, message: &str) -> ! {
        self.as_aborter().abort(message)
    }

    fn aborter(&self) -> Option<Aborter> {
        Some(self.as_aborter())
    }
}

impl Collectives for Solo {
    fn group(&self) -> &dyn ProcessGroup {
        self
    }

    fn all_gather(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        host::num_columns("all_gather", mine, None)?;
        Ok(mine.unsqueeze(0)?)
    }

    fn all_to_all_v(&self, parts: &Tensor, send: &[usize], receive: &[usize]) -> Result<Tensor, DistError> {
        host::check_parts(parts, send, receive, 1)?;
        Ok(parts.clone())
    }

    fn all_reduce(&self, mine: &Tensor) -> Result<Tensor, DistError> {
        host::num_columns("all_reduce", mine, None)?;
        Ok(mine.clone())
    }

    fn broadcast(&self, mine: &Tensor, root: usize) -> Result<Tensor, DistError> {
        host::num_columns("broadcast", mine, None)?;
        host::check_root(root, 1)?;
        Ok(mine.clone())
    }

    fn duplicate(&self) -> Duplicate {
        Box::new(|| Box::new(Self))
    }

    fn finish(self: Box<Self>) {}
}

impl Solo {
    fn as_aborter(self) -> Aborter {
        Aborter { rank: 0, world_size: 1, end: |code| std::process::exit(code) }
    }
}
