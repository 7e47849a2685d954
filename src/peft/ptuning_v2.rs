//! P-Tuning v2: trainable keys and values for every layer (Liu et al. 2021, arXiv:2110.07602), with THUDM's names and sizes.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::export::{self, ExportError, Files, PrefixShape};
use super::prefix::{Names, PrefixEncoder, Projection, Shape};
use super::{ExportContext, PeftMethod, RowContext, TrainHooks};
use crate::model::ModelConfig;
use crate::params::ParamSet;

pub const NAME: &str = "ptuning_v2";
/// THUDM's names of the parameters in a checkpoint (modeling_chatglm.py, PrefixEncoder).
pub const NAMES: Names = Names {
    embedding: "transformer.prefix_encoder.embedding.weight",
    first: ["transformer.prefix_encoder.trans.0.weight", "transformer.prefix_encoder.trans.0.bias"],
    second: ["transformer.prefix_encoder.trans.2.weight", "transformer.prefix_encoder.trans.2.bias"],
};

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

    fn refresh(&mut self) -> Result<()> {
        self.encoder.refresh()
    }

    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        self.encoder.hooks(rows)
    }

    fn site_len(&self) -> usize {
        self.encoder.site_len()
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
        let path = context.model_dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ExportError::Io { path: path.clone(), source })?;
        let base_config = serde_json::from_str(&text).map_err(|source| ExportError::Json { path, source })?;
        // Both formats in one folder: their file names differ, and the file about the run is the same.
        let mut files: BTreeMap<String, Vec<u8>> =
            export::peft_files(&shape, self.encoder.table(), &base_model, context.about)?.into_iter().collect();
        files.extend(export::thudm_files(&shape, &self.params().tensors()?, &base_config, context.about)?);
        Ok(files.into_iter().collect())
    }
}
