//! Every kernel against the CPU's code, which is the specification: the same cases wherever kernels run.

mod adamw;
mod attention;
mod column_sums;
mod cross_entropy;
mod dropout;
mod elementwise;
mod embedding;
mod empty;
mod finite_differences;
mod non_finite;
pub mod products;
mod rms_norm;
mod rotary;
mod swiglu;
mod tanh;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::rc::Rc;

use bytemuck::Pod;
use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};

use super::gpu::Gpu;
use super::launch::{Buffer, Bytes, Executor, KernelDtype, LaunchError, NO_FAULT, download, upload};
use crate::digest::hex;
use crate::rng::{KeyedRng, Stream};

/// Numbers of rows or tokens: one, and about the sizes of warps, tiles and blocks.
pub const COUNTS: [usize; 6] = [1, 31, 33, 64, 127, 193];

/// What cases belong to: the files of kernels, and cuBLASLt's products.
pub const FILES: [&str; 14] = [
    "adamw",
    "attention",
    "attention_f32",
    "column_sums",
    "cross_entropy",
    "dropout",
    "elementwise",
    "embedding",
    "non_finite",
    "rms_norm",
    "rotary",
    "swiglu",
    "tanh",
    "products",
];

type Run = dyn Fn(&mut Check) -> Result<(), CheckError> + Send + Sync;

/// One launch or a few, and what must come of it.
pub struct Case {
    /// The kernels' file, without its ending.
    pub file: &'static str,
    /// What is special about it.
    pub name: String,
    /// What its kernels ask of global memory, by the formulas beside their launches; none where nobody says.
    pub bytes: Option<Bytes>,
    run: Box<Run>,
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
    let all = [
        adamw::cases(),
        attention::cases(),
        column_sums::cases(),
        cross_entropy::cases(),
        dropout::cases(),
        elementwise::cases(),
        embedding::cases(),
        empty::cases(),
        finite_differences::cases(),
        non_finite::cases(),
        rms_norm::cases(),
        rotary::cases(),
        swiglu::cases(),
        tanh::cases(),
    ];
    all.into_iter().flatten().collect()
}

impl Case {
    pub fn new(file: &'static str, name: String, run: impl Fn(&mut Check) -> Result<(), CheckError> + Send + Sync + 'static) -> Self {
        Self { file, name, bytes: None, run: Box::new(run) }
    }

    fn moving(self, bytes: Bytes) -> Self {
        Self { bytes: Some(bytes), ..self }
    }

    /// A launch that is refused with `text`.
    fn refused(
        file: &'static str,
        name: &str,
        text: &'static str,
        start: impl Fn(&dyn Executor) -> Result<(), LaunchError> + Send + Sync + 'static,
    ) -> Self {
        Self::new(file, name.to_owned(), move |check| {
            let found = start(check.executor).map_or_else(|error| error.to_string(), |()| "a launch".to_owned());
            if found == text { Ok(()) } else { Err(CheckError::Other { what: "an error".to_owned(), expected: text.to_owned(), found }) }
        })
    }

    /// A hash of all that the kernels wrote: the same in every run. `memo` is of this case's runs; `slack` times what f32 arithmetic may lose is
    /// allowed: [`CARD_SLACK`] on a GPU.
    ///
    /// # Errors
    /// When a kernel fails, or gives something else than the specification.
    pub fn run(&self, gpu: &dyn Gpu, memo: &Memo, slack: f32) -> Result<String, CheckError> {
        let mut check = Check { executor: gpu, gpu, memo, slack, outputs: Sha256::new() };
        (self.run)(&mut check)?;
        Ok(hex(&check.outputs.finalize()))
    }
}

/// What a case computes on the CPU and takes long, by name: kept from run to run.
#[derive(Default)]
pub struct Memo(RefCell<BTreeMap<&'static str, Rc<Vec<f32>>>>);

/// A bound on a difference: a part of the expected value, and a part of the size of what it belongs to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bound {
    pub relative: f32,
    pub absolute: f32,
}

impl Bound {
    fn of(self, expected: f32, size: f32) -> f32 {
        self.relative * expected.abs() + self.absolute * size
    }
}

/// How far a kernel's result may be from the specification's, both from the same rounded inputs; the default: not at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// What values lose when they are rounded to a 16-bit type: the same wherever the kernel runs.
    pub rounding: Bound,
    /// What sums and functions in f32 lose. A GPU gets [`CARD_SLACK`] times as much.
    pub arithmetic: Bound,
}

/// By how much more f32 arithmetic on a GPU may differ from the specification than the same source on the host. Fixed before any GPU ran it:
/// the host computes each product and each sum with a rounding of its own and has libm's functions (half a unit in the last place); nvcc fuses
/// multiply-adds, and `ex2.approx`, `lg2.approx`, `rcp.approx` and `rsqrtf` are off by up to 2 units (PTX ISA 9.7.3), which is 4 times as much.
pub const CARD_SLACK: f32 = 4.0;

impl Tolerance {
    /// Of a result that is computed in f32 and rounded once to `dtype`: half a unit in the last place, and what sums of some thousand f32
    /// products lose in another order.
    pub fn rounded_once(dtype: KernelDtype) -> Self {
        let relative = if dtype == KernelDtype::F32 { 0.0 } else { dtype.epsilon() };
        Self { rounding: Bound { relative, absolute: 0.0 }, arithmetic: Bound { relative: 1e-5, absolute: 2e-6 } }
    }

