//! Prompt tuning: trainable soft tokens before each row (Lester et al. 2021, arXiv:2104.08691), with PEFT's names (peft/tuners/prompt_tuning).
//!
//! Shapes: P soft tokens, H hidden size of the model.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::export::{ExportError, Files};
use super::keys::{KeyError, MethodKeys, positive};
use super::soft_prompt::{self, SoftHooks, TABLE};
use super::{Costs, ExportContext, MethodError, PeftMethod, RowContext, TrainHooks};
use crate::kernels::host::tensor;
use crate::model::ChatGlm2;
use crate::model::hooks::BaseWeight;
use crate::model::shape::ModelShape;
use crate::params::ParamSet;
use crate::rng::{KeyedRng, Stream, name_key};

pub const NAME: &str = "prompt_tuning";

/// What soft tokens start as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInit {
    /// N(0, 1): PEFT's RANDOM.
    Random,
    /// Rows of the word embedding: PEFT's SAMPLE_VOCAB.
    Vocab,
}

impl PromptInit {
    fn peft_name(self) -> &'static str {
        match self {
            Self::Random => "RANDOM",
            Self::Vocab => "SAMPLE_VOCAB",
        }
    }
}

/// As PEFT's `PromptTuningConfig` has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub num_virtual_tokens: NonZeroUsize,
    pub prompt_init: PromptInit,
}

impl Settings {
    pub const KEYS: &[&str] = &["num_virtual_tokens", "prompt_init"];

    /// # Errors
    /// When a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> std::result::Result<Self, KeyError> {
        Ok(Self {
            num_virtual_tokens: positive("num_virtual_tokens", keys.num_virtual_tokens.unwrap_or(20))?,
            prompt_init: keys.prompt_init.unwrap_or(PromptInit::Vocab),
        })
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::PromptTuning),
            num_virtual_tokens: Some(self.num_virtual_tokens.get()),
            prompt_init: Some(self.prompt_init),
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        let start = match self.prompt_init {
            PromptInit::Random => "N(0, 1)",
            PromptInit::Vocab => "rows of the word embedding",
        };
        format!("prompt tuning: {} soft tokens, at first {start}", self.num_virtual_tokens)
    }

    fn learning_rate(&self) -> f64 {
        3e-2 // PEFT, examples/causal_language_modeling/peft_prompt_tuning_clm.ipynb
    }

    fn costs(&self, shape: &ModelShape) -> std::result::Result<Costs, MethodError> {
        Ok(soft_prompt::costs(self.num_virtual_tokens, shape, self.num_virtual_tokens.get() as u64 * shape.hidden))
    }

    fn create(&self, base: &ChatGlm2, seed: u64) -> std::result::Result<Box<dyn PeftMethod>, MethodError> {
        Ok(Box::new(PromptTuning::new(self, base, seed)?))
    }
}

/// The soft tokens themselves.
pub struct PromptTuning {
    init: PromptInit,
    params: ParamSet,
}

impl PromptTuning {
    /// Fresh soft tokens: N(0, 1), or rows of the word embedding, drawn from all that it has.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(settings: &Settings, base: &ChatGlm2, seed: u64) -> Result<Self> {
        let (tokens, hidden) = (settings.num_virtual_tokens.get(), base.config.hidden_size);
        let rng = KeyedRng::new(seed, Stream::ParameterInit, name_key(TABLE));
        let table = match settings.prompt_init {
            PromptInit::Random => tensor(rng.normal(tokens * hidden), &[tokens, hidden])?,
            PromptInit::Vocab => {
                let Some(embedding) = base.weight(BaseWeight::Embedding) else { bail!("the model has no word embedding") };
                let size = embedding.dim(0)? as u32;
                let ids: Vec<u32> = (0..tokens as u64).map(|i| rng.below(i, size)).collect();
                embedding.index_select(&Tensor::new(ids, embedding.device())?, 0)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?
            }
        };
        Self::from_table(settings.prompt_init, table)
    }

    /// Given soft tokens, `[P, H]`.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn from_table(init: PromptInit, table: Tensor) -> Result<Self> {
        table.dims2()?;
        Ok(Self { init, params: ParamSet::new(&BTreeMap::from([(TABLE.to_owned(), table)]))? })
    }

    /// Reads what PEFT saved of prompt tuning or p-tuning for `base`: of both it keeps the soft tokens alone.
    ///
    /// # Errors
    /// When a file is missing or not whole, the adapter is of another kind, or a size is not the model's.
    pub fn read_peft(dir: &Path, base: &ChatGlm2) -> std::result::Result<Self, MethodError> {
        Ok(Self::from_table(PromptInit::Random, soft_prompt::read_peft(dir, &base.config)?)?)
    }

    /// `[P, H]`, sharing memory with the parameters.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn table(&self) -> Result<Tensor> {
        self.params.get(TABLE)
    }
}

impl PeftMethod for PromptTuning {
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
        Ok(Box::new(SoftHooks::new(self.table()?)))
    }

    fn site_is_parameters(&self) -> bool {
        true
    }

    fn sizes(&self) -> BTreeMap<String, Value> {
        let tokens = self.params.layout().get(TABLE).map_or(0, |entry| entry.shape[0]);
        BTreeMap::from([("num_virtual_tokens".to_owned(), tokens.into())])
    }

    fn export(&self, context: &ExportContext) -> std::result::Result<Files, ExportError> {
        let own = json!({
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": self.init.peft_name(),
            "prompt_tuning_init_text": null,
            "tokenizer_kwargs": null,
            "tokenizer_name_or_path": null,
        });
        soft_prompt::peft_files(&self.table()?, own, &[], context)
    }
}
