//! Tuning methods. A method is a value: it owns its parameters and hands out [`Hooks`] for a micro-batch; the model names none of them.

pub mod export;
pub mod lora;
pub mod prefix;
pub mod prefix_tuning;
pub mod ptuning_v2;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::Path;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use self::export::{ExportError, Files};
use crate::model::ModelConfig;
use crate::model::hooks::{Hooks, LinearSite};
use crate::params::ParamSet;

/// Which method, and its sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum MethodPlan {
    PtuningV2 { pre_seq_len: NonZeroUsize, prefix_projection: bool, prefix_dropout: f64 },
    PrefixTuning { pre_seq_len: NonZeroUsize, prefix_projection: bool, encoder_hidden_size: Option<NonZeroUsize> },
    Lora { rank: NonZeroUsize, alpha: f64, dropout: f64, targets: BTreeSet<LinearSite>, use_rslora: bool },
}

/// What an exported adapter says of its base.
#[derive(Clone, Copy, Debug)]
pub struct ExportContext<'a> {
    /// Folder of the base model.
    pub model_dir: &'a Path,
    pub config: &'a ModelConfig,
    /// Identity of the run: method, sizes, base fingerprint, tokenizer, template.
    pub about: &'a serde_json::Value,
}

/// The rows of a micro-batch as a method sees them.
#[derive(Clone, Copy, Debug)]
pub struct RowContext<'a> {
    /// Keys of the rows' random numbers (their positions in the training stream).
    pub stream_positions: &'a [u64],
    /// Row r is the tokens `bounds[r]..bounds[r + 1]`.
    pub row_bounds: &'a [usize],
    pub mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout acts.
    Train,
    Eval,
}

/// Hooks that gather a gradient while a backward pass runs.
pub trait TrainHooks: Hooks {
    /// The site gradient of the micro-batch, `[PeftMethod::site_len]` f32.
    fn into_site_grad(self: Box<Self>) -> Result<Tensor>;
}

/// A parameter-efficient tuning method.
///
/// Gradients travel in two steps. A micro-batch yields the gradient at the *sites* (where the method meets the model: the prefix
/// table, not the MLP behind it); sites are summed over micro-batches and ranks; then [`Self::param_grad`] pulls the sum through the
/// method's own parameterisation once a step. The pull-back is linear, so the result is the same, and a re-parameterised prefix
/// reduces 7 MB instead of 477 MB.
pub trait PeftMethod {
    /// The method's name in configurations and checkpoints.
    fn name(&self) -> &'static str;
    fn params(&self) -> &ParamSet;
    fn params_mut(&mut self) -> &mut ParamSet;
    /// Computes what depends on the parameters alone; called after every change of them.
    fn refresh(&mut self) -> Result<()>;
    /// Hands for one micro-batch.
    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>>;
    /// Elements of the site gradient.
    fn site_len(&self) -> usize;
    /// Gradient of the parameters, flat in their order, from the summed site gradient.
    fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor>;
    /// Sizes that a checkpoint must agree on, name -> value.
    fn sizes(&self) -> BTreeMap<String, serde_json::Value>;
    /// The files of the adapter in the public formats that know it, relative path and content.
    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError>;
}

/// The method that `plan` asks for, with fresh parameters.
///
/// # Errors
/// When the sizes do not fit the model.
pub fn create(plan: &MethodPlan, config: &ModelConfig, seed: u64) -> Result<Box<dyn PeftMethod>> {
    Ok(match plan {
        MethodPlan::PtuningV2 { pre_seq_len, prefix_projection, prefix_dropout } => {
            let shape = ptuning_v2::shape(config, pre_seq_len.get(), *prefix_projection);
            Box::new(ptuning_v2::PtuningV2::new(shape, *prefix_dropout, seed)?)
        }
        MethodPlan::PrefixTuning { pre_seq_len, prefix_projection, encoder_hidden_size } => {
            let hidden = encoder_hidden_size.map(NonZeroUsize::get);
            let shape = prefix_tuning::shape(config, pre_seq_len.get(), *prefix_projection, hidden);
            Box::new(prefix_tuning::PrefixTuning::new(shape, seed)?)
        }
        MethodPlan::Lora { rank, alpha, dropout, targets, use_rslora } => {
            let shape = lora::Shape::new(config, rank.get(), targets);
            let scale = lora::Scale { alpha: *alpha, use_rslora: *use_rslora };
            Box::new(lora::Lora::new(shape, scale, *dropout, seed)?)
        }
    })
}
