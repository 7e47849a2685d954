//! What a run computes on, and in which type.

use std::path::Path;

use candle_core::{DType, Device};

use super::TrainError;
use super::together::together;
use crate::config::Plan;
use crate::config::plan::{DeviceChoice, ModelPlan};
use crate::dist::ProcessGroup;
use crate::kernels::attention::HEAD_DIMS;
use crate::kernels::cuda::{self, CudaError};
use crate::kernels::launch::KernelDtype;
use crate::model::weights::WeightSource;
use crate::model::{ComputeDtype, ModelConfig};
use crate::peft::{self, MethodPlan};

/// There is one where NVIDIA's kernel module is loaded.
const DRIVER_FILE: &str = "/proc/driver/nvidia/version";

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceWish {
    pub device: DeviceChoice,
    pub dtype: Option<ComputeDtype>,
}

impl DeviceWish {
    fn dtype_on_gpu(&self) -> ComputeDtype {
        self.dtype.unwrap_or(ComputeDtype::Bfloat16)
    }
}

/// What is computed beside the base.
#[derive(Clone, Copy, Debug)]
pub enum Workload<'a> {
    Base,
    Methods(&'a [&'a MethodPlan]),
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
    /// Opens the device that `wish` asks for, for a model and what is computed with it, and says in a line what it is. Every rank calls it.
    ///
    /// # Errors
    /// The same on every rank: when a GPU is asked for and cannot be used, or a CPU is to compute in 16 bits.
    pub fn open(wish: DeviceWish, config: &ModelConfig, workload: Workload, group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        let (mut chosen, reason) = together(group, || match wish.device {
            DeviceChoice::Cpu => Ok((Self::cpu(wish)?, None)),
            DeviceChoice::Cuda(ordinal) => {
                supported(config, workload, wish.dtype_on_gpu())?;
                Ok((Self::gpu(ordinal, wish, group)?, None))
            }
            DeviceChoice::Auto => Self::auto(wish, config, workload, group),
        })?;
        let told = if chosen.device.is_cpu() { reason.unwrap_or_default() } else { ON_GPU.to_owned() };
        let all = group.all_gather_bytes(told.as_bytes())?;
        if let Some(rank) = all.iter().position(|told| told != ON_GPU.as_bytes()) {
            let reason = String::from_utf8_lossy(&all[rank]);
            if group.rank() == 0 && all.iter().any(|told| told == ON_GPU.as_bytes()) {
                let why = if reason.is_empty() { "it finds no GPU" } else { &*reason };
                tracing::warn!("all ranks compute on the CPU, since rank {rank} does: {why}");
            } else if group.rank() == 0 && !reason.is_empty() {
                tracing::warn!("there is a GPU, and it is not used: {reason}");
            }
            // Ranks that compute differently would drift apart.
            chosen = together(group, || Self::cpu(wish))?;
        }
        if !chosen.device.is_cpu() {
            tracing::info!("rank {} computes on {}", group.rank(), chosen.name);
        }
        Ok(chosen)
    }

    /// Device and type of values, whichever GPU it is: `cuda, bfloat16`.
    pub fn kind(&self) -> String {
        format!("{}, {}", if self.device.is_cpu() { "cpu" } else { "cuda" }, self.dtype)
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
        if self.dtype == ComputeDtype::Bfloat16
            && group.rank() == 0
            && let Some((name, shape)) = config.parameter_shapes().first_key_value()
        {
            let stored = match source.dtype(name, shape)? {
                DType::BF16 => return Ok(()),
                DType::F16 => "float16",
                _ => "float32",
            };
            tracing::info!("the weights are {stored} and are rounded to bfloat16 once, each by at most 2^-9 (0.2 %) of itself");
        }
        Ok(())
    }

    fn cpu(wish: DeviceWish) -> Result<Self, TrainError> {
        match wish.dtype {
            None | Some(ComputeDtype::Float32) => {
                let dtype = ComputeDtype::Float32;
                Ok(Self { device: Device::Cpu, dtype, name: format!("the CPU in {dtype}") })
            }
            Some(ComputeDtype::Bfloat16) => Err(TrainError::DtypeOnCpu),
        }
    }

    fn gpu(ordinal: Option<usize>, wish: DeviceWish, group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        let (driver, dtype) = (cuda::driver()?, wish.dtype_on_gpu());
        let (ranks_here, gpus) = (group.local_size(), driver.devices.len());
        if ordinal.is_none() && ranks_here > gpus && gpus > 0 {
            return Err(TrainError::TooFewGpus { ranks_here, gpus });
        }
        let ordinal = ordinal.unwrap_or(group.local_rank());
        let device = cuda::tensor_device(ordinal)?;
        let name = driver.devices.get(ordinal).map(ToString::to_string).unwrap_or_default();
        Ok(Self { device, dtype, name: format!("{name} in {dtype}") })
    }

    /// A GPU where all of it can be computed there; else the CPU, with the reason where somebody with a GPU would wonder.
    fn auto(
        wish: DeviceWish,
        config: &ModelConfig,
        workload: Workload,
        group: &dyn ProcessGroup,
    ) -> Result<(Self, Option<String>), TrainError> {
        let reason: TrainError = match cuda::driver() {
            Ok(driver) if driver.devices.is_empty() => return Ok((Self::cpu(wish)?, None)),
            Err(CudaError::NoDriver { .. } | CudaError::NoDevice) => return Ok((Self::cpu(wish)?, None)),
            Err(CudaError::NotBuilt) if !Path::new(DRIVER_FILE).exists() => return Ok((Self::cpu(wish)?, None)),
            Err(error) => error.into(),
            Ok(_) => match supported(config, workload, wish.dtype_on_gpu()) {
                Err(error) => error.into(),
                Ok(()) => match Self::gpu(None, wish, group) {
                    Ok(chosen) => return Ok((chosen, None)),
                    Err(error) if is_of_the_machine(&error) => error,
                    Err(error) => return Err(error),
                },
            },
        };
        // A type that only a GPU has was asked for: why there is none is the error.
        let text = reason.to_string();
        Self::cpu(wish).map(|chosen| (chosen, Some(text))).map_err(|_| reason)
    }
}

