//! Bottleneck adapters behind a block's sublayers, A(h) = up(act(down(h))). Names, start and files are those of the adapters library.
//!
//! With y what attention gives, z what the MLP gives, x the stream before the block and x1 that between the two:
//! Houlsby (Houlsby et al. 2019, arXiv:1902.00751): x1 = x + y + A_att(y); x2 = x1 + z + A_out(z), act = silu.
//! Pfeiffer (Pfeiffer et al. 2020, arXiv:2005.00052): x1 = x + y; x2 = x1 + z + A_out(z + x1), act = relu: it reads the stream with the MLP
//! already added, as the library's does in all models that norm before a sublayer.
//!
//! Shapes: T tokens, H hidden size, r = H / reduction factor. The sites are the parameters themselves.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::adapter_files::{self, AdapterFolder};
use super::adapter_hooks::AdapterHooks;
use super::bottleneck::{self, Bottleneck};
use super::export::{ExportError, Files};
use super::keys::{KeyError, MethodKeys, positive};
use super::{Costs, ExportContext, MethodError, PeftMethod, RowContext, TrainHooks};
use crate::kernels::activation::Activation;
use crate::kernels::host::F32View;
use crate::model::hooks::{Reach, Sublayer};
use crate::model::shape::ModelShape;
use crate::model::{ChatGlm2, ModelConfig};
use crate::params::ParamSet;

pub const NAME: &str = "adapter";

/// Where adapters stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// Behind attention and behind the MLP, with a swish between: the adapters library's `DoubleSeqBnConfig`.
    Houlsby,
    /// Behind the MLP, with a ReLU between: the adapters library's `SeqBnConfig`.
    Pfeiffer,
}

impl AdapterKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Houlsby => "houlsby",
            Self::Pfeiffer => "pfeiffer",
        }
    }

    /// In the order of the forward pass.
    pub(super) fn sublayers(self) -> &'static [Sublayer] {
        match self {
            Self::Houlsby => &[Sublayer::Attention, Sublayer::Mlp],
            Self::Pfeiffer => &[Sublayer::Mlp],
        }
    }

    pub(super) fn activation(self) -> Activation {
        match self {
            Self::Houlsby => Activation::Silu,
            Self::Pfeiffer => Activation::Relu,
        }
    }

    /// How far down the gradient goes in layer 0; in those above it goes through.
    pub(super) fn reach(self, layer: usize) -> Reach {
        match self {
            _ if layer > 0 => Reach::Input,
            Self::Houlsby => Reach::AttentionOutput,
            Self::Pfeiffer => Reach::MlpOutput,
        }
    }
}

/// As the adapters library's `SeqBnConfig` and `DoubleSeqBnConfig` have them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub kind: AdapterKind,
    pub reduction_factor: NonZeroUsize,
    /// Not `name`: a plan is tagged with the method's.
    pub adapter_name: String,
}

impl Settings {
    pub const KEYS: &[&str] = &["adapter_config", "reduction_factor", "adapter_name"];

