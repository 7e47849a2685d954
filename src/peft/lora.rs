//! LoRA: low-rank updates of linear layers, y += s x Aᵀ Bᵀ (Hu et al. 2021, arXiv:2106.09685), with s = alpha / r, or alpha / √r for
//! rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). Names, start and file format are PEFT's.
//!
//! Shapes: r rank, T tokens; A `[r, in]`, B `[out, r]`. The site is A and B themselves.
#![allow(non_snake_case, reason = "A, B and their gradients are the paper's names")]

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::Path;

use candle_core::{Result, Tensor};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::export::{self, ExportError, Files};
use super::{ExportContext, Mode, PeftMethod, RowContext, TrainHooks};
use crate::kernels::host::{F32View, tensor};
use crate::kernels::{elementwise, matmul};
use crate::model::ModelConfig;
use crate::model::hooks::{Hooks, LinearSite, Reach};
use crate::params::ParamSet;
use crate::rng::{KeyedRng, Stream, name_key, unit};

pub const NAME: &str = "lora";
/// What PEFT puts before the base's names.
const PEFT_PREFIX: &str = "base_model.model.";

pub fn name_of_A(layer: usize, site: LinearSite) -> String {
    format!("{}.lora_A.weight", site.path(layer))
}

pub fn name_of_B(layer: usize, site: LinearSite) -> String {
    format!("{}.lora_B.weight", site.path(layer))
}

/// Which linear layers are updated, and how large they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub rank: usize,
    pub layers: usize,
    /// Target -> (out, in).
    pub targets: BTreeMap<LinearSite, (usize, usize)>,
}

impl Shape {
    pub fn new(config: &ModelConfig, rank: usize, targets: &BTreeSet<LinearSite>) -> Self {
        let sizes = config.parameter_shapes();
        let size = |site: LinearSite| match sizes.get(&format!("{}.weight", site.path(0))).map(Vec::as_slice) {
            Some(&[out, input]) => (out, input),
            _ => (0, 0), // a model without layers
        };
        Self { rank, layers: config.num_layers, targets: targets.iter().map(|&site| (site, size(site))).collect() }
    }

    fn parameter_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let each = (0..self.layers).flat_map(|layer| self.targets.iter().map(move |(&site, &size)| (layer, site, size)));
        each.flat_map(|(layer, site, (out, input))| {
            [(name_of_A(layer, site), vec![self.rank, input]), (name_of_B(layer, site), vec![out, self.rank])]
        })
        .collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    pub alpha: f64,
    /// alpha / √r in place of alpha / r.
    pub use_rslora: bool,
}

/// The updates of all targets in all layers.
pub struct Lora {
    shape: Shape,
    scale: Scale,
    dropout: f32,
    seed: u64,
    params: ParamSet,
}

