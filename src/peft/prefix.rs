//! Trainable keys and values for every layer, given by a table or by an MLP over one: what P-Tuning v2 and prefix tuning share.
//!
//! Shapes: P virtual tokens, L layers, G kv groups, D head dim, W = 2 L G D the width of a table row, E and M the projection's input and
//! hidden width, R rows. A table row is [layer 0 K | layer 0 V | layer 1 K | ...], each G D wide. The site is the table, before dropout.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{Costs, Mode, RowContext, TrainHooks};
use crate::kernels::host::tensor;
use crate::kernels::prefix::{self, Dropout, Layout};
use crate::kernels::{elementwise, matmul, tanh};
use crate::model::ModelConfig;
use crate::model::hooks::{Hooks, LinearSite, PrefixKv, Reach};
use crate::params::ParamSet;
use crate::rng::{KeyedRng, Stream, name_key};

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

    fn layout(&self) -> Layout {
        let &Self { virtual_tokens, layers, groups, head_dim, .. } = self;
        Layout { virtual_tokens, layers, groups, head_dim }
    }

    /// Values of one table row.
    pub fn width(&self) -> usize {
        self.layout().width()
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
    /// In which the model computes.
    dtype: DType,
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
        let mut method = Self { shape, names, dropout: dropout as f32, seed, dtype: DType::F32, params, table, hidden: None };
        method.refresh()?;
        Ok(method)
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Puts the prefix on `device`, for a model that computes in `dtype`.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn move_to(&mut self, device: &Device, dtype: DType) -> Result<()> {
        self.params.move_to(device)?;
        self.dtype = dtype;
        self.refresh()
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
        self.hooks_with(Dropout::Multipliers { rows: r, values: multiplier.flatten_all()?.to_vec1()? })
    }

    fn hooks_with(&self, dropout: Dropout) -> Result<Box<dyn TrainHooks + '_>> {
        let grad_PW = Tensor::zeros(self.table.shape(), DType::F32, self.table.device())?;
        Ok(Box::new(PrefixHooks { table_PW: &self.table, layout: self.shape.layout(), dtype: self.dtype, dropout, grad_PW }))
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
        let [first, first_bias] = self.names.first.map(|name| self.params.get(name));
        let [second, second_bias] = self.names.second.map(|name| self.params.get(name));
        let hidden = tanh::fwd(&matmul::nt_bias(&embedding, &first?, &first_bias?)?)?;
        self.table = matmul::nt_bias(&hidden, &second?, &second_bias?)?;
        self.hidden = Some(hidden);
        Ok(())
    }

    /// Hooks of a micro-batch, with dropout while training.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        self.hooks_with(match rows.mode {
            Mode::Train if self.dropout > 0.0 => {
                Dropout::keyed(self.shape.layout(), self.seed, self.dropout, rows.stream_positions, self.table.device())?
            }
            _ => Dropout::None,
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
        let dpre_PH = tanh::bwd(hidden_PH, &dhidden_PH)?;
        let grads = self.params.flat().zeros_like()?;
        let of = |name: &str| self.params.layout().view(&grads, name);
        matmul::nn_add_(&of(self.names.embedding)?, &dpre_PH, &self.params.get(self.names.first[0])?)?;
        matmul::tn_add_(&of(self.names.first[0])?, &dpre_PH, &self.params.get(self.names.embedding)?)?;
        elementwise::add_row_sum_(&of(self.names.first[1])?, &dpre_PH)?;
        matmul::tn_add_(&of(self.names.second[0])?, &dtable_PW, hidden_PH)?;
        elementwise::add_row_sum_(&of(self.names.second[1])?, &dtable_PW)?;
        Ok(grads)
    }
}

struct PrefixHooks<'a> {
    /// `[P, W]`
    table_PW: &'a Tensor,
    layout: Layout,
    /// In which the model computes.
    dtype: DType,
    dropout: Dropout,
    grad_PW: Tensor,
}

impl Hooks for PrefixHooks<'_> {
    fn changes_sublayers(&self) -> bool {
        false
    }

    fn changes_linear(&self, _layer: usize, _site: LinearSite) -> bool {
        false
    }

    fn prefix_kv(&self, layer: usize) -> Result<Option<PrefixKv>> {
        let (k_RGPD, v_RGPD) = prefix::expand(self.table_PW, self.layout, layer, &self.dropout, self.dtype)?;
        Ok(Some(PrefixKv { k_RGPD, v_RGPD }))
    }

    fn prefix_kv_grad(&mut self, layer: usize, grad: PrefixKv) -> Result<()> {
        prefix::sum_(&self.grad_PW, self.layout, layer, [&grad.k_RGPD, &grad.v_RGPD], &self.dropout)
    }

    fn reach(&self, layer: usize) -> Reach {
        if layer == 0 { Reach::Prefix } else { Reach::Input }
    }
}

impl TrainHooks for PrefixHooks<'_> {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        self.grad_PW.flatten_all()
    }
}
