//! What another implementation needs to run the same steps: the rows of each micro-batch and the initial parameters.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::TrainError;
use crate::config::Plan;
use crate::data::{Dataset, MicroBatch};
use crate::peft::PeftMethod;

/// Writes one JSON line a micro-batch, where the plan asks for it.
pub struct BatchDump {
    file: Option<(PathBuf, BufWriter<File>)>,
}

impl BatchDump {
    /// Rank r > 0 writes to `PATH.rank-r`.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn open(plan: &Plan, rank: usize) -> Result<Self, TrainError> {
        let Some(path) = &plan.run.dump_batches else { return Ok(Self { file: None }) };
        let path = if rank == 0 { path.clone() } else { PathBuf::from(format!("{}.rank-{rank}", path.display())) };
        let file = File::create(&path).map_err(|source| TrainError::Io { path: path.clone(), source })?;
        Ok(Self { file: Some((path, BufWriter::new(file))) })
    }

    /// # Errors
    /// When the disk fails.
    pub fn write(&mut self, step: u64, slots: &[(usize, MicroBatch)], data: &Dataset) -> Result<(), TrainError> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        for (slot, batch) in slots {
            let rows: Vec<_> = batch
                .sample_indices
                .iter()
                .map(|&i| {
                    let sample = data.sample(i);
                    json!({ "ids": sample.ids, "is_target": sample.is_target })
                })
                .collect();
            let line = json!({ "step": step, "slot": slot, "rows": rows });
            writeln!(file, "{line}").map_err(|source| TrainError::Io { path: path.clone(), source })?;
        }
        file.flush().map_err(|source| TrainError::Io { path: path.clone(), source })
    }
}

/// Writes a method's parameters as safetensors.
///
/// # Errors
/// When the disk fails.
pub fn parameters(path: &Path, method: &dyn PeftMethod) -> Result<(), TrainError> {
    let bytes = crate::formats::safetensors::to_bytes(&method.params().host_tensors()?).map_err(crate::peft::export::ExportError::from)?;
    std::fs::write(path, bytes).map_err(|source| TrainError::Io { path: path.to_owned(), source })
}
