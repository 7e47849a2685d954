//! Saving beside the steps. A save copies this rank's part of the state and returns; a thread of each rank hashes, compresses and writes its
//! shard, and the ranks look at each other's progress between steps. When all shards are durable the first rank's thread commits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use candle_core::DType;

use super::TrainError;
use super::optimizer::Optimizer;
use super::probe;
use super::state::{PARAMETER, Progress};
use super::together::together;
use crate::checkpoint::{self, CheckpointError, Disk, Draft, FileEntry, Flat, Header, Identity, Keep, Part, Probe, ProbeRow, Written};
use crate::config::Plan;
use crate::config::plan::{OnSaveError, WeightDtype};
use crate::dist::{AgreedError, ProcessGroup, Shards};
use crate::model::{ChatGlm2, ModelConfig};
use crate::optim;
use crate::params::Layout;
use crate::peft::{ExportContext, PeftMethod};

/// Key of the probe in what an export says of itself.
pub(super) const PROBE: &str = "probe";

/// What is the same for all saves of a run.
#[derive(Clone, Copy)]
pub struct SaveContext<'a> {
    pub disk: &'a dyn Disk,
    pub group: &'a dyn ProcessGroup,
    pub plan: &'a Plan,
    pub config: &'a ModelConfig,
    pub identity: &'a Identity,
    /// What each save computes a probe on.
    pub probe_rows: &'a [ProbeRow],
}

/// Saves checkpoints, at most one at a time. All ranks call the same methods at the same steps.
pub struct Saver<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    context: SaveContext<'env>,
    in_flight: Option<InFlight<'scope>>,
    /// Buffers of the last snapshot, for the next.
    spare: Vec<Vec<u8>>,
    /// The newest that is durable, and its step.
    durable: Option<(u64, PathBuf)>,
    num_failed: u64,
    /// Time for which a save waited for the one before, since it was last asked for.
    waited: Duration,
}

struct InFlight<'scope> {
    draft: Draft<'scope>,
    header: Header,
    layout: Arc<Layout>,
    begun: Instant,
    stage: Stage<'scope>,
}

enum Stage<'scope> {
    Writing(Task<'scope, OfThisRank>),
    /// A task on the first rank, which has all shards' sizes.
    Committing(Option<Task<'scope, Tidied>>, Vec<Written>),
}

/// What a rank has written, and its snapshot.
type OfThisRank = (Written, BTreeMap<String, FileEntry>, Part);

/// What came of deleting older checkpoints; the new one is durable in any case.
type Tidied = Result<Vec<PathBuf>, CheckpointError>;

type Task<'scope, T> = ScopedJoinHandle<'scope, Result<T, CheckpointError>>;

impl Stage<'_> {
    fn is_finished(&self) -> bool {
        match self {
            Self::Writing(task) => task.is_finished(),
            Self::Committing(task, _) => task.as_ref().is_none_or(ScopedJoinHandle::is_finished),
        }
    }
}

