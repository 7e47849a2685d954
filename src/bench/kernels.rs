//! Every kernel and product at the shapes of a training step of ChatGLM2-6B, with memory, ready to be timed by `gpu_times`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::traffic;
use crate::kernels::attention::Heads;
use crate::kernels::attention::device::{Batch, DqkvAt, GradsAt, PrefixAt, RowSums, Tiles};
use crate::kernels::cross_entropy::Logits;
use crate::kernels::gpu::{Operands, Product};
use crate::kernels::launch::{Buffer, Executor, KernelDtype, LaunchError, NO_FAULT, upload};
use crate::kernels::rotary::Direction;
use crate::kernels::{adamw, attention, cross_entropy, embedding, non_finite, rms_norm, rotary, swiglu};
use crate::rng::{KeyedRng, Stream};

pub(super) const DTYPE: KernelDtype = KernelDtype::Bf16;
const F32: KernelDtype = KernelDtype::F32;
/// Starts a kernel once.
type Start = Box<dyn Fn(&dyn Executor) -> Result<(), LaunchError>>;

/// Sizes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Packed tokens of a micro-batch, in rows of `row`; attention also in rows of `long_row`.
    pub tokens: usize,
    pub row: usize,
    pub long_row: usize,
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
        long_row: 2048,
        prefix: 128,
        hidden: 4096,
        ffn: 13696,
        vocabulary: 65024,
        chunk: 1024,
        heads: Heads { num_heads: 32, num_groups: 2, head_dim: 128 },
        parameters: 1 << 26,
    };

    /// Small enough for tests/standin.
    pub const SMALL: Self = Self {
        tokens: 96,
        row: 48,
        long_row: 96,
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
    /// Copies (from, to) that undo what a start does to its operands: else they would drift from run to run.
    pub restore: Vec<(Buffer, Buffer)>,
}

impl Entry {
    /// # Errors
    /// When a launch fails.
    pub fn start(&self, executor: &dyn Executor) -> Result<(), LaunchError> {
        (self.start)(executor)
    }
}

/// Random values of a block, which buffers repeat: drawing the billions of a step would take longer than timing them. The block outgrows L1.
const BLOCK: usize = 1 << 21;

/// Memory with random numbers in it.
pub(super) struct Memory<'e> {
    executor: &'e dyn Executor,
    blocks: RefCell<BTreeMap<KernelDtype, Vec<u8>>>,
    /// Each buffer begins elsewhere in the block, so that operands differ.
    offset: Cell<usize>,
}

impl<'e> Memory<'e> {
    pub(super) fn new(executor: &'e dyn Executor) -> Self {
        Self { executor, blocks: RefCell::default(), offset: Cell::new(0) }
    }

    /// `len` values of N(0, 1).
    pub(super) fn values(&self, name: &str, dtype: KernelDtype, len: usize) -> Result<u64, LaunchError> {
        let mut blocks = self.blocks.borrow_mut();
        let values = || KeyedRng::new(7, Stream::ParameterInit, 0).normal(BLOCK);
        let block = blocks.entry(dtype).or_insert_with(|| dtype.to_bytes(&values()));
        self.offset.set((self.offset.get() + 40_503 * dtype.wide() * 16) % block.len());
        let (bytes, offset) = (len * dtype.num_bytes(), self.offset.get());
        let mut repeated = Vec::with_capacity(bytes + block.len());
        repeated.extend_from_slice(&block[offset..]);
        while repeated.len() < bytes {
            repeated.extend_from_slice(block);
        }
        self.bytes(name, &repeated[..bytes])
    }

    /// As [`Self::values`] of [`DTYPE`], and a second buffer that keeps them.
    fn restored(&self, name: &str, len: usize) -> Result<(u64, (Buffer, Buffer)), LaunchError> {
        let bytes = len * DTYPE.num_bytes();
        // The same offset: the same values.
        let before = self.offset.get();
        let kept = self.values(&format!("{name}, kept"), DTYPE, len)?;
        self.offset.set(before);
        let address = self.values(name, DTYPE, len)?;
        Ok((address, (Buffer { address: kept, bytes }, Buffer { address, bytes })))
    }

