//! ChatGLM2: embedding, blocks, final norm; the head lives in [`super::loss`].

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::ModelError;
use super::block::{Block, NoObserver, Observer, Pass, Saved};
use super::config::ModelConfig;
use super::hooks::{BaseWeight, Hooks, LinearSite, Reach};
use super::linear::Linear;
use super::shape::ModelShape;
use super::soft::Extended;
use super::weights::WeightSource;
use crate::kernels::attention::{Heads, Rows, Tables};
use crate::kernels::ids::Ids;
use crate::kernels::rotary::{self, Angles, Precision, Table};
use crate::kernels::{bf16, embedding, rms_norm};

/// What the backward pass computes again instead of keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Keep each block's intermediate values: 4N FLOPs a token.
    None,
    /// Keep each block's input alone and run its forward again: 6N FLOPs a token.
    Block,
}

/// In which arithmetic the rotary angles are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeTable {
    /// As exact arithmetic has it.
    Exact,
    /// In config.json's torch_dtype, as THUDM's code does.
    Published,
}

/// Rows of tokens packed one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// `[T]`
    pub ids: &'a [u32],
    /// `[T]` rotary positions.
    pub positions: &'a [u32],
    pub rows: Rows<'a>,
}

/// A ChatGLM2 on one device. Cloning it copies no weight.
#[derive(Clone, Debug)]
pub struct ChatGlm2 {
    pub config: ModelConfig,
    embedding_VH: Tensor,
    blocks: Vec<Block>,
    final_layernorm_H: Option<Tensor>,
    output_layer: Linear,
    /// Shared by clones: what is made of it serves all.
    rotary: Arc<rotary::Cache>,
}

/// What a forward pass leaves for the backward pass, lowest layer first; none for layers that the gradient does not reach.
pub struct Tape {
    layers: Vec<Option<Kept>>,
    rotary: Table,
    tables: Tables,
    /// The rows with their soft tokens, where there are some.
    extended: Option<Extended>,
}

enum Kept {
    All(Box<Saved>),
    Input(Tensor),
}

impl Tape {
    /// q, k, v of each layer (rotated), where they were kept.
    pub fn qkv(&self) -> impl Iterator<Item = Option<&Tensor>> {
        self.layers.iter().map(|kept| match kept {
            Some(Kept::All(saved)) => Some(&saved.qkv_TN),
            _ => None,
        })
    }
}

/// Which layers a forward pass keeps values of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Those that the gradient reaches.
    ForBackward(Recompute),
    /// All (a key-value cache is made from them).
    All,
    Nothing,
}

impl ChatGlm2 {
    /// The weights of `source` on `device`, as `dtype`.
    ///
    /// # Errors
    /// When a weight is missing or has another shape than config.json says.
    pub fn load(
        config: ModelConfig,
        source: &WeightSource,
        rope: RopeTable,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        Self::from_tensors(config, rope, |name, shape| source.get(name, shape, dtype, device))
    }

    /// A model of the weights that `get` gives for a name and a shape.
    ///
    /// # Errors
    /// Those of `get`.
    pub fn from_tensors(
        config: ModelConfig,
        rope: RopeTable,
        get: impl Fn(&str, &[usize]) -> std::result::Result<Tensor, ModelError>,
    ) -> std::result::Result<Self, ModelError> {
        let c = &config;
        let shape = ModelShape::from(c);
        let get = |weight: BaseWeight| get(&weight.name(), &shape.dims(weight));
        let get_if_there = |weight: BaseWeight| shape.has(weight).then(|| get(weight)).transpose();
        let linear = |layer, site| {
            let (weight, bias) = (get(BaseWeight::Weight(layer, site))?, get_if_there(BaseWeight::Bias(layer, site))?);
            Ok::<_, ModelError>(Linear::new(weight, bias))
        };
        let heads = Heads { num_heads: c.num_attention_heads, num_groups: c.multi_query_group_num, head_dim: c.kv_channels };
        let blocks = (0..c.num_layers)
            .map(|layer| {
                Ok(Block {
                    layer,
                    heads,
                    norm_eps: c.layernorm_epsilon,
                    input_layernorm_H: get(BaseWeight::InputLayernorm(layer))?,
                    query_key_value: linear(layer, LinearSite::QueryKeyValue)?,
                    dense: linear(layer, LinearSite::Dense)?,
                    post_attention_layernorm_H: get(BaseWeight::PostAttentionLayernorm(layer))?,
                    dense_h_to_4h: linear(layer, LinearSite::DenseHTo4h)?,
                    dense_4h_to_h: linear(layer, LinearSite::Dense4hToH)?,
                })
            })
            .collect::<std::result::Result<_, ModelError>>()?;
        let embedding_VH = get(BaseWeight::Embedding)?;
        let final_layernorm_H = get_if_there(BaseWeight::FinalLayernorm)?;
        let output_layer = Linear::new(get(BaseWeight::OutputLayer)?, None);
        let precision = match rope {
            RopeTable::Exact => Precision::Exact,
            RopeTable::Published => Precision::Published(c.torch_dtype),
        };
        let angles = Angles { base: c.rope.base, position_divisor: c.rope.position_scale, precision };
        let rotary = Arc::new(rotary::Cache::new(c.kv_channels, angles));
        Ok(Self { embedding_VH, blocks, final_layernorm_H, output_layer, rotary, config })
    }

