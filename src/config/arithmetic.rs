//! What a plan costs: parameters, FLOPs a token, bytes a rank. Pure functions of the model's sizes and the plan.
//!
//! N below is the number of weights in matrix products (all linears, the head included, the embedding table not). Everything in the base
//! is frozen, so the backward pass computes input gradients only: 2N forward, 2N backward, and 2N more where blocks are recomputed. The
//! head works on target positions only.

use serde::Serialize;

use crate::model::config::ModelConfig;
use crate::model::hooks::LinearSite;

use super::plan::{BatchPlan, MethodPlan, Plan, Recompute, Reduction};

/// Logits are computed for so many target positions at a time.
pub const LOGITS_CHUNK_ROWS: usize = 512;

const F32_BYTES: u64 = 4;

/// The sizes in config.json that costs depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ModelShape {
    pub layers: u64,
    pub hidden: u64,
    pub ffn: u64,
    pub heads: u64,
    pub groups: u64,
    /// Channels of a head.
    pub kv: u64,
    pub vocab: u64,
}

impl From<&ModelConfig> for ModelShape {
    fn from(config: &ModelConfig) -> Self {
        Self {
            layers: config.num_layers as u64,
            hidden: config.hidden_size as u64,
            ffn: config.ffn_hidden_size as u64,
            heads: config.num_attention_heads as u64,
            groups: config.multi_query_group_num as u64,
            kv: config.kv_channels as u64,
            vocab: config.padded_vocab_size as u64,
        }
    }
}

impl ModelShape {
    /// Width of the joined query, key and value projection.
    pub fn qkv_width(&self) -> u64 {
        (self.heads + 2 * self.groups) * self.kv
    }

    /// (out, in) of a block's linear layer.
    pub fn linear(&self, site: LinearSite) -> (u64, u64) {
        match site {
            LinearSite::QueryKeyValue => (self.qkv_width(), self.hidden),
            LinearSite::Dense => (self.hidden, self.heads * self.kv),
            LinearSite::DenseHTo4h => (2 * self.ffn, self.hidden),
            LinearSite::Dense4hToH => (self.hidden, self.ffn),
        }
    }

    /// Weights of the blocks' linears.
    pub fn trunk_weights(&self) -> u64 {
        self.layers * LinearSite::ALL.into_iter().map(|site| self.linear(site)).map(|(out, input)| out * input).sum::<u64>()
    }

    pub fn head_weights(&self) -> u64 {
        self.vocab * self.hidden
    }

    /// All parameters: linears, query-key-value bias, norms, embedding table, head.
    pub fn parameters(&self) -> u64 {
        self.trunk_weights() + self.layers * (self.qkv_width() + 2 * self.hidden) + self.hidden + 2 * self.head_weights()
    }

    /// f32 values that the backward pass of one layer needs of one token.
    pub fn saved_floats(&self, recompute: Recompute) -> u64 {
        match recompute {
            Recompute::None => self.hidden + self.qkv_width() + self.heads * self.kv + self.hidden + 2 * self.ffn,
            Recompute::Block => self.hidden,
        }
    }

    /// Keys and values of one virtual token in all layers.
    pub fn prefix_width(&self) -> u64 {
        2 * self.layers * self.groups * self.kv
    }
}

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
    /// Scores and weighted values, forward, backward and recomputed, of one query over one key, summed over layers.
    pub attention_per_key: u64,
}

impl TokenFlops {
    pub fn trunk(&self) -> u64 {
        self.trunk_forward + self.trunk_backward + self.trunk_recompute
    }

    /// FLOPs of a row of `tokens` inputs, `targets` of them in the loss, behind `prefix` virtual tokens.
    pub fn row(&self, tokens: u64, targets: u64, prefix: u64) -> u64 {
        let keys = tokens * prefix + tokens * (tokens + 1) / 2;
        tokens * self.trunk() + targets * self.head + keys * self.attention_per_key
    }
}

/// Memory of one rank by purpose; f32 everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RankBytes {
    pub weights: u64,
    /// Parameter, gradient and two moments.
    pub trainable: u64,
    /// Gradient sums of this rank's slots, where the method meets the model.
    pub slot_sums: u64,
    /// What the backward pass keeps of one micro-batch of longest rows.
    pub saved_activations: u64,
    /// Logits of one chunk of target positions.
    pub logits: u64,
}

