//! Every kernel at the shapes of a training step of ChatGLM2-6B: time, and its share of what the machine can do.

use serde::{Deserialize, Serialize};

use super::traffic;
use crate::kernels::attention::Heads;
use crate::kernels::attention::device::{Batch, DqkvAt, GradsAt, PrefixAt, RowSums, Tiles};
use crate::kernels::cross_entropy::Logits;
use crate::kernels::gpu::{Gpu, Operands, Product};
use crate::kernels::launch::{Executor, KernelDtype, LaunchError, NO_FAULT, upload};
use crate::kernels::rotary::Direction;
use crate::kernels::{adamw, attention, cross_entropy, embedding, non_finite, rms_norm, rotary, swiglu};

const DTYPE: KernelDtype = KernelDtype::Bf16;
const F32: KernelDtype = KernelDtype::F32;
/// Starts a kernel once.
type Start = Box<dyn Fn(&dyn Executor) -> Result<(), LaunchError>>;

const WARM_UP: usize = 5;
const RUNS: usize = 20;

/// Sizes of a step.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Packed tokens of a micro-batch, in rows of `row`.
    pub tokens: usize,
    pub row: usize,
    pub prefix: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub vocabulary: usize,
    /// Rows of logits that are there at once.
    pub chunk: usize,
    pub heads: Heads,
    /// Trained parameters.
    pub parameters: usize,
}

impl Shape {
    pub const CHATGLM2_6B: Self = Self {
        tokens: 4096,
        row: 128,
        prefix: 128,
        hidden: 4096,
        ffn: 13696,
        vocabulary: 65024,
        chunk: 1024,
        heads: Heads { num_heads: 32, num_groups: 2, head_dim: 128 },
        parameters: 1 << 26,
    };

    /// Small enough for the host's shim.
    pub const SMALL: Self = Self {
        tokens: 96,
        row: 48,
        prefix: 16,
        hidden: 64,
        ffn: 136,
        vocabulary: 512,
        chunk: 3,
        heads: Heads { num_heads: 2, num_groups: 1, head_dim: 64 },
        parameters: 1000,
    };
}

/// What bounds a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Bytes that go in or out of memory at least: each operand once.
    Bytes(u64),
    /// Floating-point operations of tensor cores.
    Flops(u64),
}

/// A kernel, or a few that belong together, ready to be started.
pub struct Entry {
    pub name: String,
    pub work: Work,
    start: Start,
}

impl Entry {
    /// # Errors
    /// When a launch fails.
    pub fn start(&self, executor: &dyn Executor) -> Result<(), LaunchError> {
        (self.start)(executor)
    }
}

/// Memory with ones in it, or other bytes that make plain numbers.
struct Memory<'e>(&'e dyn Executor);

impl Memory<'_> {
    /// `len` values of about 1.
    fn values(&self, name: &str, dtype: KernelDtype, len: usize) -> Result<u64, LaunchError> {
        let some: Vec<f32> = (0..len).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
        self.bytes(name, &dtype.to_bytes(&some))
    }

    fn bytes(&self, name: &str, bytes: &[u8]) -> Result<u64, LaunchError> {
        upload(self.0, name, bytes)
    }

    fn no_fault(&self) -> Result<u64, LaunchError> {
        self.bytes("fault", &NO_FAULT.to_le_bytes())
    }
}

/// A batch but for its tiles.
#[derive(Clone, Copy)]
struct BatchAt {
    heads: Heads,
    tiles_at: u64,
    qkv: u64,
    width: usize,
    prefix_at: PrefixAt,
    out: u64,
    lse: u64,
}

impl BatchAt {
    fn batch<'t>(&self, tiles: &'t Tiles) -> Batch<'t> {
        let &Self { heads, tiles_at, qkv, width, prefix_at, out, lse } = self;
        Batch { heads, tiles, tiles_at, qkv, qkv_stride: width, prefix: prefix_at, out, lse }
    }
}

fn hidden_of(heads: Heads) -> usize {
    heads.num_heads * heads.head_dim
}

