//! NVIDIA's driver and NCCL, found as the loader would find them; nothing is loaded.

use std::fs;
use std::path::{Path, PathBuf};

use super::Finding;

const FOLDERS: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
    "/usr/local/cuda/lib64",
    "/usr/lib/wsl/lib",
];

pub fn findings() -> Vec<Finding> {
    vec![driver(), cuda(), nccl()]
}

fn driver() -> Finding {
    match fs::read_to_string("/proc/driver/nvidia/version").ok().as_deref().and_then(|t| t.lines().next()) {
        Some(line) => Finding::good("NVIDIA driver", line.trim_start_matches("NVRM version:").trim()),
        None => Finding::missing("NVIDIA driver", "NVIDIA GPUs; this build computes on the CPU", "apt-get install nvidia-driver"),
    }
}

fn cuda() -> Finding {
    match find_library("libcuda.so.1") {
        Some(path) => Finding::good("CUDA", path.display().to_string()),
        None => Finding::missing("CUDA", "NVIDIA GPUs; libcuda.so.1 comes with the driver", "in a container: docker run --gpus all"),
    }
}

fn nccl() -> Finding {
    match find_library("libnccl.so.2") {
        Some(path) => Finding::good("NCCL", path.display().to_string()),
        None => Finding::missing("NCCL", "more than one NVIDIA GPU", "apt-get install libnccl2 (from NVIDIA's repository)"),
    }
}

/// The file that the loader would take: `LD_LIBRARY_PATH`, then its cache, then the usual folders.
fn find_library(name: &str) -> Option<PathBuf> {
    let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let in_folder = |folder: &Path| Some(folder.join(name)).filter(|p| p.exists());
    std::env::split_paths(&named)
        .find_map(|folder| in_folder(&folder))
        .or_else(|| in_cache(&fs::read("/etc/ld.so.cache").ok()?, name).filter(|p| p.exists()))
        .or_else(|| FOLDERS.iter().find_map(|folder| in_folder(Path::new(folder))))
}

/// The path of `name` in the bytes of ld.so.cache: a zero-terminated string that ends in `/name`.
fn in_cache(cache: &[u8], name: &str) -> Option<PathBuf> {
    let path = cache.split(|&b| b == 0).find(|s| s.ends_with(format!("/{name}").as_bytes()))?;
    Some(PathBuf::from(std::str::from_utf8(path).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_cache_with_a_longer_name_finds_the_exact_one() {
        let cache = b"\x01\0libcuda.so.1\0/opt/libcuda.so.1.2\0/usr/lib/libcuda.so.1\0";
        assert_eq!(in_cache(cache, "libcuda.so.1"), Some(PathBuf::from("/usr/lib/libcuda.so.1")));
        assert_eq!(in_cache(cache, "libnccl.so.2"), None);
    }
}
