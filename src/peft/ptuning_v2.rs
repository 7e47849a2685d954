//! P-Tuning v2: trainable keys and values for every layer (Liu et al. 2021, arXiv:2110.07602).
//!
//! Shapes: P virtual tokens, L layers, G kv groups, D head dim, W = 2 L G D the width of a table row, H hidden, R rows.
//! A table row is [layer 0 K | layer 0 V | layer 1 K | ...], each G D wide. The site is the table, before dropout.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::export::{self, ExportError, Files, PrefixShape};
use super::{ExportContext, Mode, PeftMethod, RowContext, TrainHooks};
use crate::kernels::host::{F32View, tensor};
use crate::kernels::{elementwise, matmul};
use crate::model::ModelConfig;
use crate::model::hooks::{Hooks, PrefixKv, Reach};
use crate::params::ParamSet;
use crate::rng::{KeyedRng, Stream, name_key, unit};

pub const NAME: &str = "ptuning_v2";
/// THUDM's names of the parameters in a checkpoint.
pub const EMBEDDING: &str = "transformer.prefix_encoder.embedding.weight";
const TRANS_0_WEIGHT: &str = "transformer.prefix_encoder.trans.0.weight";
const TRANS_0_BIAS: &str = "transformer.prefix_encoder.trans.0.bias";
const TRANS_2_WEIGHT: &str = "transformer.prefix_encoder.trans.2.weight";
const TRANS_2_BIAS: &str = "transformer.prefix_encoder.trans.2.bias";

/// Sizes of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub virtual_tokens: usize,
    pub layers: usize,
    pub groups: usize,
    pub head_dim: usize,
    /// Width of the projection's hidden layer; none: the table itself is trained.
    pub projection: Option<usize>,
}

impl Shape {
    pub fn new(config: &ModelConfig, virtual_tokens: usize, projection: bool) -> Self {
        Self {
            virtual_tokens,
            layers: config.num_layers,
            groups: config.multi_query_group_num,
            head_dim: config.kv_channels,
            projection: projection.then_some(config.hidden_size),
        }
    }

    /// Values of one table row.
    pub fn width(&self) -> usize {
        2 * self.layers * self.groups * self.head_dim
    }

    fn parameter_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let w = self.width();
        let mut shapes = BTreeMap::from([(EMBEDDING.to_owned(), vec![self.virtual_tokens, w])]);
        if let Some(h) = self.projection {
            shapes.insert(TRANS_0_WEIGHT.into(), vec![h, w]);
            shapes.insert(TRANS_0_BIAS.into(), vec![h]);
            shapes.insert(TRANS_2_WEIGHT.into(), vec![w, h]);
            shapes.insert(TRANS_2_BIAS.into(), vec![w]);
        }
        shapes
    }
}

/// The prefix, its optional projection MLP, and the table that they give.
pub struct PtuningV2 {
    shape: Shape,
    dropout: f32,
    seed: u64,
    params: ParamSet,
    /// `[P, W]`
    table: Tensor,
    /// tanh output of the projection, `[P, H]`.
    hidden: Option<Tensor>,
}

impl PtuningV2 {
    /// A fresh prefix: N(0, 1) for the table and torch's uniform bounds ±1/√in for the projection, as THUDM's PrefixEncoder starts.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(shape: Shape, dropout: f64, seed: u64) -> Result<Self> {
        let init = |(name, dims): (String, Vec<usize>)| {
            let rng = KeyedRng::new(seed, Stream::ParameterInit, name_key(&name));
            let n = dims.iter().product();
            let values = if name == EMBEDDING {
                rng.normal(n)
            } else {
                let fan_in =
                    if name.starts_with("transformer.prefix_encoder.trans.0") { shape.width() } else { shape.projection.unwrap_or(1) };
                let bound = 1.0 / (fan_in as f32).sqrt();
                (0..n as u64).map(|i| (2.0 * rng.uniform(i) - 1.0) * bound).collect()
            };
            Ok((name, tensor(values, &dims)?))
        };
        let tensors = shape.parameter_shapes().into_iter().map(init).collect::<Result<BTreeMap<_, _>>>()?;
        Self::from_tensors(shape, dropout, seed, &tensors)
    }

    /// A prefix with given values, by THUDM's names.
    ///
    /// # Errors
    /// When a name is missing or unknown or has another shape than `shape` says.
    pub fn from_tensors(shape: Shape, dropout: f64, seed: u64, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        if !shape.head_dim.is_multiple_of(4) {
            bail!("ptuning_v2: kv_channels is {}, expected a multiple of 4", shape.head_dim);
        }
        let zeros = |(name, dims): (String, Vec<usize>)| Ok((name, Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu)?));
        let mut params = ParamSet::new(&shape.parameter_shapes().into_iter().map(zeros).collect::<Result<_>>()?)?;
        params.load(tensors)?;
        let table = params.get(EMBEDDING)?;
        let mut method = Self { shape, dropout: dropout as f32, seed, params, table, hidden: None };
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
            bail!("ptuning_v2: multiplier {:?} does not fit {s:?}", multiplier.dims());
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
}