    pub fn device(&self) -> &Device {
        self.embedding_VH.device()
    }

    /// The type in which it computes.
    pub fn dtype(&self) -> DType {
        self.embedding_VH.dtype()
    }

    pub fn heads(&self) -> Heads {
        let c = &self.config;
        Heads { num_heads: c.num_attention_heads, num_groups: c.multi_query_group_num, head_dim: c.kv_channels }
    }

    /// Hidden states before the final norm, `[T, H]`, and what `keep` asks for.
    ///
    /// # Errors
    /// When an id is not below the vocabulary or the sizes do not fit.
    pub fn forward(&self, tokens: Tokens, hooks: &dyn Hooks, keep: Keep) -> Result<(Tensor, Tape)> {
        self.forward_observed(tokens, hooks, keep, &mut NoObserver)
    }

    /// As [`Self::forward`], showing intermediate results to `observer`.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_observed(&self, tokens: Tokens, hooks: &dyn Hooks, keep: Keep, observer: &mut dyn Observer) -> Result<(Tensor, Tape)> {
        let mut x_TH = embedding::gather(&self.embedding_VH, &Ids::new(tokens.ids))?;
        let soft_PH = hooks.soft_tokens()?;
        let extended = soft_PH.as_ref().map(|soft_PH| Ok::<_, candle_core::Error>(Extended::new(tokens, soft_PH.dim(0)?))).transpose()?;
        if let (Some(extended), Some(soft_PH)) = (&extended, &soft_PH) {
            x_TH = extended.join(soft_PH, &x_TH)?;
        }
        let (positions, rows) = extended.as_ref().map_or((tokens.positions, tokens.rows), |e| (e.positions(), e.rows()));
        let rotary = self.rotary.table(positions);
        let tables = Tables::default();
        let rows = Rows { tables: Some(&tables), ..rows };
        let mut layers = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y_TH, saved) = block.forward(&x_TH, Pass { rows, rotary: &rotary }, hooks, observer)?;
            let reached = hooks.reach(block.layer) != Reach::Nothing;
            layers.push(match keep {
                Keep::All => Some(Kept::All(Box::new(saved))),
                Keep::ForBackward(Recompute::None) if reached => Some(Kept::All(Box::new(saved))),
                Keep::ForBackward(Recompute::Block) if reached => Some(Kept::Input(x_TH)),
                Keep::ForBackward(_) | Keep::Nothing => None,
            });
            x_TH = y_TH;
        }
        if let Some(extended) = &extended {
            x_TH = extended.split(&x_TH)?.1;
        }
        Ok((x_TH, Tape { layers, rotary, tables, extended }))
    }

    /// Takes the gradient towards the hidden states, `[T, H]`, down to the lowest trained place; the hooks receive theirs on the way.
    /// `layer_done` hears of each layer that it is through with: nothing is added to a gradient of its parameters any more.
    ///
    /// # Errors
    /// When a hook or `layer_done` fails.
    pub fn backward(
        &self,
        dx_TH: Tensor,
        tape: Tape,
        tokens: Tokens,
        hooks: &mut dyn Hooks,
        layer_done: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let Tape { layers, rotary, tables, extended } = tape;
        let rows = Rows { tables: Some(&tables), ..extended.as_ref().map_or(tokens.rows, Extended::rows) };
        let pass = Pass { rows, rotary: &rotary };
        let mut dx_TH = Some(match (&extended, hooks.soft_tokens()?) {
            // Nothing is predicted from a soft token.
            (Some(extended), Some(soft_PH)) => extended.join(&soft_PH.zeros_like()?, &dx_TH)?,
            _ => dx_TH,
        });
        for (block, kept) in self.blocks.iter().zip(layers).rev() {
            let (Some(dy_TH), Some(kept)) = (dx_TH.take(), kept) else { return Ok(()) };
            let saved = match kept {
                Kept::All(saved) => *saved,
                Kept::Input(x_TH) => block.forward(&x_TH, pass, hooks, &mut NoObserver)?.1,
            };
            dx_TH = block.backward(dy_TH, saved, pass, hooks)?;
            layer_done(block.layer)?;
        }
        let Some(mut dx_TH) = dx_TH else { return Ok(()) };
        if let Some(extended) = &extended {
            let (dsoft_RPH, own_TH) = extended.split(&dx_TH)?;
            hooks.soft_tokens_grad(&dsoft_RPH)?;
            dx_TH = own_TH;
        }
        if let Some(dembedding_VH) = hooks.weight_grad(BaseWeight::Embedding)? {
            embedding::scatter_add_rows_(&dembedding_VH, tokens.ids, &dx_TH)?;
        }
        Ok(())
    }

    /// A parameter of the base; none where the model has no such part.
    pub fn weight(&self, weight: BaseWeight) -> Option<&Tensor> {
        let block = |layer: usize| self.blocks.get(layer);
        match weight {
            BaseWeight::Embedding => Some(&self.embedding_VH),
            BaseWeight::InputLayernorm(layer) => block(layer).map(|b| &b.input_layernorm_H),
            BaseWeight::PostAttentionLayernorm(layer) => block(layer).map(|b| &b.post_attention_layernorm_H),
            BaseWeight::Weight(layer, site) => block(layer).map(|b| b.weights_of(site).weight()),
            BaseWeight::Bias(layer, site) => block(layer).and_then(|b| b.weights_of(site).bias()),
            BaseWeight::FinalLayernorm => self.final_layernorm_H.as_ref(),
            BaseWeight::OutputLayer => Some(self.output_layer.weight()),
        }
    }

    /// Every parameter that the model has.
    pub fn weights(&self) -> impl Iterator<Item = (BaseWeight, &Tensor)> {
        BaseWeight::all(self.blocks.len()).filter_map(|weight| Some((weight, self.weight(weight)?)))
    }

    /// Rounds every parameter to bfloat16, in place: clones see it.
    ///
    /// # Errors
    /// When a parameter is not on the CPU.
    pub fn round_weights_to_bf16(&self) -> Result<()> {
        self.weights().try_for_each(|(_, tensor)| bf16::round_(tensor))
    }

    /// Puts tensors in the place of parameters; the rest stays as it is. A clone made before keeps the old ones.
    ///
    /// # Errors
    /// When the model has no such part, or a tensor has another shape.
    pub fn replace_weights(&mut self, weights: &BTreeMap<BaseWeight, Tensor>) -> Result<()> {
        for (&weight, tensor) in weights {
            let place = match weight {
                BaseWeight::Embedding => Some(&mut self.embedding_VH),
                BaseWeight::FinalLayernorm => self.final_layernorm_H.as_mut(),
                BaseWeight::OutputLayer => Some(self.output_layer.weight_mut()),
                BaseWeight::InputLayernorm(layer) => self.blocks.get_mut(layer).map(|b| &mut b.input_layernorm_H),
                BaseWeight::PostAttentionLayernorm(layer) => self.blocks.get_mut(layer).map(|b| &mut b.post_attention_layernorm_H),
                BaseWeight::Weight(layer, site) => self.blocks.get_mut(layer).map(|b| b.weights_of_mut(site).weight_mut()),
                BaseWeight::Bias(layer, site) => self.blocks.get_mut(layer).and_then(|b| b.weights_of_mut(site).bias_mut()),
            };
            match place {
                Some(old) if old.dims() == tensor.dims() => *old = tensor.clone(),
                Some(old) => bail!("`{}` has shape {:?}, expected {:?}", weight.name(), tensor.dims(), old.dims()),
                None => bail!("the model has no `{}`", weight.name()),
            }
        }
        Ok(())
    }

    /// The final norm, or the identity where the model has none: hidden `[N, H]` -> (normed `[N, H]`, 1 / rms where there is a norm).
    pub(super) fn final_norm(&self, x_NH: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        match &self.final_layernorm_H {
            Some(w_H) => rms_norm::fwd(x_NH, w_H, self.config.layernorm_epsilon).map(|(y, rstd)| (y, Some(rstd))),
            None => Ok((x_NH.clone(), None)),
        }
    }

    pub(super) fn final_norm_backward(&self, dy_NH: Tensor, x_NH: &Tensor, rstd: Option<&Tensor>) -> Result<Tensor> {
        let (Some(w_H), Some(rstd_N)) = (&self.final_layernorm_H, rstd) else { return Ok(dy_NH) };
        let dx_NH = dy_NH.zeros_like()?;
        rms_norm::bwd_add_(&dx_NH, &dy_NH, x_NH, rstd_N, w_H)?;
        Ok(dx_NH)
    }

    pub(super) fn output_layer(&self) -> &Linear {
        &self.output_layer
    }
}
