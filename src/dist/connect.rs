//! Joins the group of ranks that a launcher started.

use super::launcher::{self, Claim, Environment, Spread};
use super::{Collectives, DistError, Solo};

/// Joins the group of ranks that a launcher started (mpirun, srun), or is alone without one.
///
/// MPI is initialised only under a launcher, so that glmddp runs where no MPI daemon can be reached.
///
/// # Errors
/// When several processes were started and they cannot find each other: each would train alone and overwrite the others.
pub fn connect(env: Environment) -> Result<Box<dyn Collectives>, DistError> {
    let unconnected = if launcher::is_alone(env)? { None } else { launcher::speaking_no_mpi(env) };
    let Some(claim) = launcher::speaking_mpi(env) else {
        return match unconnected {
            None => Ok(Box::new(Solo)),
            Some(claim) => Err(lone(claim)),
        };
    };
    // srun starts the daemons of an mpirun inside its allocation, one a machine: its number of tasks is not that of ranks.
    let other = unconnected.filter(|other| other.launcher != "srun" && claim.num_processes != other.num_processes);
    // One launcher inside another: several jobs that do not know of each other. A number of machines may well differ from that of ranks.
    let is_nested = |other: &Claim| claim.num_processes.is_some_and(|n| n == 1 || other.spread == Spread::Processes);
    match other {
        Some(other) if is_nested(&other) => Err(lone(other)),
        other => join(claim, other),
    }
}

/// Who does what one process does alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// This process: it is the only one, or on a machine of its own.
    Own,
    /// This process, for all that the launcher started.
    First { claim: Claim },
    /// Another process.
    Another,
}

/// Whether this process does the work of a command that meets no other rank. Under mpirun and its like the first one does.
///
/// # Errors
/// When several processes were started, and by a launcher that no MPI library knows: a run would be refused there too ([`connect`]).
pub fn turn(env: Environment) -> Result<Turn, DistError> {
    let is_alone = launcher::is_alone(env)?;
    let claim = launcher::speaking_mpi(env);
    if let Some(claim) = &claim {
        match (claim.rank, claim.num_processes) {
            (Some(rank), _) if rank > 0 => return Ok(Turn::Another),
            (_, Some(n)) if n > 1 => return Ok(Turn::First { claim: claim.clone() }),
            _ => {}
        }
    }
    let other = launcher::speaking_no_mpi(env).filter(|other| !is_alone && other.spread == Spread::Processes);
    // As in `connect`, of the daemons of an mpirun.
    match other.filter(|other| claim.is_none() || other.launcher != "srun") {
        Some(claim) => Err(DistError::Repeated { claim }),
        None => Ok(Turn::Own),
    }
}

/// Each of the processes would train alone.
fn lone(claim: Claim) -> DistError {
    if cfg!(feature = "mpi") {
        DistError::Unconnected { claim }
    } else {
        DistError::WithoutMpi { launcher: claim.launcher, processes: claim.processes() }
    }
}

/// `other` is a launcher besides, which says that there are more processes than MPI may find.
#[cfg(feature = "mpi")]
fn join(claim: Claim, other: Option<Claim>) -> Result<Box<dyn Collectives>, DistError> {
    let group = super::mpi::Mpi::initialise()?;
    let is_one_of_several = claim.num_processes.is_some_and(|n| n > 1) || claim.rank.is_some_and(|rank| rank > 0);
    match other {
        _ if group.group().world_size() > 1 => Ok(Box::new(group)),
        Some(other) => Err(lone(other)),
        None if is_one_of_several => Err(lone(claim)),
        None => Ok(Box::new(group)),
    }
}

