//! A run's output folder: whose it is, what was left half-done in it, and which checkpoints are kept.

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::publish::{discard, make_folder};
use super::{CheckpointError, Disk, REPLACED, TEMPORARY, TRASH, by_step, open, step_of};

/// What a run means to do with an output folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Begin; the folder must hold no run.
    Start,
    /// Go on from what is there.
    Resume,
    /// Begin, and delete the checkpoints that are there.
    Overwrite,
}

/// What a run writes besides its checkpoints.
const RUN_FILES: [&str; 3] = ["trainer_log.jsonl", "adapter", "training_args.toml"];

/// Creates the folder and takes it for a run; cleans up what an earlier run left half-done.
///
/// # Errors
/// When it holds another run and the claim is to start, or is a file, or the disk fails.
pub fn claim(disk: &dyn Disk, output_dir: &Path, claim: Claim) -> Result<(), CheckpointError> {
    make_folder(disk, output_dir).map_err(|e| CheckpointError::io("create", output_dir, 0, e))?;
    clean_leftovers(disk, output_dir)?;
    let checkpoints = by_step(disk, output_dir)?;
    match claim {
        Claim::Resume => Ok(()),
        Claim::Overwrite => checkpoints.iter().try_for_each(|(_, path)| discard(disk, path)),
        Claim::Start => {
            let entries = disk.list(output_dir).map_err(|e| CheckpointError::io("list", output_dir, 0, e))?;
            let checkpoint = checkpoints.first().map(|(_, path)| path);
            let found = checkpoint.or_else(|| entries.iter().find(|path| RUN_FILES.iter().any(|name| path.ends_with(name))));
            match found.and_then(|path| path.file_name()) {
                Some(name) => {
                    Err(CheckpointError::OutputDirTaken { path: output_dir.to_owned(), found: name.to_string_lossy().into_owned() })
                }
                None => Ok(()),
            }
        }
    }
}

/// Removes what a killed save or deletion left, and gives a checkpoint that was about to be replaced its name back where the new one
/// never got it. Returns what it removed.
///
/// # Errors
/// When the disk fails.
pub fn clean_leftovers(disk: &dyn Disk, output_dir: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut removed = Vec::new();
    for path in leftovers(disk, output_dir)? {
        if let Some(original) = original_of(&path).filter(|original| disk.list(original).is_err()) {
            disk.rename(&path, &original).map_err(|e| CheckpointError::io("rename", &path, 0, e))?;
        } else {
            disk.remove(&path).map_err(|e| CheckpointError::io("remove", &path, 0, e))?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// So many whole ones, the newest.
    pub newest: NonZeroUsize,
    /// And the one with the lowest held-out loss, of equals the first.
    pub best: bool,
    /// And those of each so many steps.
    pub every: Option<NonZeroU64>,
}

/// Why a checkpoint stays, or that it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Among the newest whole ones.
    Newest,
    /// It has the lowest held-out loss.
    Best,
    /// It is of a step that is kept for ever.
    Every,
    /// Not whole, and newer than the last that is kept.
    NotWhole,
    /// Newer than the one that is known to be good.
    Later,
    Goes,
}

/// What `keep` makes of each checkpoint, newest first, once that of `step` is durable. All stay while that one has not an undamaged manifest
/// and all lengths.
///
/// # Errors
/// When the disk fails.
pub fn fates(disk: &dyn Disk, output_dir: &Path, step: u64, keep: Keep) -> Result<Vec<(PathBuf, Fate)>, CheckpointError> {
    let (later, checkpoints): (Vec<_>, Vec<_>) = by_step(disk, output_dir)?.into_iter().partition(|(other, _)| *other > step);
    let mut fates: Vec<(PathBuf, Fate)> = later.into_iter().map(|(_, path)| (path, Fate::Later)).collect();
    let whole: BTreeMap<u64, Option<f64>> = checkpoints
        .iter()
        .filter_map(|(step, path)| Some((*step, open(disk, path).ok().filter(|checkpoint| checkpoint.has_its_lengths(disk))?)))
        .map(|(step, checkpoint)| (step, checkpoint.manifest.header.eval_loss))
        .collect();
    let may_go = whole.contains_key(&step);
    let losses = whole.iter().filter_map(|(step, loss)| Some((*step, (*loss)?)));
    let best = losses.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(step, _)| step).filter(|_| keep.best);
    let mut num_newest = 0;
    for (step, path) in checkpoints {
        let is_whole = whole.contains_key(&step);
        let fate = if num_newest < keep.newest.get() {
            num_newest += usize::from(is_whole);
            if is_whole { Fate::Newest } else { Fate::NotWhole }
        } else if Some(step) == best {
            Fate::Best
        } else if keep.every.is_some_and(|every| step.is_multiple_of(every.get())) {
            Fate::Every
        } else if may_go {
            Fate::Goes
        } else {
            Fate::NotWhole
        };
        fates.push((path, fate));
    }
    Ok(fates)
}