/// What a rank on a GPU tells the others; the others tell why they are not.
const ON_GPU: &str = "on a GPU";

/// Whether a GPU cannot be used because of what the machine has, not because something failed.
fn is_of_the_machine(error: &TrainError) -> bool {
    use CudaError::{Architecture, DriverTooOld, Library, NoImage, NoSuchDevice};
    match error {
        TrainError::TooFewGpus { .. } => true,
        TrainError::Cuda(error) => {
            matches!(**error, Architecture { .. } | DriverTooOld { .. } | Library { .. } | NoImage { .. } | NoSuchDevice { .. })
        }
        _ => false,
    }
}

/// Tests that kernels can compute the model and what is computed with it.
fn supported(config: &ModelConfig, workload: Workload, dtype: ComputeDtype) -> Result<(), NotOnGpu> {
    let refused = |what| move |reason| NotOnGpu::Method { what, reason };
    match workload {
        Workload::Base => {}
        Workload::Methods(methods) => methods
            .iter()
            .try_for_each(|method| method.settings().gpu_support().map_err(refused(format!("method {}", method.kind().name()))))?,
        Workload::Adapter(dir) => peft::read::gpu_support(dir).map_err(refused(format!("the adapter in {}", dir.display())))?,
    }
    if !HEAD_DIMS.contains(&config.kv_channels) {
        let expected = HEAD_DIMS.map(|size| size.to_string()).join(" or ");
        return Err(NotOnGpu::Size { what: "heads", found: config.kv_channels, expected });
    }
    let wide = match dtype {
        ComputeDtype::Float32 => KernelDtype::F32.wide(),
        ComputeDtype::Bfloat16 => KernelDtype::Bf16.wide(),
    };
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
