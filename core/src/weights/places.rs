//! Where published weights lie: downloads, and Hugging Face's cache.

use std::path::{Path, PathBuf};

use super::MODEL_FILE;
use crate::files::{index_name, is_split_name};
use crate::text::printable;
use crate::{Error, Result};

/// The index of a sharded model.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The usual name of a file of PyTorch.
const PICKLE_FILE: &str = "pytorch_model.bin";

/// Endings of PyTorch's own files.
const PICKLES: [&str; 5] = ["pth", "pt", "bin", "ckpt", "pkl"];

/// The error of a PyTorch file where weights are used as they lie.
pub(super) fn import_first(path: &Path) -> Error {
    let help = format!("`dinolab import {} --out weights`, and name that folder", printable(path));
    Error::content(path, "this is a file of PyTorch, which has to be imported first", help)
}

/// Whether a file has a name of PyTorch's.
pub(super) fn is_pickle(path: &Path) -> bool {
    path.extension().is_some_and(|ending| PICKLES.iter().any(|known| ending == *known))
}

/// The index beside a file that is one of several: `model-00001-of-00003.safetensors`.
pub(super) fn index_of(file: &Path) -> Option<PathBuf> {
    let name = file.file_name()?.to_str()?;
    let (stem, _) = name.rsplit_once("-of-")?.0.rsplit_once('-')?;
    let index = file.with_file_name(index_name(stem));
    (is_split_name(stem, name) && is_there(&index)).then_some(index)
}

/// Most entries of a folder that are looked at.
const MOST: usize = 10_000;

/// Whether there is anything at `path`, be it a link that leads nowhere.
pub(super) fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// What is wrong if there is no file at `path`.
pub(super) fn missing(path: &Path) -> Option<String> {
    match (path.exists(), std::fs::read_link(path)) {
        (true, _) => None,
        (false, Ok(to)) => Some(format!("this is a link to {}, where nothing is (any more)", printable(to))),
        (false, Err(_)) => Some("does not exist".into()),
    }
}

/// Names of the entries of a folder, sorted.
pub(super) fn entries(folder: &Path) -> Result<Vec<String>> {
    let list = std::fs::read_dir(folder).map_err(Error::io("list", folder))?.take(MOST);
    let mut names: Vec<String> = list.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// The file of published weights in a folder: the usual one, its index if it is sharded, the only safetensors file there
/// is, or that of the snapshot if the folder is a model in Hugging Face's cache.
///
/// # Errors
/// If there is none, or several.
pub(super) fn published_in(folder: &Path) -> Result<PathBuf> {
    // A whole file wins: an index beside it is a leaving of another download.
    if let Some(name) = [MODEL_FILE, INDEX_FILE].into_iter().find(|name| is_there(&folder.join(name))) {
        return Ok(folder.join(name));
    }
    if let Some(snapshot) = snapshot(folder)? {
        return published_in(&snapshot);
    }
    let names = entries(folder)?;
    let ends = |name: &&String, endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let found: Vec<&String> = names.iter().filter(|n| ends(n, &[".safetensors", ".safetensors.index.json"])).collect();
    let (problem, help): (String, String) = match found[..] {
        [only] => return Ok(folder.join(only)),
        [] => {
            let pickles: Vec<&String> = names.iter().filter(|name| is_pickle(Path::new(name))).collect();
            let usual = pickles.iter().find(|name| name.as_str() == PICKLE_FILE);
            match pickles[..] {
                [only] => return Ok(folder.join(only)),
                [] => {
                    let problem = format!("this folder has no {MODEL_FILE} and no {INDEX_FILE}");
                    (problem, "name a safetensors file, or a folder with one under that name".into())
                }
                ref several => match usual {
                    Some(usual) => return Ok(folder.join(usual)),
                    None => several_of("PyTorch", several),
                },
            }
        }
        ref several => several_of("safetensors", several),
    };
    Err(Error::content(folder, problem, help))
}

fn several_of(kind: &str, names: &[&String]) -> (String, String) {
    let list = names.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ");
    (format!("this folder has several {kind} files: {}", printable(list)), "name one of them".into())
}

/// The snapshot of a model in Hugging Face's cache (`models--<owner>--<name>`); `None` for any other folder.
///
/// # Errors
/// If there is no snapshot, or several of which none is the main one.
pub(super) fn snapshot(folder: &Path) -> Result<Option<PathBuf>> {
    let snapshots = if folder.ends_with("snapshots") { folder.to_path_buf() } else { folder.join("snapshots") };
    if !snapshots.is_dir() {
        let models: Vec<String> = entries(folder)?.into_iter().filter(|n| n.starts_with("models--")).collect();
        return match models.first() {
            Some(first) => {
                let problem = format!("this is Hugging Face's cache, with {} models", models.len());
                Err(Error::content(
                    folder,
                    problem,
                    format!("name one of them, such as {}", printable(folder.join(first))),
                ))
            }
            None => Ok(None),
        };
    }
    let versions: Vec<String> = entries(&snapshots)?.into_iter().filter(|n| snapshots.join(n).is_dir()).collect();
    let main = std::fs::read_to_string(snapshots.with_file_name("refs").join("main")).unwrap_or_default();
    let chosen = match &versions[..] {
        [only] => Some(only),
        several => several.iter().find(|version| *version == main.trim()),
    };
    let none = || {
        let problem = "this is a model in Hugging Face's cache";
        let help = match versions.first() {
            Some(first) => format!("name one of its snapshots, such as {}", printable(snapshots.join(first))),
            None => "its snapshot is gone: download the model again".into(),
        };
        Error::content(folder, problem, help)
    };
    chosen.map(|version| Some(snapshots.join(version))).ok_or_else(none)
}