    fn bytes(&self, name: &str, bytes: &[u8]) -> Result<u64, LaunchError> {
        upload(self.executor, name, bytes)
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
    let memory = Memory::new(executor);
    let Shape { tokens, row, long_row, prefix, hidden, ffn, vocabulary, chunk, heads, parameters } = *shape;
    let Heads { num_heads, num_groups, head_dim } = heads;
    let mut entries = Vec::new();
    let mut push = |name: &str, work: Work, restore: &[(Buffer, Buffer)], start: Start| {
        entries.push(Entry { name: name.to_owned(), work, start, restore: restore.to_vec() });
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
    push("embedding", least("embedding", tokens), &[], Box::new(move |e| embedding::device::gather(e, DTYPE, &gather)));

    let w = memory.values("norm weight", DTYPE, hidden)?;
    let (y, rstd) = (memory.values("y", DTYPE, tokens * hidden)?, memory.values("rstd", F32, tokens)?);
    let norm = rms_norm::device::Rows { x, w, y, rstd, rows: tokens, columns: hidden };
    push("rms_norm_fwd", least("rms_norm_fwd", tokens), &[], Box::new(move |e| rms_norm::device::fwd(e, DTYPE, &norm, 1e-5)));
    let ((dx, dx_kept), dy) = (memory.restored("dx", tokens * hidden)?, memory.values("dy", DTYPE, tokens * hidden)?);
    let norm_bwd = rms_norm::device::Rows { y: dx, ..norm };
    push("rms_norm_bwd", least("rms_norm_bwd", tokens), &[dx_kept], Box::new(move |e| rms_norm::device::bwd_add(e, DTYPE, &norm_bwd, dy)));

    let width = heads.qkv_width();
    let (qkv, qkv_kept) = memory.restored("qkv", tokens * width)?;
    let turned = num_heads + num_groups;
    let angles = memory.values("cos", F32, tokens * head_dim / 4)?;
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let positions = memory.bytes("positions", bytemuck::cast_slice(&positions))?;
    let rotary =
        rotary::device::Heads { x: qkv, positions, cos: angles, sin: angles, rows: tokens, stride: width, heads: turned, head_dim };
    push("rotary", least("rotary", tokens), &[qkv_kept], Box::new(move |e| rotary::device::rotate_(e, DTYPE, &rotary, Direction::Forward)));

    for (prefix, row, of_rows) in [(0, row, ""), (prefix, row, ""), (0, long_row, ", long rows"), (prefix, long_row, ", long rows")] {
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
        let sums = (tokens / row * of_prefix).max(4);
        let (dprefix_k, dprefix_v) = (memory.values("dprefix k", F32, sums)?, memory.values("dprefix v", F32, sums)?);
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
        let name = format!("attention_fwd prefix {prefix}{of_rows}");
        push(&name, Work::Flops(2 * product), &[], Box::new(move |e| attention::device::fwd(e, DTYPE, &at.batch(&of_fwd))));
        let name = format!("attention_bwd prefix {prefix}{of_rows}");
        push(
            &name,
            Work::Flops(5 * product),
            &[],
            Box::new(move |e| {
                attention::device::bwd(e, DTYPE, &at.batch(&tiles), &grads)?;
                sums.map_or(Ok(()), |sums| attention::device::sum_rows(e, &sums))
            }),
        );
    }
    let ((gate_up, gate_up_kept), act) = (memory.restored("gate_up", tokens * 2 * ffn)?, memory.values("act", DTYPE, tokens * ffn)?);
    let mlp = swiglu::device::Rows { gate_up, act, rows: tokens, columns: ffn, stride: 2 * ffn };
    push("swiglu_fwd", least("swiglu_fwd", tokens), &[], Box::new(move |e| swiglu::device::fwd(e, DTYPE, &mlp)));
    push("swiglu_bwd", least("swiglu_bwd", tokens), &[gate_up_kept], Box::new(move |e| swiglu::device::bwd_(e, DTYPE, &mlp)));

    let targets: Vec<u8> = (0..chunk).flat_map(|i| ((i * 31 % vocabulary) as i32).to_le_bytes()).collect();
    let (logits, logits_kept) = memory.restored("logits", chunk * vocabulary)?;
    let loss = cross_entropy::device::Rows {
        logits,
        targets: memory.bytes("targets", &targets)?,
        losses: memory.values("losses", F32, chunk)?,
        fault: memory.no_fault()?,
        rows: chunk,
        columns: vocabulary,
    };
    push(
        "cross_entropy",
        least("cross_entropy", chunk),
        &[logits_kept],
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
        &[],
        Box::new(move |e| {
            adamw::device::chunk_square_sums(e, g, parameters, sums)?;
            adamw::device::norm(e, sums, num_chunks, 1.0, of_norm, factor)
        }),
    );
    let update = adamw::Update { weight1: 0.1, keep2: 0.999, weight2: 1e-3, keep: 1.0, step_size: -1e-6, correction: 1.0, epsilon: 1e-8 };
    let state = adamw::device::Buffers { params: p, exp_avg: m, exp_avg_sq: v, grads: g, rounded: None, factor, n: parameters };
    // Its moments come to rest at the gradient's, so nothing has to be restored.
    push("adamw", least("adamw", tokens), &[], Box::new(move |e| adamw::device::step(e, &update, &state)));
    push("non_finite", Work::Bytes(4 * parameters as u64), &[], Box::new(move |e| non_finite::device::first(e, g, parameters, fault)));
    Ok(entries)
}

/// cuBLASLt's products of a step, in its order: names as in [`traffic::step`]. A frozen weight has no gradient of its own.
///
/// # Errors
/// When memory is short.
pub fn products(executor: &dyn Executor, shape: &Shape) -> Result<Vec<(String, Product)>, LaunchError> {
    let memory = Memory::new(executor);
    let Shape { tokens, hidden, ffn, vocabulary, chunk, heads, .. } = *shape;
    let (width, out_width) = (heads.qkv_width(), hidden_of(heads));
    let mut products = Vec::new();
    // Forward x [M, from] w [to, from]^T, and backward dy [M, to] w.
    for (name, rows, from, to, bias, residual) in [
        ("qkv + bias", tokens, hidden, width, true, false),
        ("dense + residual", tokens, out_width, hidden, false, true),
        ("gate_up", tokens, hidden, 2 * ffn, false, false),
        ("down + residual", tokens, ffn, hidden, false, true),
        ("output layer", chunk, hidden, vocabulary, false, false),
    ] {
        let (x, y) = (memory.values("x", DTYPE, rows * from)?, memory.values("y", DTYPE, rows * to)?);
        let weight = memory.values("weight", DTYPE, from * to)?;
        let (dtype, out_dtype) = (DTYPE, DTYPE);
        products.push((
            name.to_owned(),
            Product {
                operands: Operands::Nt,
                sizes: [rows, to, from],
                a: x,
                b: weight,
                d: y,
                dtype,
                out_dtype,
                bias: if bias { Some(memory.values("bias", DTYPE, to)?) } else { None },
                residual: if residual { Some(memory.values("residual", DTYPE, rows * to)?) } else { None },
            },
        ));
        let backward = format!("{}, backward", name.split(" + ").next().unwrap_or(name));
        let dy = memory.values("dy", DTYPE, rows * to)?;
        let (bias, residual) = (None, None);
        let (operands, sizes) = (Operands::Nn, [rows, from, to]);
        products.push((backward, Product { operands, sizes, a: dy, b: weight, d: x, dtype, out_dtype, bias, residual }));
    }
    Ok(products)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has no memory: only addresses, 256 bytes each.
    struct Addresses(Cell<u64>);

    impl Executor for Addresses {
        fn describe(&self) -> String {
            "addresses".to_owned()
        }
        fn alloc(&self, _: &str, bytes: usize) -> Result<Buffer, LaunchError> {
            self.0.set(self.0.get() + 256);
            Ok(Buffer { address: self.0.get(), bytes })
        }
        fn write(&self, _: Buffer, _: &[u8]) -> Result<(), LaunchError> {
            Ok(())
        }
        fn read(&self, from: Buffer) -> Result<Vec<u8>, LaunchError> {
            unreachable!("{from:?}")
        }
        fn launch(&self, _: &str, _: crate::kernels::launch::Launch, _: &[u8]) -> Result<(), LaunchError> {
            Ok(())
        }
    }

    #[test]
    fn products_are_those_of_the_step() {
        let traffic = traffic::step(&Shape::SMALL, 1);
        let products = products(&Addresses(Cell::new(0)), &Shape::SMALL).unwrap();
        let expected: Vec<&str> = traffic.iter().filter(|kernel| kernel.asked.is_none()).map(|kernel| kernel.name).collect();
        let mut expected: Vec<&str> = expected.into_iter().filter(|name| !name.starts_with("attention")).collect();
        let mut found: Vec<&str> = products.iter().map(|(name, _)| name.as_str()).collect();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
    }
}
