//! NVIDIA GPUs: what this build has for them, the driver, the devices, and the libraries.

use std::fs;
use std::path::{Path, PathBuf};

use super::Finding;
use crate::kernels::cuda::{self, Build, CudaError, Driver, Library};
use crate::telemetry::bytes;

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
const GPUS: &str = "NVIDIA GPUs";

pub fn findings() -> Vec<Finding> {
    let build = cuda::build();
    let mut findings = vec![built(build.as_ref()), kernel_module()];
    findings.extend(driver(find_library(&cuda::DRIVER), build.as_ref(), &cuda::driver()));
    let libraries = [cuda::CUBLAS, cuda::CUBLAS_LT, cuda::CURAND, cuda::NCCL];
    findings.extend(libraries.iter().map(|l| library(l, find_library(l), cuda::load(l))));
    findings
}

fn hint(error: &CudaError) -> String {
    error.hint().unwrap_or_else(|| "look at `nvidia-smi`, and at the kernel's log".into())
}

fn built(build: Option<&Build>) -> Finding {
    let Some(Build { toolkit, architectures, ptx, num_kernels }) = build else {
        let error = CudaError::NotBuilt;
        return Finding::poor("CUDA build", error.to_string(), GPUS, hint(&error));
    };
    let architectures: Vec<String> = architectures.iter().map(ToString::to_string).collect();
    let code = format!("machine code for compute capability {}, PTX of {ptx} for newer", architectures.join(", "));
    Finding::good("CUDA build", format!("CUDA {toolkit}; {num_kernels} kernels: {code}"))
}

fn kernel_module() -> Finding {
    match fs::read_to_string("/proc/driver/nvidia/version").ok().as_deref().and_then(|t| t.lines().next()) {
        Some(line) => Finding::good("NVIDIA driver", line.trim_start_matches("NVRM version:").trim()),
        None => Finding::missing("NVIDIA driver", GPUS, "apt-get install nvidia-driver"),
    }
}

/// The driver's library, found at `path`, and the devices that it finds.
fn driver(path: Option<PathBuf>, build: Option<&Build>, driver: &Result<Driver, CudaError>) -> Vec<Finding> {
    let place = path.as_ref().map(|p| p.display().to_string());
    let library = |error: &CudaError| {
        let found = place.as_ref().map_or_else(|| error.to_string(), |p| format!("{p}: {error}"));
        Finding::poor("CUDA", found, GPUS, hint(error))
    };
    let missing = || Finding::missing("CUDA", cuda::DRIVER.needed_for, cuda::DRIVER.remedy);
    let Driver { cuda, devices } = match driver {
        Ok(driver) => driver,
        Err(CudaError::NotBuilt) => return vec![place.map_or_else(missing, |p| Finding::good("CUDA", p))],
        Err(CudaError::NoDriver { .. }) if place.is_none() => return vec![missing()],
        Err(error) => return vec![library(error)],
    };
    let mut findings = Vec::new();
    match build.map(|build| build.toolkit).filter(|toolkit| cuda < toolkit) {
        Some(required) => findings.push(library(&CudaError::DriverTooOld { required, found: *cuda })),
        None => findings
            .push(Finding::good("CUDA", format!("the driver runs CUDA {cuda}; {}", place.as_deref().unwrap_or("found by the loader")))),
    }
    findings.extend(devices.iter().map(|device| {
        let (what, memory) = (format!("GPU {}", device.ordinal), bytes(device.memory_bytes));
        match device.usable() {
            Ok(()) => Finding::good(what, format!("{}, compute capability {}, {memory}", device.name, device.capability)),
            Err(error) => Finding::poor(what, error.to_string(), "computing there", hint(&error)),
        }
    }));
    findings
}

