//! Tuning methods. A method is a value: it owns its parameters and hands out [`Hooks`] for a micro-batch; the model names none of them.
//!
//! A method's file has its [`Settings`] (from a user's keys to sizes, costs and the method itself) and its [`PeftMethod`]. `methods!` below is the
//! one place where methods are listed.

pub mod adapter;
mod adapter_files;
pub mod adapter_fusion;
mod adapter_hooks;
pub mod bare;
pub mod base_weights;
mod bottleneck;
mod error;
pub mod export;
pub mod export_model;
pub mod keys;
pub mod lora;
mod lora_settings;
mod low_rank;
pub mod p_tuning;
pub mod prefix;
pub mod prefix_tuning;
pub mod prompt_encoder;
pub mod prompt_tuning;
pub mod ptuning_v2;
pub mod read;
pub mod select;
mod soft_prompt;
pub mod thudm;
mod understood;

pub mod freeze;
pub mod full;
mod fusion_layer;
pub mod ia3;
mod import;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

pub use self::error::MethodError;
use self::export::{ExportError, Files};
pub use self::import::import;
use self::keys::{KeyError, MethodKeys};
pub use self::read::{Base, read};
use crate::model::hooks::{BaseWeight, Hooks};
use crate::model::shape::ModelShape;
use crate::model::{ChatGlm2, ModelConfig};
use crate::params::ParamSet;

/// From `Variant = module` to what the rest of the program asks for by method.
macro_rules! methods {
    ($($(#[$attribute:meta])* $variant:ident = $module:ident),+ $(,)?) => {
        /// The tuning method as users name it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum FinetuningType {
            $($(#[$attribute])* $variant),+
        }

        /// Which method, and its settings.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "name", rename_all = "snake_case")]
        pub enum MethodPlan {
            $($variant($module::Settings)),+
        }

        /// What `finetuning_type` may be.
        pub const METHOD_NAMES: &[&str] = &["prefix", $($module::NAME),+];

        impl FinetuningType {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $module::NAME),+ }
            }

            /// The keys that the method reads.
            pub fn keys(self) -> &'static [&'static str] {
                match self { $(Self::$variant => $module::Settings::KEYS),+ }
            }
        }

        impl MethodPlan {
            /// # Errors
            /// When a key's value is out of its range, or one is missing.
            pub fn resolve(kind: FinetuningType, keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
                Ok(match kind { $(FinetuningType::$variant => Self::$variant($module::Settings::resolve(keys)?)),+ })
            }

            pub fn kind(&self) -> FinetuningType {
                match self { $(Self::$variant(_) => FinetuningType::$variant),+ }
            }

            pub fn settings(&self) -> &dyn Settings {
                match self { $(Self::$variant(settings) => settings),+ }
            }
        }
    };
}

methods! {
    #[serde(alias = "prefix")]
    PtuningV2 = ptuning_v2,
    PrefixTuning = prefix_tuning,
    PTuning = p_tuning,
    PromptTuning = prompt_tuning,
    Lora = lora,
    Adapter = adapter,
    AdapterFusion = adapter_fusion,
    Freeze = freeze,
    Full = full,
    Ia3 = ia3,
}

/// Why a method cannot be computed on a GPU, behind its name.
const ON_CPU_ALONE: &str = "is computed on a CPU only, so far; ptuning_v2, prefix_tuning and lora are computed on a GPU";

/// A method as a user has set it, before there is a model. A settings type also has `KEYS` and `resolve`.
pub trait Settings {
    /// The keys that resolve to these settings again.
    fn keys(&self) -> MethodKeys;
    /// What a person reads in the plan, without the number of parameters.
    fn describe(&self) -> String;
    /// The published recipe's, or the nearest to one.
    fn learning_rate(&self) -> f64;
    /// Whether weights of the base are trained, and so many that the optimizer's state may not fit a rank.
    fn trains_base_weights(&self) -> bool {
        false
    }
    /// Whether a GPU can compute the method with these settings.
    ///
    /// # Errors
    /// With the reason, to stand behind the method's name.
    fn gpu_support(&self) -> std::result::Result<(), &'static str> {
        Err(ON_CPU_ALONE)
    }
    /// Folders of adapters that the method is made from.
    fn adapters(&self) -> &[PathBuf] {
        &[]
    }
    /// # Errors
    /// When the settings name parts that the model does not have.
    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError>;
    /// The method with fresh parameters.
    ///
    /// # Errors
    /// When the settings do not fit the model, or a file that they name cannot be read.
    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError>;
}

