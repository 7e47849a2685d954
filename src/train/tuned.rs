//! A base and what was tuned on it, loaded for use.

use std::path::Path;

use super::base::same_base;
use super::device::{Chosen, DeviceWish, Workload};
use super::probe;
use super::save::PROBE;
use super::together::together;
use super::{TrainError, room};
use crate::config::values::MemoryLimit;
use crate::dist::ProcessGroup;
use crate::model::hooks::{Hooks, NoHooks};
use crate::model::shape::ModelShape;
use crate::model::weights::WeightSource;
use crate::model::{ChatGlm2, RopeTable};
use crate::peft::export::{ABOUT_FILE, ExportError};
use crate::peft::{self, Base, Mode, PeftMethod, RowContext, bare};
use crate::tokenizer::GlmTokenizer;

pub struct Tuned {
    pub tokenizer: GlmTokenizer,
    pub model: ChatGlm2,
    /// None: the base alone.
    pub method: Option<Box<dyn PeftMethod>>,
}

impl Tuned {
    /// Loads the model in `dir` and the adapter that a run exported. Every rank calls it with the same arguments.
    ///
    /// # Errors
    /// The same on every rank: the model cannot fit into memory, a folder is not what it should be, the adapter belongs to another base, or the ranks have different bases.
    pub fn load(
        dir: &Path,
        adapter: Option<&Path>,
        rope_table: RopeTable,
        wish: DeviceWish,
        memory_limit: Option<MemoryLimit>,
        group: &dyn ProcessGroup,
    ) -> Result<Self, TrainError> {
        let (config, source) = together(group, || Ok(bare::open_if_there(dir)?))?;
        let device = Chosen::open(wish, &config, adapter.map_or(Workload::Base, Workload::Adapter), group)?;
        if !device.device.is_cpu() {
            room::say_unheld(memory_limit, group);
        } else {
            room::expect_room_for_weights(&format!("the model in {}", dir.display()), &ModelShape::from(&config), memory_limit, group)?;
        }
        let (tokenizer, model, fingerprint) = together(group, || {
            // To say what is missing.
            let source = source.map_or_else(|| WeightSource::open(dir), Ok)?;
            let tokenizer = GlmTokenizer::from_file(&dir.join("tokenizer.model"))?;
            tokenizer.check_fits(config.padded_vocab_size)?;
            // Reads every byte of the weights: only where something is held against it, and on one rank of each machine.
            let is_compared = adapter.is_some() || group.world_size() > 1;
            let fingerprint =
                if is_compared && group.local_rank() == 0 { source.fingerprint(&config.parameter_shapes())? } else { String::new() };
            device.say_rounding(&source, &config, group)?;
            Ok((tokenizer, ChatGlm2::load(config, &source, rope_table, device.dtype.dtype(), &device.device)?, fingerprint))
        })?;
        let fingerprint = same_base(group, &fingerprint)?;
        let base = Base { model: &model, fingerprint: &fingerprint, tokenizer_sha256: tokenizer.sha256() };
        let method = together(group, || Ok(adapter.map(|adapter| peft::read(adapter, base)).transpose()?))?;
        together(group, || replay(&model, method.as_deref(), adapter.filter(|_| group.rank() == 0)))?;
        Ok(Self { tokenizer, model, method })
    }

    /// The method's hands on one row of `num_tokens`, without dropout.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn with_hooks<T>(&self, num_tokens: usize, work: impl FnOnce(&dyn Hooks) -> candle_core::Result<T>) -> candle_core::Result<T> {
        let Some(method) = &self.method else { return work(&NoHooks) };
        let rows = RowContext { stream_positions: &[0], row_bounds: &[0, num_tokens], mode: Mode::Eval };
        work(&*method.hooks(rows)?)
    }
}

/// Tests that an adapter gives what it gave when it was exported, where it says.
fn replay(model: &ChatGlm2, method: Option<&dyn PeftMethod>, adapter: Option<&Path>) -> Result<(), TrainError> {
    let (Some(method), Some(adapter)) = (method, adapter) else { return Ok(()) };
    let probe = peft::read::about(adapter)?.and_then(|about| about.get(PROBE).cloned());
    let Some(probe) = probe else { return Ok(()) };
    let probe = serde_json::from_value(probe).map_err(|source| ExportError::Json { path: adapter.join(ABOUT_FILE), source })?;
    match probe::replay(model, method, &probe)? {
        Some((what, then, now)) => Err(TrainError::ProbeDiffers { path: adapter.to_owned(), what, then, now }),
        None => Ok(()),
    }
}
