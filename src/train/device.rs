//! What a run computes on, and in which type.

use std::path::Path;

use candle_core::{DType, Device};

use super::TrainError;
use super::together::together;
use crate::config::Plan;
use crate::config::plan::{DeviceChoice, ModelPlan};
use crate::dist::ProcessGroup;
use crate::kernels::cuda::{self, CudaError};
use crate::kernels::launch::KernelDtype;
use crate::model::weights::WeightSource;
use crate::model::{ComputeDtype, ModelConfig};
use crate::peft::{self, MethodPlan};

/// There is one where NVIDIA's kernel module is loaded.
const DRIVER_FILE: &str = "/proc/driver/nvidia/version";

/// Heads of other sizes have no kernel.
const HEAD_DIMS: [usize; 2] = [64, 128];

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish {
    pub device: DeviceChoice,
    pub dtype: Option<ComputeDtype>,
}

/// What is computed beside the base.
#[derive(Clone, Copy, Debug)]
pub enum Tuned<'a> {
    Nothing,
    By(&'a [&'a MethodPlan]),
    /// In this folder.
    Adapter(&'a Path),
}

/// A device that is open.
#[derive(Clone, Debug)]
pub struct Chosen {
    pub device: Device,
    pub dtype: ComputeDtype,
    /// As a person reads it: `GPU 0 (NVIDIA H100, compute capability 9.0) in bfloat16`.
    pub name: String,
}