/// What a method costs beyond the frozen base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    pub trainable_parameters: u64,
    /// Those of them that stand in the place of the base's own.
    pub trained_base_parameters: u64,
    /// Elements of the gradient where the method meets the model.
    pub site_elements: u64,
    /// Virtual tokens before each row, in every layer.
    pub prefix_tokens: u64,
    /// Soft tokens before each row: they pass all layers as a row's own.
    pub soft_tokens: u64,
    /// FLOPs of a token in the method's own products.
    pub forward: u64,
    pub backward: u64,
    /// FLOPs of a target token in the gradient of the head's weights.
    pub head_backward: u64,
    /// The backward pass ends in this layer.
    pub lowest_layer: u64,
    /// The lowest layer with a gradient through the base's own products, where that is one above [`Self::lowest_layer`].
    pub lowest_base_gradient: u64,
    /// Parameters of the method that do not train.
    pub frozen_parameters: u64,
    /// f32 values that the method keeps of one token for the backward pass, over all layers.
    pub saved_floats: u64,
}

/// What an exported adapter says of its base.
#[derive(Clone, Copy, Debug)]
pub struct ExportContext<'a> {
    /// Folder of the base model.
    pub model_dir: &'a Path,
    pub config: &'a ModelConfig,
    /// Of the weights of an exported model; none: each as the base has it.
    pub dtype: Option<DType>,
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
    /// The buffer that [`Self::into_site_grad`] gives, where a pass adds to it in place from the start; none where it is made at the end.
    fn running_site_grad(&self) -> Option<Tensor> {
        None
    }
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
    /// Takes what it computes with to the base's device, in the base's type.
    ///
    /// # Errors
    /// When there is not enough memory, or the method is computed on a CPU only.
    fn move_to(&mut self, base: &ChatGlm2) -> Result<()> {
        if base.device().is_cpu() { Ok(()) } else { bail!("method {} {ON_CPU_ALONE}", self.name()) }
    }
    /// Computes what depends on the parameters alone; called after every change of them.
    fn refresh(&mut self) -> Result<()> {
        Ok(())
    }
    /// Hands for one micro-batch.
    fn hooks<'a>(&'a self, rows: RowContext<'a>) -> Result<Box<dyn TrainHooks + 'a>>;
    /// Elements of the site gradient.
    fn site_len(&self) -> usize {
        self.params().layout().num_elements()
    }
    /// Whether the site is the parameters themselves and [`Self::param_grad`] the identity: then ranks that share the optimizer's state need
    /// only their shards of the summed site gradient. Where it is not said, they get all of it.
    fn site_is_parameters(&self) -> bool {
        false
    }
    /// The parts of the site gradient that a backward pass finishes in each [`Stage`](crate::model::hooks::Stage), in the order of these; then
    /// [`TrainHooks::running_site_grad`] is there. None: nothing is final before the end.
    fn site_stages(&self) -> Vec<Vec<Range<usize>>> {
        Vec::new()
    }
    /// Gradient of the parameters, flat in their order, from the mean site gradient.
    fn param_grad(&self, site_grad: &Tensor) -> Result<Tensor> {
        Ok(site_grad.clone())
    }
    /// Parameters of the base that the method trains, sharing memory with [`Self::params`]: they stand in the model's place of them.
    fn trained_base_weights(&self) -> Result<BTreeMap<BaseWeight, Tensor>> {
        Ok(BTreeMap::new())
    }
    /// What shows that the model computes with these parameters what its base computes; `None` where nothing does.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    fn without_effect(&self) -> Result<Option<&'static str>> {
        Ok(None)
    }
    /// Sizes that a checkpoint must agree on, name -> value.
    fn sizes(&self) -> BTreeMap<String, serde_json::Value>;
    /// The files of the adapter in the public formats that know it, relative path and content.
    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError>;
    /// Parameters of the base with the method's changes folded in; none where they cannot be told from the base's weights alone.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    fn merged_base_weights(&self, _base: &ChatGlm2) -> Result<Option<BTreeMap<BaseWeight, Tensor>>> {
        Ok(None)
    }
}

/// The method that `plan` asks for, with fresh parameters.
///
/// # Errors
/// When the settings do not fit the model, or a file that they name cannot be read.
pub fn create(plan: &MethodPlan, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
    plan.settings().create(base, seed)
}