impl Lora {
    /// A fresh update, which changes nothing: A uniform within ±1/√in (PEFT's `kaiming_uniform_(a=√5)`), B zero.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(shape: Shape, scale: Scale, dropout: f64, seed: u64) -> Result<Self> {
        let init = |(name, dims): (String, Vec<usize>)| {
            let n: usize = dims.iter().product();
            let values = if name.ends_with("lora_A.weight") {
                let rng = KeyedRng::new(seed, Stream::ParameterInit, name_key(&name));
                let bound = 1.0 / (dims[1] as f32).sqrt();
                (0..n as u64).map(|i| (2.0 * rng.uniform(i) - 1.0) * bound).collect()
            } else {
                vec![0.0; n]
            };
            Ok((name, tensor(values, &dims)?))
        };
        let params = ParamSet::new(&shape.parameter_shapes().into_iter().map(init).collect::<Result<_>>()?)?;
        Ok(Self { shape, scale, dropout: dropout as f32, seed, params })
    }

    /// An update with given values.
    ///
    /// # Errors
    /// When a name is missing or unknown or has another shape than `shape` says.
    pub fn from_tensors(shape: Shape, scale: Scale, dropout: f64, seed: u64, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let mut method = Self::new(shape, scale, dropout, seed)?;
        method.params.load(tensors)?;
        Ok(method)
    }

    /// Reads an adapter that PEFT saved for a model with `config`.
    ///
    /// # Errors
    /// When a file is missing or not whole, the adapter is of another kind or uses what this program does not compute, or sizes disagree.
    pub fn read_peft(dir: &Path, config: &ModelConfig) -> std::result::Result<Self, ExportError> {
        let file = export::PeftFile::open(dir, "LORA")?;
        file.expect("bias", &json!("none"))?;
        for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
            file.expect(key, &json!(false))?;
        }
        for key in ["rank_pattern", "alpha_pattern"] {
            file.expect(key, &json!({}))?;
        }
        for key in [
            "layers_to_transform",
            "modules_to_save",
            "layer_replication",
            "exclude_modules",
            "target_parameters",
            "trainable_token_indices",
        ] {
            file.expect(key, &Value::Null)?;
        }
        let targets: BTreeSet<LinearSite> = file.read("target_modules", "a list of linear layers of a block")?;
        let shape = Shape::new(config, file.read::<NonZeroUsize>("r", "a number above 0")?.get(), &targets);
        let scale = Scale {
            alpha: file.read("lora_alpha", "a number")?,
            use_rslora: file.config.get("use_rslora").is_some_and(|v| v == &json!(true)),
        };
        let dropout = file.read("lora_dropout", "a share")?;
        let tensors = shape.parameter_shapes().into_iter().map(|(name, dims)| {
            let value = file.tensor(&format!("{PEFT_PREFIX}{name}"), &dims)?;
            Ok((name, value))
        });
        let tensors = tensors.collect::<std::result::Result<_, ExportError>>()?;
        Ok(Self::from_tensors(shape, scale, dropout, 0, &tensors)?)
    }

    fn factor(&self) -> f32 {
        let rank = self.shape.rank as f64;
        (self.scale.alpha / if self.scale.use_rslora { rank.sqrt() } else { rank }) as f32
    }
}

impl PeftMethod for Lora {
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
        Ok(())
    }

    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        let drops = rows.mode == Mode::Train && self.dropout > 0.0;
        Ok(Box::new(LoraHooks { method: self, rows: drops.then_some(rows), grad: vec![0.0; self.site_len()] }))
    }

    fn site_len(&self) -> usize {
        self.params.layout().num_elements()
    }

    fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor> {
        Ok(site_grad.clone())
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        let targets: Vec<_> = self.shape.targets.keys().collect();
        BTreeMap::from([
            ("lora_rank".to_owned(), self.shape.rank.into()),
            ("lora_alpha".to_owned(), self.scale.alpha.into()),
            ("lora_target".to_owned(), json!(targets)),
            ("use_rslora".to_owned(), self.scale.use_rslora.into()),
        ])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let targets: Vec<_> = self.shape.targets.keys().collect();
        let config = json!({
            "auto_mapping": null,
            "base_model_name_or_path": context.model_dir.display().to_string(),
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": self.scale.alpha,
            "lora_dropout": f64::from(self.dropout),
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.shape.rank,
            "revision": null,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_rslora": self.scale.use_rslora,
        });
        let tensors = self.params.tensors()?.into_iter().map(|(name, value)| (format!("{PEFT_PREFIX}{name}"), value)).collect();
        export::peft_adapter(&config, &tensors, context.about)
    }
}

struct LoraHooks<'a> {
    method: &'a Lora,
    /// Rows whose inputs are dropped from; none where nothing is dropped.
    rows: Option<RowContext<'a>>,
    grad: Vec<f32>,
}

