//! P-Tuning v2: trainable keys and values for every layer (Liu et al. 2021, arXiv:2110.07602), with THUDM's names and sizes.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::export::{self, ExportError, Files, PrefixShape};
use super::keys::{KeyError, MethodKeys, positive, share_below_one};
use super::prefix::{self, Names, PrefixEncoder, Projection, Shape};
use super::thudm::thudm_files;
use super::{Costs, ExportContext, MethodError, PeftMethod, RowContext, TrainHooks};
use crate::kernels::host::on_host;
use crate::model::shape::ModelShape;
use crate::model::{ChatGlm2, ModelConfig};
use crate::params::ParamSet;

pub const NAME: &str = "ptuning_v2";
/// THUDM's names of the parameters in a checkpoint (modeling_chatglm.py, PrefixEncoder).
pub const NAMES: Names = Names {
    embedding: "transformer.prefix_encoder.embedding.weight",
    first: ["transformer.prefix_encoder.trans.0.weight", "transformer.prefix_encoder.trans.0.bias"],
    second: ["transformer.prefix_encoder.trans.2.weight", "transformer.prefix_encoder.trans.2.bias"],
};

/// As THUDM's arguments have them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub pre_seq_len: NonZeroUsize,
    pub prefix_projection: bool,
    pub prefix_dropout: f64,
}

impl Settings {
    pub const KEYS: &[&str] = &["pre_seq_len", "prefix_projection", "prefix_dropout"];

    /// # Errors
    /// When a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        Ok(Self {
            pre_seq_len: positive("pre_seq_len", keys.pre_seq_len.unwrap_or(128))?,
            prefix_projection: keys.prefix_projection.unwrap_or(false),
            prefix_dropout: share_below_one("prefix_dropout", keys.prefix_dropout.unwrap_or(0.1))?,
        })
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::PtuningV2),
            pre_seq_len: Some(self.pre_seq_len.get()),
            prefix_projection: Some(self.prefix_projection),
            prefix_dropout: Some(self.prefix_dropout),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        let projection = if self.prefix_projection { " through an MLP" } else { "" };
        format!("P-Tuning v2: {} virtual tokens{projection}, dropout {}", self.pre_seq_len, self.prefix_dropout)
    }

    fn learning_rate(&self) -> f64 {
        2e-2 // THUDM/ChatGLM2-6B, ptuning/train.sh
    }

    fn gpu_support(&self) -> std::result::Result<(), &'static str> {
        Ok(())
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        let width = shape.prefix_width();
        let projection = self.prefix_projection.then_some((width, shape.hidden));
        Ok(prefix::costs(self.pre_seq_len.get() as u64, width, projection))
    }

    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        let shape = shape(&base.config, self.pre_seq_len.get(), self.prefix_projection);
        let mut method = PtuningV2::new(shape, self.prefix_dropout, seed)?;
        method.move_to(base)?;
        Ok(Box::new(method))
    }
}

/// Sizes of a prefix; THUDM's projection reads rows as wide as the table's and has the model's hidden width.
pub fn shape(config: &ModelConfig, virtual_tokens: usize, projection: bool) -> Shape {
    let mlp = Projection { input: config.prefix_width(), hidden: config.hidden_size };
    Shape::new(config, virtual_tokens, projection.then_some(mlp))
}

/// A prefix under THUDM's names.
pub struct PtuningV2 {
    pub encoder: PrefixEncoder,
}

impl PtuningV2 {
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(shape: Shape, dropout: f64, seed: u64) -> Result<Self> {
        Ok(Self { encoder: PrefixEncoder::new(shape, &NAMES, dropout, seed)? })
    }

    /// # Errors
    /// As [`PrefixEncoder::from_tensors`].
    pub fn from_tensors(shape: Shape, dropout: f64, seed: u64, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        Ok(Self { encoder: PrefixEncoder::from_tensors(shape, &NAMES, dropout, seed, tensors)? })
    }
}

impl PeftMethod for PtuningV2 {
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

    fn sizes(&self) -> BTreeMap<String, serde_json::Value> {
        BTreeMap::from([
            ("pre_seq_len".to_owned(), self.encoder.shape().virtual_tokens.into()),
            ("prefix_projection".to_owned(), self.encoder.shape().projection.is_some().into()),
        ])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let shape = PrefixShape::of(context.config, self.encoder.shape().virtual_tokens);
        let base_model = context.model_dir.display().to_string();
        let base_config = export::read_json(&context.model_dir.join("config.json"))?;
        let note = "adapter_model.safetensors (PEFT) holds the projection's output alone; the projection is in pytorch_model.bin (THUDM)";
        let about = export::with_notes(context.about, self.encoder.shape().projection.map(|_| note));
        // Both formats in one folder: their file names differ, and the file about the run is the same.
        let mut files: BTreeMap<String, Vec<u8>> =
            export::peft_files(&shape, &on_host(self.encoder.table())?, &base_model, &about)?.into_iter().collect();
        files.extend(thudm_files(&shape, &self.params().host_tensors()?, &base_config, &about)?);
        Ok(files.into_iter().collect())
    }
}