/// Why a model or a method cannot be computed on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotOnGpu {
    #[error("{what} {reason}")]
    Method { what: String, reason: &'static str },
    #[error("the model has {what} of {found}, and the kernels of a GPU take {expected}")]
    Size { what: &'static str, found: usize, expected: String },
}

impl Chosen {
    /// Opens the device that `wish` asks for, for a model and what is tuned on it, and says in one line what it is. Every rank calls it.
    ///
    /// # Errors
    /// The same on every rank: when a GPU is asked for and cannot be used, or a CPU is to compute in 16 bits.
    pub fn open(wish: Wish, config: &ModelConfig, tuned: Tuned, group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        let chosen = together(group, || match wish.device {
            DeviceChoice::Cpu => Self::cpu(wish.dtype),
            DeviceChoice::Cuda(ordinal) => {
                let dtype = wish.dtype.unwrap_or(ComputeDtype::Bfloat16);
                supported(config, tuned, dtype)?;
                Self::gpu(ordinal, dtype, group)
            }
            DeviceChoice::Auto => Self::auto(wish.dtype, config, tuned, group),
        })?;
        if !chosen.device.is_cpu() {
            tracing::info!("rank {} computes on {}", group.rank(), chosen.name);
        }
        Ok(chosen)
    }

    /// The plan with what was chosen in the place of what was asked for, as a checkpoint has it: which GPU it was is of no matter there.
    pub fn of(&self, plan: &Plan) -> Plan {
        let device = if self.device.is_cpu() { DeviceChoice::Cpu } else { DeviceChoice::Cuda(None) };
        Plan { model: ModelPlan { device, compute_dtype: Some(self.dtype), ..plan.model.clone() }, ..plan.clone() }
    }

    /// Says what becomes of the weights in `source`, where that is not what they are.
    ///
    /// # Errors
    /// When one is missing.
    pub fn say_rounding(&self, source: &WeightSource, config: &ModelConfig, group: &dyn ProcessGroup) -> Result<(), TrainError> {
        if self.dtype == ComputeDtype::Bfloat16 && group.rank() == 0 {
            for (name, shape) in config.parameter_shapes().iter().take(1) {
                let stored = match source.dtype(name, shape)? {
                    DType::BF16 => return Ok(()),
                    DType::F16 => "float16",
                    _ => "float32",
                };
                tracing::info!("the weights are {stored} and are rounded to bfloat16 once, each by at most 2^-9 (0.2 %) of itself");
            }
        }
        Ok(())
    }

    fn cpu(dtype: Option<ComputeDtype>) -> Result<Self, TrainError> {
        match dtype {
            None | Some(ComputeDtype::Float32) => {
                Ok(Self { device: Device::Cpu, dtype: ComputeDtype::Float32, name: "the CPU in float32".to_owned() })
            }
            Some(ComputeDtype::Bfloat16) => Err(TrainError::DtypeOnCpu),
        }
    }

    fn gpu(ordinal: Option<usize>, dtype: ComputeDtype, group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        let driver = cuda::driver()?;
        let ranks_here = group.local_size();
        match ordinal {
            Some(_) if ranks_here > 1 => return Err(TrainError::OneGpuForRanks { ranks_here }),
            None if ranks_here > driver.devices.len() && !driver.devices.is_empty() => {
                return Err(TrainError::TooFewGpus { ranks_here, gpus: driver.devices.len() });
            }
            _ => {}
        }
        let ordinal = ordinal.unwrap_or(group.local_rank());
        let device = cuda::tensor_device(ordinal)?;
        let name = driver.devices.get(ordinal).map(ToString::to_string).unwrap_or_default();
        Ok(Self { device, dtype, name: format!("{name} in {}", text(dtype)) })
    }

    /// A GPU where all of it can be computed there; else the CPU, with the reason where somebody with a GPU would wonder.
    fn auto(dtype: Option<ComputeDtype>, config: &ModelConfig, tuned: Tuned, group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        let on_gpu = dtype.unwrap_or(ComputeDtype::Bfloat16);
        let reason = match cuda::driver() {
            Ok(driver) if driver.devices.is_empty() => None,
            Ok(_) => match supported(config, tuned, on_gpu) {
                Ok(()) => return Self::gpu(None, on_gpu, group),
                Err(reason) => Some(reason.to_string()),
            },
            Err(error @ CudaError::NotBuilt) if Path::new(DRIVER_FILE).exists() => Some(error.to_string()),
            Err(CudaError::NotBuilt | CudaError::NoDriver { .. } | CudaError::NoDevice) => None,
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = reason.filter(|_| group.rank() == 0) {
            tracing::warn!("there is a GPU, and it is not used: {reason}");
        }
        Self::cpu(dtype)
    }
}

/// Tests that kernels can compute the method on the model.
fn supported(config: &ModelConfig, tuned: Tuned, dtype: ComputeDtype) -> Result<(), NotOnGpu> {
    let refused = |what| move |reason| NotOnGpu::Method { what, reason };
    match tuned {
        Tuned::Nothing => {}
        Tuned::By(methods) => methods
            .iter()
            .try_for_each(|method| method.settings().gpu_support().map_err(refused(format!("method {}", method.kind().name()))))?,
        Tuned::Adapter(dir) => peft::read::gpu_support(dir).map_err(refused(format!("the adapter in {}", dir.display())))?,
    }
    if !HEAD_DIMS.contains(&config.kv_channels) {
        let expected = HEAD_DIMS.map(|size| size.to_string()).join(" or ");
        return Err(NotOnGpu::Size { what: "heads", found: config.kv_channels, expected });
    }
    let wide = kernel_dtype(dtype).wide();
    for (what, found) in [
        ("a hidden size", config.hidden_size),
        ("an ffn_hidden_size", config.ffn_hidden_size),
        ("a padded vocabulary", config.padded_vocab_size),
    ] {
        if !found.is_multiple_of(wide) {
            return Err(NotOnGpu::Size { what, found, expected: format!("multiples of {wide}") });
        }
    }
    Ok(())
}

fn kernel_dtype(dtype: ComputeDtype) -> KernelDtype {
    match dtype.dtype() {
        DType::BF16 => KernelDtype::Bf16,
        _ => KernelDtype::F32,
    }
}

fn text(dtype: ComputeDtype) -> &'static str {
    match dtype {
        ComputeDtype::Float32 => "float32",
        ComputeDtype::Bfloat16 => "bfloat16",
    }
}
