//! Trainable keys and values for every layer, given by a table or by an MLP over one: what P-Tuning v2 and prefix tuning share.
//!
//! Shapes: P virtual tokens, L layers, G kv groups, D head dim, W = 2 L G D the width of a table row, E and M the projection's input and
//! hidden width, R rows. A table row is [layer 0 K | layer 0 V | layer 1 K | ...], each G D wide. The site is the table, before dropout.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::{Costs, Mode, RowContext, TrainHooks};
use crate::kernels::host::{F32View, tensor};
use crate::kernels::{elementwise, matmul};
use crate::model::ModelConfig;
use crate::model::hooks::{Hooks, PrefixKv, Reach};
use crate::params::ParamSet;
use crate::rng::{KeyedRng, Stream, name_key, unit};

/// What a method calls its parameters.
#[derive(Debug)]
pub struct Names {
    /// `[P, W]`, or `[P, E]` before a projection.
    pub embedding: &'static str,
    /// `[M, E]`, `[M]`
    pub first: [&'static str; 2],
    /// `[W, M]`, `[W]`
    pub second: [&'static str; 2],
}

/// Widths of the MLP embedding -> tanh -> table row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    pub input: usize,
    pub hidden: usize,
}

/// Sizes of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub virtual_tokens: usize,
    pub layers: usize,
    pub groups: usize,
    pub head_dim: usize,
    /// None: the table itself is trained.
    pub projection: Option<Projection>,
}

impl Shape {
    pub fn new(config: &ModelConfig, virtual_tokens: usize, projection: Option<Projection>) -> Self {
        Self { virtual_tokens, layers: config.num_layers, groups: config.multi_query_group_num, head_dim: config.kv_channels, projection }
    }

    /// Values of one table row.
    pub fn width(&self) -> usize {
        2 * self.layers * self.groups * self.head_dim
    }

    fn parameter_shapes(&self, names: &Names) -> BTreeMap<String, Vec<usize>> {
        let w = self.width();
        let Some(Projection { input: e, hidden: m }) = self.projection else {
            return BTreeMap::from([(names.embedding.to_owned(), vec![self.virtual_tokens, w])]);
        };
        let mlp = names.first.into_iter().chain(names.second).zip([vec![m, e], vec![m], vec![w, m], vec![w]]);
        let all = mlp.chain([(names.embedding, vec![self.virtual_tokens, e])]);
        all.map(|(name, shape)| (name.to_owned(), shape)).collect()
    }
}

/// Costs of P virtual tokens with table rows of `width`, behind an MLP of (E, M) where there is one.
pub(super) fn costs(virtual_tokens: u64, width: u64, projection: Option<(u64, u64)>) -> Costs {
    let table = virtual_tokens * width;
    let trained = projection.map_or(table, |(e, m)| virtual_tokens * e + m * (e + 1) + width * (m + 1));
    Costs { trainable_parameters: trained, site_elements: table, prefix_tokens: virtual_tokens, ..Costs::default() }
}

/// The prefix, its optional projection MLP, and the table that they give.
pub struct PrefixEncoder {
    shape: Shape,
    names: &'static Names,
    dropout: f32,
    seed: u64,
    params: ParamSet,
    /// `[P, W]`
    table: Tensor,
    /// tanh output of the projection, `[P, M]`.
    hidden: Option<Tensor>,
}

