//! Full tuning: every parameter of the base trains.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::base_weights::{self, BaseWeights};
use super::keys::{KeyError, MethodKeys};
use super::{Costs, MethodError, PeftMethod};
use crate::model::ChatGlm2;
use crate::model::hooks::BaseWeight;
use crate::model::shape::ModelShape;

pub const NAME: &str = "full";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {}

impl Settings {
    pub const KEYS: &[&str] = &[];

    /// # Errors
    /// None: there is nothing to set.
    pub fn resolve(_keys: &MethodKeys) -> Result<Self, KeyError> {
        Ok(Self {})
    }
}

impl super::Settings for Settings {
    fn keys(&self) -> MethodKeys {
        MethodKeys { finetuning_type: Some(super::FinetuningType::Full), ..MethodKeys::default() }
    }

    fn describe(&self) -> String {
        "full tuning: every parameter, f32 masters".to_owned()
    }

    fn learning_rate(&self) -> f64 {
        1e-4 // THUDM/ChatGLM2-6B, ptuning/ds_train_finetune.sh
    }

    fn trains_base_weights(&self) -> bool {
        true
    }

    fn costs(&self, shape: &ModelShape) -> Result<Costs, MethodError> {
        let is_there = |weight: &BaseWeight| !matches!(weight, BaseWeight::Bias(_, site) if !shape.has_bias(*site));
        Ok(base_weights::costs(shape, &BaseWeight::all(shape.layers as usize).filter(is_there).collect()))
    }

    fn create(&self, base: &ChatGlm2, _seed: u64) -> Result<Box<dyn PeftMethod>, MethodError> {
        let all: BTreeSet<BaseWeight> = base.weights().map(|(weight, _)| weight).collect();
        Ok(Box::new(BaseWeights::new(NAME, BTreeMap::new(), base, &all)?))
    }
}
