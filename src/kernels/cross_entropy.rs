//! Softmax cross-entropy in place: logits become their gradient.

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{F32View, tensor, with_f32_mut};
use super::launch::NO_REPORT;
use super::on_gpu::on_gpu;
use super::simd::{exp_sum, max, vectorize};

/// What becomes of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// They become d(sum of losses)/d logits = softmax - onehot(target). Where a loss is not finite its gradient is not either.
    ToGradient,
    /// They become e^(logit - max) and are of no further use.
    Discard,
}

/// Negative log-likelihood of each target in f32, `[N]`, on the logits' device.
///
/// # Shapes
/// logits `[N, V]`, targets `[N]` ids below V.
///
/// # Errors
/// When the number of targets differs or a target is not below V.
pub fn nll_(logits_NV: &Tensor, targets: &[u32], logits: Logits) -> Result<Tensor> {
    let (n, v) = logits_NV.dims2()?;
    if targets.len() != n {
        bail!("cross_entropy: {n} rows of logits, {} targets", targets.len());
    }
    if let Some(&bad) = targets.iter().find(|&&t| t as usize >= v) {
        bail!("cross_entropy: target {bad} is not below the vocabulary of {v}");
    }
    if let Some(gpu) = on_gpu(logits_NV)? {
        let (losses_N, targets) = (gpu.result_of(n, DType::F32)?, gpu.upload(targets)?);
        let rows = device::Rows {
            logits: gpu.at(logits_NV)?,
            targets: gpu.at_of(&targets, DType::U32)?,
            losses: gpu.at_of(&losses_N, DType::F32)?,
            fault: NO_REPORT,
            rows: n,
            columns: v,
        };
        gpu.run(|e, dtype| device::nll_(e, dtype, &rows, logits, 1.0))?;
        return Ok(losses_N);
    }
    let losses: Vec<std::sync::atomic::AtomicU32> = targets.iter().map(|_| 0.into()).collect();
    with_f32_mut(logits_NV, "cross_entropy", |values| {
        values.par_chunks_mut(v).zip(targets).zip(&losses).for_each(|((row, &target), loss)| {
            let nll = vectorize(|| row_nll(row, target as usize, logits));
            loss.store(nll.to_bits(), std::sync::atomic::Ordering::Relaxed);
        });
    })?;
    tensor(losses.into_iter().map(|bits| f32::from_bits(bits.into_inner())).collect(), &[n])
}

#[inline(always)]
fn row_nll(row: &mut [f32], target: usize, logits: Logits) -> f32 {
    let shift = max(row);
    let target_logit = row[target];
    let sum = exp_sum(row, shift);
    let loss = sum.ln() - (target_logit - shift);
    if logits == Logits::ToGradient {
        let scale = 1.0 / sum;
        row.iter_mut().for_each(|p| *p *= scale);
        row[target] = if loss.is_finite() { row[target] - 1.0 } else { f32::NAN };
    }
    loss
}

/// The index of the largest logit of each row and its distance to the second largest, `[N]`.
///
/// # Errors
/// When the tensor is not `[N, V]` f32 with V of at least 2.
pub fn top2(logits_NV: &Tensor) -> Result<Vec<(u32, f32)>> {
    let (_, v) = logits_NV.dims2()?;
    if v < 2 {
        bail!("top2: a vocabulary of {v} has no second choice");
    }
    let logits = F32View::new(logits_NV)?;
    Ok(logits
        .chunks_exact(v)
        .map(|row| {
            let (mut best, mut second) = ((0, f32::NEG_INFINITY), f32::NEG_INFINITY);
            for (i, &x) in row.iter().enumerate() {
                if x > best.1 {
                    (second, best) = (best.1, (i, x));
                } else if x > second {
                    second = x;
                }
            }
            (best.0 as u32, best.1 - second)
        })
        .collect())
}

/// The kernels of `cross_entropy.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use super::Logits;
    use crate::kernels::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, WARP, launch, require_aligned, tiles};

    const THREADS: u32 = 512;
    /// The target of a row that is not in the loss, as those of a prompt.
    pub const IGNORED: i32 = -1;

    /// Addresses: logits `[N, V]`, contiguous; targets `[N]` i32, below V or [`IGNORED`]; losses `[N]` f32; the fault's 8 bytes, which get the
    /// lowest row with another target.
    #[derive(Clone, Copy, Debug)]
    pub struct Rows {
        pub logits: u64,
        pub targets: u64,
        pub losses: u64,
        pub fault: u64,
        pub rows: usize,
        /// V.
        pub columns: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct Args {
        logits: u64,
        targets: u64,
        losses: u64,
        fault: u64,
        columns: i32,
        scale: f32,
    }

    /// As [`super::nll_`], the gradient times `scale`; of ignored rows loss and gradient are 0. [`Logits::Discard`] leaves the logits as they are.
    ///
    /// # Errors
    /// When the vocabulary or an address is no multiple of 16 bytes, or the launch fails.
    pub fn nll_(executor: &dyn Executor, dtype: KernelDtype, rows: &Rows, logits: Logits, scale: f32) -> Result<(), LaunchError> {
        let pass = if logits == Logits::ToGradient { "grad" } else { "loss" };
        let name = format!("cross_entropy_{pass}_{}", dtype.suffix());
        let &Rows { logits, targets, losses, fault, rows, columns } = rows;
        tiles(&name, dtype, columns, THREADS)?;
        require_aligned(&name, &[logits])?;
        let args = Args { logits, targets, losses, fault, columns: columns as i32, scale };
        launch(executor, &name, Launch::row(rows, THREADS, THREADS / WARP * 4), &args)
    }

    /// Of [`nll_`] where no row is ignored.
    pub fn bytes(dtype: KernelDtype, rows: usize, columns: usize, logits: Logits) -> Bytes {
        let (s, row) = (dtype.num_bytes(), columns * dtype.num_bytes());
        let (read, written) = if logits == Logits::ToGradient { (2 * row, row) } else { (row, 0) };
        Bytes { read: (rows * (read + s + THREADS as usize * 4)) as u64, written: (rows * (written + 4)) as u64 }
    }
}