    /// Of a result whose intermediate values (probabilities, their gradients) were rounded to `dtype` before a tensor core took them; the
    /// absolute one in units of the vector's root mean square. Where two keys share all probability their gradients cancel, and each may be
    /// off by half a unit in the last place times an input of three or four standard deviations. In f32, scores of some tens are off by
    /// 1e-6 of themselves, and so are their probabilities.
    pub fn rounded_inside(dtype: KernelDtype) -> Self {
        let of = |part: f32| Bound { relative: part, absolute: part };
        match dtype {
            KernelDtype::F32 => Self { rounding: Bound::default(), arithmetic: of(2e-5) },
            _ => Self { rounding: of(4.0 * dtype.epsilon()), arithmetic: Bound::default() },
        }
    }

    /// Of sums of `terms` f32 products in any order, whose root mean square is `size`, rounded once to `dtype`. Rounding errors add up like a
    /// random walk: one chain of fused multiply-adds, the worst order, was off by up to 3.6 sqrt(terms) 2^-24 size (32 to 13,696 terms,
    /// 220,000 sums of normal values). With [`CARD_SLACK`] 8 are allowed; a tensor core, which cuts off what it aligns, needs some of the rest.
    pub fn summed(dtype: KernelDtype, terms: usize, size: f32) -> Self {
        let absolute = 2.0 * (terms as f32).sqrt() * KernelDtype::F32.epsilon() * size;
        Self { rounding: Bound { relative: dtype.epsilon(), absolute: 0.0 }, arithmetic: Bound { relative: 0.0, absolute } }
    }

    /// Of a value of a vector of root mean square `size`, with `slack` times what arithmetic loses.
    fn of(self, expected: f32, size: f32, slack: f32) -> f32 {
        self.rounding.of(expected, size) + slack * self.arithmetic.of(expected, size)
    }
}

/// A case that runs: its memory, and what it has read.
pub struct Check<'e> {
    pub executor: &'e dyn Executor,
    gpu: &'e dyn Gpu,
    memo: &'e Memo,
    slack: f32,
    outputs: Sha256,
}

impl Check<'_> {
    /// The values that `make` computes, which it does once a case.
    pub fn once(&self, name: &'static str, make: impl FnOnce() -> Result<Vec<f32>, CheckError>) -> Result<Rc<Vec<f32>>, CheckError> {
        if let Some(values) = self.memo.0.borrow().get(name) {
            return Ok(values.clone());
        }
        let values = Rc::new(make()?);
        self.memo.0.borrow_mut().insert(name, values.clone());
        Ok(values)
    }

    /// Memory with `values` in `dtype`.
    pub fn input(&self, name: &str, dtype: KernelDtype, values: &[f32]) -> Result<u64, LaunchError> {
        self.bytes(name, &dtype.to_bytes(values))
    }

    pub fn bytes(&self, name: &str, bytes: &[u8]) -> Result<u64, LaunchError> {
        upload(self.executor, name, bytes)
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

    /// A fault's 8 bytes, nothing reported yet.
    pub fn fault(&self) -> Result<u64, LaunchError> {
        self.bytes("fault", &NO_FAULT.to_le_bytes())
    }

    /// Reads `expected.len()` values, which must have the bits of `expected`.
    pub fn expect_bits<T: Pod + Debug>(&mut self, what: &str, address: u64, expected: &[T]) -> Result<(), CheckError> {
        let found: Vec<T> = download(self.executor, Buffer { address, bytes: size_of_val(expected) })?;
        self.outputs.update(bytemuck::cast_slice(&found));
        let differs = |(a, b): (&T, &T)| bytemuck::bytes_of(a) != bytemuck::bytes_of(b);
        let Some(at) = expected.iter().zip(&found).position(differs) else { return Ok(()) };
        let what = format!("{what}, element {at} of {}", expected.len());
        Err(CheckError::Other { what, expected: format!("{:?}", expected[at]), found: format!("{:?}", found[at]) })
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
        let slack = self.slack;
        self.compare(what, address, dtype, expected, |_, value| tolerance.of(value, 1.0, slack))
    }

    /// As [`Self::expect`], with the absolute tolerance in units of each value's `sizes` ([`vector_sizes`]): the errors of many rounded
    /// products grow with the vector that they make up. What is left of exact cancellation may differ as it does in f32, in units of the largest
    /// `factor` of the products.
    pub fn expect_sized(
        &mut self,
        what: &str,
        address: u64,
        dtype: KernelDtype,
        expected: &[f32],
        sizes: &[f32],
        factor: f32,
        tolerance: Tolerance,
    ) -> Result<(), CheckError> {
        let slack = self.slack;
        let left = factor * slack * Tolerance::rounded_inside(KernelDtype::F32).arithmetic.absolute;
        self.compare(what, address, dtype, expected, |at, value| tolerance.of(value, sizes[at], slack) + left)
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

/// Rows of `width` values, `stride` apart, with `between` from row to row.
fn strided(values: &[f32], width: usize, stride: usize, between: f32) -> Vec<f32> {
    let row = |row: &[f32]| row.iter().copied().chain(std::iter::repeat_n(between, stride - width)).collect::<Vec<_>>();
    values.chunks_exact(width).flat_map(row).collect()
}

fn tensor(values: &[f32], rows: usize) -> candle_core::Result<Tensor> {
    Tensor::from_slice(values, (rows, values.len() / rows), &Device::Cpu)
}

fn flat(values: &[f32]) -> candle_core::Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu)
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}
