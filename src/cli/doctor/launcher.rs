//! MPI: linked in, its launcher, and whether this process was started by one.

use std::fs;
use std::process::Command;

use super::super::environment;
use super::Finding;
use crate::dist::launcher::{self, ALONE, Claim};

const FOR_RANKS: &str = "training on more than one device";
const INSTALL: &str = "apt-get install openmpi-bin libopenmpi-dev";

pub fn findings() -> Vec<Finding> {
    vec![library(), mpirun(), launched()]
}

/// The MPI library that is mapped into this process.
fn library() -> Finding {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let linked = maps.lines().filter_map(|l| l.split_ascii_whitespace().nth(5)).find(|path| is_mpi(path));
    match linked {
        Some(path) => Finding::good("MPI library", path),
        None => Finding::missing(
            "MPI library",
            FOR_RANKS,
            "build with MPI: apt-get install libopenmpi-dev libclang-dev, then cargo build --release",
        ),
    }
}

fn is_mpi(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|file| file.starts_with("libmpi.so") || file.starts_with("libmpich.so"))
}

fn mpirun() -> Finding {
    let output = Command::new("mpirun").arg("--version").output().ok().filter(|o| o.status.success());
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    match text.as_ref().and_then(|t| t.lines().find(|l| !l.trim().is_empty())) {
        Some(line) => Finding::good("mpirun", line.trim()),
        None => Finding::missing("mpirun", FOR_RANKS, INSTALL),
    }
}

fn launched() -> Finding {
    let of = |claim: &Claim| match (claim.rank, claim.num_processes) {
        (Some(rank), Some(size)) => format!("{}: rank {rank} of {size}", claim.launcher),
        _ => format!("{}: {}", claim.launcher, claim.processes()),
    };
    let env = &environment::variable;
    let unconnected = launcher::speaking_no_mpi(env).filter(|_| !matches!(launcher::is_alone(env), Ok(true)));
    match (launcher::speaking_mpi(env), unconnected) {
        (Some(claim), _) => Finding::good("started by", of(&claim)),
        (None, Some(claim)) => {
            let remedy = format!("start glmddp with mpirun; {ALONE}=1 if no other process belongs to this one");
            Finding::poor("started by", format!("{}, whose processes MPI does not connect", of(&claim)), FOR_RANKS, remedy)
        }
        (None, None) => Finding::good("started by", "a shell: one rank (mpirun -n 2 glmddp ... starts two)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_mpi_of_helper_libraries_is_false() {
        assert!(is_mpi("/usr/lib/x86_64-linux-gnu/libmpi.so.40.30.4") && is_mpi("/opt/mpich/libmpich.so.12"));
        assert!(!is_mpi("/usr/lib/libmpi_cxx.so.40") && !is_mpi("/libmpi.so/libc.so.6"));
    }
}