/// Deletes what `keep` does not name, once the checkpoint of `step` is durable; later ones, which a run left that this one has gone back
/// behind, are not touched. Nothing is deleted while this one has not an undamaged manifest and all lengths. Returns what it deleted.
///
/// # Errors
/// When the disk fails.
pub fn retention(disk: &dyn Disk, output_dir: &Path, step: u64, keep: Keep) -> Result<Vec<PathBuf>, CheckpointError> {
    if by_step(disk, output_dir)?.len() <= keep.newest.get() {
        return Ok(Vec::new());
    }
    let fates = fates(disk, output_dir, step, keep)?;
    let goes: Vec<PathBuf> = fates.into_iter().filter(|(_, fate)| *fate == Fate::Goes).map(|(path, _)| path).collect();
    goes.iter().try_for_each(|path| discard(disk, path))?;
    Ok(goes)
}

/// What a killed save or deletion left in an output folder.
///
/// # Errors
/// When the folder cannot be read.
pub fn leftovers(disk: &dyn Disk, output_dir: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let entries = disk.list(output_dir).map_err(|e| CheckpointError::io("list", output_dir, 0, e))?;
    let is_left = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        [TEMPORARY, REPLACED, TRASH].iter().any(|prefix| name.starts_with(prefix))
    };
    Ok(entries.into_iter().filter(is_left).collect())
}

/// Where the folder stood that was about to be replaced, if that is what `path` is.
fn original_of(path: &Path) -> Option<PathBuf> {
    Some(path.with_file_name(path.file_name()?.to_str()?.strip_prefix(REPLACED)?))
}

/// The checkpoints that a user names: the folder itself where it is one, else all in it, newest first.
///
/// # Errors
/// When it is no folder, or one without checkpoints.
pub fn named(disk: &dyn Disk, path: &Path) -> Result<Named, CheckpointError> {
    let entries = disk.list(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotADirectory => CheckpointError::NotAFolder { path: path.to_owned() },
        std::io::ErrorKind::NotFound => not_found(disk, path, None),
        _ => CheckpointError::io("read", path, 0, source),
    })?;
    if step_of(path).is_some() || entries.iter().any(|entry| entry.ends_with(super::MANIFEST)) {
        return Ok(Named::Checkpoint(path.to_owned()));
    }
    match super::newest_first(disk, path)? {
        none if none.is_empty() && leftovers(disk, path)?.is_empty() => Err(CheckpointError::NoCheckpoints { path: path.to_owned() }),
        all => Ok(Named::OutputDir(all)),
    }
}

/// As [`named`], of a checkpoint that a run in `output_dir` is to go on from: a path from where the user is, or else from `output_dir`.
///
/// # Errors
/// As [`named`]; one that is nowhere says which there are.
pub fn to_resume(disk: &dyn Disk, output_dir: &Path, path: &Path) -> Result<Named, CheckpointError> {
    let is_there = |path: &Path| !matches!(disk.list(path), Err(error) if error.kind() == std::io::ErrorKind::NotFound);
    let inside = output_dir.join(path);
    match [path, &inside].into_iter().find(|path| is_there(path)) {
        Some(path) => named(disk, path),
        None => Err(not_found(disk, path, Some(output_dir))),
    }
}

/// The error that names the checkpoints beside `path`, or else those of `output_dir`.
fn not_found(disk: &dyn Disk, path: &Path, output_dir: Option<&Path>) -> CheckpointError {
    let beside = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let names = |folder: &Path| -> Vec<String> {
        let all = super::newest_first(disk, folder).unwrap_or_default();
        all.iter().rev().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect()
    };
    let found = [beside, output_dir].into_iter().flatten().map(|folder| (folder.to_owned(), names(folder)));
    let (folder, there) = found.into_iter().find(|(_, there)| !there.is_empty()).unwrap_or_default();
    CheckpointError::NotFound { path: path.to_owned(), folder, there }
}

