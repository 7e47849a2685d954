//! Why a method cannot be made for a model.

use std::path::PathBuf;

use super::export::ExportError;
use crate::model::ModelError;

#[derive(Debug, thiserror::Error)]
pub enum MethodError {
    /// A setting that only the model can judge.
    #[error("`method.{key}` is \"{found}\", and in this model {reason}")]
    Setting { key: &'static str, found: String, reason: String, hint: String },
    #[error("{} is of {name}, which cannot be folded into the base's weights", path.display())]
    NotMergeable { path: PathBuf, name: String },
    /// Two adapters that cannot be joined: folder and value of each.
    #[error("`{what}` of {} is \"{}\" and of {} \"{}\"", pair[0].0.display(), pair[0].1, pair[1].0.display(), pair[1].1)]
    Pair { what: &'static str, pair: Box<[(PathBuf, String); 2]> },
    /// An adapter whose values are to become those of a method that it does not fit.
    #[error("{} does not fit {method}: `{what}` is {} in the adapter and {} in this run", path.display(), values[0], values[1])]
    NotImportable { path: PathBuf, method: &'static str, what: String, values: Box<[String; 2]> },
    /// A folder that was given as a base.
    #[error("{} is not a bare base: {what}", path.display())]
    NotBare { path: PathBuf, what: String, hint: String },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] ExportError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl MethodError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Setting { hint, .. } | Self::NotBare { hint, .. } => Some(hint.clone()),
            Self::Model(error) => error.hint(),
            Self::NotMergeable { .. } => Some("LoRA, rsLoRA, DoRA and (IA)^3 can be; use this one beside its base".to_owned()),
            Self::NotImportable { .. } => Some(
                "give the method and sizes of the adapter; PEFT keeps the output of an encoder or a projection alone, which only a run \
                 without one (prefix_projection = false, prompt_tuning) can go on from"
                    .to_owned(),
            ),
            Self::Pair { what: "adapter_name", .. } => {
                Some("the adapters of a fusion need different names: train one of them with another `adapter_name`".to_owned())
            }
            Self::Pair { .. } => Some("the adapters of a fusion need to be trained on the same base".to_owned()),
            Self::Adapter(error) => error.hint(),
            Self::Tensor(_) => None,
        }
    }
}
