//! What a user should know of a base before it is used: its own dialogue template, and adapters that name another base.

use std::collections::BTreeSet;
use std::path::Path;

use super::report;
use crate::dist::ProcessGroup;
use crate::model::template::other_template;
use crate::peft;
use crate::train::TrainError;
use crate::train::together::together;

/// Warns, on the first rank, if the base in `model_dir` was trained with another template than rows get. Every rank calls it.
///
/// # Errors
/// When a file of the folder that says so is damaged.
pub fn of_template(model_dir: &Path, group: &dyn ProcessGroup) -> Result<(), TrainError> {
    let found = together(group, || Ok(other_template(model_dir)?))?;
    report::warn(&Vec::from_iter(found.map(|template| template.to_string())));
    Ok(())
}

/// Warns, on the first rank, of each of `adapters` that names another base than the one in `model_dir`. Every rank calls it.
///
/// # Errors
/// When a file of an adapter or of the base is damaged.
pub fn of_names<'a>(model_dir: &Path, adapters: impl IntoIterator<Item = &'a Path>, group: &dyn ProcessGroup) -> Result<(), TrainError> {
    for adapter in BTreeSet::from_iter(adapters) {
        let found = together(group, || Ok(peft::read::other_name(adapter, model_dir)?))?;
        report::warn(&Vec::from_iter(found));
    }
    Ok(())
}