/// A library found at `path`, and what came of loading it.
fn library(library: &Library, path: Option<PathBuf>, loaded: Result<(), CudaError>) -> Finding {
    match (path, loaded) {
        (Some(path), Ok(()) | Err(CudaError::NotBuilt)) => Finding::good(library.name, path.display().to_string()),
        (None, Ok(())) => Finding::good(library.name, "found by the loader"),
        (Some(path), Err(error)) => Finding::poor(library.name, format!("{}: {error}", path.display()), library.needed_for, hint(&error)),
        (None, Err(_)) => Finding::missing(library.name, library.needed_for, library.remedy),
    }
}

/// The file that the loader would take.
fn find_library(library: &Library) -> Option<PathBuf> {
    library.files.iter().find_map(|file| find_file(file))
}

/// In `LD_LIBRARY_PATH`, beside the program, in the loader's cache, in the usual folders.
fn find_file(name: &str) -> Option<PathBuf> {
    let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("lib")));
    let in_folder = |folder: &Path| Some(folder.join(name)).filter(|p| p.exists());
    std::env::split_paths(&named)
        .chain(beside)
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
    use crate::kernels::cuda::{Device, Version};

    #[test]
    fn in_cache_with_a_longer_name_finds_the_exact_one() {
        let cache = b"\x01\0libcuda.so.1\0/opt/libcuda.so.1.2\0/usr/lib/libcuda.so.1\0";
        assert_eq!(in_cache(cache, "libcuda.so.1"), Some(PathBuf::from("/usr/lib/libcuda.so.1")));
        assert_eq!(in_cache(cache, "libnccl.so.2"), None);
    }

    fn text(findings: Vec<Finding>) -> String {
        super::super::table(&findings)
    }

    #[test]
    fn findings_of_machines_with_and_without_gpus_say_what_is_there() {
        let toolkit = Version(13, 0);
        let build =
            Build { toolkit, architectures: vec![Version(8, 0), Version(8, 9), Version(9, 0)], ptx: Version(9, 0), num_kernels: 24 };
        let device = |ordinal, name: &str, capability, gib: u64| Device { ordinal, name: name.into(), capability, memory_bytes: gib << 30 };
        let devices = vec![device(0, "NVIDIA GeForce RTX 4090", Version(8, 9), 24), device(1, "Tesla V100", Version(7, 0), 16)];
        let new = Ok(Driver { cuda: toolkit, devices: devices.clone() });
        let old = Ok(Driver { cuda: Version(12, 4), devices });
        let path = || Some(PathBuf::from("/usr/lib/x86_64-linux-gnu/libcuda.so.1"));
        let cases = [
            ("built without CUDA, no driver", vec![built(None)], driver(None, None, &Err(CudaError::NotBuilt))),
            ("built without CUDA, a driver", vec![], driver(path(), None, &Err(CudaError::NotBuilt))),
            ("two GPUs", vec![built(Some(&build))], driver(path(), Some(&build), &new)),
            ("a driver that is too old", vec![], driver(path(), Some(&build), &old)),
            ("no driver", vec![], driver(None, Some(&build), &Err(CudaError::NoDriver { reason: None }))),
            ("no GPU", vec![], driver(path(), Some(&build), &Err(CudaError::NoDevice))),
        ];
        let texts = cases.map(|(name, first, then)| format!("{name}\n{}", text([first, then].concat())));
        insta::assert_snapshot!("gpus", texts.join("\n"));
    }

    #[test]
    fn findings_of_libraries_tell_those_that_do_not_load() {
        let path = || Some(PathBuf::from("/usr/lib/libcublas.so.13"));
        let fails = |reason: Option<&str>| Err(CudaError::Library { library: cuda::CUBLAS, reason: reason.map(str::to_owned) });
        let cases = [
            library(&cuda::CUBLAS, path(), Ok(())),
            library(&cuda::CUBLAS, path(), Err(CudaError::NotBuilt)),
            library(&cuda::CUBLAS, None, Ok(())),
            library(&cuda::CUBLAS, path(), fails(Some("libcublasLt.so.13: cannot open shared object file"))),
            library(&cuda::CUBLAS, None, fails(None)),
        ];
        insta::assert_snapshot!("libraries", text(cases.to_vec()));
    }
}
