//! Freeze tuning: some of the base's parameters train, by default those of the last layers; all else is frozen.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::base_weights::{self, BaseWeights};
use super::keys::{KeyError, MethodKeys, positive};
use super::select::Selector;
use super::{Costs, MethodError, PeftMethod};
use crate::model::ChatGlm2;
use crate::model::hooks::BaseWeight;
use crate::model::shape::ModelShape;

pub const NAME: &str = "freeze";

/// Which parameters train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Settings {
    /// All of the last n layers.
    Layers(NonZeroUsize),
    /// Those with such names.
    Modules(Selector),
}

impl Settings {
    pub const KEYS: &[&str] = &["freeze_trainable_layers", "freeze_trainable_modules"];

    /// # Errors
    /// When both keys are given or a value is out of its range.
    pub fn resolve(keys: &MethodKeys) -> Result<Self, KeyError> {
        let Some(text) = &keys.freeze_trainable_modules else {
            return Ok(Self::Layers(positive("freeze_trainable_layers", keys.freeze_trainable_layers.unwrap_or(2))?));
        };
        if let Some(layers) = keys.freeze_trainable_layers {
            return Err(KeyError::new("freeze_trainable_layers", layers, "it alone, or freeze_trainable_modules alone"));
        }
        let expected = "names of parameters separated by commas, or a regular expression for whole names";
        Ok(Self::Modules(Selector::new(text).map_err(|_| KeyError::new("freeze_trainable_modules", format!("\"{text}\""), expected))?))
    }

    /// Those of `all` that train.
    fn trained(&self, num_layers: usize, all: impl Iterator<Item = BaseWeight>) -> Result<BTreeSet<BaseWeight>, MethodError> {
        match self {
            Self::Layers(n) if n.get() > num_layers => Err(MethodError::Setting {
                key: "freeze_trainable_layers",
                found: n.to_string(),
                reason: format!("there are {num_layers} layers"),
                hint: format!("use at most {num_layers}, or finetuning_type = \"full\""),
            }),
            Self::Layers(n) => Ok(all.filter(|weight| weight.layer().is_some_and(|layer| layer >= num_layers - n.get())).collect()),
            Self::Modules(selector) => {
                let by_name = base_weights::by_name(num_layers);
                let names: BTreeSet<String> = all.map(BaseWeight::name).collect();
                // A name may be a module's: `mlp` stands for all parameters below it.
                let chosen = selector.select_below(&names.iter().map(String::as_str).collect::<Vec<_>>());
                let chosen = chosen.map_err(|reason| MethodError::Setting {
                    key: "freeze_trainable_modules",
                    found: selector.text().to_owned(),
                    reason,
                    hint: format!("a parameter's whole name is like `{}`", BaseWeight::InputLayernorm(0).name()),
                })?;
                Ok(chosen.into_iter().map(|name| by_name[name]).collect())
            }
        }
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        let (layers, modules) = match self {
            Self::Layers(n) => (Some(n.get()), None),
            Self::Modules(selector) => (None, Some(selector.text().to_owned())),
        };
        MethodKeys {
            finetuning_type: Some(super::FinetuningType::Freeze),
            freeze_trainable_layers: layers,
            freeze_trainable_modules: modules,
            ..MethodKeys::default()
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Layers(n) => format!("freeze: the last {n} layers train, f32 masters"),
            Self::Modules(selector) => format!("freeze: {} train, f32 masters", selector.text()),
        }
    }

    fn learning_rate(&self) -> f64 {
        1e-4 // liucongg/ChatGLM-Finetuning, README, the freeze method on ChatGLM2
    }

    fn trains_base_weights(&self) -> bool {
        true
    }

    fn costs(&self, shape: &ModelShape) -> Result<Costs, MethodError> {
        let num_layers = shape.layers as usize;
        let is_there = |weight: &BaseWeight| !matches!(weight, BaseWeight::Bias(_, site) if !shape.has_bias(*site));
        Ok(base_weights::costs(shape, &self.trained(num_layers, BaseWeight::all(num_layers).filter(is_there))?))
    }

    fn create(&self, base: &ChatGlm2, _seed: u64) -> Result<Box<dyn PeftMethod>, MethodError> {
        let trained = self.trained(base.config.num_layers, base.weights().map(|(weight, _)| weight))?;
        let sizes = match self {
            Self::Layers(n) => BTreeMap::from([("freeze_trainable_layers".to_owned(), json!(n.get()))]),
            Self::Modules(_) => {
                let names: Vec<String> = trained.iter().map(|weight| weight.name()).collect();
                BTreeMap::from([("freeze_trainable_modules".to_owned(), json!(names))])
            }
        };
        Ok(Box::new(BaseWeights::new(NAME, sizes, base, &trained)?))
    }
}
