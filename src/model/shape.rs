//! The sizes of a model that costs depend on.

use serde::Serialize;

use super::chatglm2::Recompute;
use super::config::ModelConfig;
use super::hooks::{BaseWeight, LinearSite};

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
    /// query_key_value has a bias.
    pub qkv_bias: bool,
    /// Every linear layer of a block has one.
    pub linear_bias: bool,
    /// A norm stands before the head.
    pub final_norm: bool,
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
            qkv_bias: config.add_qkv_bias,
            linear_bias: config.add_bias_linear,
            final_norm: config.post_layer_norm,
        }
    }
}

impl ModelShape {
    /// ChatGLM2-6B's, from its published config.json.
    pub const CHATGLM2_6B: Self = Self {
        layers: 28,
        hidden: 4096,
        ffn: 13696,
        heads: 32,
        groups: 2,
        kv: 128,
        vocab: 65024,
        qkv_bias: true,
        linear_bias: false,
        final_norm: true,
    };

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

    pub fn has_bias(&self, site: LinearSite) -> bool {
        self.linear_bias || (self.qkv_bias && site == LinearSite::QueryKeyValue)
    }

    /// Whether the model has such a parameter.
    pub fn has(&self, weight: BaseWeight) -> bool {
        match weight {
            BaseWeight::Bias(_, site) => self.has_bias(site),
            BaseWeight::FinalLayernorm => self.final_norm,
            _ => true,
        }
    }

    /// The shape of a parameter, in a model that has it.
    pub fn dims(&self, weight: BaseWeight) -> Vec<usize> {
        let dims = match weight {
            BaseWeight::Embedding | BaseWeight::OutputLayer => vec![self.vocab, self.hidden],
            BaseWeight::InputLayernorm(_) | BaseWeight::PostAttentionLayernorm(_) | BaseWeight::FinalLayernorm => vec![self.hidden],
            BaseWeight::Weight(_, site) => vec![self.linear(site).0, self.linear(site).1],
            BaseWeight::Bias(_, site) => vec![self.linear(site).0],
        };
        dims.into_iter().map(|size| size as usize).collect()
    }

    /// Elements of a parameter, in a model that has it.
    pub fn elements(&self, weight: BaseWeight) -> u64 {
        self.dims(weight).iter().map(|&size| size as u64).product()
    }

    /// Every parameter that the model has.
    pub fn weights(&self) -> impl Iterator<Item = BaseWeight> {
        BaseWeight::all(self.layers as usize).filter(|&weight| self.has(weight))
    }

    /// Weights of the blocks' linears.
    pub fn trunk_weights(&self) -> u64 {
        self.layers * LinearSite::ALL.into_iter().map(|site| self.linear(site)).map(|(out, input)| out * input).sum::<u64>()
    }

    pub fn head_weights(&self) -> u64 {
        self.vocab * self.hidden
    }

    /// All parameters: linears with their biases, norms, embedding table, head.
    pub fn parameters(&self) -> u64 {
        self.weights().map(|weight| self.elements(weight)).sum()
    }

    /// Values that the backward pass of one layer needs of one token.
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
