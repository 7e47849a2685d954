//! What a plan costs: parameters, FLOPs a token, bytes a rank. Pure functions of the model's sizes and the plan.
//!
//! N below is the number of weights in matrix products (all linears, the head included, the embedding table not). Where the base
//! is frozen, the backward pass computes input gradients only: 2N forward, 2N backward, and 2N more where blocks are recomputed. The
//! head works on target positions only.

use serde::Serialize;

use super::plan::{BatchPlan, Duration, Plan, Recompute, Reduction, Warmup, WeightDtype};
use crate::dist::Shards;
use crate::model::loss::LOGITS_CHUNK;
use crate::model::shape::ModelShape;
use crate::optim;
use crate::peft::{Costs, MethodError};

const F32_BYTES: u64 = 4;

/// FLOPs of one token in a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TokenFlops {
    /// Forward pass of all blocks' linears, 2N without the head, and of what the method adds to them.
    pub trunk_forward: u64,
    /// Their input gradients, 2N without the head, and the gradients of what the method adds.
    pub trunk_backward: u64,
    /// Forward pass run again: 2N without the head, or 0.
    pub trunk_recompute: u64,
    /// Head, forward and backward, of a target token.
    pub head: u64,
    /// The forward part of it.
    pub head_forward: u64,
    /// Scores and weighted values, forward, backward and recomputed, of one query over one key, summed over layers.
    pub attention_per_key: u64,
}

impl TokenFlops {
    pub fn trunk(&self) -> u64 {
        self.trunk_forward + self.trunk_backward + self.trunk_recompute
    }

    /// FLOPs of a row of `tokens` inputs, `targets` of them in the loss, behind `prefix` virtual tokens; 2^64 where there are more.
    pub fn row(&self, tokens: u64, targets: u64, prefix: u64) -> u64 {
        let keys = tokens * prefix + tokens * (tokens + 1) / 2;
        let products = [(tokens, self.trunk()), (targets, self.head), (keys, self.attention_per_key)];
        products.into_iter().fold(0, |sum: u64, (n, flops)| sum.saturating_add(n.saturating_mul(flops)))
    }
}

/// Memory of one rank by purpose; f32 everywhere, bf16 values too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RankBytes {
    pub weights: u64,
    pub trained_parameters: u64,
    /// Mean gradient of the parameters, or of this rank's shard of them.
    pub gradient: u64,
    /// The optimizer's two, of all parameters or of this rank's shard of them.
    pub moments: u64,
    /// The optimizer's f32 masters of parameters that the model has in bf16, all or this rank's shard; 0 where the parameters are f32.
    pub masters: u64,
    /// Gradient sums of this rank's slots, where the method meets the model.
    pub slot_sums: u64,
    /// What the backward pass keeps of one micro-batch of longest rows.
    pub saved_activations: u64,
    /// Logits of one chunk of target positions.
    pub logits: u64,
}

impl RankBytes {
    /// A model that nothing is trained on.
    pub fn of_weights(shape: &ModelShape) -> Self {
        Self { weights: F32_BYTES * shape.parameters(), ..Self::default() }
    }

    pub fn total(&self) -> u64 {
        let trained = self.trained_parameters + self.gradient + self.moments + self.masters;
        self.weights + trained + self.slot_sums + self.saved_activations + self.logits
    }
}

/// The numbers behind a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Arithmetic {
    pub base_parameters: u64,
    pub matmul_weights: u64,
    pub trainable_parameters: u64,
    /// Those of them that are the base's own.
    pub trained_base_parameters: u64,
    pub prefix_tokens: u64,
    /// Soft tokens before each row; they count as tokens.
    pub soft_tokens: u64,
    /// Tokens of a row that the model sees, at most: prompt, answer and eos, less the last, which predicts nothing.
    pub max_row_tokens: u64,
    pub max_row_targets: u64,
    pub token_flops: TokenFlops,
    /// FLOPs of one step over all ranks if every row has the greatest length.
    pub max_step_flops: u64,
    pub rank_bytes: RankBytes,
}

