//! Files and folders that are whole or not there.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::{Error, Result};

/// What the names of half-written folders begin with.
pub(crate) const BUILDING: &str = ".building-";
/// Starts the name of a file that is being written; it is renamed when it is whole.
const WRITING: &str = ".writing-";

/// Makes temporary files and folders with the permissions of ordinary ones (less the umask), as they are renamed later.
pub(super) fn shared(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(WRITING);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    builder
}

/// A new folder in `parent`, to be renamed when it is whole: removed when it is dropped before that.
pub(crate) fn new_folder(parent: &Path) -> Result<tempfile::TempDir> {
    shared(0o777).prefix(BUILDING).tempdir_in(parent).map_err(Error::io("create a folder in", parent))
}

/// Writes a file so that a reader sees the old content or the new, never a part.
///
/// # Errors
/// If it cannot be written.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = shared(0o666).tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(Error::io("write", path))
}

/// Removes the files that a process was writing in `folder` when it was killed. Only for who holds the folder's lock, under
/// which all of its files are written.
///
/// # Errors
/// If the folder cannot be read, or a file not removed.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if entry.file_name().to_string_lossy().starts_with(WRITING) {
            fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
        }
    }
    Ok(())
}

pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|d| d.sync_all()).map_err(Error::io("flush", path))
}

/// The BLAKE3 hash of a file, in hex.
///
/// # Errors
/// If it cannot be read.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    hasher.update_reader(file).map_err(Error::io("read", path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// The hash of one file, or of the hashes of several.
///
/// # Errors
/// If one cannot be read.
pub(crate) fn hash_files(paths: &[PathBuf]) -> Result<String> {
    let hashes: Vec<String> = paths.par_iter().map(|path| hash_file(path)).collect::<Result<_>>()?;
    Ok(hash_of_hashes(&hashes))
}

/// The hash of one, or that of several.
pub(crate) fn hash_of_hashes(hashes: &[String]) -> String {
    match hashes {
        [one] => one.clone(),
        several => blake3::hash(several.concat().as_bytes()).to_hex().to_string(),
    }
}
