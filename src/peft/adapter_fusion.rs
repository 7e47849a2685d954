//! AdapterFusion (Pfeiffer et al. 2020, arXiv:2005.00247): attention over the outputs of two or more frozen adapters behind the MLP, as the
//! adapters library's default, "dynamic", has it. Names, start and files are the library's.
//!
//! With z what the MLP gives, x1 the stream before it and h = z + x1: u_k = A_k(h) without its skip, q = query(h), p = softmax over the
//! adapters of q · key(u_k), over the whole width, not scaled; x2 = x1 + z + Σ p_k value(u_k).
//!
//! The library can draw the value matrices to the identity by λ Σ (value - I)² in the loss (`regularization`: λ = 0.01). Here its gradient
//! is added to the mean gradient once a step; the loss that is reported remains that of the data.
//!
//! Shapes: H hidden size; query, key, value `[H, H]`, the biases of query and key `[H]`. The sites are the parameters themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::adapter::{Adapter, AdapterKind};
use super::adapter_files::{self, AdapterFolder, FusionFolder};
use super::bottleneck;
use super::export::{ExportError, Files};
use super::fusion_layer::{self, FusionHooks};
use super::keys::{KeyError, MethodKeys, within};
use super::{Costs, ExportContext, MethodError, PeftMethod, RowContext, TrainHooks};
use crate::digest::sha256_hex;
use crate::formats::safetensors;
use crate::kernels::host::tensor;
use crate::model::hooks::Sublayer;
use crate::model::shape::ModelShape;
use crate::model::{ChatGlm2, ModelConfig};
use crate::params::ParamSet;

pub const NAME: &str = "adapter_fusion";
const VALUE: &str = "value.weight";
/// Off the diagonal of a fresh value matrix (adapters/methods/modeling.py, BertFusion).
const OFF_DIAGONAL: f32 = 1e-6;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Folders of Pfeiffer adapters.
    pub adapters: Vec<PathBuf>,
    /// λ
    pub regularization: f64,
}

impl Settings {
    pub const KEYS: &[&str] = &["fusion_adapters", "fusion_regularization"];

    /// # Errors
    /// When there are fewer than two folders or a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        let expected = "the folders of two or more adapters, separated by commas";
        let Some(text) = &keys.fusion_adapters else { return Err(KeyError::new("fusion_adapters", "not given", expected)) };
        let folders: Vec<&str> = text.split(',').map(str::trim).collect();
        if folders.len() < 2 || folders.contains(&"") {
            return Err(KeyError::new("fusion_adapters", format!("\"{text}\""), expected));
        }
        let weight = keys.fusion_regularization.unwrap_or(0.0);
        Ok(Self {
            adapters: folders.into_iter().map(PathBuf::from).collect(),
            regularization: within("fusion_regularization", weight, weight >= 0.0, "a number of at least 0")?,
        })
    }

    fn listed(&self, separator: &str) -> String {
        self.adapters.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(separator)
    }

    /// # Errors
    /// When a folder holds no adapter that can be joined, two have one name, or they say that they belong to different bases.
    fn folders(&self) -> std::result::Result<Vec<AdapterFolder>, MethodError> {
        let mut folders: Vec<AdapterFolder> = Vec::new();
        for dir in &self.adapters {
            let folder = AdapterFolder::open(dir)?;
            folder.expect_kind(AdapterKind::Pfeiffer)?;
            folder.expect_no_dropout()?;
            for (other, other_dir) in folders.iter().zip(&self.adapters) {
                let two = |what, first: &str, second: &str| {
                    let pair = [(other_dir.clone(), first.to_owned()), (dir.clone(), second.to_owned())];
                    MethodError::Pair { what, pair: Box::new(pair) }
                };
                if other.settings.adapter_name == folder.settings.adapter_name {
                    return Err(two("adapter_name", &other.settings.adapter_name, &folder.settings.adapter_name));
                }
                if let (Some(first), Some(second)) = (other.base_fingerprint()?, folder.base_fingerprint()?)
                    && first != second
                {
                    return Err(two("base_fingerprint", &first, &second));
                }
            }
            folders.push(folder);
        }
        Ok(folders)
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::AdapterFusion),
            fusion_adapters: Some(self.listed(",")),
            fusion_regularization: Some(self.regularization),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        format!("adapter fusion: of {}, regularization {}", self.listed(", "), self.regularization)
    }

    fn learning_rate(&self) -> f64 {
        5e-5 // adapter-hub/adapters, docs/training.md, "Train AdapterFusion"
    }

    fn adapters(&self) -> &[PathBuf] {
        &self.adapters
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        let (hidden, layers) = (shape.hidden, shape.layers);
        let widths = self.folders()?.iter().map(|folder| folder.settings.width(hidden as usize) as u64).collect::<Vec<_>>();
        let (num_adapters, width) = (widths.len() as u64, widths.iter().sum::<u64>());
        let parameters = layers * (3 * hidden * hidden + 2 * hidden);
        let (square, narrow) = (2 * hidden * hidden, 2 * hidden * width);
        Ok(Costs {
            trainable_parameters: parameters,
            site_elements: parameters,
            // Query, key and value once a token, whatever the number of adapters; each adapter's two matrices.
            forward: layers * (3 * square + 2 * narrow),
            // Gradients of the three and of what goes into them; the frozen adapters' inputs; but for the input of the lowest.
            backward: layers * (6 * square + 2 * narrow) - (square + 2 * narrow),
            lowest_base_gradient: 1,
            frozen_parameters: layers * (2 * hidden * width + width + num_adapters * hidden),
            saved_floats: layers * ((3 + num_adapters) * hidden + num_adapters + width),
            ..Costs::default()
        })
    }

    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        let adapters = self.folders()?.into_iter().map(|folder| Adapter::from_folder(&folder, &base.config));
        let adapters = adapters.collect::<std::result::Result<_, ExportError>>()?;
        Ok(Box::new(AdapterFusion::new(adapters, self.regularization, &base.config, seed)?))
    }
}

