//! Writing a folder so that it is complete or invisible.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use super::{CheckpointError, Disk, REPLACED, TEMPORARY, TRASH, beside, is_inside};

/// Room beyond the files' own bytes that saving asks for (folders, block rounding).
pub(super) const SLACK_BYTES: u64 = 1 << 16;

/// Writes a whole folder: into a temporary one beside it, each file made durable in the order given, then renamed. A folder that was
/// there before keeps its name until then, and is deleted last.
///
/// # Errors
/// When the disk is full or fails: what was there before is untouched, and what was begun is removed as far as the disk allows.
pub fn publish<N: AsRef<str>, B: AsRef<[u8]>>(disk: &dyn Disk, path: &Path, files: &[(N, B)]) -> Result<(), CheckpointError> {
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_ref(), bytes.as_ref())).collect();
    if let Some((bad, _)) = files.iter().find(|(name, _)| !is_inside(name)) {
        return Err(CheckpointError::BadPath { path: (*bad).to_owned() });
    }
    let temporary = beside(path, TEMPORARY);
    let needed = files.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>() + SLACK_BYTES;
    let write = || {
        start_folder(disk, path, &temporary, needed)?;
        files.iter().try_for_each(|(name, bytes)| put(disk, &temporary, name, bytes))?;
        sync_folders(disk, &temporary, files.iter().map(|(name, _)| *name))?;
        replace(disk, &temporary, path)
    };
    let result = write();
    if result.is_err() {
        // Gives the room back; should this fail too, the next start cleans up.
        _ = disk.remove(&temporary);
    }
    result.map_err(|error| match error {
        CheckpointError::DiskFull { .. } => {
            CheckpointError::DiskFull { path: path.to_owned(), needed_bytes: needed, free_bytes: disk.free_bytes(parent_of(path)).ok() }
        }
        other => other,
    })
}

/// Writes one file so that at any time the old content or the new one stands under its name, whole.
///
/// # Errors
/// When the disk is full or fails; the old content stays.
pub fn publish_file(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let temporary = beside(path, TEMPORARY);
    let write = || {
        let mut file = disk.create(&temporary)?;
        file.write_all(bytes)?;
        file.flush()?;
        file.sync()?;
        disk.rename(&temporary, path)?;
        disk.sync_dir(parent_of(path))
    };
    write().map_err(|e| CheckpointError::io("write", path, bytes.len() as u64, e))
}

pub(super) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a folder and those above it that are missing, with durable names: what is synced in a folder is lost with the folder's name.
pub(super) fn make_folder(disk: &dyn Disk, path: &Path) -> std::io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|at| !at.as_os_str().is_empty() && disk.list(at).is_err()).collect();
    missing.into_iter().rev().try_for_each(|at| disk.create_dir(at).and_then(|()| disk.sync_dir(parent_of(at))))
}

/// Makes an empty folder `temporary` beside `path`, where there is room for `needed_bytes`.
pub(super) fn start_folder(disk: &dyn Disk, path: &Path, temporary: &Path, needed_bytes: u64) -> Result<(), CheckpointError> {
    let wrap = |action, at: &Path, source| CheckpointError::io(action, at, needed_bytes, source);
    let parent = parent_of(path);
    make_folder(disk, parent).map_err(|e| wrap("create", parent, e))?;
    if let Ok(free) = disk.free_bytes(parent)
        && free < needed_bytes
    {
        return Err(CheckpointError::DiskFull { path: path.to_owned(), needed_bytes, free_bytes: Some(free) });
    }
    match disk.remove(temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(wrap("remove", temporary, e)),
        _ => disk.create_dir(temporary).map_err(|e| wrap("create", temporary, e)),
    }
}

/// Writes one file below `folder`, which is there, and makes its content durable.
pub(super) fn put(disk: &dyn Disk, folder: &Path, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
    let at = folder.join(name);
    let wrap = |action| {
        let at = &at;
        move |source| CheckpointError::io(action, at, bytes.len() as u64, source)
    };
    if let Some(parent) = at.parent().filter(|parent| *parent != folder && !disk.is_folder(parent)) {
        disk.create_dir(parent).map_err(wrap("create"))?;
    }
    let mut file = disk.create(&at).map_err(wrap("create"))?;
    file.write_all(bytes).and_then(|()| file.flush()).map_err(wrap("write"))?;
    file.sync().map_err(wrap("make durable"))
}

/// Makes the names in `folder` durable, and those in the folders of the files `names` below it.
pub(super) fn sync_folders<'a>(disk: &dyn Disk, folder: &Path, names: impl Iterator<Item = &'a str>) -> Result<(), CheckpointError> {
    let mut folders = BTreeSet::from([folder.to_owned()]);
    for name in names {
        folders.extend(folder.join(name).ancestors().skip(1).take_while(|above| *above != folder).map(Path::to_owned));
    }
    let sync = |folder: &std::path::PathBuf| disk.sync_dir(folder).map_err(|e| CheckpointError::io("make durable", folder, 0, e));
    folders.iter().rev().try_for_each(sync)
}

/// Gives a durable temporary folder its name.
pub(super) fn replace(disk: &dyn Disk, temporary: &Path, path: &Path) -> Result<(), CheckpointError> {
    let wrap = |action| move |source| CheckpointError::io(action, path, 0, source);
    let old = beside(path, REPLACED);
    // Whatever it is: a file, or a link that leads nowhere, would keep a folder from this name.
    let is_it = |at: &std::path::PathBuf| at.file_name() == path.file_name();
    let had_old = disk.list(parent_of(path)).map_err(wrap("list"))?.iter().any(is_it);
    if had_old {
        disk.rename(path, &old).map_err(wrap("rename"))?;
    }
    if let Err(error) = disk.rename(temporary, path) {
        if had_old {
            // Should this fail too, the next start gives the old folder its name back.
            _ = disk.rename(&old, path);
        }
        return Err(wrap("rename")(error));
    }
    disk.sync_dir(parent_of(path)).map_err(wrap("make durable"))?;
    if let Some(error) = had_old.then(|| discard(disk, &old).err()).flatten() {
        // The new one is durable; what is left does no harm, and the next start removes it.
        tracing::warn!("{} is complete, but what it replaced is left: {error}", path.display());
    }
    Ok(())
}

/// Deletes a folder; at no time does a part of it bear its name.
pub(super) fn discard(disk: &dyn Disk, path: &Path) -> Result<(), CheckpointError> {
    let trash = beside(path, TRASH);
    disk.rename(path, &trash).and_then(|()| disk.remove(&trash)).map_err(|e| CheckpointError::io("remove", path, 0, e))
}

#[cfg(test)]
mod tests {
    use super::super::RealDisk;
    use super::*;

    #[test]
    fn file_outside_the_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x", "/x", "", "a/../../x", "./x", "a//x", "a/", "a/./x"] {
            let result = publish(&RealDisk, &dir.path().join("out"), &[(name, b"")]);
            assert!(matches!(result, Err(CheckpointError::BadPath { .. })), "{name}");
        }
    }
}
