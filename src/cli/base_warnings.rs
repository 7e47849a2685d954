//! What a user should know of a base before it is used: its own template of dialogues, and adapters that name another base.

use std::path::Path;

use super::{environment, report};
use crate::model::template::other_template;
use crate::peft;
use crate::train::TrainError;

/// Warns, on the first rank, if the base in `model_dir` was made with another template than rows get.
///
/// # Errors
/// When a file of the folder that says so is damaged.
pub fn of_template(model_dir: &Path) -> Result<(), TrainError> {
    if speaks() {
        report::warn(&Vec::from_iter(other_template(model_dir)?.map(|template| template.to_string())));
    }
    Ok(())
}

/// Warns, on the first rank, of each of `adapters` that names another base than the one in `model_dir`.
///
/// # Errors
/// When a file of an adapter or of the base is damaged.
pub fn of_names<'a>(model_dir: &Path, adapters: impl IntoIterator<Item = &'a Path>) -> Result<(), TrainError> {
    if speaks() {
        for adapter in adapters {
            report::warn(&Vec::from_iter(peft::read::other_name(adapter, model_dir)?));
        }
    }
    Ok(())
}

fn speaks() -> bool {
    environment::launched_rank().is_none_or(|rank| rank == 0)
}
