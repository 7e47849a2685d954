//! Errors that some ranks meet become one error that all return.

use std::fmt;

use super::{DistError, ProcessGroup};

/// The same on every rank.
#[derive(Debug)]
pub enum AgreedError {
    /// At least one rank failed in a phase in which all took part; this is the lowest one's error.
    Rank {
        rank: usize,
        world_size: usize,
        /// Number of ranks that failed.
        num_failed: usize,
        message: String,
    },
    /// The ranks could not be asked.
    Dist(DistError),
}

impl fmt::Display for AgreedError {
    /// The message alone where all ranks failed (then it is no matter of ranks), else with the rank.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rank { world_size, num_failed, message, .. } if num_failed == world_size => f.write_str(message),
            Self::Rank { rank, world_size, message, .. } => write!(f, "rank {rank} of {world_size}: {message}"),
            Self::Dist(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for AgreedError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Rank { .. } => None,
            Self::Dist(error) => error.source(),
        }
    }
}

impl From<DistError> for AgreedError {
    fn from(error: DistError) -> Self {
        Self::Dist(error)
    }
}

/// Gives back `mine` if no rank has an error, else the error of the lowest rank that has one, on all ranks.
///
/// Collective: every rank calls it, with its own outcome of the phase before.
pub fn agree<T>(group: &dyn ProcessGroup, mine: Result<T, String>) -> Result<T, AgreedError> {
    let status = match &mine {
        Ok(_) => Vec::new(),
        Err(message) => [b"!", message.as_bytes()].concat(),
    };
    let all = group.all_gather_bytes(&status)?;
    let num_failed = all.iter().filter(|s| !s.is_empty()).count();
    match (all.iter().position(|s| !s.is_empty()), mine) {
        (None, Ok(value)) => Ok(value),
        (Some(rank), _) => {
            let message = String::from_utf8_lossy(&all[rank][1..]).into_owned();
            Err(AgreedError::Rank { rank, world_size: group.world_size(), num_failed, message })
        }
        (None, Err(message)) => Err(AgreedError::Rank { rank: group.rank(), world_size: group.world_size(), num_failed: 1, message }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Solo, local};
    use super::*;

    #[test]
    fn agree_with_errors_on_two_ranks_gives_all_the_lowest() {
        let all = local::run(4, |group| {
            let mine = if group.rank() >= 2 { Err(format!("bad row on {}", group.rank())) } else { Ok(7) };
            Ok::<_, DistError>(agree(group, mine).map_err(|e| e.to_string()))
        });
        for outcome in all {
            assert_eq!(outcome.unwrap(), Err("rank 2 of 4: bad row on 2".to_owned()));
        }
    }

    #[test]
    fn agree_with_the_same_error_everywhere_names_no_rank() {
        let all = local::run(3, |group| Ok::<_, DistError>(agree::<()>(group, Err("no such file".into())).map_err(|e| e.to_string())));
        assert!(all.into_iter().all(|outcome| outcome.unwrap() == Err("no such file".to_owned())));
        assert_eq!(agree::<()>(&Solo, Err(String::new())).unwrap_err().to_string(), "");
    }

    #[test]
    fn agree_without_error_gives_each_rank_its_own_value() {
        let all = local::run(3, |group| agree(group, Ok(group.rank())).map_err(|e| DistError::Slots { rank: 0, problem: e.to_string() }));
        assert_eq!(all.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
