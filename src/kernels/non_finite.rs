//! The search for what is not finite.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::host::{F32View, on_host, tensor};
use super::launch::NO_FAULT;
use super::on_gpu::on_gpu;

/// Elements a task looks at.
const CHUNK: usize = 1 << 14;

/// Where the first element of a buffer is that is not finite: `[2]`, a u64 as two f32 words on the buffer's device, for [`place`].
///
/// # Errors
/// When the buffer is not contiguous f32.
pub fn search(buffer: &Tensor) -> Result<Tensor> {
    if let Some(gpu) = on_gpu(buffer)? {
        let place = gpu.upload_f32(&words(NO_FAULT))?;
        let (x, fault) = (gpu.at_of(buffer, DType::F32)?, gpu.at_of(&place, DType::F32)?);
        gpu.run(|e, _| device::first(e, x, buffer.elem_count(), fault))?;
        return Ok(place);
    }
    tensor(words(first(&F32View::new(buffer)?).map_or(NO_FAULT, |at| at as u64)).to_vec(), &[2])
}

/// What [`search`] found, from its words.
pub fn place(words: &[f32]) -> Option<usize> {
    let place = words.first_chunk::<2>().map_or(NO_FAULT, |pair| bytemuck::cast(*pair));
    (place != NO_FAULT).then_some(place as usize)
}

/// The first element of a buffer that is not finite: its place and value.
///
/// # Errors
/// When the buffer is not contiguous f32.
pub fn first_non_finite(buffer: &Tensor) -> Result<Option<(usize, f32)>> {
    // sync: the place is read here.
    let Some(at) = place(&search(buffer)?.to_vec1()?) else { return Ok(None) };
    let value = on_host(&buffer.flatten_all()?.narrow(0, at, 1)?)?.to_vec1()?;
    Ok(value.first().map(|value| (at, *value)))
}

fn first(data: &[f32]) -> Option<usize> {
    let chunk = data.par_chunks(CHUNK).position_first(|chunk| chunk.iter().any(|x| !x.is_finite()))?;
    let at = data[chunk * CHUNK..].iter().position(|x| !x.is_finite())?;
    Some(chunk * CHUNK + at)
}

fn words(place: u64) -> [f32; 2] {
    bytemuck::cast(place)
}

/// The kernel of `non_finite.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use crate::kernels::launch::{Bytes, Executor, Launch, LaunchError, launch, require_aligned};

    const THREADS: u32 = 256;
    /// Loads of 16 bytes that a thread makes.
    const LOADS: usize = 4;

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        x: u64,
        fault: u64,
        n: i64,
    }

    /// As [`super::search`] of x `[n]` f32: the index goes to `fault`, 8 bytes, unless that holds a lower one.
    ///
    /// # Errors
    /// When the address is no multiple of 16 bytes, or the launch fails.
    pub fn first(executor: &dyn Executor, x: u64, n: usize, fault: u64) -> Result<(), LaunchError> {
        let name = "non_finite_f32";
        require_aligned(name, &[x])?;
        let blocks = n.div_ceil(4 * LOADS * THREADS as usize);
        launch(executor, name, Launch::row(blocks, THREADS, 0), &Args { x, fault, n: n as i64 })
    }

    /// Of [`first`].
    pub fn bytes(n: usize) -> Bytes {
        Bytes { read: 4 * n as u64, written: 0 }
    }
}
