//! The arguments of subcommands that use a model, tuned or not.

use std::path::PathBuf;

use clap::Args;

use super::{base_warnings, report};
use crate::config::values::{MemoryLimit, named};
use crate::dist::{self, ProcessGroup};
use crate::model::RopeTable;
use crate::train::TrainError;
use crate::train::tuned::Tuned;

#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case", next_help_heading = "Model")]
pub struct TunedArgs {
    /// Folder of the base model as the hub has it, or of a fully tuned one
    #[arg(long, value_name = "DIR")]
    pub model_name_or_path: PathBuf,
    /// Folder of an adapter that a run exported (OUTPUT_DIR/adapter), or that PEFT, the adapters library or THUDM's script saved [default: the
    /// base alone]
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// In which arithmetic the rotary angles are computed [default: exact]
    #[arg(long, value_name = "WHICH", value_parser = named::<RopeTable>(&["exact", "published"]))]
    pub rope_table: Option<RopeTable>,
    /// Memory that the ranks of this machine may take together, such as 20GiB: a model that is larger is refused before it is loaded; none
    /// does not look [default: what is free, with swap, under the limits of the container or job]
    #[arg(long, value_name = "SIZE|none")]
    pub memory_limit: Option<MemoryLimit>,
    /// Threads of each rank [default: cores of the machine / ranks on it]
    #[arg(long, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
}

impl TunedArgs {
    /// Starts the threads and loads model and adapter, having warned if the adapter names another base.
    ///
    /// # Errors
    /// As [`Tuned::load`], or when there are no such threads or the model cannot fit into memory.
    pub fn load(&self, group: &dyn ProcessGroup) -> Result<Tuned, TrainError> {
        base_warnings::of_names(&self.model_name_or_path, self.adapter.as_deref(), group)?;
        let threads = dist::plan_threads(group, self.threads)?;
        dist::install_thread_pool(threads.count)?;
        let dir = &self.model_name_or_path;
        let rope_table = self.rope_table.unwrap_or(RopeTable::Exact);
        let tuned = Tuned::load(dir, self.adapter.as_deref(), rope_table, self.memory_limit, group)?;
        if let (Some(adapter), Some(method)) = (&self.adapter, &tuned.method)
            && let Some(reason) = method.without_effect()?
        {
            report::warn(&[format!("{} changes nothing, the result is that of the base alone: {reason}", adapter.display())]);
        }
        Ok(tuned)
    }
}