impl LoraHooks<'_> {
    /// 0 or 1 / (1 - p) for each element of an input `[T, in]`: the same whatever the row is packed with, and in a second forward pass.
    fn multiplier(&self, layer: usize, site: LinearSite, width: usize) -> Result<Option<Tensor>> {
        let Some(rows) = self.rows else { return Ok(None) };
        let (p, kept) = (self.method.dropout, 1.0 / (1.0 - self.method.dropout));
        let blocks = width.div_ceil(4);
        let mut out = Vec::new();
        for (bounds, &position) in rows.row_bounds.windows(2).zip(rows.stream_positions) {
            let rng = KeyedRng::new(self.method.seed, Stream::LowRankDropout, (position << 12) + (layer * 4 + site as usize) as u64);
            out.par_extend((0..(bounds[1] - bounds[0]) * width).into_par_iter().map(|i| {
                let (token, channel) = (i / width, i % width);
                let bits = rng.block((token * blocks + channel / 4) as u32)[channel % 4];
                if unit(bits) < p { 0.0 } else { kept }
            }));
        }
        let tokens = out.len() / width;
        Ok(Some(tensor(out, &[tokens, width])?))
    }

    /// A and B.
    fn pair(&self, layer: usize, site: LinearSite) -> Result<(Tensor, Tensor)> {
        let params = &self.method.params;
        Ok((params.get(&name_of_A(layer, site))?, params.get(&name_of_B(layer, site))?))
    }

    /// Adds to the gradient of a parameter; `value(i)` is its element i.
    fn add(&mut self, name: &str, value: impl Fn(usize) -> f32) {
        if let Some(entry) = self.method.params.layout().get(name) {
            let part = &mut self.grad[entry.offset..entry.offset + entry.num_elements()];
            part.iter_mut().enumerate().for_each(|(i, g)| *g += value(i));
        }
    }
}

impl Hooks for LoraHooks<'_> {
    fn changes_linear(&self, _layer: usize, site: LinearSite) -> bool {
        self.method.shape.targets.contains_key(&site)
    }

    fn linear(&self, layer: usize, site: LinearSite, x: &Tensor, y: &Tensor) -> Result<()> {
        let (A, B) = self.pair(layer, site)?;
        let u_Tr = match self.multiplier(layer, site, x.dim(1)?)? {
            Some(multiplier) => matmul::nt(&(x * multiplier)?, &A)?,
            None => matmul::nt(x, &A)?,
        };
        elementwise::scale_(&u_Tr, self.method.factor())?;
        elementwise::add_(y, &matmul::nt(&u_Tr, &B)?)
    }

    fn linear_grad(&mut self, layer: usize, site: LinearSite, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (A, B) = self.pair(layer, site)?;
        let multiplier = self.multiplier(layer, site, x.dim(1)?)?;
        let x = multiplier.as_ref().map_or_else(|| Ok(x.clone()), |m| x * m)?;
        let u_Tr = matmul::nt(&x, &A)?;
        elementwise::scale_(&u_Tr, self.method.factor())?;
        let dB_transposed = matmul::tn(&u_Tr, dy)?;
        let du_Tr = matmul::nn(dy, &B)?;
        elementwise::scale_(&du_Tr, self.method.factor())?;
        let dA = matmul::tn(&du_Tr, &x)?;
        let (rank, out) = dB_transposed.dims2()?;
        let (dA, dB) = (F32View::new(&dA)?, F32View::new(&dB_transposed)?);
        self.add(&name_of_A(layer, site), |i| dA[i]);
        self.add(&name_of_B(layer, site), |i| dB[i % rank * out + i / rank]);
        let dx = matmul::nn(&du_Tr, &A)?;
        multiplier.map_or_else(|| Ok(dx.clone()), |m| &dx * m)
    }

    fn reach(&self, layer: usize) -> Reach {
        if layer == 0 { Reach::QueryKeyValue } else { Reach::Input }
    }
}

impl TrainHooks for LoraHooks<'_> {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        let len = self.grad.len();
        tensor(self.grad, &[len])
    }
}
