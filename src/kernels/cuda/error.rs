//! What can be wrong with a GPU, its driver or its libraries.

use super::super::launch::KernelDtype;
use super::library::driver_branch;
use super::{Device, Library, OLDEST_CAPABILITY, Version};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("this glmddp was built without CUDA: it computes on the CPU")]
    NotBuilt,
    #[error("there is no NVIDIA driver: {} cannot be loaded{}", alternatives(DRIVER_FILES), because(.reason))]
    NoDriver { reason: Option<String> },
    #[error("the NVIDIA driver finds no GPU")]
    NoDevice,
    #[error("there is no GPU {ordinal}: the NVIDIA driver finds {found}, counted from 0")]
    NoSuchDevice { ordinal: usize, found: usize },
    #[error("the NVIDIA driver runs CUDA {found} at most, and this glmddp was built with CUDA {required}")]
    DriverTooOld { required: Version, found: Version },
    #[error("{device} is too old: the kernels need compute capability {OLDEST_CAPABILITY} or higher")]
    Architecture { device: Device },
    #[error("{} is missing, needed for {}: {} cannot be loaded{}", .library.name, .library.needed_for, alternatives(.library.files), because(.reason))]
    Library { library: Library, reason: Option<String> },
    #[error("there is no kernel `{op}` for {} on a GPU, only for {}", .dtype.suffix(), dtypes(.supported, "and"))]
    Dtype { op: String, dtype: KernelDtype, supported: Vec<KernelDtype> },
    #[error("no image of kernel `{kernel}` runs on {device}: there is machine code for {}, and PTX of {ptx}", versions(.architectures))]
    NoImage { kernel: String, device: Device, architectures: Vec<Version>, ptx: Version },
    #[error("there is no kernel `{kernel}` in this glmddp")]
    NoKernel { kernel: String },
    #[error("kernel `{kernel}` asks for {bytes} bytes of shared memory, and a block has at most {limit} on {device}")]
    SharedMemory { kernel: String, bytes: u32, device: Device, limit: u32 },
    #[error("no device for tensors could be made: {reason}")]
    Tensors { reason: String },
    #[error("{device} was not opened for tensors by glmddp")]
    ForeignDevice { device: String },
    #[error("{call} failed: {name}: {text}")]
    Call { call: &'static str, name: String, text: String },
}

const DRIVER_FILES: &[&str] = super::DRIVER.files;

impl CudaError {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotBuilt => Some(
                "cargo build --release --features cuda (`source scripts/setup_cuda.sh` brings nvcc), or a folder that scripts/bundle.sh made"
                    .into(),
            ),
            Self::NoDriver { .. } => Some(format!("{}; `nvidia-smi` shows whether it works", super::DRIVER.remedy)),
            Self::NoDevice => Some("look at CUDA_VISIBLE_DEVICES, and at what `nvidia-smi` says; in a container: docker run --gpus all".into()),
            Self::NoSuchDevice { found, .. } => Some(format!("use 0 to {}, or widen CUDA_VISIBLE_DEVICES", found.saturating_sub(1))),
            Self::DriverTooOld { required, .. } => Some(format!(
                "install driver {} or newer, or NVIDIA's cuda-compat-{}-{} on a data center GPU, or build with an older CUDA (CUDA_HOME)",
                driver_branch(*required),
                required.0,
                required.1
            )),
            Self::Architecture { .. } => Some("use a GPU of the Ampere generation (A100, RTX 30) or newer, or train on the CPU".into()),
            Self::Library { library, .. } => Some(library.remedy.into()),
            Self::Dtype { supported, .. } => Some(format!("use {}", dtypes(supported, "or"))),
            Self::NoImage { device, .. } => Some(format!(
                "add {}{} to ARCHITECTURES in build.rs and build again, with an nvcc that knows it",
                device.capability.0, device.capability.1
            )),
            Self::NoKernel { .. } => Some("the names of kernels come from src/kernels/*.cu: build again".into()),
            Self::SharedMemory { .. } | Self::ForeignDevice { .. } | Self::Tensors { .. } | Self::Call { .. } => None,
        }
    }

    /// Of a kernel that is not among `there`: it may be there for other types of elements.
    pub fn kernel_not_found(kernel: &str, there: &[&str]) -> Self {
        let split = |name: &str| {
            let (op, suffix) = name.rsplit_once('_')?;
            Some((op.to_owned(), KernelDtype::ALL.into_iter().find(|dtype| dtype.suffix() == suffix)?))
        };
        let Some((op, dtype)) = split(kernel) else { return Self::NoKernel { kernel: kernel.to_owned() } };
        let mut supported: Vec<_> = there.iter().filter_map(|name| split(name)).filter(|(o, _)| *o == op).map(|(_, dtype)| dtype).collect();
        supported.sort();
        if supported.is_empty() { Self::NoKernel { kernel: kernel.to_owned() } } else { Self::Dtype { op, dtype, supported } }
    }

    /// Of a failed call of the driver: the name of its code, and its text.
    pub fn call_failed(call: &'static str, name: &str, text: &str) -> Self {
        match name {
            "CUDA_ERROR_NO_DEVICE" => Self::NoDevice,
            _ => Self::Call { call, name: name.to_owned(), text: text.to_owned() },
        }
    }

    /// Of an image of `kernel` that the driver did not take.
    pub fn image_refused(kernel: &str, name: &str, text: &str, device: &Device, build: &super::Build) -> Self {
        match name {
            "CUDA_ERROR_NO_BINARY_FOR_GPU" | "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" | "CUDA_ERROR_INVALID_PTX" => Self::NoImage {
                kernel: kernel.to_owned(),
                device: device.clone(),
                architectures: build.architectures.clone(),
                ptx: build.ptx,
            },
            _ => Self::call_failed("cuModuleLoadData", name, text),
        }
    }
}

