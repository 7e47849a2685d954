//! Cores, memory, disk, shared memory, limits.

use std::fs;

use rustix::fs::statvfs;

use super::Finding;
use crate::telemetry::Memory;
use crate::telemetry::bytes;

const SMALL_SHARED_MEMORY: u64 = 64 << 20;
const SMALL_DISK: u64 = 1 << 30;
const FEW_OPEN_FILES: u64 = 1024;

pub fn findings() -> Vec<Finding> {
    vec![cores(), memory(), disk(), shared_memory(), open_files(), locked_memory()]
}

fn cores() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| cpu.lines().find(|l| l.starts_with(name)).and_then(|l| l.split_once(':')).map_or("", |(_, v)| v.trim());
    let flags: Vec<&str> = field("flags").split(' ').collect();
    let vector: Vec<&str> = ["avx2", "fma", "avx512f"].into_iter().filter(|f| flags.contains(f)).collect();
    let mut found = format!("{cores}, divided among the ranks of this machine");
    for part in [field("model name"), &vector.join(" ")].into_iter().filter(|p| !p.is_empty()) {
        found += &format!("; {part}");
    }
    Finding::good("cores", found)
}

fn memory() -> Finding {
    let Some(memory) = Memory::of_this_machine() else {
        return Finding::good("memory", "unknown: no /proc/meminfo");
    };
    let left = memory.left_in_group.map(|n| format!(", {} left by the limit of the container or job", bytes(n))).unwrap_or_default();
    Finding::good("memory", format!("{} available of {}{left}", bytes(memory.available), bytes(memory.total)))
}

/// Free and total bytes of the file system that holds `path`.
fn space(path: &str) -> Option<(u64, u64)> {
    let s = statvfs(path).ok()?;
    Some((s.f_bavail * s.f_frsize, s.f_blocks * s.f_frsize))
}

fn disk() -> Finding {
    match space(".") {
        Some((free, total)) => {
            let found = format!("{} free of {} in the working directory", bytes(free), bytes(total));
            if free < SMALL_DISK {
                Finding::poor(
                    "disk",
                    found,
                    "checkpoints and the cache of tokenized rows",
                    "free some space, or give an output_dir elsewhere",
                )
            } else {
                Finding::good("disk", found)
            }
        }
        None => Finding::good("disk", "unknown"),
    }
}

fn shared_memory() -> Finding {
    match space("/dev/shm") {
        Some((free, total)) => {
            let found = format!("{} free of {}", bytes(free), bytes(total));
            if free < SMALL_SHARED_MEMORY {
                Finding::poor(
                    "/dev/shm",
                    found,
                    "messages between the ranks of one machine",
                    "in a container: --shm-size=1g, or --ipc=host",
                )
            } else {
                Finding::good("/dev/shm", found)
            }
        }
        None => Finding::missing("/dev/shm", "messages between the ranks of one machine", "mount -t tmpfs tmpfs /dev/shm"),
    }
}

/// A soft limit of this process; none if there is none.
fn limit(name: &str) -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    limits.lines().find_map(|l| l.strip_prefix(name))?.split_ascii_whitespace().next()?.parse().ok()
}

fn limit_text(limit: Option<u64>, show: impl Fn(u64) -> String) -> String {
    limit.map_or_else(|| "unlimited".to_owned(), show)
}

fn open_files() -> Finding {
    let limit = limit("Max open files");
    let found = limit_text(limit, |n| n.to_string());
    if limit.is_some_and(|n| n < FEW_OPEN_FILES) {
        Finding::poor("open files", found, "weight shards and connections between ranks", "ulimit -n 4096")
    } else {
        Finding::good("open files", found)
    }
}

fn locked_memory() -> Finding {
    let limit = limit_text(limit("Max locked memory"), bytes);
    Finding::good("locked memory", format!("{limit} (more is needed for InfiniBand only: ulimit -l unlimited)"))
}