/// Gradients of slots that a rank holds at once, at most: one sum and the new one, or the open subtrees of its share of the slot tree.
fn gradient_buffers(batch: &BatchPlan, reduction: Reduction) -> u64 {
    let accumulation = batch.accumulation_steps() as u64;
    match reduction {
        Reduction::AllReduce => accumulation.min(2),
        Reduction::SlotTree => accumulation.min(2 * u64::from(batch.slots_per_step.ilog2()) + 1),
    }
}

/// Parameters whose moments a rank holds, at most.
fn optimizer_shard(plan: &Plan, trainable_parameters: u64) -> u64 {
    let num_shards = if plan.optim.shard_optimizer { plan.batch.world_size.get() } else { 1 };
    Shards::new(trainable_parameters as usize, num_shards, optim::CHUNK).longest() as u64
}

/// FLOPs of a token under a method with `costs`.
pub fn token_flops(shape: &ModelShape, costs: &Costs, recompute: Recompute) -> TokenFlops {
    let passes_recomputed = match recompute {
        Recompute::None => 0,
        Recompute::Block => 1,
    };
    let forward = 2 * shape.trunk_weights();
    let from = |flops: u64, layer: u64| flops / shape.layers.max(1) * (shape.layers - layer);
    let lowest_gradient = costs.lowest_layer.max(costs.lowest_base_gradient);
    let scores = 4 * shape.layers * shape.heads * shape.kv;
    TokenFlops {
        trunk_forward: forward + costs.forward,
        trunk_backward: from(forward, lowest_gradient) + costs.backward,
        trunk_recompute: passes_recomputed * (from(forward, costs.lowest_layer) + costs.forward),
        head: 4 * shape.head_weights() + costs.head_backward,
        head_forward: 2 * shape.head_weights(),
        attention_per_key: scores + from(2 * scores, lowest_gradient) + passes_recomputed * from(scores, costs.lowest_layer),
    }
}

/// What a rank has at once in memory, of a micro-batch and of the gradients of slots.
struct Held {
    saved_floats: u64,
    logits_rows: u64,
    gradient_buffers: u64,
    /// Elements of the mean gradient, beside those buffers.
    gradient: u64,
}

fn rank_bytes(shape: &ModelShape, plan: &Plan, costs: &Costs, held: &Held) -> RankBytes {
    // Trained weights of the base are counted among the trainable ones.
    let weights = shape.parameters() + costs.frozen_parameters - costs.trained_base_parameters;
    let trained = costs.trainable_parameters;
    let shard = optimizer_shard(plan, trained);
    RankBytes {
        weights: F32_BYTES * weights,
        trained_parameters: F32_BYTES * trained,
        gradient: F32_BYTES * held.gradient,
        moments: 2 * F32_BYTES * shard,
        masters: match plan.model.torch_dtype {
            WeightDtype::Float32 => 0,
            WeightDtype::Bfloat16 => F32_BYTES * shard,
        },
        slot_sums: F32_BYTES * costs.site_elements * held.gradient_buffers,
        saved_activations: F32_BYTES * held.saved_floats,
        logits: F32_BYTES * (LOGITS_CHUNK as u64).min(held.logits_rows) * shape.vocab,
    }
}

/// What a rank may take, of micro-batches of rows of so many inputs and targets.
fn most_rank_bytes(shape: &ModelShape, plan: &Plan, costs: &Costs, row_tokens: u64, row_targets: u64) -> RankBytes {
    let rows = plan.batch.rows_per_slot.get() as u64;
    let trained = costs.trainable_parameters;
    let reached = shape.layers - costs.lowest_layer;
    let saved = match plan.model.recompute {
        Recompute::None => reached * shape.saved_floats(Recompute::None) + costs.saved_floats,
        Recompute::Block => {
            reached * shape.saved_floats(Recompute::Block) + shape.saved_floats(Recompute::None) + costs.saved_floats / shape.layers.max(1)
        }
    };
    let held = Held {
        saved_floats: rows * (costs.soft_tokens + row_tokens) * saved,
        logits_rows: rows * row_targets,
        gradient_buffers: gradient_buffers(&plan.batch, plan.optim.reduction),
        // Only where the method meets the model by its parameters themselves can ranks do with a shard of the gradient.
        gradient: if costs.site_elements == trained { optimizer_shard(plan, trained) } else { trained },
    };
    rank_bytes(shape, plan, costs, &held)
}