/// Query, key and value of all layers, and the adapters that they join.
pub struct AdapterFusion {
    adapters: Vec<Adapter>,
    /// Sha256 of each adapter's values by its name, however they are saved and wherever: their folders may move.
    hashes: Value,
    regularization: f64,
    num_layers: usize,
    params: ParamSet,
}

impl AdapterFusion {
    /// A fresh fusion: query and key N(0, 0.02) with zero biases, value 1 on the diagonal and 1e-6 elsewhere.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(adapters: Vec<Adapter>, regularization: f64, config: &ModelConfig, seed: u64) -> Result<Self> {
        let names = joined(&adapters);
        let tensors = shapes(&names, config).into_iter().map(|(name, shape)| {
            let n = config.hidden_size;
            let value = if name.ends_with(VALUE) {
                let values = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { OFF_DIAGONAL });
                tensor(values.collect(), &shape)?
            } else {
                bottleneck::start(&name, &shape, seed)?
            };
            Ok((name, value))
        });
        let params = ParamSet::new(&tensors.collect::<Result<_>>()?)?;
        let hashes = adapters.iter().map(|adapter| {
            let bytes = adapter.params().tensors().and_then(|tensors| safetensors::to_bytes(&tensors).map_err(candle_core::Error::wrap))?;
            Ok((adapter.settings().adapter_name.clone(), json!(sha256_hex(bytes))))
        });
        let hashes = Value::Object(hashes.collect::<Result<_>>()?);
        Ok(Self { adapters, hashes, regularization, num_layers: config.num_layers, params })
    }

    /// A fusion with given values.
    ///
    /// # Errors
    /// When a name is missing or unknown or has another shape.
    pub fn from_tensors(
        adapters: Vec<Adapter>,
        regularization: f64,
        config: &ModelConfig,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let mut method = Self::new(adapters, regularization, config, 0)?;
        method.params.load(tensors)?;
        Ok(method)
    }

    /// Reads a fusion with its adapters for a model with `config`, as the library's `save_adapter_setup` or this program saved it.
    ///
    /// # Errors
    /// When a file is missing or not whole, a part is of another kind or uses what this program does not compute, or sizes disagree.
    pub fn read(dir: &Path, config: &ModelConfig) -> std::result::Result<Self, ExportError> {
        let folder = FusionFolder::open(dir)?;
        folder.adapters.iter().try_for_each(|adapter| adapter.expect_kind(AdapterKind::Pfeiffer))?;
        let adapters = folder.adapters.iter().map(|adapter| Adapter::from_folder(adapter, config));
        let adapters = adapters.collect::<std::result::Result<Vec<_>, _>>()?;
        let tensors = folder.tensors(&shapes(&joined(&adapters), config), config)?;
        Ok(Self::from_tensors(adapters, 0.0, config, &tensors)?)
    }

    pub(super) fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// The name of a layer's parameter.
    pub(super) fn parameter(&self, layer: usize, part: &str) -> String {
        parameter(&joined(&self.adapters), layer, part)
    }

    /// λ Σ (value - I)² over all layers.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn regularization(&self) -> Result<f64> {
        (0..self.num_layers).try_fold(0.0, |sum, layer| {
            Ok(sum + fusion_layer::regularization(&self.params.get(&self.parameter(layer, VALUE))?, self.regularization)?)
        })
    }
}

/// The adapters' names, as the library joins them.
fn joined(adapters: &[Adapter]) -> String {
    adapters.iter().map(|adapter| adapter.settings().adapter_name.as_str()).collect::<Vec<_>>().join(",")
}

fn parameter(names: &str, layer: usize, part: &str) -> String {
    format!("{}.adapter_fusion_layer.{names}.{part}", bottleneck::site(layer, Sublayer::Mlp))
}

/// The parameters, name -> shape.
fn shapes(names: &str, config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let h = config.hidden_size;
    let parts =
        [("query.weight", vec![h, h]), ("query.bias", vec![h]), ("key.weight", vec![h, h]), ("key.bias", vec![h]), (VALUE, vec![h, h])];
    let of = |layer| parts.clone().map(|(part, shape)| (parameter(names, layer, part), shape));
    (0..config.num_layers).flat_map(of).collect()
}

impl PeftMethod for AdapterFusion {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    fn hooks<'a>(&'a self, _rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        Ok(Box::new(FusionHooks::new(self)?))
    }

    fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor> {
        if self.regularization == 0.0 {
            return Ok(site_grad.clone());
        }
        let grad = site_grad.copy()?;
        let grads = self.params.layout().views(&grad)?;
        for layer in 0..self.num_layers {
            let name = self.parameter(layer, VALUE);
            fusion_layer::add_regularization_grad_(&grads[&name], &self.params.get(&name)?, self.regularization)?;
        }
        Ok(grad)
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([("fusion_adapters".to_owned(), self.hashes.clone())])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let names: Vec<&str> = self.adapters.iter().map(|adapter| adapter.settings().adapter_name.as_str()).collect();
        let mut files = adapter_files::of_fusion_of(&names, &self.params.tensors()?, context)?;
        for adapter in &self.adapters {
            let name = &adapter.settings().adapter_name;
            let own = adapter_files::of_adapter(adapter.settings(), &adapter.params().tensors()?, context)?;
            files.extend(own.into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        }
        files.push(adapter_files::about(context));
        Ok(files)
    }
}
