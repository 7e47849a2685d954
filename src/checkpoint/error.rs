//! What can go wrong with a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use super::Mismatch;
use crate::formats::FormatError;
use crate::paths::{Kind, NotThere};

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the disk is full: {} needs {needed_bytes} bytes, and {}", path.display(), room(*needed_bytes, *free_bytes))]
    DiskFull { path: PathBuf, needed_bytes: u64, free_bytes: Option<u64> },
    #[error("{} is not a complete checkpoint: {reason}", path.display())]
    Incomplete { path: PathBuf, reason: String },
    #[error("checkpoint {} is damaged: {what}: expected {expected}, found {found}", path.display())]
    Damaged { path: PathBuf, what: String, expected: String, found: String },
    #[error("checkpoint {} has format version {found}, and this program reads up to {supported}", path.display())]
    NewerFormat { path: PathBuf, found: u64, supported: u32 },
    #[error("checkpoint {} has format version {found}, saved by an older glmddp, and this program reads version {supported}", path.display())]
    OlderFormat { path: PathBuf, found: u64, supported: u32 },
    #[error("checkpoint {} holds another state than this run has: tensor `{name}`: expected {expected}, found {found}", path.display())]
    OtherTensors { path: PathBuf, name: String, expected: String, found: String },
    #[error("rank {rank} has written {}, and rank 0 finds {found} there", path.display())]
    Unseen { path: PathBuf, rank: usize, found: String },
    #[error("none of the {num} checkpoints in {} is whole; the newest: {newest}", path.display())]
    NoneGood { path: PathBuf, num: usize, newest: String },
    #[error("checkpoint {} is of another run: {}", path.display(), mismatches.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Mismatch { path: PathBuf, mismatches: Vec<Mismatch> },
    #[error("{} holds another run: found {found}", path.display())]
    OutputDirTaken { path: PathBuf, found: String },
    #[error("no such folder: {}{}", path.display(), and_there(folder, there))]
    NotFound {
        path: PathBuf,
        /// Where checkpoints could be.
        folder: PathBuf,
        /// Names of the checkpoints there, oldest first.
        there: Vec<String>,
    },
    #[error("{} is a file, expected the folder of a checkpoint or of a run", path.display())]
    NotAFolder { path: PathBuf },
    #[error("{} is a checkpoint, expected the output_dir of a run", path.display())]
    NotAnOutputDir { path: PathBuf },
    #[error("{} holds no checkpoint", path.display())]
    NoCheckpoints { path: PathBuf },
    #[error("`{path}` is not a relative path inside a checkpoint")]
    BadPath { path: String },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// What there is where so much is needed.
fn room(needed_bytes: u64, free_bytes: Option<u64>) -> String {
    match free_bytes {
        None => "too few are free".to_owned(),
        Some(free) if free < needed_bytes => format!("{free} are free"),
        Some(free) => format!("it takes no more, though {free} are free: a quota, or the number of files, is used up"),
    }
}

fn and_there(folder: &Path, there: &[String]) -> String {
    if there.is_empty() { String::new() } else { format!("; {} has {}", folder.display(), there.join(", ")) }
}

impl CheckpointError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::DiskFull { .. } => {
                "make room, then go on with `--resume_from_checkpoint latest` (a comparison: with the same command); earlier checkpoints are untouched".to_owned()
            }
            Self::Incomplete { .. } | Self::Damaged { .. } => {
                "use an earlier checkpoint; `glmddp train` with `--resume_from_checkpoint latest` finds the newest whole one".to_owned()
            }
            Self::NewerFormat { .. } => "use the version of glmddp that wrote it, or a newer one".to_owned(),
            Self::OlderFormat { .. } => "go on with the version of glmddp that saved it, or start anew in another `output_dir`".to_owned(),
            Self::OtherTensors { .. } => "resume with the settings of the checkpoint, or start anew in another `output_dir`".to_owned(),
            Self::Unseen { .. } => "name an `output_dir` on a file system that all machines of the job share".to_owned(),
            Self::NoneGood { .. } => "start anew in another `output_dir`, or restore a checkpoint from a backup".to_owned(),
            Self::Mismatch { .. } => "use the model, tokenizer and method settings that the checkpoint was made with, or start anew in another `output_dir`".to_owned(),
            Self::OutputDirTaken { .. } => {
                "name another `output_dir`, go on with `--resume_from_checkpoint latest`, or give `--overwrite_output_dir` to delete what is there".to_owned()
            }
            Self::NotFound { path, there, .. } if there.is_empty() => {
                let not_there = NotThere { path: path.clone(), expected: Kind::Folder };
                not_there.hint_and("give OUTPUT_DIR/checkpoint-N, or the OUTPUT_DIR of a run")
            }
            Self::NotFound { folder, there, .. } => {
                let newest = there.last().map(|name| folder.join(name)).unwrap_or_default();
                format!("give `{}`, the newest, or another of them", newest.display())
            }
            Self::NotAFolder { .. } | Self::NoCheckpoints { .. } => {
                "give OUTPUT_DIR/checkpoint-N, or the OUTPUT_DIR of a run for all in it".to_owned()
            }
            Self::NotAnOutputDir { .. } => "give the folder above it".to_owned(),
            Self::Io { action, .. } if *action != "read" => "what was saved before is untouched; check the folder's permissions and the disk".to_owned(),
            Self::Format(error) => return error.hint(),
            Self::Io { .. } | Self::BadPath { .. } | Self::Tensor(_) => return None,
        })
    }

    /// An error of the disk; a full one gets its own kind.
    pub(super) fn io(action: &'static str, path: &Path, needed_bytes: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned(), needed_bytes, free_bytes: None }
            }
            _ => Self::Io { action, path: path.to_owned(), source },
        }
    }
}
