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
    if x.device().is_cpu() {
        return Ok(None);
    }
    let dtype = match x.dtype() {
        DType::F32 => KernelDtype::F32,
        DType::BF16 => KernelDtype::Bf16,
        DType::F16 => KernelDtype::F16,
        dtype => bail!("no kernel computes with {dtype:?}"),
    };
    let gpu = cuda::gpu_of(x.device()).map_err(Error::wrap)?;
    Ok(Some(OnGpu { gpu, device: x.device().clone(), dtype }))
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
        Tensor::from_slice(words, words.len(), &self.device)
    }

    /// As [`Self::upload`], of f32 values.
    ///
    /// # Errors
    /// As [`Self::upload`].
    pub fn upload_f32(&self, values: &[f32]) -> Result<Tensor> {
        Tensor::from_slice(values, values.len(), &self.device)
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
