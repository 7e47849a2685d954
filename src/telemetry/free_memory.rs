//! How much memory processes of this machine can still take: what the kernel calls available, with free swap, under the limits of the
//! control groups (containers, jobs of a scheduler) that this process is in.
//!
//! Sources: proc(5) on `/proc/meminfo`; the kernel's `admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.

use std::fs;
use std::path::{Path, PathBuf};

/// A machine's memory in bytes, as `/proc/meminfo` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub total: u64,
    /// Free, or in caches that give way.
    pub available: u64,
    pub free_swap: u64,
    /// What the tightest control group leaves; `None` without a limit.
    pub left_in_group: Option<u64>,
}

impl Memory {
    /// `None` where the system does not say (no `/proc`).
    pub fn of_this_machine() -> Option<Self> {
        Self::read(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
    }

    /// What can be taken before something is killed. Rather too much than too little: swap and file caches count as free.
    pub fn free(&self) -> u64 {
        let free = self.available.saturating_add(self.free_swap);
        self.left_in_group.map_or(free, |left| left.min(free))
    }

    fn read(proc: &Path, groups: &Path) -> Option<Self> {
        let info = fs::read_to_string(proc.join("meminfo")).ok()?;
        let bytes = |name: &str| field(&info, name, ':')?.checked_mul(1024);
        let (total, available, free_swap) = (bytes("MemTotal")?, bytes("MemAvailable")?, bytes("SwapFree").unwrap_or(0));
        let own = fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
        let left = own.lines().filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            match controllers {
                "" => left_in(groups, path, &VERSION_2),
                _ if controllers.split(',').any(|name| name == "memory") => left_in(&groups.join("memory"), path, &VERSION_1),
                _ => None,
            }
        });
        Some(Self { total, available, free_swap, left_in_group: left.min().map(|left| left.saturating_add(free_swap)) })
    }
}

/// The number of a line `name: 123 kB` or `name 123`.
fn field(text: &str, name: &str, separator: char) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(separator))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

/// File names of one version of control groups, and the fields of `memory.stat` that give way.
struct Version {
    limit: &'static str,
    used: &'static str,
    caches: [&'static str; 2],
}

const VERSION_2: Version = Version { limit: "memory.max", used: "memory.current", caches: ["active_file", "inactive_file"] };
const VERSION_1: Version =
    Version { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", caches: ["total_active_file", "total_inactive_file"] };
/// Version 1 says "no limit" by a number near 2^63.
const NO_LIMIT: u64 = 1 << 60;

/// What the group `path` below `root`, and those that it is in, leave; `None` if none has a limit. In a container the path may be the
/// host's: the groups that are not to be seen are passed over, and the root, which is then the container's own, is read.
fn left_in(root: &Path, path: &str, version: &Version) -> Option<u64> {
    let own = root.join(path.trim_start_matches('/'));
    let dirs = own.ancestors().take_while(|dir| dir.starts_with(root)).map(PathBuf::from);
    dirs.filter_map(|dir| {
        let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
        let limit = number(version.limit).filter(|&limit| limit < NO_LIMIT)?;
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let caches: u64 = version.caches.iter().filter_map(|name| field(&stat, name, ' ')).sum();
        Some(limit.saturating_sub(number(version.used)?.saturating_sub(caches)))
    })
    .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A made-up machine: files by path.
    fn memory(files: &[(&str, &str)]) -> Option<Memory> {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Memory::read(&root.path().join("proc"), &root.path().join("groups"))
    }

    const INFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\nSwapTotal:       9999 kB\nSwapFree:        2048 kB\n",
    );

    #[test]
    fn machine_without_groups_has_what_is_available_and_swap() {
        let found = memory(&[INFO]).unwrap();
        assert_eq!(found, Memory { total: 16 * MIB, available: 8 * MIB, free_swap: 2 * MIB, left_in_group: None });
        assert_eq!(found.free(), 10 * MIB);
    }

    #[test]
    fn machine_that_does_not_say_is_none() {
        assert_eq!(memory(&[]), None);
        assert_eq!(memory(&[("proc/meminfo", "MemTotal: 1 kB\n")]), None);
        assert_eq!(memory(&[("proc/meminfo", "MemTotal: 1 kB\nMemAvailable: much kB\n")]), None);
    }

    #[test]
    fn group_of_version_2_leaves_its_limit_less_what_gives_no_way() {
        let own = ("proc/self/cgroup", "0::/job/step\n");
        let used = ("groups/job/step/memory.current", "5242880\n");
        let stat = ("groups/job/step/memory.stat", "anon 1\nactive_file 1048576\ninactive_file 2097152\n");
        let left = |limit| memory(&[INFO, own, used, stat, ("groups/job/step/memory.max", limit)]).unwrap().free();
        // 6 MiB - (5 - 3) MiB, and 2 MiB of swap.
        assert_eq!(left("6291456\n"), 6 * MIB);
        assert_eq!(left("max\n"), 10 * MIB);
        assert_eq!(left("1048576\n"), 2 * MIB, "nothing is left but swap");
    }

    #[test]
    fn group_above_may_leave_less() {
        let own = ("proc/self/cgroup", "0::/job/step\n");
        let inner = [("groups/job/step/memory.max", "8388608"), ("groups/job/step/memory.current", "0")];
        let outer = [("groups/job/memory.max", "4194304"), ("groups/job/memory.current", "3145728")];
        assert_eq!(memory(&[INFO, own, inner[0], inner[1], outer[0], outer[1]]).unwrap().left_in_group, Some(3 * MIB));
    }

    #[test]
    fn container_of_version_1_is_read_at_the_root_where_its_path_is_the_hosts() {
        let own = ("proc/self/cgroup", "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/docker/ab\n");
        let files = |limit| {
            let stat = ("groups/memory/memory.stat", "cache 9\ntotal_active_file 0\ntotal_inactive_file 1048576\n");
            memory(&[INFO, own, ("groups/memory/memory.limit_in_bytes", limit), ("groups/memory/memory.usage_in_bytes", "3145728"), stat])
        };
        assert_eq!(files("4194304").unwrap().left_in_group, Some(4 * MIB));
        assert_eq!(files("9223372036854771712").unwrap().left_in_group, None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_of_this_machine_is_plausible() {
        let memory = Memory::of_this_machine().unwrap();
        assert!(memory.free() > 0 && memory.available <= memory.total);
    }
}
