//! What a bit-equal resume needs, from a checkpoint: parameters, the optimizer's state, and the place in the training stream.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::TrainError;
use super::finite;
use super::optimizer::Optimizer;
use super::resume_report::{PassedOver, Resumed};
use super::together::together;
use crate::checkpoint::{self, CheckpointError, Disk, Header, Identity, Named};
use crate::config::plan::Resume;
use crate::dist::ProcessGroup;
use crate::params::Layout;
use crate::peft::PeftMethod;

/// What the trained parameters are called in a state; the optimizer names its own kinds.
pub(super) const PARAMETER: &str = "parameter";

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Rows of the training stream consumed.
    pub consumed_rows: u64,
}

/// What this rank needs of a checkpoint.
struct Read<'k> {
    progress: Progress,
    header: Header,
    parameters: Vec<f32>,
    /// This rank's shard of the optimizer's state, by kind.
    state: Vec<(&'k str, Vec<f32>)>,
}

/// Puts the values of the checkpoint that `resume` names into a fresh method and optimizer, saved on any number of ranks; none to start anew.
/// A newest one that is damaged, for any rank, is passed over for the one before it. All ranks call it.
///
/// # Errors
/// The same on every rank: when it names nothing that is whole, or a checkpoint of another base, method, size, tokenizer or data order.
pub fn resume(
    disk: &dyn Disk,
    group: &dyn ProcessGroup,
    output_dir: &Path,
    resume: &Resume,
    identity: &Identity,
    method: &mut dyn PeftMethod,
    optimizer: &mut Optimizer,
) -> Result<Option<Resumed>, TrainError> {
    let (candidates, may_fall_back) = match resume {
        Resume::No => return Ok(None),
        Resume::Path(path) => named(disk, group, output_dir, path)?,
        Resume::Latest => (newest_first(disk, group, output_dir)?, true),
    };
    let layout = method.params().layout().clone();
    let mut passed_over: Vec<PassedOver> = Vec::new();
    for path in candidates {
        let mine = together(group, || match read(disk, group, &path, identity, &layout, optimizer) {
            Err(TrainError::Checkpoint(error)) if may_fall_back && is_damage(&error) => Ok(Err(error.to_string())),
            other => other.map(Ok),
        })?;
        let reason = mine.as_ref().err().map_or(&[][..], String::as_bytes);
        let reasons = group.all_gather_bytes(reason)?;
        match (reasons.iter().find(|reason| !reason.is_empty()), mine) {
            (None, Ok(read)) => {
                let (progress, header) = (read.progress, read.header.clone());
                together(group, || put(&path, read, method, optimizer))?;
                return Ok(Some(Resumed { path, progress, header, passed_over }));
            }
            (reason, _) => {
                let reason = reason.map_or(String::new(), |reason| String::from_utf8_lossy(reason).into_owned());
                if group.rank() == 0 {
                    tracing::warn!("{} is passed over: {reason}", path.display());
                }
                passed_over.push(PassedOver { path, reason });
            }
        }
    }
    together(group, || {
        Err(match passed_over.first() {
            None => TrainError::NothingToResume { path: output_dir.to_owned() },
            Some(newest) => {
                // Those of another run lie in its folder.
                let folder = newest.path.parent().unwrap_or(output_dir);
                CheckpointError::NoneGood { path: folder.to_owned(), num: passed_over.len(), newest: newest.reason.clone() }.into()
            }
        })
    })
}

/// The checkpoints that the first rank sees.
fn newest_first(disk: &dyn Disk, group: &dyn ProcessGroup, output_dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    of_first_rank(group, || Ok(checkpoint::newest_first(disk, output_dir)?))
}

/// The checkpoints that `path` names, as the first rank sees them, and whether it names all of a folder: then a damaged one is passed over.
fn named(disk: &dyn Disk, group: &dyn ProcessGroup, output_dir: &Path, path: &Path) -> Result<(Vec<PathBuf>, bool), TrainError> {
    let mut is_folder = false;
    let paths = of_first_rank(group, || {
        Ok(match checkpoint::to_resume(disk, output_dir, path)? {
            Named::Checkpoint(path) => vec![path],
            Named::OutputDir(all) => {
                is_folder = true;
                all
            }
        })
    })?;
    let flags = group.all_gather_bytes(&[u8::from(is_folder)])?;
    Ok((paths, flags.iter().any(|flag| flag.contains(&1))))
}

/// Paths that the first rank finds, on every rank.
fn of_first_rank(group: &dyn ProcessGroup, find: impl FnOnce() -> Result<Vec<PathBuf>, TrainError>) -> Result<Vec<PathBuf>, TrainError> {
    let texts = together(group, || {
        let paths = if group.rank() == 0 { find()? } else { Vec::new() };
        Ok(paths.iter().filter_map(|path| path.to_str()).collect::<Vec<_>>().join("\n"))
    })?;
    let all = group.all_gather_bytes(texts.as_bytes())?;
    let texts = all.first().map_or(String::new(), |texts| String::from_utf8_lossy(texts).into_owned());
    Ok(texts.lines().map(PathBuf::from).collect())
}

/// Whether an older checkpoint may do where this one does not.
fn is_damage(error: &CheckpointError) -> bool {
    use CheckpointError::{Damaged, Incomplete, Io, NewerFormat, OlderFormat};
    matches!(error, Damaged { .. } | Incomplete { .. } | Io { .. } | NewerFormat { .. } | OlderFormat { .. })
}

fn read<'k>(
    disk: &dyn Disk,
    group: &dyn ProcessGroup,
    path: &Path,
    identity: &Identity,
    layout: &Layout,
    optimizer: &Optimizer<'k>,
) -> Result<Read<'static>, TrainError> {
    let checkpoint = checkpoint::open(disk, path)?;
    let header = &checkpoint.manifest.header;
    let mismatches = checkpoint::compare(&checkpoint.manifest, identity);
    if !mismatches.is_empty() {
        return Err(TrainError::Mismatch { path: path.to_owned(), mismatches });
    }
    if group.rank() == 0 {
        checkpoint.check_files(disk)?;
    }
    let mut wanted = vec![(PARAMETER, 0..layout.num_elements())];
    wanted.extend(optimizer.kinds().iter().map(|kind| (*kind, optimizer.shard())));
    let mut flats = checkpoint.flats(disk, layout, &wanted)?;
    let state = flats.split_off(1);
    let progress = Progress { step: header.step, consumed_rows: header.consumed_rows };
    Ok(Read {
        progress,
        header: header.clone(),
        parameters: flats.remove(0),
        state: optimizer.kinds().iter().copied().zip(state).collect(),
    })
}

fn put(path: &Path, read: Read, method: &mut dyn PeftMethod, optimizer: &mut Optimizer) -> Result<(), TrainError> {
    let tensor = |values: Vec<f32>| {
        let len = values.len();
        Tensor::from_vec(values, len, &Device::Cpu)
    };
    let parameters = tensor(read.parameters)?;
    finite::of_checkpoint(path, &parameters, method.params().layout())?;
    method.params_mut().load_flat(&parameters)?;
    method.refresh()?;
    let state = read.state.into_iter().map(|(kind, values)| Ok((kind, tensor(values)?))).collect::<Result<_, TrainError>>()?;
    optimizer.restore(&state, read.progress.step)
}
