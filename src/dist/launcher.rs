//! Who started this process as part of a job, by the environment variables that launchers set.

use super::DistError;

/// Reads one environment variable; the command line passes it in.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Set to 1, a process counts as alone, whatever a launcher has set that MPI does not connect.
pub const ALONE: &str = "GLMDDP_ALONE";
/// Tasks of a Slurm step. An interactive or batch step has one, and is no job of ours.
const SLURM_TASKS: &str = "SLURM_STEP_NUM_TASKS";

/// What a launcher's variables count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Processes that the launcher started, as mpirun does.
    Processes,
    /// Machines, containers or pods, with one process each; or the variables stand there for another reason.
    Machines,
}

/// One launcher, by what it sets.
struct Launcher {
    name: &'static str,
    /// Variable with the number of processes.
    size: &'static str,
    /// Variable with this process's rank.
    rank: &'static str,
    /// One of these must be set as well; with an empty list none need be.
    marks: &'static [&'static str],
    spread: Spread,
}

const fn launcher(name: &'static str, size: &'static str, rank: &'static str, marks: &'static [&'static str]) -> Launcher {
    Launcher { name, size, rank, marks, spread: Spread::Processes }
}

/// Launchers whose processes an MPI library connects. The first that fits counts.
const SPEAK_MPI: &[Launcher] = &[
    launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", &[]),
    launcher("mpirun_rsh", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", &[]),
    launcher("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", &[]),
    launcher("flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", &[]),
    // MPICH, Intel MPI and Cray MPICH, which may have started their daemons by srun.
    launcher("mpirun", "PMI_SIZE", "PMI_RANK", &["PMI_SIZE"]),
    launcher("srun", SLURM_TASKS, "PMIX_RANK", &[SLURM_TASKS]),
    launcher("srun", SLURM_TASKS, "PMI_RANK", &[SLURM_TASKS]),
    launcher("mpirun", "", "PMIX_RANK", &[]),
    launcher("mpirun", "", "PMI_RANK", &[]),
];

// What each launcher that sets `WORLD_SIZE` sets besides it.
const ACCELERATE: &[&str] = &["ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"];
const DEEPSPEED: &[&str] = &["CROSS_SIZE", "CROSS_RANK", "LOCAL_SIZE"];
const TORCHRUN: &[&str] = &["TORCHELASTIC_RUN_ID", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"];
const CLUSTER: &[&str] = &["RANK", "NODE_RANK", "MASTER_ADDR"];

/// Launchers that no MPI library knows: each of their processes finds itself alone.
const SPEAK_NO_MPI: &[Launcher] = &[
    launcher("accelerate", "WORLD_SIZE", "RANK", ACCELERATE),
    launcher("deepspeed", "WORLD_SIZE", "RANK", DEEPSPEED),
    launcher("torchrun", "WORLD_SIZE", "RANK", TORCHRUN),
    launcher("horovodrun", "HOROVOD_SIZE", "HOROVOD_RANK", &[]),
    // Kubernetes' PyTorchJob and its like.
    Launcher { spread: Spread::Machines, ..launcher("a cluster's job", "WORLD_SIZE", "RANK", CLUSTER) },
    Launcher { spread: Spread::Machines, ..launcher("a cluster's job", "PET_NNODES", "PET_NODE_RANK", &[]) },
    Launcher { spread: Spread::Machines, ..launcher("a launcher", "WORLD_SIZE", "RANK", &[]) },
    launcher("srun", SLURM_TASKS, "SLURM_PROCID", &[]),
];

/// What a launcher says of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub launcher: &'static str,
    /// The variable with the number of processes.
    pub variable: &'static str,
    /// Number of processes; `None` where the variables do not tell.
    pub num_processes: Option<usize>,
    pub rank: Option<usize>,
    pub spread: Spread,
    /// An MPI library can connect the processes.
    pub speaks_mpi: bool,
}

impl Claim {
    /// `2 processes (WORLD_SIZE is 2)`, or what is known where the number is not.
    pub fn processes(&self) -> String {
        match self.num_processes {
            Some(n) => format!("{n} processes ({} is {n})", self.variable),
            None => "one of several processes".to_owned(),
        }
    }
}

/// The launcher whose processes an MPI library connects, if one started this process.
pub fn speaking_mpi(env: Environment) -> Option<Claim> {
    // srun sets its number of tasks with and without PMI: a rank of PMI's is needed.
    let has_size = |l: &Launcher| l.size != SLURM_TASKS && number(l.size, env).is_some_and(|n| n > 0);
    let fits = |l: &Launcher| has_marks(l, env) && (has_size(l) || number(l.rank, env).is_some());
    SPEAK_MPI.iter().find(|l| fits(l)).map(|l| Claim { speaks_mpi: true, ..claim(l, env) })
}

/// The launcher that started this process as one of several that MPI does not connect.
pub fn speaking_no_mpi(env: Environment) -> Option<Claim> {
    let fits = |l: &Launcher| has_marks(l, env) && number(l.size, env).is_some_and(|n| n > 1);
    SPEAK_NO_MPI.iter().find(|l| fits(l)).map(|l| claim(l, env))
}

/// Whether the user says that no other process belongs to this one ([`ALONE`]).
///
/// # Errors
/// When the variable says neither yes nor no.
pub fn is_alone(env: Environment) -> Result<bool, DistError> {
    let value = env(ALONE).unwrap_or_default();
    match value.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "" | "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(DistError::Alone { value }),
    }
}

/// Every variable that is looked at.
pub fn variables() -> impl Iterator<Item = &'static str> {
    let all = SPEAK_MPI.iter().chain(SPEAK_NO_MPI);
    all.flat_map(|l| [l.size, l.rank].into_iter().chain(l.marks.iter().copied())).filter(|name| !name.is_empty()).chain([ALONE])
}

