//! Prefix tuning: trainable keys and values for every layer, by default behind an MLP (Li and Liang 2021, arXiv:2101.00190), with PEFT's names
//! and sizes (peft/tuners/prefix_tuning/model.py, PrefixEncoder). Against P-Tuning v2 the MLP reads narrow rows, and nothing is dropped.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::export::{self, ExportError, Files, PeftFile, PrefixShape};
use super::keys::{KeyError, MethodKeys, positive};
use super::prefix::{self, Names, PrefixEncoder, Projection, Shape};
use super::{Costs, ExportContext, MethodError, PeftMethod, RowContext, TrainHooks};
use crate::kernels::host::on_host;
use crate::model::shape::ModelShape;
use crate::model::{ChatGlm2, ModelConfig};
use crate::params::ParamSet;

pub const NAME: &str = "prefix_tuning";
/// PEFT's names of the parameters.
pub const NAMES: Names = Names {
    embedding: "embedding.weight",
    first: ["transform.0.weight", "transform.0.bias"],
    second: ["transform.2.weight", "transform.2.bias"],
};

/// As PEFT's `PrefixTuningConfig` has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub pre_seq_len: NonZeroUsize,
    pub prefix_projection: bool,
    pub encoder_hidden_size: Option<NonZeroUsize>,
}

impl Settings {
    pub const KEYS: &[&str] = &["pre_seq_len", "prefix_projection", "encoder_hidden_size"];

    /// # Errors
    /// When a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        Ok(Self {
            pre_seq_len: positive("pre_seq_len", keys.pre_seq_len.unwrap_or(128))?,
            prefix_projection: keys.prefix_projection.unwrap_or(true),
            encoder_hidden_size: keys.encoder_hidden_size.map(|width| positive("encoder_hidden_size", width)).transpose()?,
        })
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::PrefixTuning),
            pre_seq_len: Some(self.pre_seq_len.get()),
            prefix_projection: Some(self.prefix_projection),
            encoder_hidden_size: self.encoder_hidden_size.map(NonZeroUsize::get),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        let projection = if self.prefix_projection { " through an MLP" } else { "" };
        format!("prefix tuning: {} virtual tokens{projection}", self.pre_seq_len)
    }

    fn learning_rate(&self) -> f64 {
        1e-2 // PEFT, examples/conditional_generation/peft_prefix_tuning_seq2seq.ipynb
    }

    fn gpu_support(&self) -> std::result::Result<(), &'static str> {
        // Products want addresses that are multiples of 16 bytes, and the projection's parameters lie one behind the other.
        match self.encoder_hidden_size {
            Some(hidden) if self.prefix_projection && !hidden.get().is_multiple_of(8) => {
                Err("with an encoder_hidden_size that is no multiple of 8 is computed on a CPU only, so far")
            }
            _ => Ok(()),
        }
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        let token_dim = shape.groups * shape.kv;
        let hidden = self.encoder_hidden_size.map_or(token_dim, |hidden| hidden.get() as u64);
        Ok(prefix::costs(self.pre_seq_len.get() as u64, shape.prefix_width(), self.prefix_projection.then_some((token_dim, hidden))))
    }

    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        let hidden = self.encoder_hidden_size.map(NonZeroUsize::get);
        let mut method = PrefixTuning::new(shape(&base.config, self.pre_seq_len.get(), self.prefix_projection, hidden), seed)?;
        method.move_to(base)?;
        Ok(Box::new(method))
    }
}

/// Sizes of a prefix; PEFT's projection reads rows as wide as one layer's key (`token_dim`), and so is its hidden layer unless told otherwise.
pub fn shape(config: &ModelConfig, virtual_tokens: usize, projection: bool, encoder_hidden_size: Option<usize>) -> Shape {
    let token_dim = config.multi_query_group_num * config.kv_channels;
    let mlp = Projection { input: token_dim, hidden: encoder_hidden_size.unwrap_or(token_dim) };
    Shape::new(config, virtual_tokens, projection.then_some(mlp))
}

/// A prefix under PEFT's names.
pub struct PrefixTuning {
    encoder: PrefixEncoder,
}

impl PrefixTuning {
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(shape: Shape, seed: u64) -> Result<Self> {
        Ok(Self { encoder: PrefixEncoder::new(shape, &NAMES, 0.0, seed)? })
    }

    /// # Errors
    /// As [`PrefixEncoder::from_tensors`].
    pub fn from_tensors(shape: Shape, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        Ok(Self { encoder: PrefixEncoder::from_tensors(shape, &NAMES, 0.0, 0, tensors)? })
    }

    /// Reads a prefix that PEFT saved for a model with `config`; where it was computed by an encoder, this is the encoder's output.
    ///
    /// # Errors
    /// When a file is missing or not whole, the adapter is of another kind, or sizes disagree.
    pub fn read_peft(dir: &Path, config: &ModelConfig) -> std::result::Result<Self, ExportError> {
        let file = PeftFile::open(dir, "PREFIX_TUNING")?;
        file.expect("num_layers", &config.num_layers.into())?;
        file.expect("num_attention_heads", &config.multi_query_group_num.into())?;
        file.expect("token_dim", &(config.multi_query_group_num * config.kv_channels).into())?;
        let prefix = export::read_peft(dir)?;
        let tensors = BTreeMap::from([(NAMES.embedding.to_owned(), prefix.table)]);
        Ok(Self::from_tensors(Shape::new(config, prefix.shape.virtual_tokens, None), &tensors)?)
    }

    /// What the model sees, `[P, W]`.
    pub fn table(&self) -> &Tensor {
        self.encoder.table()
    }
}

impl PeftMethod for PrefixTuning {
    fn name(&self) -> &'static str {
        NAME
    }

    fn params(&self) -> &ParamSet {
        self.encoder.params()
    }

    fn params_mut(&mut self) -> &mut ParamSet {
        self.encoder.params_mut()
    }

    fn move_to(&mut self, base: &ChatGlm2) -> Result<()> {
        self.encoder.move_to(base.device(), base.dtype())
    }

    fn refresh(&mut self) -> Result<()> {
        self.encoder.refresh()
    }

    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        self.encoder.hooks(rows)
    }

    fn site_len(&self) -> usize {
        self.encoder.site_len()
    }

    fn site_is_parameters(&self) -> bool {
        self.encoder.site_is_parameters()
    }

    fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor> {
        self.encoder.param_grad(site_grad)
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        let shape = self.encoder.shape();
        BTreeMap::from([
            ("pre_seq_len".to_owned(), shape.virtual_tokens.into()),
            ("encoder_hidden_size".to_owned(), shape.projection.map_or(Value::Null, |p| p.hidden.into())),
        ])
    }

    /// The encoder's output: PEFT keeps no encoder, so a run goes on from a checkpoint and not from this.
    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let shape = PrefixShape::of(context.config, self.encoder.shape().virtual_tokens);
        let note =
            "PEFT keeps the projection's output alone: it cannot go on training the projection from this; a checkpoint of the run can";
        let about = export::with_notes(context.about, self.encoder.shape().projection.map(|_| note));
        export::peft_files(&shape, &on_host(self.encoder.table())?, &context.model_dir.display().to_string(), &about)
    }
}
