//! Every kernel against the CPU's code, which is the specification: the same cases wherever kernels run.

mod attention;
mod rms_norm;

use sha2::{Digest, Sha256};

use super::launch::{Buffer, Executor, KernelDtype, LaunchError};
use crate::digest::hex;
use crate::rng::{KeyedRng, Stream};

/// Numbers of rows or tokens: one, and about the sizes of warps, tiles and blocks.
pub const COUNTS: [usize; 6] = [1, 31, 33, 64, 127, 193];

/// One launch or a few, and what must come of it.
pub struct Case {
    /// The kernels' file, without its ending.
    pub file: &'static str,
    /// What is special about it.
    pub name: String,
    run: Box<dyn Fn(&mut Check) -> Result<(), CheckError> + Send + Sync>,
}

#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    #[error("{what}, element {at} of {len}: expected {expected:e}, found {found:e}, and they may differ by {tolerance:e}")]
    Differs { what: String, at: usize, len: usize, expected: f32, found: f32, tolerance: f32 },
    #[error("{what}: expected {expected}, found {found}")]
    Other { what: String, expected: String, found: String },
}

/// All cases, by file.
pub fn cases() -> Vec<Case> {
    [attention::cases(), rms_norm::cases()].into_iter().flatten().collect()
}

impl Case {
    fn new(file: &'static str, name: String, run: impl Fn(&mut Check) -> Result<(), CheckError> + Send + Sync + 'static) -> Self {
        Self { file, name, run: Box::new(run) }
    }

    /// A hash of all that the kernels wrote: the same in every run.
    ///
    /// # Errors
    /// When a kernel fails, or gives something else than the specification.
    pub fn run(&self, executor: &dyn Executor) -> Result<String, CheckError> {
        let mut check = Check { executor, outputs: Sha256::new() };
        (self.run)(&mut check)?;
        Ok(hex(&check.outputs.finalize()))
    }
}

/// How far a kernel's result may be from the specification's, both from the same rounded inputs.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Of the expected value.
    pub relative: f32,
    /// Of any value; in units of the inputs' size.
    pub absolute: f32,
}

impl Tolerance {
    /// Of a result that is computed in f32 and rounded once to `dtype`: half a unit in the last place, and what sums of some thousand f32
    /// products lose in another order.
    pub fn rounded_once(dtype: KernelDtype) -> Self {
        let f32_part = 1e-5;
        match dtype {
            KernelDtype::F32 => Self { relative: f32_part, absolute: 2e-6 },
            _ => Self { relative: dtype.epsilon() + f32_part, absolute: 2e-6 },
        }
    }

    /// Of a result whose intermediate values (probabilities, their gradients) were rounded to `dtype` before a tensor core took them; the
    /// absolute one in units of the vector's root mean square. Where two keys share all probability their gradients cancel, and each may be
    /// off by half a unit in the last place times an input of three or four standard deviations. In f32, scores of some tens are off by
    /// 1e-6 of themselves, and so are their probabilities.
    pub fn rounded_inside(dtype: KernelDtype) -> Self {
        match dtype {
            KernelDtype::F32 => Self { relative: 2e-5, absolute: 2e-5 },
            _ => Self { relative: 4.0 * dtype.epsilon(), absolute: 4.0 * dtype.epsilon() },
        }
    }

    fn of(self, expected: f32) -> f32 {
        self.relative * expected.abs() + self.absolute
    }
}

/// A case that runs: its memory, and what it has read.
pub struct Check<'e> {
    pub executor: &'e dyn Executor,
    outputs: Sha256,
}

impl Check<'_> {
    /// Memory with `values` in `dtype`.
    pub fn input(&self, name: &str, dtype: KernelDtype, values: &[f32]) -> Result<u64, LaunchError> {
        self.bytes(name, &dtype.to_bytes(values))
    }

    pub fn bytes(&self, name: &str, bytes: &[u8]) -> Result<u64, LaunchError> {
        let buffer = self.executor.alloc(name, bytes.len())?;
        self.executor.write(buffer, bytes)?;
        Ok(buffer.address)
    }

    /// Memory for `len` values that a kernel writes.
    pub fn output(&self, name: &str, dtype: KernelDtype, len: usize) -> Result<u64, LaunchError> {
        Ok(self.executor.alloc(name, len * dtype.num_bytes())?.address)
    }

    /// `len` values that a kernel wrote.
    pub fn read(&mut self, address: u64, dtype: KernelDtype, len: usize) -> Result<Vec<f32>, LaunchError> {
        let bytes = self.executor.read(Buffer { address, bytes: len * dtype.num_bytes() })?;
        self.outputs.update(&bytes);
        Ok(dtype.from_bytes(&bytes))
    }

    /// Reads `expected.len()` values and holds them against `expected`.
    pub fn expect(
        &mut self,
        what: &str,
        address: u64,
        dtype: KernelDtype,
        expected: &[f32],
        tolerance: Tolerance,
    ) -> Result<(), CheckError> {
        self.compare(what, address, dtype, expected, |_, value| tolerance.of(value))
    }

    /// As [`Self::expect`], with the absolute tolerance in units of each value's `sizes` ([`vector_sizes`]): the errors of many rounded
    /// products grow with the vector that they make up. What is left of exact cancellation may differ as it does in f32.
    pub fn expect_sized(
        &mut self,
        what: &str,
        address: u64,
        dtype: KernelDtype,
        expected: &[f32],
        sizes: &[f32],
        tolerance: Tolerance,
    ) -> Result<(), CheckError> {
        let left = Tolerance::rounded_inside(KernelDtype::F32).absolute;
        let Tolerance { relative, absolute } = tolerance;
        self.compare(what, address, dtype, expected, |at, value| relative * value.abs() + absolute * sizes[at] + left)
    }

    fn compare(
        &mut self,
        what: &str,
        address: u64,
        dtype: KernelDtype,
        expected: &[f32],
        tolerance: impl Fn(usize, f32) -> f32,
    ) -> Result<(), CheckError> {
        let (len, found) = (expected.len(), self.read(address, dtype, expected.len())?);
        for (at, (&expected, &found)) in expected.iter().zip(&found).enumerate() {
            let tolerance = tolerance(at, expected);
            // Infinities must be equal; a NaN equals nothing.
            if !((expected - found).abs() <= tolerance || expected == found) {
                return Err(CheckError::Differs { what: what.to_owned(), at, len, expected, found, tolerance });
            }
        }
        Ok(())
    }
}

/// For each value the root mean square of its vector of `width` values.
pub fn vector_sizes(values: &[f32], width: usize) -> Vec<f32> {
    let size = |vector: &[f32]| (vector.iter().map(|x| x * x).sum::<f32>() / width as f32).sqrt();
    values.chunks(width).flat_map(|vector| vec![size(vector); vector.len()]).collect()
}

/// Normal values of standard deviation `scale`, rounded to `dtype`; `key` chooses them.
pub fn random(key: u64, len: usize, scale: f32, dtype: KernelDtype) -> Vec<f32> {
    KeyedRng::new(key, Stream::ParameterInit, 0).normal(len).into_iter().map(|v| dtype.round(v * scale)).collect()
}
