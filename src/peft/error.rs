//! Why a method cannot be made for a model.

use std::path::PathBuf;

use super::export::ExportError;

#[derive(Debug, thiserror::Error)]
pub enum MethodError {
    /// A setting that only the model can judge.
    #[error("`method.{key}` is \"{found}\", and in this model {reason}")]
    Setting { key: &'static str, found: String, reason: String, hint: String },
    #[error("{} is of {name}, which cannot be folded into the base's weights", path.display())]
    NotMergeable { path: PathBuf, name: &'static str },
    #[error(transparent)]
    Adapter(#[from] ExportError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl MethodError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Setting { hint, .. } => Some(hint.clone()),
            Self::NotMergeable { .. } => Some("LoRA, rsLoRA and DoRA can be; use this one beside its base".to_owned()),
            Self::Adapter(error) => error.hint(),
            Self::Tensor(_) => None,
        }
    }
}
