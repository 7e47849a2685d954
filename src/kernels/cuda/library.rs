//! Libraries of CUDA that are looked for when they are used.

use super::Version;

/// A library, the file names that cudarc tries (without its rarer spellings), and where it comes from. A file of another name is of no use:
/// cudarc would not find it, and panics where it finds none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Library {
    pub name: &'static str,
    pub needed_for: &'static str,
    /// In the order in which they are tried.
    pub files: &'static [&'static str],
    /// How to get it.
    pub remedy: &'static str,
}

pub const DRIVER: Library = Library {
    name: "libcuda",
    needed_for: "NVIDIA GPUs; it comes with the driver",
    files: &["libcuda.so", "libcuda.so.1"],
    remedy: "apt-get install nvidia-driver; in a container: docker run --gpus all",
};
pub const CUBLAS: Library = Library {
    name: "cuBLAS",
    needed_for: "matrix products on NVIDIA GPUs",
    files: &["libcublas.so", "libcublas.so.13", "libcublas.so.12"],
    remedy: "apt-get install libcublas-13-0 (from NVIDIA's repository), or pip install nvidia-cublas and its nvidia/cu13/lib on LD_LIBRARY_PATH",
};
pub const CUBLAS_LT: Library = Library {
    name: "cuBLASLt",
    needed_for: "matrix products with what follows them on NVIDIA GPUs",
    files: &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"],
    remedy: CUBLAS.remedy,
};
pub const CURAND: Library = Library {
    name: "cuRAND",
    needed_for: "tensors on NVIDIA GPUs",
    files: &["libcurand.so", "libcurand.so.10"],
    remedy: "apt-get install libcurand-13-0 (from NVIDIA's repository), or pip install nvidia-curand and its nvidia/cu13/lib on LD_LIBRARY_PATH",
};
pub const NCCL: Library = Library {
    name: "NCCL",
    needed_for: "more than one NVIDIA GPU",
    files: &["libnccl.so"],
    remedy: "apt-get install libnccl-dev (from NVIDIA's repository), or pip install nvidia-nccl-cu13, its nvidia/nccl/lib on LD_LIBRARY_PATH and \
             in it ln -s libnccl.so.2 libnccl.so",
};

/// The first branch of NVIDIA's Linux driver that runs CUDA `version` (CUDA Toolkit Release Notes, table 3).
pub fn driver_branch(version: Version) -> &'static str {
    const BRANCHES: [(Version, &str); 10] = [
        (Version(12, 0), "525"),
        (Version(12, 1), "530"),
        (Version(12, 2), "535"),
        (Version(12, 3), "545"),
        (Version(12, 4), "550"),
        (Version(12, 5), "555"),
        (Version(12, 6), "560"),
        (Version(12, 8), "570"),
        (Version(12, 9), "575"),
        (Version(13, 0), "580"),
    ];
    BRANCHES.iter().find(|(cuda, _)| *cuda >= version).map_or("the newest", |(_, branch)| branch)
}
