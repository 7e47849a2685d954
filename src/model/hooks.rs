//! Where a tuning method may touch the forward pass, and the gradient that comes back there.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::linear::Linear;
use crate::kernels::{elementwise, matmul};

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

    /// The last part of its name.
    pub fn name(self) -> &'static str {
        self.module().rsplit('.').next().unwrap_or_default()
    }

    /// Its name in all of the model.
    pub fn path(self, layer: usize) -> String {
        format!("transformer.encoder.layers.{layer}.{}", self.module())
    }

    /// How far down its gradient has to reach, where nothing below is trained.
    pub fn reach(self) -> Reach {
        match self {
            Self::QueryKeyValue => Reach::QueryKeyValue,
            Self::Dense => Reach::AttentionOutput,
            Self::DenseHTo4h => Reach::Mlp,
            Self::Dense4hToH => Reach::MlpOutput,
        }
    }
}

/// One of a block's two halves; its output is added to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sublayer {
    Attention,
    Mlp,
}

/// A parameter of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BaseWeight {
    /// `[V, H]`
    Embedding,
    /// `[H]`, before a layer's attention.
    InputLayernorm(usize),
    /// `[out, in]`
    Weight(usize, LinearSite),
    /// `[out]`
    Bias(usize, LinearSite),
    /// `[H]`, before a layer's MLP.
    PostAttentionLayernorm(usize),
    /// `[H]`
    FinalLayernorm,
    /// `[V, H]`
    OutputLayer,
}

impl BaseWeight {
    /// All that a model of `num_layers` layers may have.
    pub fn all(num_layers: usize) -> impl Iterator<Item = Self> {
        let of_layer = |layer| {
            let linears = LinearSite::ALL.into_iter().flat_map(move |site| [Self::Weight(layer, site), Self::Bias(layer, site)]);
            [Self::InputLayernorm(layer), Self::PostAttentionLayernorm(layer)].into_iter().chain(linears)
        };
        [Self::Embedding, Self::FinalLayernorm, Self::OutputLayer].into_iter().chain((0..num_layers).flat_map(of_layer))
    }

    /// Its name in the hub's checkpoints.
    pub fn name(self) -> String {
        match self {
            Self::Embedding => "transformer.embedding.word_embeddings.weight".to_owned(),
            Self::InputLayernorm(layer) => format!("transformer.encoder.layers.{layer}.input_layernorm.weight"),
            Self::Weight(layer, site) => format!("{}.weight", site.path(layer)),
            Self::Bias(layer, site) => format!("{}.bias", site.path(layer)),
            Self::PostAttentionLayernorm(layer) => format!("transformer.encoder.layers.{layer}.post_attention_layernorm.weight"),
            Self::FinalLayernorm => "transformer.encoder.final_layernorm.weight".to_owned(),
            Self::OutputLayer => "transformer.output_layer.weight".to_owned(),
        }
    }

    /// The layer that it belongs to; none for what stands before or behind the layers.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::InputLayernorm(layer) | Self::Weight(layer, _) | Self::Bias(layer, _) | Self::PostAttentionLayernorm(layer) => {
                Some(layer)
            }
            Self::Embedding | Self::FinalLayernorm | Self::OutputLayer => None,
        }
    }

    /// The part of a backward pass that finishes its gradient.
    pub fn stage(self) -> Stage {
        match (self, self.layer()) {
            (Self::Embedding, _) => Stage::Embedding,
            (_, Some(layer)) => Stage::Layer(layer),
            (_, None) => Stage::Head,
        }
    }

    /// How far down in its layer the gradient has to reach for it alone; `Nothing` for what belongs to no layer.
    pub fn reach(self) -> Reach {
        match self {
            Self::InputLayernorm(_) => Reach::Input,
            Self::Weight(_, site) | Self::Bias(_, site) => site.reach(),
            Self::PostAttentionLayernorm(_) => Reach::Mlp,
            Self::Embedding | Self::FinalLayernorm | Self::OutputLayer => Reach::Nothing,
        }
    }
}

/// A part of a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Output layer and final norm.
    Head,
    Layer(usize),
    Embedding,
}

impl Stage {
    /// In the order in which a backward pass through a model of `num_layers` finishes them.
    pub fn all(num_layers: usize) -> impl Iterator<Item = Self> {
        std::iter::once(Self::Head).chain((0..num_layers).rev().map(Self::Layer)).chain([Self::Embedding])
    }

    /// How many come before it.
    pub fn place(self, num_layers: usize) -> usize {
        match self {
            Self::Head => 0,
            Self::Layer(layer) => num_layers - layer,
            Self::Embedding => num_layers + 1,
        }
    }
}

/// How far down a layer's backward pass has to go, from its top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Nothing in this layer or below is trained.
    Nothing,
    /// To the MLP's output and its last linear layer.
    MlpOutput,
    /// Through all of the MLP, the norm before it included.
    Mlp,
    /// To the attention's output and its last linear layer.
    AttentionOutput,
    /// To the prefix of this layer's attention.
    Prefix,
    /// To what the layer's query-key-value product gives.
    QueryKeyValue,
    /// To the layer's input.
    Input,
}

/// Whether somebody below needs the gradient towards a linear layer's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    Wanted,
    Unwanted,
}

