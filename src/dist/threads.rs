//! How many threads a rank takes: the machine's cores are shared by its ranks, and a launcher may already have divided them.
//!
//! mpirun's default binds a rank to one core when a job has one or two ranks, and to a socket or NUMA node otherwise; with more ranks
//! than cores it binds nothing. So counting what a process may run on is not enough, and neither is dividing by the number of
//! ranks: the ranks tell each other their sets of CPUs, and each CPU is divided among the ranks that may use it.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use super::{DistError, ProcessGroup};

/// Which CPUs a process may run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores {
    /// Numbers of the CPUs that its affinity allows; none where the system does not tell.
    pub cpus: Option<BTreeSet<u32>>,
    /// Threads that can run at once (`std::thread::available_parallelism`): the CPUs, or less under a container's quota.
    pub available: NonZeroUsize,
}

impl Cores {
    /// Of this process. To be asked before it starts threads of its own.
    pub fn of_this_process() -> Self {
        Self { cpus: allowed_cpus("/proc/self/status"), available: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN) }
    }

    fn encode(&self) -> String {
        let cpus = self.cpus.as_ref().map(|cpus| cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
        format!("{} {}", self.available, cpus.unwrap_or_default())
    }

    fn decode(text: &str) -> Option<Self> {
        let (available, cpus) = text.split_once(' ')?;
        Some(Self { available: available.parse().ok()?, cpus: parse_cpu_list(cpus) })
    }
}

fn allowed_cpus(status_file: &str) -> Option<BTreeSet<u32>> {
    let status = std::fs::read_to_string(status_file).ok()?;
    parse_cpu_list(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)
}

/// The kernel's list format: `0-3,8`.
fn parse_cpu_list(list: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

/// Threads for one of the ranks `neighbours` of a machine (`mine` among them): what was asked for, else its share of its CPUs.
pub fn threads_per_rank(mine: &Cores, neighbours: &[Cores], asked: Option<NonZeroUsize>) -> NonZeroUsize {
    if let Some(asked) = asked {
        return asked;
    }
    let equal_share = mine.available.get() / neighbours.len().max(1);
    let sets: Option<Vec<&BTreeSet<u32>>> = neighbours.iter().map(|n| n.cpus.as_ref()).collect();
    let share = match (&mine.cpus, sets) {
        (Some(cpus), Some(sets)) => {
            let sharers = |cpu: &u32| sets.iter().filter(|set| set.contains(cpu)).count().max(1) as f64;
            let share = (cpus.iter().map(|cpu| 1.0 / sharers(cpu)).sum::<f64>() + 1e-6) as usize;
            // A quota is one for all ranks of a container.
            if mine.available.get() < cpus.len() { share.min(equal_share) } else { share }
        }
        _ => equal_share,
    };
    NonZeroUsize::new(share).unwrap_or(NonZeroUsize::MIN)
}

/// A rank's threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Threads {
    pub count: NonZeroUsize,
    /// CPUs of this machine that the launcher may use and that no rank is allowed to run on; 0 when threads were asked for.
    pub num_idle_cpus: usize,
}

impl Threads {
    /// What to do about idle CPUs.
    pub fn hint(&self) -> Option<String> {
        (self.num_idle_cpus > 0).then(|| {
            format!("{} CPUs are left idle because this process is bound to others; under mpirun, add `--bind-to none`", self.num_idle_cpus)
        })
    }
}

/// Divides this machine's cores among its ranks. Collective.
pub fn plan_threads(group: &dyn ProcessGroup, asked: Option<NonZeroUsize>) -> Result<Threads, DistError> {
    let mine = Cores::of_this_process();
    let message = format!("{} {}", group.machine(), mine.encode());
    let mut neighbours = Vec::new();
    for (rank, bytes) in group.all_gather_bytes(message.as_bytes())?.into_iter().enumerate() {
        let bad = || DistError::Message { rank, what: "its cores", expected: "machine, threads, CPUs".into(), found: bytes.len() };
        let text = std::str::from_utf8(&bytes).map_err(|_| bad())?;
        let (machine, cores) = text.split_once(' ').ok_or_else(bad)?;
        if machine == group.machine().to_string() {
            neighbours.push(Cores::decode(cores).ok_or_else(bad)?);
        }
    }
    let count = threads_per_rank(&mine, &neighbours, asked);
    let launchers = allowed_cpus(&format!("/proc/{}/status", std::os::unix::process::parent_id()));
    let num_idle_cpus = if asked.is_some() { 0 } else { num_idle(launchers.as_ref(), &neighbours) };
    Ok(Threads { count, num_idle_cpus })
}

