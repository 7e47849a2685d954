//! P-tuning: soft tokens before each row, computed by an MLP or an LSTM from a trainable embedding (Liu et al. 2021, arXiv:2103.10385), with
//! PEFT's names and sizes (peft/tuners/p_tuning). The encoder runs once a step, and its output is the site.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::export::{ExportError, Files};
use super::keys::{KeyError, MethodKeys, positive};
pub use super::prompt_encoder::EncoderKind;
use super::prompt_encoder::{LSTM_LAYERS, PromptEncoder, Shape};
use super::soft_prompt::{self, SoftHooks};
use super::{Costs, ExportContext, MethodError, PeftMethod, RowContext, TrainHooks};
use crate::model::ChatGlm2;
use crate::model::shape::ModelShape;
use crate::params::ParamSet;

pub const NAME: &str = "p_tuning";

/// As PEFT's `PromptEncoderConfig` has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub num_virtual_tokens: NonZeroUsize,
    pub encoder_reparameterization_type: EncoderKind,
    /// None: the model's hidden size.
    pub encoder_hidden_size: Option<NonZeroUsize>,
}

impl Settings {
    pub const KEYS: &[&str] = &["num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size"];

    /// # Errors
    /// When a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        Ok(Self {
            num_virtual_tokens: positive("num_virtual_tokens", keys.num_virtual_tokens.unwrap_or(20))?,
            encoder_reparameterization_type: keys.encoder_reparameterization_type.unwrap_or(EncoderKind::Mlp),
            encoder_hidden_size: keys.encoder_hidden_size.map(|width| positive("encoder_hidden_size", width)).transpose()?,
        })
    }

    /// The encoder's sizes in a model of this hidden size.
    pub fn shape(&self, hidden_size: usize) -> Shape {
        Shape {
            kind: self.encoder_reparameterization_type,
            virtual_tokens: self.num_virtual_tokens.get(),
            hidden_size,
            width: self.encoder_hidden_size.map_or(hidden_size, NonZeroUsize::get),
        }
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::PTuning),
            num_virtual_tokens: Some(self.num_virtual_tokens.get()),
            encoder_reparameterization_type: Some(self.encoder_reparameterization_type),
            encoder_hidden_size: self.encoder_hidden_size.map(NonZeroUsize::get),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        let width = self.encoder_hidden_size.map_or("the model's width".to_owned(), |width| format!("width {width}"));
        let kind = match self.encoder_reparameterization_type {
            EncoderKind::Mlp => "an MLP",
            EncoderKind::Lstm => "an LSTM",
        };
        format!("p-tuning: {} soft tokens through {kind} of {width}", self.num_virtual_tokens)
    }

    fn learning_rate(&self) -> f64 {
        1e-3 // PEFT, examples/sequence_classification/P_Tuning.ipynb
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        let parameters = self.shape(shape.hidden as usize).num_parameters() as u64;
        Ok(soft_prompt::costs(self.num_virtual_tokens, shape, parameters))
    }

    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        let encoder = PromptEncoder::new(self.shape(base.config.hidden_size), seed)?;
        Ok(Box::new(PTuning { encoder }))
    }
}

/// Soft tokens behind their encoder.
pub struct PTuning {
    encoder: PromptEncoder,
}

impl PTuning {
    /// # Errors
    /// As [`PromptEncoder::from_tensors`].
    pub fn from_tensors(shape: Shape, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        Ok(Self { encoder: PromptEncoder::from_tensors(shape, tensors)? })
    }

    /// What the model sees, `[P, H]`.
    pub fn table(&self) -> &Tensor {
        self.encoder.output()
    }
}

impl PeftMethod for PTuning {
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

    fn hooks<'a>(&'a self, _rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>> {
        Ok(Box::new(SoftHooks::new(self.table().clone())))
    }

    fn site_len(&self) -> usize {
        self.table().elem_count()
    }

    fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor> {
        self.encoder.param_grad(site_grad)
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        let shape = self.encoder.shape();
        BTreeMap::from([
            ("num_virtual_tokens".to_owned(), shape.virtual_tokens.into()),
            ("encoder_reparameterization_type".to_owned(), shape.kind.name().into()),
            ("encoder_hidden_size".to_owned(), shape.width.into()),
        ])
    }

    /// The encoder's output, as PEFT saves it.
    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let shape = self.encoder.shape();
        let own = json!({
            "encoder_dropout": 0.0,
            "encoder_hidden_size": shape.width,
            "encoder_num_layers": LSTM_LAYERS, // PEFT's default, also where the encoder is an MLP and it says nothing
            "encoder_reparameterization_type": shape.kind.name(),
            "peft_type": "P_TUNING",
        });
        let resume = "prompt_embeddings is the output of the encoder: PEFT cannot go on training the encoder from it; the checkpoints of \
                      this run hold the encoder, and training goes on from them";
        soft_prompt::peft_files(self.table(), own, &[resume], context)
    }
}