    /// # Errors
    /// When a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        let name = keys.adapter_name.as_deref().unwrap_or("default");
        if !adapter_files::is_name(name) {
            return Err(KeyError::new("adapter_name", format!("\"{name}\""), adapter_files::A_NAME));
        }
        Ok(Self {
            kind: keys.adapter_config.unwrap_or(AdapterKind::Pfeiffer),
            reduction_factor: positive("reduction_factor", keys.reduction_factor.unwrap_or(16))?,
            adapter_name: name.to_owned(),
        })
    }

    /// r
    pub fn width(&self, hidden: usize) -> usize {
        (hidden / self.reduction_factor).max(1)
    }

    /// All parameters of a model's adapters, name -> shape.
    pub(super) fn shapes(&self, config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
        let sizes = (config.hidden_size, self.width(config.hidden_size));
        let sites = (0..config.num_layers).flat_map(|layer| self.kind.sublayers().iter().map(move |&which| (layer, which)));
        sites.flat_map(|(layer, which)| bottleneck::shapes(layer, which, &self.adapter_name, sizes)).collect()
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::Adapter),
            adapter_config: Some(self.kind),
            reduction_factor: Some(self.reduction_factor.get()),
            adapter_name: Some(self.adapter_name.clone()),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        let sites = match self.kind {
            AdapterKind::Houlsby => "behind attention and MLP",
            AdapterKind::Pfeiffer => "behind the MLP",
        };
        format!("adapter ({}): width hidden / {}, {sites}", self.kind.name(), self.reduction_factor)
    }

    fn learning_rate(&self) -> f64 {
        1e-4 // adapter-hub/adapters, docs/training.md, "Train a Task Adapter"
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        let (hidden, width) = (shape.hidden, self.width(shape.hidden as usize) as u64);
        let sites = shape.layers * self.kind.sublayers().len() as u64;
        let parameters = sites * (2 * hidden * width + width + hidden);
        let product = 2 * hidden * width;
        Ok(Costs {
            trainable_parameters: parameters,
            site_elements: parameters,
            forward: sites * 2 * product,
            backward: (4 * sites - 1) * product, // both matrices and both inputs, but for the input of the lowest
            lowest_base_gradient: match self.kind {
                AdapterKind::Houlsby => 0,
                AdapterKind::Pfeiffer => 1,
            },
            saved_floats: sites * (hidden + width),
            ..Costs::default()
        })
    }

    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        Ok(Box::new(Adapter::new(self.clone(), &base.config, seed)?))
    }
}

/// The adapters of all layers.
pub struct Adapter {
    settings: Settings,
    hidden: usize,
    params: ParamSet,
}

impl Adapter {
    /// Fresh adapters, near the identity: N(0, 0.02) for both matrices, zero biases.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(settings: Settings, config: &ModelConfig, seed: u64) -> Result<Self> {
        let tensors = settings.shapes(config).into_iter().map(|(name, shape)| {
            let value = bottleneck::start(&name, &shape, seed)?;
            Ok((name, value))
        });
        let params = ParamSet::new(&tensors.collect::<Result<_>>()?)?;
        Ok(Self { settings, hidden: config.hidden_size, params })
    }

    /// Adapters with given values.
    ///
    /// # Errors
    /// When a name is missing or unknown or has another shape.
    pub fn from_tensors(settings: Settings, config: &ModelConfig, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let mut method = Self::new(settings, config, 0)?;
        method.params.load(tensors)?;
        Ok(method)
    }

    /// Reads an adapter for a model with `config` from a folder that the adapters library or this program saved.
    ///
    /// # Errors
    /// When a file is missing or not whole, the adapter is of another kind or uses what this program does not compute, or sizes disagree.
    pub fn read(dir: &Path, config: &ModelConfig) -> std::result::Result<Self, ExportError> {
        Self::from_folder(&AdapterFolder::open(dir)?, config)
    }

    pub(super) fn from_folder(folder: &AdapterFolder, config: &ModelConfig) -> std::result::Result<Self, ExportError> {
        let tensors = folder.tensors(&folder.settings.shapes(config), config)?;
        Ok(Self::from_tensors(folder.settings.clone(), config, &tensors)?)
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// r
    pub(super) fn width(&self) -> usize {
        self.settings.width(self.hidden)
    }

    pub(super) fn bottleneck(&self, layer: usize, which: Sublayer) -> Result<Bottleneck> {
        Bottleneck::of(&self.params, layer, which, &self.settings.adapter_name, self.settings.kind.activation())
    }
}

impl PeftMethod for Adapter {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    fn site_is_parameters(&self) -> bool {
        true
    }

    fn hooks<'a>(&'a self, _rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        Ok(Box::new(AdapterHooks::new(self)?))
    }

    fn without_effect(&self) -> Result<Option<&'static str>> {
        for (name, tensor) in self.params.tensors()? {
            if bottleneck::is_of_output(&name) && F32View::new(&tensor)?.iter().any(|&x| x != 0.0) {
                return Ok(None);
            }
        }
        Ok(Some("each of its `adapter_up` is 0"))
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("adapter_config".to_owned(), json!(self.settings.kind)),
            ("reduction_factor".to_owned(), json!(self.settings.reduction_factor)),
            ("adapter_name".to_owned(), json!(self.settings.adapter_name)),
        ])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let mut files = adapter_files::of_adapter(&self.settings, &self.params.tensors()?, context)?;
        files.push(adapter_files::about(context));
        Ok(files)
    }
}
