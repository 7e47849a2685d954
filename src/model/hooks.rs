//! Where a tuning method may touch the forward pass, and the gradient that comes back there.

use candle_core::{Result, Tensor};

/// Keys and values that stand before a row's own tokens in one layer. Not rotated.
#[derive(Clone, Debug)]
pub struct PrefixKv {
    /// `[R, G, P, D]`, or `[1, G, P, D]` where all rows share it.
    pub k_RGPD: Tensor,
    /// Same shape as `k_RGPD`.
    pub v_RGPD: Tensor,
}

/// How far down a layer's backward pass has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nothing in this layer or below is trained.
    Nothing,
    /// The prefix of this layer is trained, and nothing below its attention.
    Prefix,
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

    /// How far down the backward pass of `layer` has to go; layers from the top down to the last that is not `Nothing` are asked.
    fn reach(&self, _layer: usize) -> Reach {
        Reach::Nothing
    }
}

/// The base model alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {}