/// `a or b`, `a, b or c`.
fn alternatives(names: &[&str]) -> String {
    joined(names.iter().map(ToString::to_string).collect(), "or")
}

fn dtypes(dtypes: &[KernelDtype], word: &str) -> String {
    joined(dtypes.iter().map(|dtype| dtype.suffix().to_owned()).collect(), word)
}

fn versions(versions: &[Version]) -> String {
    joined(versions.iter().map(ToString::to_string).collect(), "and")
}

fn joined(mut items: Vec<String>, word: &str) -> String {
    match (items.pop(), items.is_empty()) {
        (Some(last), false) => format!("{} {word} {last}", items.join(", ")),
        (last, _) => last.unwrap_or_default(),
    }
}

/// The loader's reason, where it says more than that there is no such file.
fn because(reason: &Option<String>) -> String {
    reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::{Build, CUBLAS, CUBLAS_LT, CURAND, NCCL};

    fn text(error: &CudaError) -> String {
        let hint = error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
        format!("error: {error}{hint}")
    }

    fn device() -> Device {
        Device { ordinal: 0, name: "Tesla V100-SXM2-16GB".into(), capability: Version(7, 0), memory_bytes: 16 << 30 }
    }

    #[test]
    fn texts_of_what_the_machine_lacks() {
        insta::assert_snapshot!("not_built", text(&CudaError::NotBuilt));
        insta::assert_snapshot!("no_driver", text(&CudaError::NoDriver { reason: None }));
        insta::assert_snapshot!(
            "no_device",
            text(&CudaError::call_failed("cuInit", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"))
        );
        insta::assert_snapshot!("no_such_device", text(&CudaError::NoSuchDevice { ordinal: 2, found: 2 }));
        insta::assert_snapshot!("driver_too_old", text(&CudaError::DriverTooOld { required: Version(13, 0), found: Version(12, 4) }));
        insta::assert_snapshot!("unsupported_architecture", text(&CudaError::Architecture { device: device() }));
        let reason = Some("libcudart.so.13: cannot open shared object file: No such file or directory".to_owned());
        insta::assert_snapshot!("call_failed", text(&CudaError::call_failed("cuInit", "CUDA_ERROR_UNKNOWN", "unknown error")));
        insta::assert_snapshot!("driver_that_does_not_load", text(&CudaError::NoDriver { reason }));
    }

    #[test]
    fn texts_of_missing_libraries() {
        let missing = [CUBLAS, CUBLAS_LT, CURAND, NCCL].map(|library| text(&CudaError::Library { library, reason: None }));
        insta::assert_snapshot!("library_missing", missing.join("\n\n"));
        let reason = Some("libcublasLt.so.13: cannot open shared object file: No such file or directory".to_owned());
        insta::assert_snapshot!("library_that_does_not_load", text(&CudaError::Library { library: CUBLAS, reason }));
    }

    #[test]
    fn texts_of_missing_kernels() {
        let there = ["attention_fwd_bf16", "attention_fwd_f16", "rms_norm_fwd_f32"];
        insta::assert_snapshot!("dtype_not_supported", text(&CudaError::kernel_not_found("attention_fwd_f32", &there)));
        insta::assert_snapshot!("kernel_not_found", text(&CudaError::kernel_not_found("rotary_fwd_f32", &there)));
        assert_eq!(CudaError::kernel_not_found("norm", &there), CudaError::NoKernel { kernel: "norm".into() });
        let architectures = vec![Version(8, 0), Version(8, 9), Version(9, 0)];
        let build = Build { toolkit: Version(13, 0), architectures, ptx: Version(9, 0), num_kernels: 6 };
        let device = Device { ordinal: 1, name: "NVIDIA RTX PRO 6000".into(), capability: Version(12, 0), memory_bytes: 96 << 30 };
        let refused =
            |name| CudaError::image_refused("rms_norm_fwd_bf16", name, "no kernel image is available for execution", &device, &build);
        insta::assert_snapshot!("image_not_found", text(&refused("CUDA_ERROR_NO_BINARY_FOR_GPU")));
        let error = CudaError::SharedMemory {
            kernel: "attention_bwd_key_d128_bf16".into(),
            bytes: 180_224,
            device: device.clone(),
            limit: 101_376,
        };
        insta::assert_snapshot!("too_much_shared_memory", text(&error));
        insta::assert_snapshot!("image_refused", text(&refused("CUDA_ERROR_ILLEGAL_STATE")));
    }
}
