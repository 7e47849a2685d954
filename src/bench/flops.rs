//! Counted operations of a training step against those that the arithmetic needs.

use serde::Serialize;

use super::setup::{Bench, BenchSetup};
use crate::config::arithmetic::token_flops;
use crate::kernels::matmul;
use crate::model::shape::ModelShape;
use crate::train::TrainError;
use crate::train::backprop;

/// Floating point operations of the matrix products of one micro-batch, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Flops {
    pub tokens: u64,
    pub target_tokens: u64,
    /// What the kernels counted.
    pub counted: u64,
    /// 4N (6N with recompute) of the blocks' weights a token, 4N of the head a target, attention, and what the method adds or leaves out.
    pub ideal: u64,
    /// What a gradient of every weight costs on top, 2N a token.
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
    let shape = ModelShape::from(&bench.model.config);
    let costs = setup.method.settings().costs(&shape)?;
    let per_token = token_flops(&shape, &costs, setup.recompute);
    let rows: u64 =
        batch.row_bounds.windows(2).map(|b| per_token.row(costs.soft_tokens + (b[1] - b[0]) as u64, 0, costs.prefix_tokens)).sum();
    let ideal = rows + per_token.head * targets;
    let (block, head) = (shape.trunk_weights(), shape.head_weights());
    Ok(Flops { tokens, target_tokens: targets, counted, ideal, weight_gradients: 2 * block * tokens + 2 * head * targets })
}
