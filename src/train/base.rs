//! What runs on the same model and the same rows share, loaded once.

use std::path::Path;
use std::sync::Arc;

use super::adapters::{Ranks, Tokenizer};
use super::device::{Chosen, DeviceWish, Workload};
use super::together::together;
use super::{TrainError, room};
use crate::config::Plan;
use crate::config::arithmetic::RowLengths;
use crate::config::surprises::surprises;
use crate::data::dataset::LengthStats;
use crate::data::load::{CacheRequest, CacheUse, LoadRequest};
use crate::data::record::Columns;
use crate::data::tokenize::Limits;
use crate::data::{self, Dataset};
use crate::dist::ProcessGroup;
use crate::model::shape::ModelShape;
use crate::model::weights::WeightSource;
use crate::model::{ChatGlm2, ModelConfig, WeightDtype};
use crate::peft::{MethodPlan, bare};
use crate::tokenizer::GlmTokenizer;

/// The base model and the rows. A clone shares the memory of both.
#[derive(Clone, Debug)]
pub struct Base {
    pub model: ChatGlm2,
    pub device: Chosen,
    pub train: Arc<Dataset>,
    pub validation: Option<Arc<Dataset>>,
    /// sha256 of the weights.
    pub fingerprint: String,
    pub tokenizer_sha256: String,
}

/// What is loaded before the weights: rows, and what reads them.
pub struct RunData {
    config: ModelConfig,
    /// The weights, opened; none where some are missing.
    source: Option<WeightSource>,
    tokenizer: GlmTokenizer,
    pub device: Chosen,
    pub train: Dataset,
    pub validation: Option<Dataset>,
}

impl RunData {
    /// Loads the rows that `plan.data` names, for the model that `plan.model` names. Every rank calls it.
    ///
    /// # Errors
    /// When a file is missing or damaged, the model is not a bare base, or rows cannot be read.
    pub fn load(plan: &Plan, group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        Self::load_for(plan, &[&plan.method], group)
    }

    /// As [`Self::load`], for runs of all of `methods`.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_for(plan: &Plan, methods: &[&MethodPlan], group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        let dir = &plan.model.model_name_or_path;
        let (tokenizer, config, source) = together(group, || {
            let (config, source) = bare::open_if_there(dir)?;
            let tokenizer = GlmTokenizer::from_file(&dir.join("tokenizer.model"))?;
            tokenizer.check_fits(config.padded_vocab_size)?;
            Ok((tokenizer, config, source))
        })?;
        let wish = DeviceWish { device: plan.model.device, dtype: plan.model.compute_dtype };
        let device = Chosen::open(wish, &config, Workload::Methods(methods), group)?;
        let (train, validation) = load_data(plan, &tokenizer, group)?;
        Ok(Self { config, source, tokenizer, device, train, validation })
    }

    /// Lines that the user of `plan` should see before anything takes long.
    pub fn surprises(&self, plan: &Plan) -> Vec<String> {
        surprises(plan, Some(self.train.num_samples() as u64))
    }

    /// Tests that the run of `plan`, called `what`, can fit into memory. Every rank calls it.
    ///
    /// # Errors
    /// When it cannot.
    pub fn expect_room(&self, what: &str, plan: &Plan, group: &dyn ProcessGroup) -> Result<(), TrainError> {
        // What is free on the host says nothing of a GPU.
        if !self.device.device.is_cpu() {
            super::room::say_unheld(plan.run.memory_limit, group);
        }
        let Some(LengthStats { min, max, .. }) = self.train.length_stats().filter(|_| self.device.device.is_cpu()) else { return Ok(()) };
        let lengths = RowLengths { shortest: min as u64, longest: max as u64, num_rows: self.train.num_samples() as u64 };
        room::expect_room(what, &ModelShape::from(&self.config), plan, &lengths, group)
    }

    /// Loads the weights. Every rank calls it.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the ranks have different weights.
    pub fn into_base(self, plan: &Plan, group: &dyn ProcessGroup) -> Result<Base, TrainError> {
        let Self { config, source, tokenizer, device, train, validation } = self;
        let (model, fingerprint) = together(group, || {
            // To say what is missing.
            let source = source.map_or_else(|| WeightSource::open(&plan.model.model_name_or_path), Ok)?;
            source.check(&config.parameter_shapes())?;
            // One rank of each machine reads every byte: the others have the same files.
            let fingerprint = if group.local_rank() == 0 { source.fingerprint(&config.parameter_shapes())? } else { String::new() };
            device.say_rounding(&source, &config, group)?;
            let model = ChatGlm2::load(config.clone(), &source, plan.model.rope_table, device.dtype.dtype(), &device.device)?;
            if plan.model.torch_dtype == WeightDtype::Bfloat16 {
                model.round_weights_to_bf16()?;
            }
            Ok((model, fingerprint))
        })?;
        let fingerprint = same_base(group, &fingerprint)?;
        let validation = validation.map(Arc::new);
        Ok(Base { model, device, train: Arc::new(train), validation, fingerprint, tokenizer_sha256: tokenizer.sha256().to_owned() })
    }
}