fn join<T>(task: Task<'_, T>) -> Result<T, TrainError> {
    Ok(task.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
}

impl<'scope, 'env> Saver<'scope, 'env> {
    /// Threads end before `scope` does.
    pub fn new(scope: &'scope Scope<'scope, 'env>, context: SaveContext<'env>) -> Self {
        Self { scope, context, in_flight: None, spare: Vec::new(), durable: None, num_failed: 0, waited: Duration::ZERO }
    }

    /// The newest checkpoint that this saver has made durable.
    pub fn durable(&self) -> Option<&Path> {
        self.durable.as_ref().map(|(_, path)| path.as_path())
    }

    /// The step of [`Self::durable`].
    pub fn durable_step(&self) -> Option<u64> {
        self.durable.as_ref().map(|(step, _)| *step)
    }

    /// Saves that failed and were passed over.
    pub fn num_failed(&self) -> u64 {
        self.num_failed
    }

    /// Time for which saves waited for the one before, since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// Takes a snapshot of the state and begins to write it as `checkpoint-{step}`. Waits for the save before, if that is not yet durable.
    ///
    /// # Errors
    /// The same on every rank: when this save cannot begin, or the one before failed; none where the plan says to go on without.
    pub fn begin(
        &mut self,
        progress: Progress,
        eval_loss: Option<f64>,
        model: &ChatGlm2,
        method: &dyn PeftMethod,
        optimizer: &Optimizer,
    ) -> Result<(), TrainError> {
        if let Some(before) = &self.in_flight {
            let (step, started) = (before.header.step, Instant::now());
            self.drain()?;
            let waited = started.elapsed();
            self.waited += waited;
            if self.is_first() {
                let seconds = waited.as_secs_f64();
                tracing::warn!("checkpoint-{} waited {seconds:.1} s until checkpoint-{step} was written", progress.step);
            }
        }
        let result = self.start(progress, eval_loss, model, method, optimizer);
        self.settle(progress.step, result)
    }

    /// Looks whether the save in flight is done. To be called between steps.
    ///
    /// # Errors
    /// The same on every rank: when that save failed; none where the plan says to go on without.
    pub fn poll(&mut self) -> Result<(), TrainError> {
        let Some(save) = &self.in_flight else { return Ok(()) };
        let mine = [u8::from(save.stage.is_finished())];
        if self.context.group.all_gather_bytes(&mine)?.iter().all(|rank| *rank == [1]) { self.advance() } else { Ok(()) }
    }

    /// Waits until no save is in flight.
    ///
    /// # Errors
    /// As [`Self::poll`].
    pub fn drain(&mut self) -> Result<(), TrainError> {
        while self.in_flight.is_some() {
            self.advance()?;
        }
        Ok(())
    }

    fn is_first(&self) -> bool {
        self.context.group.rank() == 0
    }

    fn start(
        &mut self,
        progress: Progress,
        eval_loss: Option<f64>,
        model: &ChatGlm2,
        method: &dyn PeftMethod,
        optimizer: &Optimizer,
    ) -> Result<(), TrainError> {
        let SaveContext { disk, group, plan, identity, .. } = self.context;
        let begun = Instant::now();
        let mut header = Header {
            step: progress.step,
            consumed_rows: progress.consumed_rows,
            world_size: group.world_size(),
            eval_loss: eval_loss.filter(|loss| loss.is_finite()),
            identity: identity.clone(),
            plan: serde_json::to_value(plan).unwrap_or_default(),
            probe: None,
        };
        let draft = Draft::new(disk, &plan.run.output_dir, progress.step);
        let snapshot = together(group, || {
            let part = snapshot(group, method, optimizer, std::mem::take(&mut self.spare))?;
            let probe = if group.rank() == 0 { self.context.probe(model, method)? } else { None };
            // What a method that trains the base exports is a whole model: the state has all of it that can change.
            let exports = group.rank() == 0 && method.trained_base_weights()?.is_empty();
            let files = if exports { self.context.adapter_files(method, probe.as_ref())? } else { Vec::new() };
            if group.rank() == 0 {
                let of_files: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
                draft.begin(part.bytes_of(method.params().layout().num_elements()) + of_files)?;
            }
            Ok((part, files, probe))
        });
        let (part, files, probe) = match snapshot {
            Ok(snapshot) => snapshot,
            Err(error) => {
                if self.is_first() {
                    draft.abandon();
                }
                return Err(error);
            }
        };
        header.probe = probe;
        let (rank, world_size, layout) = (group.rank(), group.world_size(), Arc::new(method.params().layout().clone()));
        let write = {
            let (draft, layout) = (draft.clone(), Arc::clone(&layout));
            move || Ok((draft.write_shard(rank, world_size, &layout, &part)?, draft.write_files(&files)?, part))
        };
        let stage = Stage::Writing(self.scope.spawn(write));
        self.in_flight = Some(InFlight { draft, header, layout, begun, stage });
        Ok(())
    }

    /// Takes the save in flight one stage further. All ranks' tasks are done, or are waited for.
    fn advance(&mut self) -> Result<(), TrainError> {
        let Some(InFlight { draft, header, layout, begun, stage }) = self.in_flight.take() else { return Ok(()) };
        let (step, group) = (header.step, self.context.group);
        let result = match stage {
            Stage::Writing(task) => self.gather(task).map(|(shards, files)| {
                let task = self.is_first().then(|| {
                    let (draft, header, layout, shards) = (draft.clone(), header.clone(), Arc::clone(&layout), shards.clone());
                    let (disk, output_dir, keep) = (self.context.disk, self.context.plan.run.output_dir.clone(), self.keep());
                    self.scope.spawn(move || {
                        draft.commit(&header, &layout, &shards, &files)?;
                        Ok(keep.map_or(Ok(Vec::new()), |keep| checkpoint::retention(disk, &output_dir, header.step, keep)))
                    })
                });
                let stage = Stage::Committing(task, shards);
                self.in_flight = Some(InFlight { draft: draft.clone(), header, layout, begun, stage });
            }),
            Stage::Committing(task, shards) => together(group, || task.map(join).transpose()).map(|tidied| {
                if self.is_first() {
                    let (stored, content) = shards.iter().fold((0, 0), |(a, b), w| (a + w.shard.bytes, b + w.shard.content_bytes));
                    let (seconds, mb) = (begun.elapsed().as_secs_f64(), |bytes: u64| bytes as f64 / 1e6);
                    let num_shards = shards.len();
                    tracing::info!(
                        "checkpoint-{step} is durable: {:.1} MB of state in {:.1} MB, {num_shards} shards, {seconds:.1} s after its step",
                        mb(content),
                        mb(stored)
                    );
                }
                if let Some(Err(error)) = tidied {
                    tracing::warn!("an older checkpoint could not be deleted, and the next save tries again: {error}");
                }
                self.durable = Some((step, draft.path().to_owned()));
            }),
        };
        if result.is_err() && self.is_first() {
            draft.abandon();
        }
        self.settle(step, result)
    }

    /// Every rank's shard, on every rank, and this rank's other files.
    fn gather(&mut self, task: Task<'scope, OfThisRank>) -> Result<(Vec<Written>, BTreeMap<String, FileEntry>), TrainError> {
        let group = self.context.group;
        let unreadable = |e: serde_json::Error| CheckpointError::Incomplete { path: PathBuf::from("checkpoint"), reason: e.to_string() };
        let (files, mine) = together(group, || {
            let (written, files, part) = join(task)?;
            self.spare = part.flats.into_iter().map(|flat| flat.bytes).collect();
            Ok((files, serde_json::to_vec(&written).map_err(unreadable)?))
        })?;
        let all = group.all_gather_bytes(&mine)?;
        let shards =
            together(group, || Ok(all.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<_, _>>().map_err(unreadable)?))?;
        Ok((shards, files))
    }

    fn keep(&self) -> Option<Keep> {
        let run = &self.context.plan.run;
        let every = run.save_keep_every.map(|every| every.try_into().unwrap_or(std::num::NonZeroU64::MAX));
        run.save_total_limit.map(|newest| Keep { newest, best: run.save_best, every })
    }

    /// Passes over a save that failed on all ranks alike, where the plan says so.
    fn settle(&mut self, step: u64, result: Result<(), TrainError>) -> Result<(), TrainError> {
        match result {
            Err(error) if self.context.plan.run.on_save_error == OnSaveError::Warn && is_of_the_save(&error) => {
                self.num_failed += 1;
                if self.is_first() {
                    let newest = self.durable().map_or("none of this run".to_owned(), |path| path.display().to_string());
                    tracing::warn!(
                        "checkpoint-{step} was NOT saved ({} failed so far; the newest durable one is {newest}): {error}",
                        self.num_failed
                    );
                }
                Ok(())
            }
            other => other,
        }
    }
}

/// Not of the ranks' connection, after which nothing can go on.
fn is_of_the_save(error: &TrainError) -> bool {
    matches!(error, TrainError::Checkpoint(_) | TrainError::Export(_) | TrainError::Agreed(AgreedError::Rank { .. }))
}

/// Copies the part of the state that this rank saves.
fn snapshot(group: &dyn ProcessGroup, method: &dyn PeftMethod, optimizer: &Optimizer, buffers: Vec<Vec<u8>>) -> Result<Part, TrainError> {
    let mut buffers = buffers.into_iter();
    let mut next = || buffers.next().unwrap_or_default();
    let flat = method.params().flat();
    // Of an optimizer that is sharded these are the shards.
    let range = Shards::new(flat.elem_count(), group.world_size(), optim::CHUNK).range(group.rank());
    let mut flats = vec![Flat::copy_in(PARAMETER, &flat.narrow(0, range.start, range.len())?, next())?];
    for (kind, state) in optimizer.state(range.clone())? {
        flats.push(Flat::copy_in(kind, &state, next())?);
    }
    Ok(Part { range, flats })
}

impl SaveContext<'_> {
    /// Writes the adapter alone into `output_dir/adapter`. On the first rank.
    ///
    /// # Errors
    /// When the disk fails; an adapter that was there before stays.
    pub fn export(&self, model: &ChatGlm2, method: &dyn PeftMethod) -> Result<PathBuf, TrainError> {
        let path = self.plan.run.output_dir.join("adapter");
        let files = self.adapter_files(method, self.probe(model, method)?.as_ref())?;
        checkpoint::publish(self.disk, &path, &files)?;
        Ok(path)
    }

    fn probe(&self, model: &ChatGlm2, method: &dyn PeftMethod) -> Result<Option<Probe>, TrainError> {
        let probe = probe::compute(model, method, self.probe_rows)?;
        if probe.is_none() {
            tracing::warn!(
                "what is saved has no probe: the tuned model gives values that are not finite on the first rows, or these are too short"
            );
        }
        Ok(probe)
    }

    fn adapter_files(&self, method: &dyn PeftMethod, probe: Option<&Probe>) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
        let about = about(self.identity, probe);
        let (model_dir, dtype) = (&self.plan.model.model_name_or_path, self.plan.model.torch_dtype);
        let dtype = (dtype == WeightDtype::Bfloat16).then_some(DType::BF16);
        Ok(method.export(&ExportContext { model_dir, config: self.config, dtype, about: &about })?)
    }
}

/// What an export says of itself.
pub(super) fn about(identity: &Identity, probe: Option<&Probe>) -> serde_json::Value {
    let mut about = serde_json::to_value(identity).unwrap_or_default();
    if let (Some(about), Some(probe)) = (about.as_object_mut(), probe) {
        about.insert(PROBE.to_owned(), serde_json::to_value(probe).unwrap_or_default());
    }
    about
}