impl PrefixEncoder {
    /// A fresh prefix: N(0, 1) for the embedding and torch's uniform bounds ±1/√in for the projection, as THUDM's and PEFT's encoders start.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(shape: Shape, names: &'static Names, dropout: f64, seed: u64) -> Result<Self> {
        let init = |(name, dims): (String, Vec<usize>)| {
            let rng = KeyedRng::new(seed, Stream::ParameterInit, name_key(&name));
            let n = dims.iter().product();
            let values = if name == names.embedding {
                rng.normal(n)
            } else {
                let fan_in = shape.projection.map_or(1, |p| if names.first.contains(&name.as_str()) { p.input } else { p.hidden });
                let bound = 1.0 / (fan_in as f32).sqrt();
                (0..n as u64).map(|i| (2.0 * rng.uniform(i) - 1.0) * bound).collect()
            };
            Ok((name, tensor(values, &dims)?))
        };
        let tensors = shape.parameter_shapes(names).into_iter().map(init).collect::<Result<BTreeMap<_, _>>>()?;
        Self::from_tensors(shape, names, dropout, seed, &tensors)
    }

    /// A prefix with given values.
    ///
    /// # Errors
    /// When a name is missing or unknown or has another shape than `shape` says.
    pub fn from_tensors(shape: Shape, names: &'static Names, dropout: f64, seed: u64, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        if !shape.head_dim.is_multiple_of(4) {
            bail!("prefix: kv_channels is {}, expected a multiple of 4", shape.head_dim);
        }
        let zeros = |(name, dims): (String, Vec<usize>)| Ok((name, Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu)?));
        let mut params = ParamSet::new(&shape.parameter_shapes(names).into_iter().map(zeros).collect::<Result<_>>()?)?;
        params.load(tensors)?;
        let table = params.get(names.embedding)?;
        let mut method = Self { shape, names, dropout: dropout as f32, seed, params, table, hidden: None };
        method.refresh()?;
        Ok(method)
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// What the model sees, `[P, W]`: the parameter itself or the projection's output.
    pub fn table(&self) -> &Tensor {
        &self.table
    }

    /// Hooks whose dropout multipliers are given, `[R, P, 2L, G, D]` (0 or 1/(1-p)): for comparisons with other implementations.
    ///
    /// # Errors
    /// When the multiplier has another shape.
    pub fn hooks_with_multiplier(&self, multiplier: &Tensor) -> Result<Box<dyn TrainHooks + '_>> {
        let s = &self.shape;
        let (r, p, slots, g, d) = multiplier.dims5()?;
        if (p, slots, g, d) != (s.virtual_tokens, 2 * s.layers, s.groups, s.head_dim) {
            bail!("prefix: multiplier {:?} does not fit {s:?}", multiplier.dims());
        }
        self.hooks_with(Some((r, multiplier.flatten_all()?.to_vec1()?)))
    }

    fn hooks_with(&self, dropout: Option<(usize, Vec<f32>)>) -> Result<Box<dyn TrainHooks + '_>> {
        let table = F32View::new(&self.table)?.to_vec();
        Ok(Box::new(PrefixHooks { shape: self.shape, table, dropout, grad: vec![0f32; self.site_len()] }))
    }

    /// Dropout multipliers of rows, keyed by their places in the training stream, `[R, P, 2L, G, D]`.
    fn multipliers(&self, stream_positions: &[u64]) -> Vec<f32> {
        let kept = 1.0 / (1.0 - self.dropout);
        let mut out = vec![0f32; stream_positions.len() * self.site_len()];
        let width = self.shape.width();
        out.par_chunks_mut(width).enumerate().for_each(|(i, out)| {
            let (row, p) = (i / self.shape.virtual_tokens, i % self.shape.virtual_tokens);
            let rng = KeyedRng::new(self.seed, Stream::PrefixDropout, stream_positions[row]);
            for (block, four) in out.chunks_exact_mut(4).enumerate() {
                let bits = rng.block((p * width / 4 + block) as u32);
                four.iter_mut().zip(bits).for_each(|(m, bits)| *m = if unit(bits) < self.dropout { 0.0 } else { kept });
            }
        });
        out
    }

    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    pub fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    /// Computes the table from the parameters.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn refresh(&mut self) -> Result<()> {
        let embedding = self.params.get(self.names.embedding)?;
        if self.shape.projection.is_none() {
            self.table = embedding;
            return Ok(());
        }
        let hidden = matmul::nt(&embedding, &self.params.get(self.names.first[0])?)?;
        elementwise::add_bias_(&hidden, &self.params.get(self.names.first[1])?)?;
        let hidden = hidden.tanh()?;
        self.table = matmul::nt(&hidden, &self.params.get(self.names.second[0])?)?;
        elementwise::add_bias_(&self.table, &self.params.get(self.names.second[1])?)?;
        self.hidden = Some(hidden);
        Ok(())
    }

    /// Hooks of a micro-batch, with dropout while training.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        self.hooks_with(match rows.mode {
            Mode::Train if self.dropout > 0.0 => Some((rows.stream_positions.len(), self.multipliers(rows.stream_positions))),
            _ => None,
        })
    }

    /// Elements of the table.
    pub fn site_len(&self) -> usize {
        self.shape.virtual_tokens * self.shape.width()
    }

    /// Whether the table itself is trained.
    pub fn site_is_parameters(&self) -> bool {
        self.shape.projection.is_none()
    }

    /// The table's gradient, `[P W]`, pulled through the projection to all parameters.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor> {
        let Some(hidden_PH) = &self.hidden else { return Ok(site_grad.clone()) };
        let dtable_PW = site_grad.reshape((self.shape.virtual_tokens, self.shape.width()))?;
        let dhidden_PH = matmul::nn(&dtable_PW, &self.params.get(self.names.second[0])?)?;
        let dpre_PH = (dhidden_PH * hidden_PH.sqr()?.affine(-1.0, 1.0)?)?;
        let embedding_PW = self.params.get(self.names.embedding)?;
        let grads = BTreeMap::from([
            (self.names.embedding.to_owned(), matmul::nn(&dpre_PH, &self.params.get(self.names.first[0])?)?),
            (self.names.first[0].to_owned(), matmul::tn(&dpre_PH, &embedding_PW)?),
            (self.names.first[1].to_owned(), dpre_PH.sum(0)?),
            (self.names.second[0].to_owned(), matmul::tn(&dtable_PW, hidden_PH)?),
            (self.names.second[1].to_owned(), dtable_PW.sum(0)?),
        ]);
        self.params.layout().flatten(&grads)
    }
}