/// # Errors
/// When the method's settings name parts that the model does not have.
pub fn plan_arithmetic(shape: &ModelShape, plan: &Plan) -> Result<Arithmetic, MethodError> {
    let costs = plan.method.settings().costs(shape)?;
    let token_flops = token_flops(shape, &costs, plan.model.recompute);
    let max_row_targets = plan.data.max_target_length as u64 + 1;
    let max_row_tokens = plan.data.max_source_length as u64 + max_row_targets - 1;
    Ok(Arithmetic {
        base_parameters: shape.parameters(),
        matmul_weights: shape.trunk_weights() + shape.head_weights(),
        trainable_parameters: costs.trainable_parameters,
        trained_base_parameters: costs.trained_base_parameters,
        prefix_tokens: costs.prefix_tokens,
        soft_tokens: costs.soft_tokens,
        max_row_tokens,
        max_row_targets,
        token_flops,
        max_step_flops: token_flops
            .row(costs.soft_tokens + max_row_tokens, max_row_targets, costs.prefix_tokens)
            .saturating_mul(plan.batch.rows_per_step() as u64),
        rank_bytes: most_rank_bytes(shape, plan, &costs, max_row_tokens, max_row_targets),
    })
}

/// Tokens of the rows of a run, the last of each, which predicts nothing, included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLengths {
    pub shortest: u64,
    pub longest: u64,
    pub num_rows: u64,
}

/// As [`plan_arithmetic`] has it, with the longest of such rows in place of the longest that the plan allows.
///
/// # Errors
/// When the method's settings name parts that the model does not have.
pub fn rank_bytes_of_rows(shape: &ModelShape, plan: &Plan, lengths: &RowLengths) -> Result<RankBytes, MethodError> {
    let row_tokens = lengths.longest.saturating_sub(1);
    let row_targets = row_tokens.min(plan.data.max_target_length as u64 + 1);
    Ok(most_rank_bytes(shape, plan, &plan.method.settings().costs(shape)?, row_tokens, row_targets))
}

/// Gradients of slots that each rank surely holds at once. On one rank: the sums of the open subtrees before its slot k, popcount(k) of
/// them, most at k = 2^m - 1. A share that begins elsewhere has at least one of its second slot on. Where weights of the base are trained, the
/// slot's own gradient is there from the start of its backward pass.
fn least_gradient_buffers(batch: &BatchPlan, reduction: Reduction, costs: &Costs) -> u64 {
    let accumulation = batch.accumulation_steps();
    let before = match reduction {
        Reduction::SlotTree if batch.world_size.get() == 1 => u64::from(accumulation.max(1).ilog2()),
        Reduction::SlotTree | Reduction::AllReduce => u64::from(accumulation > 1),
    };
    (before + u64::from(costs.trained_base_parameters > 0)).max(1)
}

