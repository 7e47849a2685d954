//! Training the base's own parameters: what freeze and full tuning share. The masters are f32, and the model sees them where its own stood.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};
use serde_json::Value;

use super::export::{ExportError, Files};
use super::export_model;
use super::{Costs, ExportContext, PeftMethod, RowContext, TrainHooks};
use crate::model::ChatGlm2;
use crate::model::hooks::{BaseWeight, Hooks, Reach, Stage};
use crate::model::shape::ModelShape;
use crate::params::ParamSet;

/// Trains some of the base's parameters.
pub struct BaseWeights {
    name: &'static str,
    sizes: BTreeMap<String, Value>,
    params: ParamSet,
    /// How far down each layer's backward pass goes.
    reach: Vec<Reach>,
}

impl BaseWeights {
    /// Starts from the base's values.
    ///
    /// # Errors
    /// When the base has no such parameter or a tensor cannot be made.
    pub fn new(name: &'static str, sizes: BTreeMap<String, Value>, base: &ChatGlm2, trained: &BTreeSet<BaseWeight>) -> Result<Self> {
        let tensors = trained.iter().map(|&weight| match base.weight(weight) {
            Some(tensor) => Ok((weight.name(), tensor.clone())),
            None => bail!("the model has no `{}`", weight.name()),
        });
        let params = ParamSet::new(&tensors.collect::<Result<_>>()?)?;
        Ok(Self { name, sizes, params, reach: reach(base.config.num_layers, trained) })
    }
}

/// For each layer: its input, where anything below is trained; else as far as its own parameters are.
fn reach(num_layers: usize, trained: &BTreeSet<BaseWeight>) -> Vec<Reach> {
    let mut below = trained.contains(&BaseWeight::Embedding);
    (0..num_layers)
        .map(|layer| {
            let own = trained.iter().filter(|weight| weight.layer() == Some(layer)).map(|weight| weight.reach()).max();
            let reach = if below { Reach::Input } else { own.unwrap_or(Reach::Nothing) };
            below |= own.is_some();
            reach
        })
        .collect()
}

/// All parameters of a model of this shape that its checkpoint can have, by name.
pub(super) fn by_name(num_layers: usize) -> BTreeMap<String, BaseWeight> {
    BaseWeight::all(num_layers).map(|weight| (weight.name(), weight)).collect()
}

/// Costs of training these parameters: dW = dyᵀ x is as much as dx = dy W.
pub(super) fn costs(shape: &ModelShape, trained: &BTreeSet<BaseWeight>) -> Costs {
    let size = |weight: BaseWeight| shape.elements(weight);
    let parameters = trained.iter().map(|&weight| size(weight)).sum();
    let products: u64 = trained.iter().filter(|weight| matches!(weight, BaseWeight::Weight(..))).map(|&weight| size(weight)).sum();
    let reach = reach(shape.layers as usize, trained);
    Costs {
        trainable_parameters: parameters,
        trained_base_parameters: parameters,
        site_elements: parameters,
        backward: 2 * products,
        head_backward: if trained.contains(&BaseWeight::OutputLayer) { 2 * shape.head_weights() } else { 0 },
        lowest_layer: reach.iter().position(|&reach| reach != Reach::Nothing).unwrap_or(reach.len()) as u64,
        ..Costs::default()
    }
}

impl PeftMethod for BaseWeights {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    fn hooks<'a>(&'a self, _rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        let grad = Tensor::zeros(self.site_len(), DType::F32, &Device::Cpu)?;
        Ok(Box::new(BaseHooks { method: self, grad }))
    }

    fn site_is_parameters(&self) -> bool {
        true
    }

    fn site_stages(&self) -> Vec<Vec<Range<usize>>> {
        let num_layers = self.reach.len();
        let names = by_name(num_layers);
        let mut stages = vec![Vec::<Range<usize>>::new(); Stage::all(num_layers).count()];
        for (name, entry) in self.params.layout().iter() {
            let (stage, end) = (&mut stages[names[name].stage().place(num_layers)], entry.offset + entry.num_elements());
            match stage.last_mut() {
                Some(last) if last.end == entry.offset => last.end = end,
                _ => stage.push(entry.offset..end),
            }
        }
        stages
    }

    fn trained_base_weights(&self) -> Result<BTreeMap<BaseWeight, Tensor>> {
        let names = by_name(self.reach.len());
        self.params.tensors()?.into_iter().map(|(name, tensor)| Ok((names[&name], tensor))).collect()
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        self.sizes.clone()
    }

    /// The whole model as the hub has it.
    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        export_model::model_files(context, &self.params.tensors()?)
    }

    fn merged_base_weights(&self, _base: &ChatGlm2) -> Result<Option<BTreeMap<BaseWeight, Tensor>>> {
        self.trained_base_weights().map(Some)
    }
}

struct BaseHooks<'a> {
    method: &'a BaseWeights,
    /// `[site_len]`
    grad: Tensor,
}

impl Hooks for BaseHooks<'_> {
    fn weight_grad(&mut self, weight: BaseWeight) -> Result<Option<Tensor>> {
        let Some(entry) = self.method.params.layout().get(&weight.name()) else { return Ok(None) };
        self.grad.narrow(0, entry.offset, entry.num_elements())?.reshape(entry.shape.as_slice()).map(Some)
    }

    fn reach(&self, layer: usize) -> Reach {
        self.method.reach[layer]
    }
}

impl TrainHooks for BaseHooks<'_> {
    fn running_site_grad(&self) -> Option<Tensor> {
        Some(self.grad.clone())
    }

    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        Ok(self.grad)
    }
}