/// All kernels of a step, in its order.
///
/// # Errors
/// When memory is short.
pub fn entries(executor: &dyn Executor, shape: &Shape) -> Result<Vec<Entry>, LaunchError> {
    let memory = Memory(executor);
    let Shape { tokens, row, prefix, hidden, ffn, vocabulary, chunk, heads, parameters } = *shape;
    let Heads { num_heads, num_groups, head_dim } = heads;
    let mut entries = Vec::new();
    let mut push = |name: &str, work: Work, start: Start| {
        entries.push(Entry { name: name.to_owned(), work, start });
    };
    let traffic = traffic::step(shape, 1);
    // Of all that a launch works on, which has `count` tokens.
    let least = |name: &str, count: usize| {
        let of_token = traffic.iter().find(|kernel| kernel.name == name).map_or(0.0, |kernel| kernel.least);
        Work::Bytes((of_token * count as f64).round() as u64)
    };

    let (table, x) = (memory.values("table", DTYPE, vocabulary * hidden)?, memory.values("x", DTYPE, tokens * hidden)?);
    let ids: Vec<u8> = (0..tokens).flat_map(|t| ((t * 7919 % vocabulary) as u32).to_le_bytes()).collect();
    let gather = embedding::device::Gather {
        table,
        ids: memory.bytes("ids", &ids)?,
        rows: x,
        fault: memory.no_fault()?,
        vocabulary,
        tokens,
        columns: hidden,
    };
    push("embedding", least("embedding", tokens), Box::new(move |e| embedding::device::gather(e, DTYPE, &gather)));

    let w = memory.values("norm weight", DTYPE, hidden)?;
    let (y, rstd) = (memory.values("y", DTYPE, tokens * hidden)?, memory.values("rstd", F32, tokens)?);
    let norm = rms_norm::device::Rows { x, w, y, rstd, rows: tokens, columns: hidden };
    push("rms_norm_fwd", least("rms_norm_fwd", tokens), Box::new(move |e| rms_norm::device::fwd(e, DTYPE, &norm, 1e-5)));
    let (dx, dy) = (memory.values("dx", DTYPE, tokens * hidden)?, memory.values("dy", DTYPE, tokens * hidden)?);
    let norm_bwd = rms_norm::device::Rows { y: dx, ..norm };
    push("rms_norm_bwd", least("rms_norm_bwd", tokens), Box::new(move |e| rms_norm::device::bwd_add(e, DTYPE, &norm_bwd, dy)));

    let width = heads.qkv_width();
    let qkv = memory.values("qkv", DTYPE, tokens * width)?;
    let turned = num_heads + num_groups;
    let angles = memory.values("cos", F32, tokens * head_dim / 4)?;
    let rotary = rotary::device::Heads { x: qkv, cos: angles, sin: angles, rows: tokens, stride: width, heads: turned, head_dim };
    push("rotary", least("rotary", tokens), Box::new(move |e| rotary::device::rotate_(e, DTYPE, &rotary, Direction::Forward)));

    for prefix in [0, prefix] {
        let bounds: Vec<usize> = (0..=tokens / row).map(|r| r * row).collect();
        let tiles = Tiles::new(&bounds, prefix, attention::Wanted::All);
        let tiles_at = memory.bytes("tiles", tiles.bytes())?;
        let of_prefix = num_groups * prefix * head_dim;
        let prefix_at = if prefix == 0 {
            PrefixAt::None
        } else {
            PrefixAt::Shared { k: memory.values("prefix k", DTYPE, of_prefix)?, v: memory.values("prefix v", DTYPE, of_prefix)? }
        };
        let (out, lse) = (memory.values("out", DTYPE, tokens * hidden_of(heads))?, memory.values("lse", F32, tokens * num_heads)?);
        let of_rows = (tokens / row * of_prefix).max(4);
        let (dprefix_k, dprefix_v) = (memory.values("dprefix k", F32, of_rows)?, memory.values("dprefix v", F32, of_rows)?);
        let grads = GradsAt {
            dout: memory.values("dout", DTYPE, tokens * hidden_of(heads))?,
            delta: memory.values("delta", F32, tokens * num_heads)?,
            dqkv: DqkvAt::Here { address: memory.values("dqkv", DTYPE, tokens * width)?, stride: width },
            dprefix_k,
            dprefix_v,
        };
        let sums = (prefix > 0).then_some(RowSums {
            dprefix_k,
            dprefix_v,
            dk: memory.values("dk", F32, of_prefix.max(4))?,
            dv: memory.values("dv", F32, of_prefix.max(4))?,
            size: of_prefix,
            num_rows: tokens / row,
        });
        // Scores that the mask leaves, of all heads.
        let scores = num_heads * (tokens / row) * (row * prefix + row * (row + 1) / 2);
        let product = 2 * (scores * head_dim) as u64;
        let at = BatchAt { heads, tiles_at, qkv, width, prefix_at, out, lse };
        let of_fwd = tiles.clone();
        let name = format!("attention_fwd prefix {prefix}");
        push(&name, Work::Flops(2 * product), Box::new(move |e| attention::device::fwd(e, DTYPE, &at.batch(&of_fwd))));
        let name = format!("attention_bwd prefix {prefix}");
        push(
            &name,
            Work::Flops(5 * product),
            Box::new(move |e| {
                attention::device::bwd(e, DTYPE, &at.batch(&tiles), &grads)?;
                sums.map_or(Ok(()), |sums| attention::device::sum_rows(e, &sums))
            }),
        );
    }
    let (gate_up, act) = (memory.values("gate_up", DTYPE, tokens * 2 * ffn)?, memory.values("act", DTYPE, tokens * ffn)?);
    let mlp = swiglu::device::Rows { gate_up, act, rows: tokens, columns: ffn, stride: 2 * ffn };
    push("swiglu_fwd", least("swiglu_fwd", tokens), Box::new(move |e| swiglu::device::fwd(e, DTYPE, &mlp)));
    push("swiglu_bwd", least("swiglu_bwd", tokens), Box::new(move |e| swiglu::device::bwd_(e, DTYPE, &mlp)));

    let targets: Vec<u8> = (0..chunk).flat_map(|i| ((i * 31 % vocabulary) as i32).to_le_bytes()).collect();
    let loss = cross_entropy::device::Rows {
        logits: memory.values("logits", DTYPE, chunk * vocabulary)?,
        targets: memory.bytes("targets", &targets)?,
        losses: memory.values("losses", F32, chunk)?,
        fault: memory.no_fault()?,
        rows: chunk,
        columns: vocabulary,
    };
    push(
        "cross_entropy",
        least("cross_entropy", chunk),
        Box::new(move |e| cross_entropy::device::nll_(e, DTYPE, &loss, Logits::ToGradient, 1.0)),
    );

    let [p, m, g] = ["params", "exp_avg", "grads"].map(|name| memory.values(name, F32, parameters));
    let (p, m, g, fault) = (p?, m?, g?, memory.no_fault()?);
    // Squares, so none is negative.
    let v = memory.bytes("exp_avg_sq", &F32.to_bytes(&vec![1.0; parameters]))?;
    let num_chunks = parameters.div_ceil(adamw::CHUNK);
    let (sums, of_norm) = (memory.bytes("sums", &vec![0; 8 * num_chunks])?, memory.bytes("norm", &[0; 8])?);
    let factor = memory.bytes("factor", &1f32.to_le_bytes())?;
    push(
        "global_norm",
        Work::Bytes(4 * parameters as u64),
        Box::new(move |e| {
            adamw::device::chunk_square_sums(e, g, parameters, sums, fault)?;
            adamw::device::norm(e, sums, num_chunks, 1.0, of_norm, factor)
        }),
    );
    let update = adamw::Update { weight1: 0.1, keep2: 0.999, weight2: 1e-3, keep: 1.0, step_size: -1e-6, correction: 1.0, epsilon: 1e-8 };
    let state = adamw::device::Buffers {
        params: p,
        exp_avg: m,
        exp_avg_sq: v,
        grads: g,
        rounded: None,
        factor,
        faults: fault,
        num_faults: 1,
        n: parameters,
    };
    push("adamw", least("adamw", tokens), Box::new(move |e| adamw::device::step(e, &update, &state)));
    push("non_finite", Work::Bytes(4 * parameters as u64), Box::new(move |e| non_finite::device::first(e, g, parameters, fault)));
    Ok(entries)
}

