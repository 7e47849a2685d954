//! How an op launches kernels on tensors of a GPU.
//!
//! An op is written once, for any device: `match on_gpu(x)? { None => the specification over slices, Some(gpu) => the launch }`.
#![allow(unsafe_code, reason = "results are written by a kernel, so their memory is not cleared first")]

use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Shape, Tensor, bail};

use super::cuda;
use super::gpu::{Gpu, Product};
use super::launch::{Buffer, Executor, KernelDtype, LaunchError};

/// The GPU of a tensor, and the type of its values.
pub struct OnGpu {
    gpu: Arc<dyn Gpu>,
    device: Device,
    pub dtype: KernelDtype,
}

/// `None` if `x` is on the CPU.
///
/// # Errors
/// When `x` is on another device than glmddp opens, or has values that no kernel computes with.
pub fn on_gpu(x: &Tensor) -> Result<Option<OnGpu>> {
    open(x.device(), x.dtype())
}

/// 64-bit numbers as pairs of words, on a GPU.
///
/// # Errors
/// When `device` is none, or there is not enough memory.
pub fn upload_u64(numbers: &[u64], device: &Device) -> Result<Tensor> {
    upload(&numbers.iter().flat_map(|&n| [n as u32, (n >> 32) as u32]).collect::<Vec<u32>>(), device)
}

/// Words, on a GPU.
///
/// # Errors
/// As [`upload_u64`].
pub fn upload(words: &[u32], device: &Device) -> Result<Tensor> {
    match open(device, DType::F32)? {
        Some(gpu) => gpu.upload(words),
        None => bail!("upload: to the CPU"),
    }
}

/// `dtype` is that of the op's values.
fn open(device: &Device, dtype: DType) -> Result<Option<OnGpu>> {
    if device.is_cpu() {
        return Ok(None);
    }
    let dtype = match dtype {
        DType::F32 => KernelDtype::F32,
        DType::BF16 => KernelDtype::Bf16,
        DType::F16 => KernelDtype::F16,
        dtype => bail!("no kernel computes with {dtype:?}"),
    };
    let gpu = cuda::gpu_of(device).map_err(Error::wrap)?;
    Ok(Some(OnGpu { gpu, device: device.clone(), dtype }))
}

impl OnGpu {
    /// Where a tensor of this GPU begins, of the same type as the op's first. To be used on this device's stream, before the tensor is dropped:
    /// its memory is freed in the order of the stream.
    ///
    /// # Errors
    /// When it is on another device, not contiguous, or of another type.
    pub fn at(&self, x: &Tensor) -> Result<u64> {
        if x.dtype() != self.tensor_dtype() {
            bail!("expected {:?}, found {:?}", self.tensor_dtype(), x.dtype());
        }
        self.at_of(x, x.dtype())
    }

    /// As [`Self::at`], of a sum in f32 or in the op's type.
    ///
    /// # Errors
    /// As [`Self::at`].
    pub fn at_sum(&self, x: &Tensor) -> Result<u64> {
        if x.dtype() == DType::F32 { self.at_of(x, DType::F32) } else { self.at(x) }
    }

    /// As [`Self::at`], of `dtype`.
    ///
    /// # Errors
    /// As [`Self::at`].
    pub fn at_of(&self, x: &Tensor, dtype: DType) -> Result<u64> {
        if !x.device().same_device(&self.device) {
            bail!(
                "expected a tensor on {:?}, found one on {:?}, or the GPU was opened twice",
                self.device.location(),
                x.device().location()
            );
        }
        if x.dtype() != dtype {
            bail!("expected {dtype:?}, found {:?}", x.dtype());
        }
        cuda::address(x)
    }

    pub fn tensor_dtype(&self) -> DType {
        match self.dtype {
            KernelDtype::F32 => DType::F32,
            KernelDtype::Bf16 => DType::BF16,
            KernelDtype::F16 => DType::F16,
        }
    }

    /// Memory for a result of the op's type, which the kernel must overwrite completely.
    ///
    /// # Errors
    /// When there is not enough.
    pub fn result(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        self.result_of(shape, self.tensor_dtype())
    }

    /// As [`Self::result`], of `dtype`.
    ///
    /// # Errors
    /// As [`Self::result`].
    pub fn result_of(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        let len = shape.elem_count();
        // A GPU has no memory of 0 bytes.
        // SAFETY: values of any bits are values of these types; the caller's kernel writes them before anybody reads.
        let values = unsafe { Tensor::empty(len.max(1), dtype, &self.device) }?;
        values.narrow(0, 0, len)?.reshape(shape)
    }

    /// Words of the host, on the GPU.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn upload(&self, words: &[u32]) -> Result<Tensor> {
        self.sent(bytemuck::cast_slice(words), words.len(), DType::U32)
    }

    /// As [`Self::upload`], of f32 values.
    ///
    /// # Errors
    /// As [`Self::upload`].
    pub fn upload_f32(&self, values: &[f32]) -> Result<Tensor> {
        self.sent(bytemuck::cast_slice(values), values.len(), DType::F32)
    }

    fn sent(&self, bytes: &[u8], len: usize, dtype: DType) -> Result<Tensor> {
        let sent = self.result_of(len, dtype)?;
        if len > 0 {
            self.gpu.send(bytes, Buffer { address: self.at_of(&sent, dtype)?, bytes: bytes.len() }).map_err(Error::wrap)?;
        }
        Ok(sent)
    }

    /// Launches what `start` does.
    ///
    /// # Errors
    /// Those of `start`.
    pub fn run(&self, start: impl FnOnce(&dyn Executor, KernelDtype) -> std::result::Result<(), LaunchError>) -> Result<()> {
        start(&*self.gpu, self.dtype).map_err(Error::wrap)
    }

    /// Queues a copy of a tensor's values to another of the same type and size.
    ///
    /// # Errors
    /// When one is on another device, or the device fails.
    pub fn copy(&self, from: &Tensor, to: &Tensor) -> Result<()> {
        let buffer = |x: &Tensor| Ok::<_, Error>(Buffer { address: self.at(x)?, bytes: x.elem_count() * x.dtype().size_in_bytes() });
        self.gpu.copy(buffer(from)?, buffer(to)?).map_err(Error::wrap)
    }

    /// # Errors
    /// As [`Gpu::product`].
    pub fn product(&self, product: &Product) -> Result<()> {
        self.gpu.product(product).map_err(Error::wrap)
    }
}