/// What each rank of a run over such rows surely takes, where [`plan_arithmetic`] has what it may take. Of the rows: micro-batches of the
/// shortest, and the longest once if the run comes to every row. Of the layers: not the lowest that is reached, which may keep less. Of the
/// gradients: all that are held at once, beside the shortest rows, or one beside the longest. Nothing of what the method keeps for itself.
///
/// # Errors
/// When the method's settings name parts that the model does not have.
pub fn least_rank_bytes(shape: &ModelShape, plan: &Plan, lengths: &RowLengths) -> Result<RankBytes, MethodError> {
    let costs = plan.method.settings().costs(shape)?;
    let rows = plan.batch.rows_per_slot.get() as u64;
    let steps = total_steps(plan, lengths.num_rows);
    // On several ranks nobody knows which meets the longest row.
    let meets_all = plan.batch.world_size.get() == 1 && steps.saturating_mul(plan.batch.rows_per_step() as u64) >= lengths.num_rows;
    let longest = if meets_all { lengths.longest } else { lengths.shortest };
    let inputs = |tokens: u64| costs.soft_tokens + tokens.saturating_sub(1);
    let saved = match (shape.layers - costs.lowest_layer, plan.model.recompute) {
        (0 | 1, _) => 0,
        (reached, Recompute::None) => (reached - 1) * shape.saved_floats(Recompute::None),
        (reached, Recompute::Block) => (reached - 1) * shape.saved_floats(Recompute::Block) + shape.saved_floats(Recompute::None),
    };
    let at_once = |gradient_buffers: u64, longest: u64| {
        let tokens = inputs(longest) + (rows - 1) * inputs(lengths.shortest);
        let held = Held { saved_floats: tokens * saved, logits_rows: rows, gradient_buffers, gradient: 0 };
        let mut bytes = rank_bytes(shape, plan, &costs, &held);
        if steps < 2 {
            // The first step frees its activations, and all sums but one, before it touches the moments: the larger of the two counts.
            let sum = F32_BYTES * costs.site_elements;
            if bytes.moments + sum > bytes.saved_activations + bytes.logits + bytes.slot_sums {
                (bytes.saved_activations, bytes.logits, bytes.slot_sums) = (0, 0, sum);
            } else {
                bytes.moments = 0;
            }
        }
        bytes
    };
    // Which slot has the longest row is not known: it may be the first.
    let most_sums = at_once(least_gradient_buffers(&plan.batch, plan.optim.reduction, &costs), lengths.shortest);
    let longest_row = at_once(1, longest);
    Ok(if most_sums.total() > longest_row.total() { most_sums } else { longest_row })
}

/// Optimizer steps of a run over `num_rows` training rows; the last step of the epochs asked for is a whole one.
pub fn total_steps(plan: &Plan, num_rows: u64) -> u64 {
    match plan.run.duration {
        Duration::Steps(steps) => steps,
        Duration::Epochs(epochs) => (num_rows as f64 * epochs / plan.batch.rows_per_step() as f64).ceil().max(1.0) as u64,
    }
}

/// Optimizer steps, and the passes over the rows that they are; where the number of rows is not known, the passes asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Length {
    pub steps: Option<u64>,
    pub epochs: Option<f64>,
    pub warmup_steps: Option<u64>,
}

/// How long `plan` runs over `num_rows` training rows.
pub fn plan_length(plan: &Plan, num_rows: Option<u64>) -> Length {
    let steps = match (plan.run.duration, num_rows) {
        (Duration::Steps(steps), _) => Some(steps),
        (Duration::Epochs(_), num_rows) => num_rows.map(|n| total_steps(plan, n)),
    };
    let done = num_rows.filter(|&n| n > 0).zip(steps).map(|(n, steps)| steps as f64 * plan.batch.rows_per_step() as f64 / n as f64);
    let epochs = done.or(match plan.run.duration {
        Duration::Steps(_) => None,
        Duration::Epochs(epochs) => Some(epochs),
    });
    let warmup_steps = match plan.optim.warmup {
        Warmup::Steps(steps) => Some(steps),
        Warmup::Ratio(_) => steps.map(|n| plan.optim.warmup.steps(n)),
    };
    Length { steps, epochs, warmup_steps }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_of_chatglm2_6b_has_the_published_number_of_parameters() {
        assert_eq!(ModelShape::CHATGLM2_6B.parameters(), 6_243_584_000);
        assert_eq!(ModelShape::CHATGLM2_6B.trunk_weights() + ModelShape::CHATGLM2_6B.head_weights(), 5_976_883_200);
    }

    #[test]
    fn saved_floats_of_chatglm2_6b_are_88_kb_in_two_bytes() {
        assert_eq!(2 * ModelShape::CHATGLM2_6B.saved_floats(Recompute::None), 88_576);
        assert_eq!(ModelShape::CHATGLM2_6B.saved_floats(Recompute::Block), 4096);
    }

    #[test]
    fn row_without_attention_and_head_costs_four_flops_a_weight() {
        let flops =
            TokenFlops { trunk_forward: 20, trunk_backward: 20, trunk_recompute: 0, head: 4, head_forward: 2, attention_per_key: 1 };
        assert_eq!(flops.row(3, 2, 5), 3 * 40 + 2 * 4 + 15 + 6);
    }
}