/// What a kernel took.
#[derive(Clone, Debug, Serialize, Deserialize)]
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

/// Times of one GPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub gpu: String,
    /// Bytes read and written by a copy of a GiB, GB/s: what memory-bound kernels are held against.
    pub copy_gb_s: f64,
    /// Of a product of 8192 x 8192 bf16: what the others are held against.
    pub product_tflop_s: f64,
    pub kernels: Vec<Timed>,
}

fn median_ms(gpu: &dyn Gpu, mut work: impl FnMut() -> Result<(), LaunchError>) -> Result<f64, LaunchError> {
    for _ in 0..WARM_UP {
        work()?;
    }
    let times: Result<Vec<f64>, _> = (0..RUNS).map(|_| gpu.time_ms(&mut work)).collect();
    let mut times = times?;
    times.sort_by(f64::total_cmp);
    Ok(f64::midpoint(times[(RUNS - 1) / 2], times[RUNS / 2]))
}

/// Times every kernel at `shape`, medians of 20 runs after 5.
///
/// # Errors
/// When memory is short or a kernel fails.
pub fn run(gpu: &dyn Gpu, shape: &Shape) -> Result<Report, LaunchError> {
    const COPY: usize = 1 << 30;
    const SIDE: usize = 8192;
    let (from, to) = (gpu.alloc("source of a copy", COPY)?, gpu.alloc("target of a copy", COPY)?);
    let copy_ms = median_ms(gpu, || gpu.copy(from, to))?;
    let memory = Memory(gpu);
    let side = || memory.values("operand", DTYPE, SIDE * SIDE);
    let (a, b, d) = (side()?, side()?, side()?);
    let (operands, dtype) = (Operands::Nt, DTYPE);
    let product = Product { operands, sizes: [SIDE; 3], a, b, d, dtype, out_dtype: dtype, bias: None, residual: None };
    let product_ms = median_ms(gpu, || gpu.product(&product))?;
    let mut kernels = Vec::new();
    for entry in entries(gpu, shape)? {
        let median_ms = median_ms(gpu, || entry.start(gpu))?;
        kernels.push(Timed { name: entry.name, work: entry.work, median_ms });
    }
    Ok(Report {
        gpu: gpu.describe(),
        copy_gb_s: 2.0 * COPY as f64 / 1e6 / copy_ms,
        product_tflop_s: product.flops() as f64 / 1e9 / product_ms,
        kernels,
    })
}