impl RankBytes {
    pub fn total(&self) -> u64 {
        self.weights + self.trainable + self.slot_sums + self.saved_activations + self.logits
    }
}

/// The numbers behind a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Arithmetic {
    pub base_parameters: u64,
    pub matmul_weights: u64,
    pub trainable_parameters: u64,
    pub prefix_tokens: u64,
    /// Tokens of a row that the model sees, at most: prompt, answer and eos, less the last, which predicts nothing.
    pub max_row_tokens: u64,
    pub max_row_targets: u64,
    pub token_flops: TokenFlops,
    /// FLOPs of one step over all ranks if every row has the greatest length.
    pub max_step_flops: u64,
    pub rank_bytes: RankBytes,
}

/// What a method costs beyond the base.
struct MethodCosts {
    trainable_parameters: u64,
    /// Elements of the gradient where the method meets the model.
    site_elements: u64,
    /// Virtual tokens before each row, in every layer.
    prefix_tokens: u64,
    /// FLOPs of a token in its own products.
    forward: u64,
    backward: u64,
}

fn method_costs(shape: &ModelShape, method: &MethodPlan) -> MethodCosts {
    match method {
        MethodPlan::PtuningV2 { pre_seq_len, prefix_projection, .. } => {
            let width = shape.prefix_width();
            let table = pre_seq_len.get() as u64 * width;
            let projection = if *prefix_projection { 2 * width * shape.hidden + shape.hidden + width } else { 0 };
            let prefix_tokens = pre_seq_len.get() as u64;
            MethodCosts { trainable_parameters: table + projection, site_elements: table, prefix_tokens, forward: 0, backward: 0 }
        }
        MethodPlan::PrefixTuning { pre_seq_len, prefix_projection, encoder_hidden_size } => {
            let (width, prefix_tokens, token_dim) = (shape.prefix_width(), pre_seq_len.get() as u64, shape.groups * shape.kv);
            let hidden = encoder_hidden_size.map_or(token_dim, |hidden| hidden.get() as u64);
            let table = prefix_tokens * width;
            let trained =
                if *prefix_projection { prefix_tokens * token_dim + hidden * (token_dim + 1) + width * (hidden + 1) } else { table };
            MethodCosts { trainable_parameters: trained, site_elements: table, prefix_tokens, forward: 0, backward: 0 }
        }
        MethodPlan::Lora { rank, targets, .. } => {
            let sizes = targets.iter().map(|&site| shape.linear(site));
            let (out, input) = sizes.fold((0, 0), |sum, (out, input)| (sum.0 + out, sum.1 + input));
            let (b, a) = (shape.layers * rank.get() as u64 * out, shape.layers * rank.get() as u64 * input);
            MethodCosts {
                trainable_parameters: a + b,
                site_elements: a + b,
                prefix_tokens: 0,
                forward: 2 * (a + b),
                // x Aᵀ again, dA and dx; dB and dy B.
                backward: 2 * (3 * a + 2 * b),
            }
        }
    }
}

/// Gradients of slots that a rank holds at once, at most: one sum and the new one, or the open subtrees of its share of the slot tree.
fn gradient_buffers(batch: &BatchPlan, reduction: Reduction) -> u64 {
    let accumulation = batch.accumulation_steps() as u64;
    match reduction {
        Reduction::AllReduce => accumulation.min(2),
        Reduction::SlotTree => accumulation.min(2 * u64::from(batch.slots_per_step.ilog2()) + 1),
    }
}