#[cfg(not(feature = "mpi"))]
fn join(claim: Claim, other: Option<Claim>) -> Result<Box<dyn Collectives>, DistError> {
    match (claim.num_processes, other) {
        (Some(1), None) => Ok(Box::new(Solo)),
        (_, other) => Err(lone(other.unwrap_or(claim))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::launcher::ALONE;
    use super::super::launcher::tests::with;
    use super::*;

    fn refused(variables: &'static [(&'static str, &'static str)]) -> DistError {
        let Err(error) = connect(&with(variables)) else { panic!("must be refused: {variables:?}") };
        error
    }

    fn is_lone(variables: &'static [(&'static str, &'static str)]) -> bool {
        connect(&with(variables)).unwrap().group().world_size() == 1
    }

    #[test]
    fn connect_without_a_launcher_is_alone() {
        assert!(is_lone(&[]) && is_lone(&[("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")]) && is_lone(&[("WORLD_SIZE", "many")]));
    }

    #[test]
    fn connect_under_launchers_without_mpi_is_refused_unless_the_user_says_alone() {
        for variables in [
            &[("SLURM_STEP_NUM_TASKS", "4")][..],
            &[("WORLD_SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0")],
            &[("WORLD_SIZE", "4"), ("RANK", "3"), ("MASTER_ADDR", "job-0")],
            &[("HOROVOD_SIZE", "4"), ("HOROVOD_RANK", "2")],
        ] {
            let error = refused(variables).to_string();
            assert!(error.starts_with("started by ") && error.contains(" as 4 processes"), "{error}");
            for (value, is_on) in [("1", true), ("yes", true), ("0", false), ("", false)] {
                let env = |name: &str| if name == ALONE { Some(value.to_owned()) } else { with(variables)(name) };
                assert_eq!(connect(&env).is_ok(), is_on, "{variables:?} {value:?}");
            }
        }
        assert_eq!(refused(&[(ALONE, "perhaps")]).to_string(), "the environment variable GLMDDP_ALONE is `perhaps`, expected 1 or 0");
    }

    #[test]
    fn connect_of_one_mpi_process_that_another_launcher_started_several_times_is_refused() {
        for variables in [
            &[("OMPI_COMM_WORLD_SIZE", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")][..],
            &[("OMPI_COMM_WORLD_SIZE", "4"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")],
            &[("SLURM_STEP_NUM_TASKS", "1"), ("PMIX_RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")],
        ] {
            let error = refused(variables);
            assert!(error.to_string().starts_with("started by torchrun as 2 processes"), "{error}");
        }
    }

    #[test]
    fn turn_of_one_command_is_the_first_processs_under_mpi_and_refused_under_others() {
        let of = |variables| turn(&with(variables));
        let is_first = |variables| matches!(of(variables), Ok(Turn::First { .. }));
        assert!(is_first(&[("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "0")]));
        assert!(is_first(&[("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2"), (ALONE, "1")]));
        assert!(is_first(&[("SLURM_STEP_NUM_TASKS", "2"), ("PMI_RANK", "0")]));
        for variables in
            [&[("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "3")][..], &[("SLURM_STEP_NUM_TASKS", "2"), ("PMIX_RANK", "1")]]
        {
            assert_eq!(of(variables).unwrap(), Turn::Another, "{variables:?}");
        }
        for variables in [
            &[][..],
            &[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0"), ("SLURM_STEP_NUM_TASKS", "4")],
            &[("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "job-0")],
            &[("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), (ALONE, "1")],
        ] {
            assert_eq!(of(variables).unwrap(), Turn::Own, "{variables:?}");
        }
        for variables in [&[("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")][..], &[("SLURM_STEP_NUM_TASKS", "4")], &[("HOROVOD_SIZE", "4")]] {
            assert!(matches!(of(variables), Err(DistError::Repeated { .. })), "{variables:?}");
        }
        assert!(of(&[(ALONE, "perhaps")]).is_err());
    }

    #[cfg(not(feature = "mpi"))]
    #[test]
    fn connect_without_mpi_under_mpirun_is_refused() {
        let error = refused(&[("OMPI_COMM_WORLD_SIZE", "4")]);
        assert!(
            error
                .to_string()
                .starts_with("started by mpirun as 4 processes (OMPI_COMM_WORLD_SIZE is 4), but this glmddp is built without MPI"),
            "{error}"
        );
        assert!(is_lone(&[("OMPI_COMM_WORLD_SIZE", "1")]));
        assert!(connect(&with(&[("PMIX_RANK", "0")])).is_err());
    }
}