struct PrefixHooks {
    shape: Shape,
    /// `[P, 2L, G, D]`
    table: Vec<f32>,
    /// Rows and their multipliers `[R, P, 2L, G, D]`; none where nothing is dropped.
    dropout: Option<(usize, Vec<f32>)>,
    /// As the table.
    grad: Vec<f32>,
}

impl PrefixHooks {
    /// Rows that get a prefix of their own: one for all where nothing is dropped.
    fn num_rows(&self) -> usize {
        self.dropout.as_ref().map_or(1, |(rows, _)| *rows)
    }

    /// First table element of (virtual token, slot, group).
    fn at(&self, p: usize, slot: usize, group: usize) -> usize {
        ((p * 2 * self.shape.layers + slot) * self.shape.groups + group) * self.shape.head_dim
    }

    /// Slot `slot` (2i: keys, 2i + 1: values of layer i) for each row, `[R, G, P, D]`.
    fn expand(&self, slot: usize) -> Result<Tensor> {
        let Shape { virtual_tokens, groups, head_dim, .. } = self.shape;
        let rows = self.num_rows();
        let mut out = vec![0f32; rows * groups * virtual_tokens * head_dim];
        out.par_chunks_mut(virtual_tokens * head_dim).enumerate().for_each(|(i, out)| {
            let (row, group) = (i / groups, i % groups);
            for (p, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let at = self.at(p, slot, group);
                out.copy_from_slice(&self.table[at..at + head_dim]);
                if let Some((_, multiplier)) = &self.dropout {
                    let multiplier = &multiplier[row * self.table.len() + at..][..head_dim];
                    out.iter_mut().zip(multiplier).for_each(|(x, m)| *x *= m);
                }
            }
        });
        tensor(out, &[rows, groups, virtual_tokens, head_dim])
    }

    /// Adds slot `slot`'s gradient `[R, G, P, D]`, row by row in order.
    fn gather(&mut self, slot: usize, grad: &Tensor) -> Result<()> {
        let Shape { virtual_tokens, groups, head_dim, .. } = self.shape;
        let rows = grad.dim(0)?;
        let grad = F32View::new(grad)?;
        for p in 0..virtual_tokens {
            for group in 0..groups {
                let at = self.at(p, slot, group);
                let sum = &mut self.grad[at..at + head_dim];
                for row in 0..rows {
                    let from = ((row * groups + group) * virtual_tokens + p) * head_dim;
                    let grad = &grad[from..from + head_dim];
                    match &self.dropout {
                        Some((_, multiplier)) => {
                            let multiplier = &multiplier[row * self.table.len() + at..][..head_dim];
                            sum.iter_mut().zip(grad).zip(multiplier).for_each(|((s, g), m)| *s += g * m);
                        }
                        None => sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g),
                    }
                }
            }
        }
        Ok(())
    }
}

impl Hooks for PrefixHooks {
    fn prefix_kv(&self, layer: usize) -> Result<Option<PrefixKv>> {
        Ok(Some(PrefixKv { k_RGPD: self.expand(2 * layer)?, v_RGPD: self.expand(2 * layer + 1)? }))
    }

    fn prefix_kv_grad(&mut self, layer: usize, grad: PrefixKv) -> Result<()> {
        self.gather(2 * layer, &grad.k_RGPD)?;
        self.gather(2 * layer + 1, &grad.v_RGPD)
    }

    fn reach(&self, layer: usize) -> Reach {
        if layer == 0 { Reach::Prefix } else { Reach::Input }
    }
}

impl TrainHooks for PrefixHooks {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        let len = self.grad.len();
        tensor(self.grad, &[len])
    }
}
