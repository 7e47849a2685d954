//! tanh by element, between the two layers of a prefix's projection, in f32.

use candle_core::{DType, Result, Tensor, bail};

use super::on_gpu::on_gpu;

/// x -> tanh x, any shape.
///
/// # Errors
/// When the tensor is not in f32 on a supported device.
pub fn fwd(x: &Tensor) -> Result<Tensor> {
    let Some(gpu) = on_gpu(x)? else { return x.tanh() };
    let y = gpu.result_of(x.shape(), DType::F32)?;
    let at = device::At { x: gpu.at_of(x, DType::F32)?, dy: 0, out: gpu.at_of(&y, DType::F32)?, n: x.elem_count() };
    gpu.run(|e, _| device::fwd(e, &at))?;
    Ok(y)
}

/// y = tanh x and dy -> dx = dy (1 - y²).
///
/// # Errors
/// When the shapes differ, or as [`fwd`].
pub fn bwd(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    if y.dims() != dy.dims() {
        bail!("tanh: shapes {:?} and {:?} differ", y.dims(), dy.dims());
    }
    let Some(gpu) = on_gpu(y)? else { return dy * y.sqr()?.affine(-1.0, 1.0)? };
    let dx = gpu.result_of(y.shape(), DType::F32)?;
    let [x, dy, out] = [y, dy, &dx].map(|tensor| gpu.at_of(tensor, DType::F32));
    let at = device::At { x: x?, dy: dy?, out: out?, n: y.elem_count() };
    gpu.run(|e, _| device::bwd(e, &at))?;
    Ok(dx)
}

/// The kernels of `tanh.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use crate::kernels::launch::{Bytes, Executor, Launch, LaunchError, launch};

    /// Values of a block.
    const OF_BLOCK: usize = 4 * THREADS as usize;
    const THREADS: u32 = 256;

    /// Addresses, `[n]` f32 each: x and out; backward, x is y.
    #[derive(Clone, Copy, Debug)]
    pub struct At {
        pub x: u64,
        pub dy: u64,
        pub out: u64,
        pub n: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        x: u64,
        dy: u64,
        out: u64,
        n: i64,
    }

    /// As [`super::fwd`].
    ///
    /// # Errors
    /// When the launch fails.
    pub fn fwd(executor: &dyn Executor, at: &At) -> Result<(), LaunchError> {
        start(executor, "tanh_fwd_f32", at)
    }

    /// As [`super::bwd`].
    ///
    /// # Errors
    /// When the launch fails.
    pub fn bwd(executor: &dyn Executor, at: &At) -> Result<(), LaunchError> {
        start(executor, "tanh_bwd_f32", at)
    }

    fn start(executor: &dyn Executor, name: &str, at: &At) -> Result<(), LaunchError> {
        let &At { x, dy, out, n } = at;
        launch(executor, name, Launch::row(n.div_ceil(OF_BLOCK), THREADS, 0), &Args { x, dy, out, n: n as i64 })
    }

    /// Bytes moved by [`fwd`].
    pub fn fwd_bytes(n: usize) -> Bytes {
        Bytes { read: 4 * n as u64, written: 4 * n as u64 }
    }
}
