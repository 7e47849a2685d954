//! Where a tuning method may touch the forward pass, and the gradient that comes back there.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

/// Keys and values that stand before a row's own tokens in one layer. Not rotated.
#[derive(Clone, Debug)]
pub struct PrefixKv {
    /// `[R, G, P, D]`, or `[1, G, P, D]` where all rows share it.
    pub k_RGPD: Tensor,
    /// Same shape as `k_RGPD`.
    pub v_RGPD: Tensor,
}

/// A linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearSite {
    QueryKeyValue,
    Dense,
    #[serde(rename = "dense_h_to_4h")]
    DenseHTo4h,
    #[serde(rename = "dense_4h_to_h")]
    Dense4hToH,
}

impl LinearSite {
    pub const ALL: [Self; 4] = [Self::QueryKeyValue, Self::Dense, Self::DenseHTo4h, Self::Dense4hToH];

    /// Its name inside a block, as config.json's checkpoints have it.
    pub fn module(self) -> &'static str {
        match self {
            Self::QueryKeyValue => "self_attention.query_key_value",
            Self::Dense => "self_attention.dense",
            Self::DenseHTo4h => "mlp.dense_h_to_4h",
            Self::Dense4hToH => "mlp.dense_4h_to_h",
        }
    }

    /// Its name in all of the model.
    pub fn path(self, layer: usize) -> String {
        format!("transformer.encoder.layers.{layer}.{}", self.module())
    }
}

/// How far down a layer's backward pass has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Nothing in this layer or below is trained.
    Nothing,
    /// The prefix of this layer is trained, and nothing below its attention.
    Prefix,
    /// The gradient has to reach what the layer's query-key-value product gives, and nothing below.
    QueryKeyValue,
    /// The gradient has to reach the layer's input.
    Input,
}

/// One method's hands in the passes over one micro-batch. The default is identity and costs nothing.
///
/// The forward part of a block may run twice (recompute): a hook gives the same answer both times.
pub trait Hooks {
    /// What layer `layer` sees before each row's own tokens.
    fn prefix_kv(&self, _layer: usize) -> Result<Option<PrefixKv>> {
        Ok(None)
    }

    /// Takes the gradient of the loss sum with respect to what [`Self::prefix_kv`] gave, one per row: `[R, G, P, D]` each.
    fn prefix_kv_grad(&mut self, _layer: usize, _grad: PrefixKv) -> Result<()> {
        Ok(())
    }

    /// Whether [`Self::linear`] has something to say about a linear layer.
    fn changes_linear(&self, _layer: usize, _site: LinearSite) -> bool {
        false
    }

    /// x `[T, in]`, y `[T, out]` as the base has it: changes y in place.
    fn linear(&self, _layer: usize, _site: LinearSite, _x: &Tensor, _y: &Tensor) -> Result<()> {
        Ok(())
    }

    /// x `[T, in]`, dy `[T, out]`: takes the gradient of what [`Self::linear`] added and gives its part of dx, `[T, in]`.
    fn linear_grad(&mut self, _layer: usize, _site: LinearSite, x: &Tensor, _dy: &Tensor) -> Result<Tensor> {
        x.zeros_like()
    }

    /// How far down the backward pass of `layer` has to go; layers from the top down to the last that is not `Nothing` are asked.
    fn reach(&self, _layer: usize) -> Reach {
        Reach::Nothing
    }
}

/// The base model alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {}