impl PeftMethod for PtuningV2 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    fn refresh(&mut self) -> Result<()> {
        let embedding = self.params.get(EMBEDDING)?;
        if self.shape.projection.is_none() {
            self.table = embedding;
            return Ok(());
        }
        let hidden = matmul::nt(&embedding, &self.params.get(TRANS_0_WEIGHT)?)?;
        elementwise::add_bias_(&hidden, &self.params.get(TRANS_0_BIAS)?)?;
        let hidden = hidden.tanh()?;
        self.table = matmul::nt(&hidden, &self.params.get(TRANS_2_WEIGHT)?)?;
        elementwise::add_bias_(&self.table, &self.params.get(TRANS_2_BIAS)?)?;
        self.hidden = Some(hidden);
        Ok(())
    }

    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        self.hooks_with(match rows.mode {
            Mode::Train if self.dropout > 0.0 => Some((rows.stream_positions.len(), self.multipliers(rows.stream_positions))),
            _ => None,
        })
    }

    fn site_len(&self) -> usize {
        self.shape.virtual_tokens * self.shape.width()
    }

    fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor> {
        let Some(hidden_PH) = &self.hidden else { return Ok(site_grad.clone()) };
        let dtable_PW = site_grad.reshape((self.shape.virtual_tokens, self.shape.width()))?;
        let dhidden_PH = matmul::nn(&dtable_PW, &self.params.get(TRANS_2_WEIGHT)?)?;
        let dpre_PH = (dhidden_PH * hidden_PH.sqr()?.affine(-1.0, 1.0)?)?;
        let embedding_PW = self.params.get(EMBEDDING)?;
        let grads = BTreeMap::from([
            (EMBEDDING.to_owned(), matmul::nn(&dpre_PH, &self.params.get(TRANS_0_WEIGHT)?)?),
            (TRANS_0_WEIGHT.to_owned(), matmul::tn(&dpre_PH, &embedding_PW)?),
            (TRANS_0_BIAS.to_owned(), dpre_PH.sum(0)?),
            (TRANS_2_WEIGHT.to_owned(), matmul::tn(&dtable_PW, hidden_PH)?),
            (TRANS_2_BIAS.to_owned(), dtable_PW.sum(0)?),
        ]);
        self.params.layout().flatten(&grads)
    }

    fn sizes(&self) -> BTreeMap<String, serde_json::Value> {
        BTreeMap::from([
            ("pre_seq_len".to_owned(), self.shape.virtual_tokens.into()),
            ("prefix_projection".to_owned(), self.shape.projection.is_some().into()),
        ])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let shape = PrefixShape::of(context.config, self.shape.virtual_tokens);
        let base_model = context.model_dir.display().to_string();
        let path = context.model_dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ExportError::Io { path: path.clone(), source })?;
        let base_config = serde_json::from_str(&text).map_err(|source| ExportError::Json { path, source })?;
        // Both formats in one folder: their file names differ, and the file about the run is the same.
        let mut files: BTreeMap<String, Vec<u8>> =
            export::peft_files(&shape, &self.table, &base_model, context.about)?.into_iter().collect();
        files.extend(export::thudm_files(&shape, &self.params.tensors()?, &base_config, context.about)?);
        Ok(files.into_iter().collect())
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
