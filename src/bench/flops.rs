//! Counted operations of a training step against those that the arithmetic needs.

use serde::Serialize;

use super::setup::{Bench, BenchSetup};
use crate::kernels::{attention, matmul};
use crate::model::Recompute;
use crate::train::TrainError;
use crate::train::backprop;

/// Floating point operations of the matrix products of one micro-batch, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Flops {
    pub tokens: u64,
    pub target_tokens: u64,
    /// What the kernels counted.
    pub counted: u64,
    /// 4N (6N with recompute) of the blocks' weights a token, 4N of the head a target, attention, and low-rank updates.
    pub ideal: u64,
    /// What a gradient of every weight would cost on top, 2N a token; none of it may be in `counted`.
    pub weight_gradients: u64,
}

impl Flops {
    pub fn ratio(&self) -> f64 {
        self.counted as f64 / self.ideal as f64
    }
}

/// Counts one micro-batch.
///
/// # Errors
/// When a file cannot be read or the sizes do not fit.
pub fn count(setup: &BenchSetup) -> Result<Flops, TrainError> {
    let bench = Bench::new(setup)?;
    let batch = bench.micro_batch(0, 0);
    let before = matmul::flops();
    backprop::forward_backward(&bench.model, &*bench.method, &batch, setup.recompute)?;
    let counted = matmul::flops() - before;
    let (tokens, targets) = (batch.ids.len() as u64, batch.targets.len() as u64);
    let (block, head) = weights(setup);
    let attention = attention::ideal_flops(&batch.row_bounds, setup.prefix_len(), bench.model.heads()) * setup.layers as u64;
    let passes = if setup.recompute == Recompute::Block { 2 } else { 1 };
    // Forward 2N (twice with recompute) and 2N towards the input; attention's backward is two products where its forward has one.
    let base = 2 * (passes + 1) * block * tokens + 4 * head * targets + (passes + 2) * attention;
    let ideal = base + updates(setup, passes) * tokens;
    Ok(Flops { tokens, target_tokens: targets, counted, ideal, weight_gradients: 2 * block * tokens + 2 * head * targets })
}

/// FLOPs of a token in low-rank updates: x Aᵀ and B forward; x Aᵀ again, dA, dx (but in layer 0), dB and dy B backward.
fn updates(s: &BenchSetup, passes: u64) -> u64 {
    let (a, b) = ((s.lora * s.hidden) as u64, (s.lora * (s.heads + 2 * s.groups) * s.kv) as u64);
    2 * s.layers as u64 * (passes * (a + b) + 3 * a + 2 * b) - 2 * a
}

/// Weights that a token passes: those of all blocks, and the head's.
fn weights(s: &BenchSetup) -> (u64, u64) {
    let qkv = s.hidden * (s.heads + 2 * s.groups) * s.kv;
    let dense = s.heads * s.kv * s.hidden;
    let mlp = 3 * s.hidden * s.ffn;
    ((s.layers * (qkv + dense + mlp)) as u64, (s.vocab * s.hidden) as u64)
}
