//! Times of a GPU: each kernel and product of a step, and its share of what the machine can do.
//!
//! Before each timed run a filler keeps the GPU busy for about 300 us, so that the host has queued start event, kernel and end event before the
//! first of them begins: a launch would else be a quarter of what a small kernel takes. Where the host was late all the same, the filler grows, and
//! what remains late is marked. It moves more than L2 holds, so that operands come from memory, and ends with reading, so that nothing is left to be
//! written back beside what is timed.

use serde::{Deserialize, Serialize};

use super::kernels::{DTYPE, Memory, Shape, Work, entries, products};
use crate::kernels::gpu::{Elapsed, Gpu, Operands, Product};
use crate::kernels::launch::{Buffer, KernelDtype, LaunchError, NO_FAULT, upload};
use crate::kernels::non_finite;

/// How often the filler may double.
const DOUBLINGS: usize = 3;

/// What the machine itself is measured with.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Size of the copy.
    pub copy_bytes: usize,
    /// Rows and columns of the square product.
    pub side: usize,
    /// Copied `filler_copies` times before each run, then read.
    pub filler_bytes: usize,
    pub filler_copies: usize,
    /// How long fillers run before the first measurement, while clocks rise.
    pub spin_ms: f64,
    /// Runs that do not count.
    pub warm_up: usize,
    pub runs: usize,
}

impl Machine {
    /// 3 copies of 128 MiB and reading it once: 310 us at 3 TB/s.
    pub const GPU: Self =
        Self { copy_bytes: 1 << 30, side: 8192, filler_bytes: 128 << 20, filler_copies: 3, spin_ms: 300.0, warm_up: 5, runs: 20 };
    /// For a rehearsal where no GPU is.
    pub const SMALL: Self =
        Self { copy_bytes: 1 << 16, side: 64, filler_bytes: 1 << 12, filler_copies: 1, spin_ms: 1.0, warm_up: 1, runs: 3 };
}

/// What all times are held against.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    pub gpu: String,
    /// What products are computed with.
    pub product_library: String,
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
    /// In most of its runs the GPU may have waited for the host.
    pub host_was_late: bool,
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

/// One line of a measurement: the ceilings first, then each time as it is known.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Line {
    Ceilings(Ceilings),
    Timed(Timed),
}

/// A GPU with its filler.
struct Clock<'g> {
    gpu: &'g dyn Gpu,
    from: Buffer,
    to: Buffer,
    /// Address of the 8 bytes into which the reading pass reports.
    fault: u64,
    machine: Machine,
}

/// A median, and whether the host was late in most runs.
struct Median {
    ms: f64,
    host_was_late: bool,
}

impl<'g> Clock<'g> {
    /// With random values in the filler: zeros are copied faster than data.
    fn new(gpu: &'g dyn Gpu, memory: &Memory, machine: &Machine) -> Result<Self, LaunchError> {
        let bytes = machine.filler_bytes;
        let half = |name| memory.values(name, KernelDtype::F32, bytes / 4).map(|address| Buffer { address, bytes });
        let fault = upload(gpu, "fault of the filler", &NO_FAULT.to_le_bytes())?;
        Ok(Self { gpu, from: half("filler")?, to: half("target of the filler")?, fault, machine: *machine })
    }

    fn fill(&self, times: usize) -> Result<(), LaunchError> {
        (0..times * self.machine.filler_copies).try_for_each(|_| self.gpu.copy(self.from, self.to))?;
        non_finite::device::first(self.gpu, self.from.address, self.from.bytes / 4, self.fault)
    }

    /// Keeps the GPU busy until its clocks have risen.
    fn spin(&self, ms: f64) -> Result<(), LaunchError> {
        let mut spent = 0.0;
        while spent < ms {
            spent += self.gpu.time(&mut || Ok(()), &mut || self.fill(100))?.ms;
        }
        Ok(())
    }

    /// The median of all runs of `work` that count, each after `restore`'s copies and the filler.
    fn median(&self, restore: &[(Buffer, Buffer)], mut work: impl FnMut() -> Result<(), LaunchError>) -> Result<Median, LaunchError> {
        let Machine { warm_up, runs, .. } = self.machine;
        let mut measured = |fillers: usize| -> Result<Median, LaunchError> {
            let mut before = || {
                restore.iter().try_for_each(|(from, to)| self.gpu.copy(*from, *to))?;
                self.fill(fillers)
            };
            let (mut times, mut num_late) = (Vec::with_capacity(runs), 0);
            for run in 0..warm_up + runs {
                let Elapsed { ms, host_was_late } = self.gpu.time(&mut before, &mut work)?;
                if run >= warm_up {
                    times.push(ms);
                    num_late += usize::from(host_was_late);
                }
            }
            times.sort_by(f64::total_cmp);
            let ms = f64::midpoint(times[(runs - 1) / 2], times[runs / 2]);
            Ok(Median { ms, host_was_late: num_late > runs / 2 })
        };
        let mut median = measured(1)?;
        for doubling in 1..=DOUBLINGS {
            if !median.host_was_late {
                break;
            }
            median = measured(1 << doubling)?;
        }
        Ok(median)
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
    let memory = Memory::new(gpu);
    let clock = Clock::new(gpu, &memory, machine)?;
    let &Machine { copy_bytes, side, spin_ms, .. } = machine;
    let source = Buffer { address: memory.values("source of a copy", KernelDtype::F32, copy_bytes / 4)?, bytes: copy_bytes };
    let target = gpu.alloc("target of a copy", copy_bytes)?;
    let operand = || memory.values("operand", DTYPE, side * side);
    let (a, b, d) = (operand()?, operand()?, operand()?);
    let (operands, dtype) = (Operands::Nt, DTYPE);
    let product = Product { operands, sizes: [side; 3], a, b, d, dtype, out_dtype: dtype, bias: None, residual: None };
    clock.spin(spin_ms)?;
    let copy_ms = clock.median(&[], || gpu.copy(source, target))?.ms;
    let product_ms = clock.median(&[], || gpu.product(&product))?.ms;
    told(Line::Ceilings(Ceilings {
        gpu: gpu.describe(),
        product_library: gpu.product_library()?,
        is_rehearsal: *shape != Shape::CHATGLM2_6B,
        copy_gb_s: 2.0 * copy_bytes as f64 / 1e6 / copy_ms,
        product_tflop_s: product.flops() as f64 / 1e9 / product_ms,
    }))?;
    let timed = |name, work, Median { ms, host_was_late }| Line::Timed(Timed { name, work, median_ms: ms, host_was_late });
    for (name, product) in products(gpu, shape)? {
        told(timed(name, Work::Flops(product.flops()), clock.median(&[], || gpu.product(&product))?))?;
    }
    for entry in entries(gpu, shape)? {
        let median = clock.median(&entry.restore, || entry.start(gpu))?;
        told(timed(entry.name, entry.work, median))?;
    }
    Ok(())
}