/// What a user's path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    Checkpoint(PathBuf),
    /// All checkpoints in it, newest first.
    OutputDir(Vec<PathBuf>),
}

#[cfg(test)]
mod tests {
    use super::super::testing::{header, save_parts, save_step};
    use super::super::{MANIFEST, RealDisk};
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        RealDisk.list(dir).unwrap().iter().map(|p| p.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn folder_of_another_run_is_refused_unless_resumed_or_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out");
        claim(&RealDisk, &dir, Claim::Start).unwrap();
        std::fs::write(dir.join("notes.txt"), b"mine").unwrap();
        claim(&RealDisk, &dir, Claim::Start).unwrap();
        save_step(&RealDisk, &dir, 5).unwrap();
        let error = claim(&RealDisk, &dir, Claim::Start).unwrap_err();
        assert!(error.to_string().ends_with("out holds another run: found checkpoint-5"), "{error}");
        assert!(error.hint().is_some());
        claim(&RealDisk, &dir, Claim::Resume).unwrap();
        assert_eq!(names(&dir), ["checkpoint-5", "notes.txt"]);
        claim(&RealDisk, &dir, Claim::Overwrite).unwrap();
        assert_eq!(names(&dir), ["notes.txt"]);
        std::fs::write(dir.join("trainer_log.jsonl"), b"").unwrap();
        assert!(claim(&RealDisk, &dir, Claim::Start).is_err());
        let file = root.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert!(claim(&RealDisk, &file, Claim::Start).is_err());
    }

    #[test]
    fn leftovers_are_removed_and_a_replaced_checkpoint_gets_its_name_back() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".tmp-checkpoint-3/state", ".trash-checkpoint-1/x", ".replaced-checkpoint-2/x"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
        assert_eq!(clean_leftovers(&RealDisk, dir.path()).unwrap().len(), 2);
        assert_eq!(names(dir.path()), ["checkpoint-2"]);
    }

    const TWO: Keep = Keep { newest: NonZeroUsize::new(2).unwrap(), best: false, every: None };

    #[test]
    fn retention_keeps_the_newest_whole_ones_and_does_not_touch_later_ones() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2, 10, 20, 30, 40] {
            save_step(&RealDisk, dir.path(), step).unwrap();
        }
        std::fs::remove_file(dir.path().join("checkpoint-20").join(MANIFEST)).unwrap();
        let deleted = retention(&RealDisk, dir.path(), 30, TWO).unwrap();
        assert_eq!(deleted.len(), 2);
        assert_eq!(names(dir.path()), ["checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-40"]);
        let all = Keep { newest: NonZeroUsize::MAX, ..TWO };
        assert_eq!(retention(&RealDisk, dir.path(), 40, all).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn retention_deletes_nothing_while_the_newest_is_not_whole() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2, 3, 4] {
            save_step(&RealDisk, dir.path(), step).unwrap();
        }
        let shard = dir.path().join("checkpoint-4/state-00000-of-00003.safetensors.zst");
        let whole = std::fs::read(&shard).unwrap();
        std::fs::write(&shard, &whole[1..]).unwrap();
        assert_eq!(retention(&RealDisk, dir.path(), 4, TWO).unwrap(), Vec::<PathBuf>::new());
        std::fs::write(&shard, &whole).unwrap();
        assert_eq!(retention(&RealDisk, dir.path(), 4, TWO).unwrap().len(), 2);
    }

    #[test]
    fn retention_keeps_the_best_and_every_so_many_steps() {
        let kept = |keep: Keep| {
            let dir = tempfile::tempdir().unwrap();
            for (step, loss) in [(5, Some(2.0)), (10, Some(1.0)), (15, Some(0.5)), (20, Some(0.5)), (25, None), (30, Some(3.0)), (35, None)]
            {
                let header = super::super::Header { eval_loss: loss, ..header(step) };
                save_parts(&RealDisk, dir.path(), &header, &[0..9, 9..18]).unwrap();
            }
            retention(&RealDisk, dir.path(), 35, keep).unwrap();
            let steps = super::super::newest_first(&RealDisk, dir.path()).unwrap();
            steps.iter().rev().map(|path| step_of(path).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(kept(TWO), [30, 35]);
        assert_eq!(kept(Keep { best: true, ..TWO }), [15, 30, 35]);
        assert_eq!(kept(Keep { every: NonZeroU64::new(10), ..TWO }), [10, 20, 30, 35]);
    }
}
