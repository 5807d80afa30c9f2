//! Reading a checkpoint, once it is found to be what was written.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::list::{list, step_of};
use super::{Set, State, FORMAT, RECIPE_FILE, SEAL, STATE_FILE};
use crate::files::{hash_file, hash_of_hashes, index_name, is_split_name, split_name, TensorFiles};
use crate::{Error, Result};

/// A whole checkpoint, whose tensors are read when they are asked for.
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps whose update was skipped because something was not finite.
    pub skipped: u64,
    /// Weights by role and name.
    pub model: TensorFiles,
    /// Moments and the losses' state.
    pub optimizer: TensorFiles,
}

impl Checkpoint {
    /// Updates done: steps that were not skipped.
    pub(crate) fn updates(&self) -> u64 {
        self.step - self.skipped
    }
}

/// Opens one checkpoint folder, if it is what was written.
///
/// # Errors
/// If a file is missing, cut off or changed, or written by a newer version.
pub fn load(path: &Path) -> Result<Checkpoint> {
    Set::ALL.into_iter().try_for_each(|set| verify(path, set).map(drop))?;
    open(path)
}

/// The same of one that another process found to be what was written.
///
/// # Errors
/// If a file is missing or cut off, or written by a newer version.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    let state = read_state(path)?;
    let (model, optimizer) = (files(path, &state, Set::Model)?, files(path, &state, Set::Optimizer)?);
    Ok(Checkpoint { path: path.into(), step: state.step, skipped: state.skipped, model, optimizer })
}

/// The weights of a checkpoint by role, whether or not they are what was written.
///
/// # Errors
/// If a file is missing or cut off.
pub(crate) fn model(path: &Path) -> Result<TensorFiles> {
    files(path, &read_state(path)?, Set::Model)
}

/// Bytes of the files with the weights of a checkpoint.
///
/// # Errors
/// If one is missing.
pub fn model_bytes(path: &Path) -> Result<u64> {
    let bytes = |name: &String| {
        let file = path.join(name);
        file.metadata().map(|file| file.len()).map_err(Error::io("read", file))
    };
    names(path, &read_state(path)?, Set::Model)?.iter().map(bytes).sum()
}

/// Of which set of a checkpoint a file of this name has tensors.
pub(crate) fn set_of(name: &str) -> Option<Set> {
    Set::ALL.into_iter().find(|set| is_split_name(set.stem(), name))
}

/// The names of the files of a set.
fn names(path: &Path, state: &State, set: Set) -> Result<Vec<String>> {
    let names: Vec<String> = state.files.keys().filter(|name| is_split_name(set.stem(), name)).cloned().collect();
    let all: Vec<String> = (0..names.len().max(1)).map(|i| split_name(set.stem(), i, names.len().max(1))).collect();
    match names == all {
        true => Ok(names),
        false => Err(changed(&path.join(if names.is_empty() { &all[0] } else { STATE_FILE }))),
    }
}

/// Finds that the files of a set are what was written; gives their hash.
///
/// # Errors
/// As [`load`].
pub(crate) fn verify(path: &Path, set: Set) -> Result<String> {
    let state = read_state(path)?;
    let names = names(path, &state, set)?;
    let index = Some(index_name(set.stem())).filter(|_| names.len() > 1);
    let of_file = |name: &String| {
        let file = path.join(name);
        let hash = hash_file(&file)?;
        if state.files.get(name) == Some(&hash) {
            Ok(hash)
        } else {
            Err(changed(&file))
        }
    };
    let hashes: Vec<String> = names.par_iter().map(of_file).collect::<Result<_>>()?;
    index.iter().try_for_each(|name| of_file(name).map(drop))?;
    Ok(hash_of_hashes(&hashes))
}