fn num_idle(launchers: Option<&BTreeSet<u32>>, neighbours: &[Cores]) -> usize {
    let (Some(all), Some(sets)) = (launchers, neighbours.iter().map(|n| n.cpus.as_ref()).collect::<Option<Vec<_>>>()) else { return 0 };
    all.iter().filter(|cpu| !sets.iter().any(|set| set.contains(cpu))).count()
}

/// Starts rayon's global pool with `threads` threads. Once a process, before anything uses it.
pub fn install_thread_pool(threads: NonZeroUsize) -> Result<(), DistError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.get())
        .thread_name(|i| format!("worker-{i}"))
        .build_global()
        .map_err(|e| DistError::ThreadPool { threads: threads.get(), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cores(list: &str, available: usize) -> Cores {
        Cores { cpus: parse_cpu_list(list), available: NonZeroUsize::new(available).unwrap() }
    }

    fn share(all: &[Cores]) -> Vec<usize> {
        all.iter().map(|mine| threads_per_rank(mine, all, None).get()).collect()
    }

    #[test]
    fn unbound_ranks_divide_the_cores() {
        assert_eq!(share(&vec![cores("0-7", 8); 4]), [2; 4]);
        assert_eq!(share(&vec![cores("0-7", 8); 3]), [2; 3]);
        assert_eq!(share(&vec![cores("0-1", 2); 4]), [1; 4]);
        assert_eq!(share(&[cores("0-15", 16)]), [16]);
        assert_eq!(share(&vec![cores("0-5", 6); 6]), [1; 6]);
    }

    #[test]
    fn bound_ranks_take_their_own_cores_undivided() {
        assert_eq!(share(&[cores("0", 1), cores("1", 1)]), [1, 1]);
        assert_eq!(share(&[cores("0-3", 4), cores("4-7", 4)]), [4, 4]);
        assert_eq!(share(&[cores("0-7", 8), cores("0-7", 8), cores("8-15", 8), cores("8-15", 8)]), [4; 4]);
    }

    #[test]
    fn container_quota_is_divided_among_ranks() {
        assert_eq!(share(&vec![cores("0-63", 4); 2]), [2; 2]);
        assert_eq!(share(&vec![cores("0-63", 2); 4]), [1; 4]);
    }

    #[test]
    fn ranks_without_known_cpus_divide_what_is_available() {
        assert_eq!(share(&vec![cores("", 8); 2]), [4; 2]);
    }

    #[test]
    fn asked_threads_win() {
        let all = [cores("0", 1), cores("1", 1)];
        assert_eq!(threads_per_rank(&all[0], &all, NonZeroUsize::new(6)).get(), 6);
    }

    #[test]
    fn cores_idle_under_binding_are_counted_and_hinted() {
        let ranks = [cores("0", 1), cores("1", 1)];
        let idle = num_idle(parse_cpu_list("0-15").as_ref(), &ranks);
        assert_eq!(idle, 14);
        let threads = Threads { count: NonZeroUsize::MIN, num_idle_cpus: idle };
        assert!(threads.hint().unwrap().contains("14 CPUs are left idle"));
        assert_eq!(num_idle(parse_cpu_list("0-1").as_ref(), &ranks), 0);
    }

    #[test]
    fn cores_survive_the_wire() {
        for c in [cores("0-3,8,10-11", 6), cores("", 4), Cores::of_this_process()] {
            assert_eq!(Cores::decode(&c.encode()), Some(c));
        }
    }

    #[test]
    fn threads_of_local_ranks_fit_the_machine() {
        let all = super::super::local::run(2, |g| plan_threads(g, None));
        let total: usize = all.into_iter().map(|t| t.unwrap().count.get()).sum();
        assert!(total <= std::thread::available_parallelism().unwrap().get().max(2));
    }
}
