//! The arguments of subcommands that use a model, tuned or not.

use std::path::PathBuf;

use clap::Args;

use super::{base_warnings, report};
use crate::config::values::{DeviceChoice, MemoryLimit, named};
use crate::dist::{self, ProcessGroup};
use crate::model::{ComputeDtype, RopeTable};
use crate::train::TrainError;
use crate::train::device::DeviceWish;
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
    /// What to compute on: auto takes a GPU where there is one that the adapter's method runs on, else the CPU; cuda takes the GPU of a rank's
    /// number on its machine, cuda:N GPU N [default: auto]
    #[arg(long, value_name = "auto|cpu|cuda[:N]")]
    pub device: Option<DeviceChoice>,
    /// The type of values in the model's computation; sums are f32 [default: bfloat16 on a GPU, float32 on a CPU]
    #[arg(long, value_name = "TYPE", value_parser = named::<ComputeDtype>(&["float32", "bfloat16"]))]
    pub compute_dtype: Option<ComputeDtype>,
    /// Memory that the ranks of this machine may take together, such as 20GiB: a model that is larger is refused before it is loaded; none
    /// does not look, and of a GPU's memory nothing is said [default: what is free, with swap, under the limits of the container or job]
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
        let wish = DeviceWish { device: self.device.unwrap_or_default(), dtype: self.compute_dtype };
        let tuned = Tuned::load(dir, self.adapter.as_deref(), rope_table, wish, self.memory_limit, group)?;
        if let (Some(adapter), Some(method)) = (&self.adapter, &tuned.method)
            && let Some(reason) = method.without_effect()?
        {
            report::warn(&[format!("{} changes nothing, the result is that of the base alone: {reason}", adapter.display())]);
        }
        Ok(tuned)
    }
}