/// The tensors of a set, of the same step.
fn files(path: &Path, state: &State, set: Set) -> Result<TensorFiles> {
    let names = names(path, state, set)?;
    let mut files = TensorFiles::none_of(path);
    let broken = |error| match error {
        Error::Content { path, problem, .. } => Error::content(path, problem, AGAIN),
        other => other,
    };
    names.iter().try_for_each(|name| files.add(&path.join(name)).map_err(broken))?;
    // `state.json` has no hash of its own: what it counts is in the files as well.
    let (key, says) = set.metadata(state.step, state.skipped);
    for (name, metadata) in names.iter().zip(files.metadata()) {
        if let Some(written) = metadata.get(key).filter(|written| **written != says) {
            let problem = format!("{key} is {says} here, {written} in {name}: it was changed");
            return Err(Error::content(path.join(STATE_FILE), problem, AGAIN));
        }
    }
    Ok(files)
}

/// What to do about a broken checkpoint.
const AGAIN: &str = "use an older checkpoint of the run, or start it anew";

fn changed(file: &Path) -> Error {
    Error::content(file, "not what was written (its hash differs: cut off or changed)", AGAIN)
}

fn read_state(path: &Path) -> Result<State> {
    let state_path = path.join(STATE_FILE);
    let text = fs::read_to_string(&state_path).map_err(Error::io("read", &state_path))?;
    // The format first: a newer one may have other keys.
    let wrong = |e: serde_json::Error| Error::content(&state_path, e.to_string(), AGAIN);
    let value: serde_json::Value = serde_json::from_str(&text).map_err(wrong)?;
    if value["format"].as_u64().is_some_and(|format| format > FORMAT.into()) {
        let (by, format) = (value["dinolab"].as_str().unwrap_or("of another version"), &value["format"]);
        let problem = format!("written by dinolab {by} in format {format}, this is format {FORMAT}");
        return Err(Error::content(&state_path, problem, "use that version or a newer one"));
    }
    let state: State = serde_json::from_value(value).map_err(wrong)?;
    if state.format != FORMAT {
        return Err(Error::content(&state_path, format!("there is no format {}", state.format), AGAIN));
    }
    Ok(state)
}

/// The newest whole checkpoint of a run, with the errors of newer ones that were passed over; `None` if there is none.
///
/// # Errors
/// If there are checkpoints but none is whole.
pub fn load_newest(run: &Path) -> Result<Option<(Checkpoint, Vec<Error>)>> {
    load_newest_before(run, u64::MAX)
}

/// As [`load_newest`], of fewer than `step` steps.
///
/// # Errors
/// As [`load_newest`].
pub fn load_newest_before(run: &Path, step: u64) -> Result<Option<(Checkpoint, Vec<Error>)>> {
    let mut passed = Vec::new();
    let earlier = |path: &PathBuf| step_of(path).is_some_and(|(s, _)| s < step);
    for path in list(run)?.into_iter().rev().filter(earlier) {
        match load(&path) {
            Ok(checkpoint) => return Ok(Some((checkpoint, passed))),
            Err(error) => passed.push(error),
        }
    }
    match passed.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(None),
    }
}

/// The recipe in a checkpoint, found to be what was written; `None` in checkpoints of versions that wrote none.
///
/// # Errors
/// If it was changed.
pub(crate) fn recipe_file(checkpoint: &Path) -> Result<Option<PathBuf>> {
    let file = checkpoint.join(RECIPE_FILE);
    if !file.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    // One without a seal was put there by somebody.
    match text.strip_prefix(SEAL).and_then(|sealed| sealed.split_once('\n')) {
        Some((hash, rest)) if hash != blake3::hash(rest.as_bytes()).to_hex().as_str() => Err(changed(&file)),
        _ => Ok(Some(file)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{content, save, Keep};
    use super::*;

    #[test]
    fn a_cut_or_changed_file_is_named_and_the_one_before_is_used() {
        let run = tempfile::tempdir().unwrap();
        save(run.path(), &content(1), Keep::newest(3)).unwrap();
        let second = save(run.path(), &content(2), Keep::newest(3)).unwrap();
        let file = second.folder.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        let (checkpoint, passed) = load_newest(run.path()).unwrap().unwrap();
        assert_eq!(checkpoint.step, 1);
        assert!(passed[0].to_string().contains("model.safetensors"), "{}", passed[0]);

        let third = save(run.path(), &content(3), Keep::newest(3)).unwrap();
        let file = third.folder.join("optimizer.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        assert!(load(&third.folder).err().unwrap().to_string().contains("optimizer.safetensors"));
    }
}