fn has_marks(launcher: &Launcher, env: Environment) -> bool {
    launcher.marks.is_empty() || launcher.marks.iter().any(|name| env(name).is_some())
}

fn claim(launcher: &Launcher, env: Environment) -> Claim {
    let &Launcher { name, size, rank, spread, .. } = launcher;
    Claim {
        launcher: name,
        variable: size,
        num_processes: number(size, env).filter(|&n| n > 0),
        rank: number(rank, env),
        spread,
        speaks_mpi: false,
    }
}

/// What is no number counts as not set: it is not a launcher's.
fn number(name: &str, env: Environment) -> Option<usize> {
    if name.is_empty() { None } else { env(name)?.trim().parse().ok() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn with(variables: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
        move |name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn launchers_that_speak_mpi_are_told_apart_by_their_variables() {
        let seen = |variables| speaking_mpi(&with(variables)).map(|c| (c.launcher, c.num_processes, c.rank));
        assert_eq!(seen(&[]), None);
        assert_eq!(seen(&[("OMPI_COMM_WORLD_SIZE", "4"), (SLURM_TASKS, "2")]), Some(("mpirun", Some(4), None)));
        assert_eq!(seen(&[("PMI_SIZE", "3"), ("PMI_RANK", "0")]), Some(("mpirun", Some(3), Some(0))));
        assert_eq!(seen(&[("MV2_COMM_WORLD_SIZE", "2"), ("MV2_COMM_WORLD_RANK", "1")]), Some(("mpirun_rsh", Some(2), Some(1))));
        assert_eq!(seen(&[("JSM_NAMESPACE_SIZE", "6"), ("JSM_NAMESPACE_RANK", "5")]), Some(("jsrun", Some(6), Some(5))));
        assert_eq!(seen(&[("FLUX_JOB_SIZE", "4"), ("FLUX_TASK_RANK", "1"), ("PMI_SIZE", "4")]), Some(("flux", Some(4), Some(1))));
        assert_eq!(seen(&[("PMIX_RANK", "1")]), Some(("mpirun", None, Some(1))));
        assert_eq!(seen(&[("PMIX_RANK", "1"), (SLURM_TASKS, "8")]), Some(("srun", Some(8), Some(1))));
        assert_eq!(seen(&[("PMI_RANK", "1"), (SLURM_TASKS, "8")]), Some(("srun", Some(8), Some(1))));
        for garbage in ["", "two", "-1", "1.5"] {
            let garbage: &'static str = garbage;
            let env = move |name: &str| Some(garbage.to_owned()).filter(|_| name.starts_with("OMPI") || name.starts_with("PMI"));
            assert_eq!(speaking_mpi(&env), None, "{garbage:?}");
        }
    }

    #[test]
    fn launchers_that_speak_no_mpi_are_told_apart_by_their_variables() {
        let seen = |variables| speaking_no_mpi(&with(variables)).map(|c| (c.launcher, c.num_processes, c.spread));
        let (processes, machines) = (Spread::Processes, Spread::Machines);
        assert_eq!(seen(&[("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")]), Some(("torchrun", Some(2), processes)));
        assert_eq!(seen(&[("WORLD_SIZE", "8"), ("TORCHELASTIC_RUN_ID", "none")]), Some(("torchrun", Some(8), processes)));
        let accelerate = [("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("ACCELERATE_MIXED_PRECISION", "no")];
        assert_eq!(speaking_no_mpi(&with(accelerate.to_vec().leak())).map(|c| c.launcher), Some("accelerate"));
        assert_eq!(seen(&[("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("CROSS_RANK", "0")]), Some(("deepspeed", Some(2), processes)));
        assert_eq!(seen(&[("HOROVOD_SIZE", "3"), ("HOROVOD_RANK", "0")]), Some(("horovodrun", Some(3), processes)));
        assert_eq!(seen(&[("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "job-0")]), Some(("a cluster's job", Some(2), machines)));
        assert_eq!(seen(&[("PET_NNODES", "2"), ("PET_NODE_RANK", "0")]), Some(("a cluster's job", Some(2), machines)));
        assert_eq!(seen(&[("WORLD_SIZE", "2")]), Some(("a launcher", Some(2), machines)));
        assert_eq!(seen(&[(SLURM_TASKS, "8")]), Some(("srun", Some(8), processes)));
        assert_eq!(seen(&[(SLURM_TASKS, "1"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), None);
        for lone in ["1", "0", "", "two", "-2", "2x", "1:4"] {
            let env = |name: &str| Some(lone.to_owned()).filter(|_| name.ends_with("SIZE") || name.ends_with("NNODES"));
            assert_eq!(speaking_no_mpi(&env), None, "{lone:?}");
        }
        assert_eq!(seen(&[("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")]), None, "no number of processes");
    }
}