pub fn plan_arithmetic(shape: &ModelShape, plan: &Plan) -> Arithmetic {
    let MethodCosts { trainable_parameters, site_elements, prefix_tokens, forward: own_forward, backward: own_backward } =
        method_costs(shape, &plan.method);
    let passes_recomputed = match plan.model.recompute {
        Recompute::None => 0,
        Recompute::Block => 1,
    };
    let forward = 2 * shape.trunk_weights();
    let token_flops = TokenFlops {
        trunk_forward: forward + own_forward,
        trunk_backward: forward + own_backward,
        trunk_recompute: passes_recomputed * (forward + own_forward),
        head: 4 * shape.head_weights(),
        attention_per_key: (3 + passes_recomputed) * 4 * shape.layers * shape.heads * shape.kv,
    };
    let max_row_targets = plan.data.max_target_length as u64 + 1;
    let max_row_tokens = plan.data.max_source_length as u64 + max_row_targets - 1;
    let rows = plan.batch.rows_per_slot.get() as u64;
    let micro_batch_tokens = rows * max_row_tokens;
    let saved = match plan.model.recompute {
        Recompute::None => shape.layers * shape.saved_floats(Recompute::None),
        Recompute::Block => shape.layers * shape.saved_floats(Recompute::Block) + shape.saved_floats(Recompute::None),
    };
    Arithmetic {
        base_parameters: shape.parameters(),
        matmul_weights: shape.trunk_weights() + shape.head_weights(),
        trainable_parameters,
        prefix_tokens,
        max_row_tokens,
        max_row_targets,
        token_flops,
        max_step_flops: plan.batch.rows_per_step() as u64 * token_flops.row(max_row_tokens, max_row_targets, prefix_tokens),
        rank_bytes: RankBytes {
            weights: F32_BYTES * shape.parameters(),
            trainable: 4 * F32_BYTES * trainable_parameters,
            slot_sums: F32_BYTES * site_elements * gradient_buffers(&plan.batch, plan.optim.reduction),
            saved_activations: F32_BYTES * micro_batch_tokens * saved,
            logits: F32_BYTES * (LOGITS_CHUNK_ROWS as u64).min(rows * max_row_targets) * shape.vocab,
        },
    }
}

/// Optimizer steps and, where the number of rows is known, passes over them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Length {
    pub steps: Option<u64>,
    pub epochs: Option<f64>,
    pub warmup_steps: Option<u64>,
}

/// How long `plan` runs over `num_rows` training rows; steps of an epoch count its last, incomplete one.
pub fn plan_length(plan: &Plan, num_rows: Option<u64>) -> Length {
    use super::plan::{Duration, Warmup};
    let rows_per_step = plan.batch.rows_per_step() as f64;
    let rows = num_rows.map(|n| n as f64);
    let steps = match plan.run.duration {
        Duration::Steps(steps) => Some(steps),
        Duration::Epochs(epochs) => rows.map(|n| (n * epochs / rows_per_step).ceil() as u64),
    };
    let epochs = match plan.run.duration {
        Duration::Steps(steps) => rows.filter(|&n| n > 0.0).map(|n| steps as f64 * rows_per_step / n),
        Duration::Epochs(epochs) => Some(epochs),
    };
    let warmup_steps = match plan.optim.warmup {
        Warmup::Steps(steps) => Some(steps),
        Warmup::Ratio(ratio) => steps.map(|n| (n as f64 * ratio).ceil() as u64),
    };
    Length { steps, epochs, warmup_steps }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATGLM2_6B: ModelShape = ModelShape { layers: 28, hidden: 4096, ffn: 13696, heads: 32, groups: 2, kv: 128, vocab: 65024 };

    #[test]
    fn shape_of_chatglm2_6b_has_the_published_number_of_parameters() {
        assert_eq!(CHATGLM2_6B.parameters(), 6_243_584_000);
        assert_eq!(CHATGLM2_6B.trunk_weights() + CHATGLM2_6B.head_weights(), 5_976_883_200);
    }

    #[test]
    fn saved_floats_of_chatglm2_6b_are_88_kb_in_two_bytes() {
        assert_eq!(2 * CHATGLM2_6B.saved_floats(Recompute::None), 88_576);
        assert_eq!(CHATGLM2_6B.saved_floats(Recompute::Block), 4096);
    }

    #[test]
    fn row_without_attention_and_head_costs_four_flops_a_weight() {
        let flops = TokenFlops { trunk_forward: 20, trunk_backward: 20, trunk_recompute: 0, head: 4, attention_per_key: 1 };
        assert_eq!(flops.row(3, 2, 5), 3 * 40 + 2 * 4 + 15 + 6);
    }
}