/// The backward pass of one linear layer as [`Hooks::linear_grad`] sees it.
pub struct LinearBackward<'a> {
    pub layer: usize,
    pub site: LinearSite,
    pub base: &'a Linear,
    /// Computes the layer's input `[T, in]` again.
    pub x: &'a dyn Fn() -> Result<Tensor>,
    /// `[T, out]`
    pub dy: &'a Tensor,
    /// What [`Hooks::linear`] asked to keep.
    pub kept: Option<&'a Tensor>,
    pub input: InputGradient,
}

impl LinearBackward<'_> {
    /// dy W, where it is wanted.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn base_input_grad(&self) -> Result<Option<Tensor>> {
        match self.input {
            InputGradient::Wanted => self.base.backward(self.dy).map(Some),
            InputGradient::Unwanted => Ok(None),
        }
    }
}

/// What [`Hooks::sublayer_grad`] makes of the gradient towards what it gave.
pub struct SublayerGrad {
    /// Towards the sublayer's own output, `[T, H]`.
    pub dy_TH: Tensor,
    /// Towards the residual stream that went in, on top of what it gets anyway, `[T, H]`.
    pub dx_TH: Option<Tensor>,
}

/// Callbacks by which a tuning method takes part in forward and backward of one micro-batch; the defaults do nothing.
///
/// The forward part of a block may run twice (recompute): a hook gives the same answer both times.
pub trait Hooks {
    /// Rows `[P, H]` that stand before each row's own tokens from the embedding on. They are ordinary tokens at positions 0 to P - 1; the row's own
    /// positions count from P.
    fn soft_tokens(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Takes the gradient of the loss sum with respect to the soft tokens of each row, `[R, P, H]`.
    fn soft_tokens_grad(&mut self, _grad_RPH: &Tensor) -> Result<()> {
        Ok(())
    }

    /// What layer `layer` sees before each row's own tokens.
    fn prefix_kv(&self, _layer: usize) -> Result<Option<PrefixKv>> {
        Ok(None)
    }

    /// Takes the gradient of the loss sum with respect to what [`Self::prefix_kv`] gave, one per row: `[R, G, P, D]` each.
    fn prefix_kv_grad(&mut self, _layer: usize, _grad: PrefixKv) -> Result<()> {
        Ok(())
    }

    /// x `[T, in]` -> (y `[T, out]`, what [`Self::linear_grad`] wants kept).
    fn linear(&self, _layer: usize, _site: LinearSite, base: &Linear, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        Ok((base.forward(x)?, None))
    }

    /// Whether [`Self::sublayer`] changes what a sublayer adds to the residual stream. If not, the layer's last product may add it at once.
    fn changes_sublayers(&self) -> bool {
        true
    }

    /// Whether [`Self::linear`] of this layer is anything but the base's.
    fn changes_linear(&self, _layer: usize, _site: LinearSite) -> bool {
        true
    }

    /// As [`Self::linear`], with `residual` `[T, out]` added to y, and rounded once where the device can.
    ///
    /// # Errors
    /// As [`Self::linear`].
    fn linear_onto(
        &self,
        layer: usize,
        site: LinearSite,
        base: &Linear,
        x: &Tensor,
        residual: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if !self.changes_linear(layer, site) {
            return Ok((base.forward_onto(x, residual)?, None));
        }
        let (y, kept) = self.linear(layer, site, base, x)?;
        elementwise::add_(&y, residual)?;
        Ok((y, kept))
    }

    /// Takes the gradient of a linear layer and gives dx `[T, in]`, where it is wanted.
    fn linear_grad(&mut self, of: LinearBackward) -> Result<Option<Tensor>> {
        if let Some(dw) = self.weight_grad(BaseWeight::Weight(of.layer, of.site))? {
            matmul::tn_add_(&dw, of.dy, &(of.x)()?)?;
        }
        if let Some(db) = self.weight_grad(BaseWeight::Bias(of.layer, of.site))? {
            elementwise::add_row_sum_(&db, of.dy)?;
        }
        of.base_input_grad()
    }

    /// x `[T, H]` the residual stream, y `[T, H]` what a sublayer is about to add to it: changes y in place, and gives what
    /// [`Self::sublayer_grad`] wants kept.
    fn sublayer(&self, _layer: usize, _which: Sublayer, _x: &Tensor, _y: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// dy `[T, H]` towards what [`Self::sublayer`] left in y; none where it left y alone.
    fn sublayer_grad(&mut self, _layer: usize, _which: Sublayer, _kept: Option<&Tensor>, _dy: &Tensor) -> Result<Option<SublayerGrad>> {
        Ok(None)
    }

    /// Where the gradient of a parameter of the base is to be added, in the parameter's shape; none where it is not trained.
    fn weight_grad(&mut self, _weight: BaseWeight) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// How far down the backward pass of `layer` has to go; layers from the top down to the last that is not `Nothing` are asked.
    fn reach(&self, _layer: usize) -> Reach {
        Reach::Nothing
    }
}

/// The base model alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {
    fn changes_sublayers(&self) -> bool {
        false
    }

    fn changes_linear(&self, _layer: usize, _site: LinearSite) -> bool {
        false
    }
}
