//! Locks of a suite's folder: who runs what, and who writes.

use std::fs::File;
use std::path::{Path, PathBuf};

use dinolab_core::{Error, Result};
use fs4::{FileExt, TryLockError};

use super::plan::{Plan, PlannedRun};

/// Locks live beside the runs, so that a run's folder holds nothing but the run.
pub(super) fn locks(plan: &Plan) -> Result<PathBuf> {
    let folder = plan.out.join("locks");
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    Ok(folder)
}

pub(super) fn lock_path(plan: &Plan, run: &PlannedRun) -> Result<PathBuf> {
    Ok(locks(plan)?.join(format!("{}-seed-{}.lock", run.arm, run.seed)))
}

/// The lock under which the files of the suite's folder are written.
///
/// # Errors
/// If it cannot be taken.
pub fn lock_folder(plan: &Plan) -> Result<File> {
    lock(&plan.out.join("suite.lock"))
}

/// The lock, held until the file is dropped; the operating system frees it when a process dies.
pub(super) fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    FileExt::lock(&file).map_err(Error::io("lock", path))?;
    Ok(file)
}

/// As [`lock`], but `None` if somebody holds it.
pub(super) fn try_lock(path: &Path) -> Result<Option<File>> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    match FileExt::try_lock(&file) {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", path)(e)),
    }
}
