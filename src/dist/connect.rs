//! Finds out whether a launcher started this process, and joins its group.

use super::{Collectives, DistError, Solo};

/// Reads one environment variable; the command line hands it in.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Who started this process as part of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Launched {
    by: &'static str,
    /// Number of processes, where the launcher's variables tell.
    num_processes: Option<usize>,
    /// The launcher speaks to MPI libraries (PMI, PMIx).
    speaks_mpi: bool,
}

fn detect(env: Environment) -> Option<Launched> {
    let number = |name: &str| env(name)?.trim().parse::<usize>().ok();
    let steps_tasks = number("SLURM_STEP_NUM_TASKS");
    if let Some(n) = number("OMPI_COMM_WORLD_SIZE").or_else(|| number("PMI_SIZE")) {
        return Some(Launched { by: "mpirun", num_processes: Some(n), speaks_mpi: true });
    }
    if env("PMIX_RANK").or_else(|| env("PMI_RANK")).is_some() {
        let by = if steps_tasks.is_some() { "srun" } else { "mpirun" };
        return Some(Launched { by, num_processes: steps_tasks, speaks_mpi: true });
    }
    // An interactive or batch step has one task and is no job of ours.
    steps_tasks.filter(|&n| n > 1).map(|n| Launched { by: "srun", num_processes: Some(n), speaks_mpi: false })
}

/// Joins the group of ranks that a launcher started (mpirun, srun), or is alone without one.
///
/// MPI is initialised only under a launcher, so that glmddp runs where no MPI daemon can be reached.
///
/// # Errors
/// When several processes were started and they cannot find each other: each would train alone and overwrite the others.
pub fn connect(env: Environment) -> Result<Box<dyn Collectives>, DistError> {
    match detect(env) {
        None => Ok(Box::new(Solo)),
        Some(Launched { by, num_processes, speaks_mpi: false }) if cfg!(feature = "mpi") => {
            Err(DistError::Unconnected { launcher: by, claimed: num_processes.unwrap_or(0) })
        }
        Some(launched) => join(launched),
    }
}

#[cfg(feature = "mpi")]
fn join(launched: Launched) -> Result<Box<dyn Collectives>, DistError> {
    let group = super::mpi::Mpi::initialise()?;
    match launched.num_processes {
        Some(claimed) if claimed > 1 && group.group().world_size() == 1 => Err(DistError::Unconnected { launcher: launched.by, claimed }),
        _ => Ok(Box::new(group)),
    }
}

#[cfg(not(feature = "mpi"))]
fn join(launched: Launched) -> Result<Box<dyn Collectives>, DistError> {
    let processes = match launched.num_processes {
        Some(1) => return Ok(Box::new(Solo)),
        Some(n) => format!("{n} processes"),
        None => "one of several processes".into(),
    };
    Err(DistError::WithoutMpi { launcher: launched.by, processes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
        move |name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn launchers_are_told_apart_by_their_variables() {
        let seen = |variables| detect(&with(variables)).map(|l| (l.by, l.num_processes, l.speaks_mpi));
        assert_eq!(seen(&[]), None);
        assert_eq!(seen(&[("OMPI_COMM_WORLD_SIZE", "4"), ("SLURM_STEP_NUM_TASKS", "2")]), Some(("mpirun", Some(4), true)));
        assert_eq!(seen(&[("PMI_SIZE", "3"), ("PMI_RANK", "0")]), Some(("mpirun", Some(3), true)));
        assert_eq!(seen(&[("PMIX_RANK", "1")]), Some(("mpirun", None, true)));
        assert_eq!(seen(&[("PMIX_RANK", "1"), ("SLURM_STEP_NUM_TASKS", "8")]), Some(("srun", Some(8), true)));
        assert_eq!(seen(&[("SLURM_STEP_NUM_TASKS", "8")]), Some(("srun", Some(8), false)));
        assert_eq!(seen(&[("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), None);
    }

    #[test]
    fn connect_without_a_launcher_is_alone() {
        assert_eq!(connect(&with(&[])).unwrap().group().world_size(), 1);
    }

    #[test]
    fn connect_under_srun_without_pmi_is_refused_with_a_way_out() {
        let Err(error) = connect(&with(&[("SLURM_STEP_NUM_TASKS", "4")])) else { panic!("must be refused") };
        assert!(error.to_string().starts_with("started by srun as 4 processes, but"), "{error}");
        assert!(error.hint().is_some());
    }

    #[cfg(not(feature = "mpi"))]
    #[test]
    fn connect_without_mpi_under_mpirun_is_refused() {
        let Err(error) = connect(&with(&[("OMPI_COMM_WORLD_SIZE", "4")])) else { panic!("must be refused") };
        assert!(error.to_string().starts_with("started by mpirun as 4 processes, but this glmddp is built without MPI"), "{error}");
        assert_eq!(connect(&with(&[("OMPI_COMM_WORLD_SIZE", "1")])).unwrap().group().world_size(), 1);
        assert!(connect(&with(&[("PMIX_RANK", "0")])).is_err());
    }
}
