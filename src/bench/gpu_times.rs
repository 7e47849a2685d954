//! Times of a GPU: each kernel and product of a step, and its share of what the machine can do.
//!
//! Before each timed run a filler keeps the GPU busy for about 200 us, so that the host has queued start event, kernel and end event before the
//! first of them begins: a launch would else be a quarter of what a small kernel takes. It moves more than L2 holds, so that operands come from memory.

use serde::{Deserialize, Serialize};

use super::kernels::{DTYPE, Memory, Shape, Work, entries, products};
use crate::kernels::gpu::{Gpu, Operands, Product};
use crate::kernels::launch::{Buffer, LaunchError};

const WARM_UP: usize = 5;
const RUNS: usize = 20;

/// What the machine itself is measured with.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Of a copy.
    pub copy_bytes: usize,
    /// Of a square product.
    pub side: usize,
    /// Copied `filler_copies` times before each run.
    pub filler_bytes: usize,
    pub filler_copies: usize,
}

impl Machine {
    /// 3 copies of 128 MiB: 270 us at 3 TB/s.
    pub const GPU: Self = Self { copy_bytes: 1 << 30, side: 8192, filler_bytes: 128 << 20, filler_copies: 3 };
    /// For a rehearsal where no GPU is.
    pub const SMALL: Self = Self { copy_bytes: 1 << 16, side: 64, filler_bytes: 1 << 12, filler_copies: 1 };
}

/// What all times are held against.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    pub gpu: String,
    /// Not the step's shapes: its times say nothing.
    pub is_rehearsal: bool,
    /// Bytes read and written by a copy of a GiB, GB/s: for memory-bound kernels.
    pub copy_gb_s: f64,
    /// Of a product of 8192 x 8192 bf16: for the others.
    pub product_tflop_s: f64,
}

/// What a kernel or a product took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    pub name: String,
    pub work: Work,
    pub median_ms: f64,
}

impl Timed {
    /// GB/s or TFLOP/s.
    pub fn speed(&self) -> f64 {
        match self.work {
            Work::Bytes(bytes) => bytes as f64 / 1e6 / self.median_ms,
            Work::Flops(flops) => flops as f64 / 1e9 / self.median_ms,
        }
    }
}

/// One line of a measurement, in the order in which they are known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    Ceilings(Ceilings),
    Timed(Timed),
}

/// A GPU with its filler.
struct Clock<'g> {
    gpu: &'g dyn Gpu,
    filler: (Buffer, Buffer),
    copies: usize,
}

impl<'g> Clock<'g> {
    fn new(gpu: &'g dyn Gpu, machine: &Machine) -> Result<Self, LaunchError> {
        let half = |name| gpu.alloc(name, machine.filler_bytes);
        Ok(Self { gpu, filler: (half("filler")?, half("target of the filler")?), copies: machine.filler_copies })
    }

    /// The median of [`RUNS`] runs of `work` after [`WARM_UP`], each after `restore`'s copies and the filler.
    fn median_ms(&self, restore: &[(Buffer, Buffer)], mut work: impl FnMut() -> Result<(), LaunchError>) -> Result<f64, LaunchError> {
        let (from, to) = self.filler;
        let mut before = || {
            restore.iter().try_for_each(|(from, to)| self.gpu.copy(*from, *to))?;
            (0..self.copies).try_for_each(|_| self.gpu.copy(from, to))
        };
        let mut times = Vec::with_capacity(RUNS);
        for run in 0..WARM_UP + RUNS {
            let ms = self.gpu.time_ms(&mut before, &mut work)?;
            if run >= WARM_UP {
                times.push(ms);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(f64::midpoint(times[(RUNS - 1) / 2], times[RUNS / 2]))
    }
}

/// Times the machine, then every product and every kernel at `shape`, and gives each to `told` as soon as it is known.
///
/// # Errors
/// When memory is short, a kernel fails, or `told` does.
pub fn run<E: From<LaunchError>>(
    gpu: &dyn Gpu,
    shape: &Shape,
    machine: &Machine,
    mut told: impl FnMut(Line) -> Result<(), E>,
) -> Result<(), E> {
    let clock = Clock::new(gpu, machine)?;
    let &Machine { copy_bytes, side, .. } = machine;
    let (from, to) = (gpu.alloc("source of a copy", copy_bytes)?, gpu.alloc("target of a copy", copy_bytes)?);
    let copy_ms = clock.median_ms(&[], || gpu.copy(from, to))?;
    let memory = Memory::new(gpu);
    let operand = || memory.values("operand", DTYPE, side * side);
    let (a, b, d) = (operand()?, operand()?, operand()?);
    let (operands, dtype) = (Operands::Nt, DTYPE);
    let product = Product { operands, sizes: [side; 3], a, b, d, dtype, out_dtype: dtype, bias: None, residual: None };
    let product_ms = clock.median_ms(&[], || gpu.product(&product))?;
    told(Line::Ceilings(Ceilings {
        gpu: gpu.describe(),
        is_rehearsal: *shape != Shape::CHATGLM2_6B,
        copy_gb_s: 2.0 * copy_bytes as f64 / 1e6 / copy_ms,
        product_tflop_s: product.flops() as f64 / 1e9 / product_ms,
    }))?;
    for (name, product) in products(gpu, shape)? {
        let median_ms = clock.median_ms(&[], || gpu.product(&product))?;
        told(Line::Timed(Timed { name, work: Work::Flops(product.flops()), median_ms }))?;
    }
    for entry in entries(gpu, shape)? {
        let median_ms = clock.median_ms(&entry.restore, || entry.start(gpu))?;
        told(Line::Timed(Timed { name: entry.name, work: entry.work, median_ms }))?;
    }
    Ok(())
}