impl Base {
    /// Loads what `plan.model` and `plan.data` name, for work without steps. Every rank calls it.
    ///
    /// # Errors
    /// As [`RunData::load`] and [`RunData::into_base`], or when the weights cannot fit into memory.
    pub fn load(plan: &Plan, group: &dyn ProcessGroup) -> Result<Self, TrainError> {
        let data = RunData::load(plan, group)?;
        let what = format!("the model in {}", plan.model.model_name_or_path.display());
        if data.device.device.is_cpu() {
            room::expect_room_for_weights(&what, &ModelShape::from(&data.config), plan.run.memory_limit, group)?;
        }
        data.into_base(plan, group)
    }
}

/// The ranks of each machine must have loaded the same base.
pub(super) fn same_base(group: &dyn ProcessGroup, mine: &str) -> Result<String, TrainError> {
    let all = group.all_gather_bytes(mine.as_bytes())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let expected = text(&all[0]);
    match all.iter().enumerate().find(|(_, f)| !f.is_empty() && **f != all[0]) {
        Some((rank, found)) => Err(TrainError::BaseDiffers { rank, expected, found: text(found) }),
        None => Ok(expected),
    }
}

fn load_data(plan: &Plan, tokenizer: &GlmTokenizer, group: &dyn ProcessGroup) -> Result<(Dataset, Option<Dataset>), TrainError> {
    let load = |file: &Path, max_samples| -> Result<Dataset, TrainError> {
        let (data, cache) =
            together(group, || Ok(data::load::load(&load_request(plan, file, max_samples), &Tokenizer(tokenizer), &Ranks(group))?))?;
        if group.rank() == 0 {
            report(&data, &plan.data.columns());
        }
        report_cache(&cache);
        Ok(data)
    };
    let train = load(&plan.data.train_file, plan.data.max_train_samples)?;
    let validation = plan.data.validation_file.as_ref().map(|file| load(file, plan.data.max_eval_samples)).transpose()?;
    Ok((train, validation))
}

/// The plan's part that decides how a file's rows become tokens.
pub fn load_request(plan: &Plan, file: &Path, max_samples: Option<usize>) -> LoadRequest {
    let d = &plan.data;
    LoadRequest {
        file: file.to_owned(),
        columns: d.columns(),
        limits: Limits { max_source_length: d.max_source_length, max_target_length: d.max_target_length, truncation: d.truncation },
        on_bad_row: d.on_bad_row,
        max_samples,
        cache: d.cache_dir.as_ref().map(|dir| CacheRequest { dir: dir.clone(), overwrite: d.overwrite_cache }),
    }
}

/// What all ranks have found.
fn report(data: &Dataset, columns: &Columns) {
    let lengths = data.length_stats().map_or(String::new(), |l| format!(", {} to {} tokens, mean {:.0}", l.min, l.max, l.mean));
    tracing::info!("{}: {} rows{lengths}", data.file().display(), data.num_samples());
    for bad in &data.bad_rows.first {
        tracing::warn!("row left out: {bad}");
    }
    if data.bad_rows.total > data.bad_rows.first.len() {
        tracing::warn!("{} rows left out in all", data.bad_rows.total);
    }
    let (rows, prompts, answers) = (data.num_samples(), data.num_cut_prompts, data.num_cut_answers);
    let most_are_cut = [(prompts, "prompts", "max_source_length"), (answers, "answers", "max_target_length")];
    for (cut, what, key) in most_are_cut.into_iter().filter(|(cut, ..)| 2 * cut > rows) {
        tracing::warn!("{cut} of {rows} {what} of {} were cut to `{key}`; use a larger one", data.file().display());
    }
    if prompts + answers > 0 {
        tracing::info!("{prompts} prompts and {answers} answers were cut to their maximum");
    }
    for line in data.column_use.report(columns, data.file()) {
        tracing::warn!("{line}");
    }
}

/// What became of this rank's cache.
fn report_cache(cache: &CacheUse) {
    match cache {
        CacheUse::Rebuilt { path, reason } => tracing::warn!("{} was made anew: {reason}", path.display()),
        CacheUse::NotKept { path, reason } => tracing::warn!("tokenized rows could not be kept in {}: {reason}", path.display()),
        CacheUse::Hit(path) => tracing::info!("tokenized rows come from {}", path.display()),
        CacheUse::Off | CacheUse::Built(_) => {}
    }
}
