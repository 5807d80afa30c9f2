//! Checkpoints: a folder of safetensors files that is either whole or not there.
//!
//! ```text
//! checkpoints/step-00000300/
//!   model.safetensors      student.<name>, teacher.<name>, <teacher>_teacher.<name>: opens in any tool
//!   optimizer.safetensors  <moment>.<name>, such as exp_avg.<name>, and state.<loss>.<name>
//!   recipe.toml            the run's recipe, so that a checkpoint that is copied elsewhere says what model it is of
//!   state.json             step, and the BLAKE3 hash of each file
//! ```
//!
//! Tensors that are too many for one file are split as Hugging Face splits them: `model-00001-of-00003.safetensors` and so on, with
//! `model.safetensors.index.json`. What is in which file depends on the model alone. Of several ranks each writes some of them.
//!
//! Everything is written to a temporary folder, flushed to the disk and renamed, so that a kill at any moment leaves
//! the old checkpoints, or those and a whole new one. A file whose hash does not fit is refused by name.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::files::{
    hash_file, hash_of_hashes, index_name, is_split_name, new_folder, split, split_name, sync_dir, write_file,
    write_index, write_tensors, TensorFiles, BUILDING,
};
use crate::recipe::CheckpointConfig;
use crate::{Error, Result, Tensor};

/// The version of the format written here.
const FORMAT: u32 = 1;
/// The folder of checkpoints inside a run folder.
pub const FOLDER: &str = "checkpoints";
/// Weights, in a checkpoint and elsewhere.
pub const MODEL_FILE: &str = "model.safetensors";
/// The file that makes a folder a checkpoint.
pub const STATE_FILE: &str = "state.json";
/// The recipe of a run, in its folder and in its checkpoints.
pub const RECIPE_FILE: &str = "recipe.toml";

/// What [`STATE_FILE`] says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    format: u32,
    dinolab: String,
    step: u64,
    skipped: u64,
    /// BLAKE3 of every other file.
    files: BTreeMap<String, String>,
}

/// Tensors of a checkpoint that are in files of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Weights by role and name.
    Model,
    /// The rest of what a run needs to go on: moments and the losses' state.
    Optimizer,
}

impl Set {
    const ALL: [Self; 2] = [Self::Model, Self::Optimizer];

    /// What the names of its files begin with.
    fn stem(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Optimizer => "optimizer",
        }
    }

    /// One key a file: the library writes several in any order, and a checkpoint's bytes are those of any run like it.
    fn metadata(self, step: u64, skipped: u64) -> (&'static str, String) {
        match self {
            Self::Model => ("step", step.to_string()),
            Self::Optimizer => ("skipped", skipped.to_string()),
        }
    }
}

/// What gives the tensors of a checkpoint, some at a time.
pub trait Give {
    /// Steps done, and how many of them were skipped because something was not finite.
    fn steps(&self) -> (u64, u64);

    /// Bytes of the tensors of a set, in order. Those of none are given by rank 0.
    fn bytes(&self, set: Set) -> Vec<u64>;

    /// Tensors of a set by their places, in host memory, if this rank keeps them. Of several ranks all have to ask for the same.
    ///
    /// # Errors
    /// If the device or a rank fails.
    fn tensors(&self, set: Set, places: Range<usize>, keep: bool) -> Result<Vec<(String, Tensor)>>;
}

/// What a checkpoint holds, in host memory.
pub struct Content {
    /// Steps done.
    pub step: u64,
    /// Steps whose update was skipped because something was not finite.
    pub skipped: u64,
    /// Weights by role and name.
    pub model: Vec<(String, Tensor)>,
    /// Moments and the losses' state.
    pub optimizer: Vec<(String, Tensor)>,
}

impl Content {
    fn of(&self, set: Set) -> &[(String, Tensor)] {
        match set {
            Set::Model => &self.model,
            Set::Optimizer => &self.optimizer,
        }
    }
}

impl Give for Content {
    fn steps(&self) -> (u64, u64) {
        (self.step, self.skipped)
    }

    fn bytes(&self, set: Set) -> Vec<u64> {
        self.of(set).iter().map(|(_, tensor)| tensor.as_bytes().len() as u64).collect()
    }

    fn tensors(&self, set: Set, places: Range<usize>, _keep: bool) -> Result<Vec<(String, Tensor)>> {
        Ok(self.of(set)[places].to_vec())
    }
}

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

fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step in the name of a checkpoint's folder, and whether the folder is in its place: not about to be replaced.
fn step_of(path: &Path) -> Option<(u64, bool)> {
    let name = path.file_name()?.to_str()?.strip_prefix("step-")?;
    let (number, in_place) = name.strip_suffix(REPLACED).map_or((name, true), |number| (number, false));
    let step = number.parse().ok()?;
    // Other names are somebody else's.
    (format!("{step:08}") == number).then_some((step, in_place))
}

/// Which checkpoints of a run are kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// So many of the newest, at least one.
    pub newest: usize,
    /// And those of steps that are multiples of this; 0: no others.
    pub every: u64,
    /// Not that of this step, whose place the new one takes.
    pub replaced: Option<u64>,
}

impl Keep {
    /// The newest alone.
    pub fn newest(newest: usize) -> Self {
        Self { newest, every: 0, replaced: None }
    }
}

/// Writes a checkpoint into `run`; gives its folder. Then removes earlier ones that are not to be kept, and those of later
/// steps: the run will do these steps again.
///
/// # Errors
/// If it cannot be written; earlier checkpoints stay as they are.
pub fn save(run: &Path, from: &dyn Give, keep: Keep) -> Result<PathBuf> {
    let saving = Saving::begin(run)?;
    let written = write(saving.folder(), from, CheckpointConfig::default().file_bytes(), (0, 1))??;
    saving.finish(from.steps(), written, keep)
}

/// Whether a set of these tensors is in several files of at most `most` bytes.
pub(crate) fn is_split(from: &dyn Give, most: u64) -> bool {
    Set::ALL.iter().any(|set| split(&from.bytes(*set), most).len() > 1)
}

/// A checkpoint that is being written.
pub struct Saving {
    run: PathBuf,
    building: TempDir,
}

/// A file of a checkpoint that was written.
#[derive(Debug, Serialize, Deserialize)]
pub struct Written {
    name: String,
    hash: String,
    bytes: u64,
    tensors: Vec<String>,
}

/// Writes the files of one rank, given with the number of ranks, into `folder`: of a set that is in one file, rank 0's. Every rank has
/// to write its own at the same time, whatever happens to its disk: such an error is inside.
///
/// # Errors
/// If tensors cannot be given.
pub fn write(folder: &Path, from: &dyn Give, most: u64, (rank, world): (usize, usize)) -> Result<Result<Vec<Written>>> {
    let (step, skipped) = from.steps();
    let mut done: Result<Vec<Written>> = Ok(Vec::new());
    for set in Set::ALL {
        let files = split(&from.bytes(set), most);
        // The last has what rank 0 alone has.
        let owner = |i: usize| (files.len() - 1 - i) % world;
        // As many at a time as there are ranks: all write at once.
        for begin in (0..files.len()).step_by(world) {
            let mut own = None;
            for i in begin..files.len().min(begin + world) {
                let keep = owner(i) == rank && done.is_ok();
                let tensors = from.tensors(set, files[i].clone(), keep)?;
                if keep {
                    own = Some((split_name(set.stem(), i, files.len()), tensors));
                }
            }
            if let (Some((name, tensors)), Ok(written)) = (own, &mut done) {
                match write_one(folder, name, &tensors, set.metadata(step, skipped)) {
                    Ok(file) => written.push(file),
                    Err(error) => done = Err(error),
                }
            }
        }
    }
    Ok(done)
}

fn write_one(folder: &Path, name: String, tensors: &[(String, Tensor)], metadata: (&str, String)) -> Result<Written> {
    let path = folder.join(&name);
    write_tensors(&path, tensors, &[metadata])?;
    let bytes = tensors.iter().map(|(_, tensor)| tensor.as_bytes().len() as u64).sum();
    let hash = hash_file(&path)?;
    Ok(Written { name, hash, bytes, tensors: tensors.iter().map(|(name, _)| name.clone()).collect() })
}

impl Saving {
    /// Makes a folder for the files of a checkpoint of `run`, which is gone with this if it is not finished.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn begin(run: &Path) -> Result<Self> {
        let folder = run.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        clear(run)?;
        Ok(Self { run: run.into(), building: new_folder(&folder)? })
    }

    /// Where the files are [written](write()).
    pub fn folder(&self) -> &Path {
        self.building.path()
    }

    /// Makes a checkpoint of these files, after so many steps and skipped ones, as [`save`] does.
    ///
    /// # Errors
    /// As [`save`].
    pub fn finish(self, (step, skipped): (u64, u64), written: Vec<Written>, keep: Keep) -> Result<PathBuf> {
        let Self { run, building } = self;
        let folder = run.join(FOLDER);
        let target = folder.join(folder_name(step));
        let mut files: BTreeMap<String, String> =
            written.iter().map(|file| (file.name.clone(), file.hash.clone())).collect();
        for stem in Set::ALL.map(Set::stem) {
            let of_set: Vec<&Written> = written.iter().filter(|file| is_split_name(stem, &file.name)).collect();
            if of_set.len() > 1 {
                let places = of_set.iter().flat_map(|f| f.tensors.iter().map(|name| (name.clone(), f.name.clone())));
                write_index(building.path(), stem, &places.collect(), of_set.iter().map(|file| file.bytes).sum())?;
                let index = index_name(stem);
                files.insert(index.clone(), hash_file(&building.path().join(index))?);
            }
        }
        if let Some(text) = sealed_recipe(&run)? {
            write_file(&building.path().join(RECIPE_FILE), text.as_bytes())?;
        }
        let state = State { format: FORMAT, dinolab: env!("CARGO_PKG_VERSION").into(), step, skipped, files };
        write_file(
            &building.path().join(STATE_FILE),
            serde_json::to_string_pretty(&state).expect("plain data").as_bytes(),
        )?;
        sync_dir(building.path())?;
        if target.exists() {
            // The same step was written before. It stays a checkpoint, under another name, until the new one is in its place.
            let old = folder.join(format!("{}{REPLACED}", folder_name(step)));
            fs::rename(&target, &old).map_err(Error::io("replace", &target))?;
        }
        fs::rename(building.keep(), &target).map_err(Error::io("write", &target))?;
        sync_dir(&folder)?;
        prune(&run, step, keep)?;
        Ok(target)
    }
}

/// Removes the checkpoints of `run` beside that of `step`, which is whole: those that are not to be kept, and those of later
/// steps.
///
/// # Errors
/// If one cannot be removed.
pub fn prune(run: &Path, step: u64, keep: Keep) -> Result<()> {
    let target = run.join(FOLDER).join(folder_name(step));
    let (earlier, other): (Vec<_>, Vec<_>) =
        list(run)?.into_iter().partition(|path| step_of(path).is_some_and(|(earlier, _)| earlier < step));
    let stale = other.into_iter().filter(|path| *path != target);
    let forever = |path: &PathBuf| step_of(path).is_some_and(|(s, _)| keep.every > 0 && s.is_multiple_of(keep.every));
    let is_replaced = |path: &PathBuf| step_of(path).is_some_and(|(s, _)| keep.replaced == Some(s));
    let (replaced, earlier): (Vec<_>, Vec<_>) = earlier.into_iter().partition(is_replaced);
    let old = earlier.into_iter().rev().skip(keep.newest.max(1) - 1);
    for old in stale.chain(replaced.into_iter().chain(old).filter(|path| !forever(path))) {
        remove(&old)?;
    }
    Ok(())
}

/// What is appended to the name of a checkpoint that another of the same step is about to replace.
const REPLACED: &str = ".replaced";

/// Removes a checkpoint: it is none from the first moment on, so that a kill leaves no half of one.
fn remove(checkpoint: &Path) -> Result<()> {
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    let hidden = checkpoint.with_file_name(format!("{REMOVING}{name}"));
    fs::rename(checkpoint, &hidden).map_err(Error::io("remove", checkpoint))?;
    fs::remove_dir_all(&hidden).map_err(Error::io("remove", checkpoint))
}

/// What the name of a checkpoint that is being removed begins with.
const REMOVING: &str = ".removing-";

/// Removes what a process left that was killed while it wrote or removed a checkpoint of `run`.
///
/// # Errors
/// If it cannot be removed.
pub fn clear(run: &Path) -> Result<()> {
    let folder = run.join(FOLDER);
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let half = step_of(&path).is_some() && path.is_dir() && !path.join(STATE_FILE).exists();
        // The newer one of the same step is in its place.
        let replaced = name.strip_suffix(REPLACED).is_some_and(|name| folder.join(name).join(STATE_FILE).exists());
        if half || replaced || name.starts_with(BUILDING) || name.starts_with(REMOVING) {
            fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// What the first line of a checkpoint's recipe begins with; the BLAKE3 hash of the rest follows. It is not in
/// [`STATE_FILE`], which is the same under other keys that change no number.
const SEAL: &str = "# blake3 of what follows: ";

/// The recipe of a run as a checkpoint keeps it.
fn sealed_recipe(run: &Path) -> Result<Option<String>> {
    let file = run.join(RECIPE_FILE);
    if !file.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    let wrong =
        |e: toml::de::Error| Error::content(&file, e.message(), "put back the recipe that the run was started with");
    let text = text.parse::<toml::Table>().map_err(wrong)?.to_string();
    Ok(Some(format!("{SEAL}{}\n{text}", blake3::hash(text.as_bytes()).to_hex())))
}

/// The checkpoints of a run, oldest first.
///
/// # Errors
/// If the folder cannot be listed.
pub fn list(run: &Path) -> Result<Vec<PathBuf>> {
    let folder = run.join(FOLDER);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        if let Some(order) = step_of(&path).filter(|_| path.join(STATE_FILE).exists()) {
            found.push((order, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The steps of the checkpoints of a run by their names, oldest first.
///
/// # Errors
/// If the folder cannot be listed.
pub fn steps(run: &Path) -> Result<Vec<u64>> {
    Ok(list(run)?.iter().filter_map(|path| step_of(path)).map(|(step, _)| step).collect())
}

/// The steps of the newest checkpoint of a run, by its name.
///
/// # Errors
/// If the folder cannot be listed.
pub fn newest_step(run: &Path) -> Result<Option<u64>> {
    Ok(steps(run)?.pop())
}

/// The steps that were done at a checkpoint, by its name.
pub(crate) fn step_at(checkpoint: &Path) -> Option<u64> {
    step_of(checkpoint).map(|(step, _)| step)
}

/// The run that a checkpoint lies in, if it lies in one.
pub(crate) fn run_of(checkpoint: &Path) -> Option<PathBuf> {
    // A link to a checkpoint leads to its run.
    let real = checkpoint.canonicalize().ok()?;
    let folder = real.parent().filter(|folder| folder.ends_with(FOLDER))?;
    folder.parent().filter(|run| run.join(RECIPE_FILE).exists()).map(Path::to_path_buf)
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
    use super::*;

    fn content(step: u64) -> Content {
        let weight = Tensor::from_slice(&[step as f32, 2.0, 3.0], &[3]).unwrap();
        let moment = Tensor::from_slice(&[0.5f32; 3], &[3]).unwrap();
        Content {
            step,
            skipped: 0,
            model: vec![("student.w".into(), weight)],
            optimizer: vec![("exp_avg.w".into(), moment)],
        }
    }

    #[test]
    fn the_newest_are_kept_and_read_back_to_the_bit() {
        let run = tempfile::tempdir().unwrap();
        for step in [10, 20, 30] {
            save(run.path(), &content(step), Keep::newest(2)).unwrap();
        }
        let names: Vec<_> = list(run.path()).unwrap().iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["step-00000020", "step-00000030"]);
        let (newest, passed) = load_newest(run.path()).unwrap().unwrap();
        assert!(passed.is_empty());
        assert_eq!(newest.step, 30);
        assert_eq!(newest.model.read("student.w").unwrap().unwrap().to_f64_vec(), [30.0, 2.0, 3.0]);
    }

    #[test]
    fn one_in_so_many_steps_is_kept_beside_the_newest() {
        let run = tempfile::tempdir().unwrap();
        for step in [10, 20, 30, 40, 50, 60, 65] {
            save(run.path(), &content(step), Keep { every: 20, ..Keep::newest(2) }).unwrap();
        }
        let steps: Vec<u64> = list(run.path()).unwrap().iter().filter_map(|p| step_of(p)).map(|(s, _)| s).collect();
        assert_eq!(steps, [20, 40, 60, 65]);
    }

    #[test]
    fn one_beside_those_that_are_kept_gives_its_place_to_the_next() {
        let run = tempfile::tempdir().unwrap();
        let kept = |step, newest, replaced| {
            save(run.path(), &content(step), Keep { every: 40, replaced, ..Keep::newest(newest) }).unwrap();
            list(run.path()).unwrap().iter().filter_map(|p| step_of(p)).map(|(s, _)| s).collect::<Vec<u64>>()
        };
        assert_eq!([10, 20].map(|step| kept(step, 2, None)), [vec![10], vec![10, 20]]);
        assert_eq!(kept(25, 3, None), [10, 20, 25]);
        assert_eq!(kept(28, 3, Some(25)), [10, 20, 28]);
        assert_eq!(kept(30, 2, Some(28)), [20, 30]);
        assert_eq!(kept(40, 3, None), [20, 30, 40]);
        assert_eq!(kept(45, 3, Some(40)), [20, 30, 40, 45], "one that is kept for ever stays");
    }

    #[test]
    fn a_cut_or_changed_file_is_named_and_the_one_before_is_used() {
        let run = tempfile::tempdir().unwrap();
        save(run.path(), &content(1), Keep::newest(3)).unwrap();
        let second = save(run.path(), &content(2), Keep::newest(3)).unwrap();
        let file = second.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        let (checkpoint, passed) = load_newest(run.path()).unwrap().unwrap();
        assert_eq!(checkpoint.step, 1);
        assert!(passed[0].to_string().contains("model.safetensors"), "{}", passed[0]);

        let third = save(run.path(), &content(3), Keep::newest(3)).unwrap();
        let file = third.join("optimizer.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        assert!(load(&third).err().unwrap().to_string().contains("optimizer.safetensors"));
    }

    /// Five tensors a set, of 12 bytes each.
    fn several() -> Content {
        let list = |set: &str| -> Vec<(String, Tensor)> {
            (0..5).map(|i| (format!("{set}.{i}"), Tensor::from_slice(&[i as f32; 3], &[3]).unwrap())).collect()
        };
        Content { step: 7, skipped: 1, model: list("student"), optimizer: list("exp_avg") }
    }

    #[test]
    fn what_is_too_large_for_a_file_is_split_and_the_files_are_the_same_of_however_many_ranks() {
        let mut written: Vec<BTreeMap<String, Vec<u8>>> = Vec::new();
        for world in [1, 2, 3, 7] {
            let run = tempfile::tempdir().unwrap();
            let saving = Saving::begin(run.path()).unwrap();
            let of_rank = |rank| write(saving.folder(), &several(), 24, (rank, world)).unwrap().unwrap();
            let parts: Vec<Vec<Written>> = (0..world).map(of_rank).collect();
            assert!(parts.iter().take(3).all(|part| !part.is_empty()), "none of the first writes nothing");
            let path = saving.finish((7, 1), parts.into_iter().flatten().collect(), Keep::newest(1)).unwrap();
            let checkpoint = load(&path).unwrap();
            for (set, files) in [("student", &checkpoint.model), ("exp_avg", &checkpoint.optimizer)] {
                let third = files.read(&format!("{set}.3")).unwrap().expect("it is in the second file");
                assert_eq!((third.to_f64_vec(), files.names().count()), (vec![3.0; 3], 5));
            }
            let all = fs::read_dir(&path).unwrap().map(|e| e.unwrap());
            written.push(all.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect());
        }
        let names: Vec<&String> = written[0].keys().collect();
        assert_eq!(names.len(), 2 * 4 + 1, "{names:?}");
        assert!(written.iter().all(|files| *files == written[0]));
        // Others find the tensors by the index.
        let run = tempfile::tempdir().unwrap();
        written[0].iter().for_each(|(name, bytes)| fs::write(run.path().join(name), bytes).unwrap());
        let read = TensorFiles::open(&run.path().join("model.safetensors.index.json")).unwrap();
        assert_eq!(read.names().count(), 5);
    }

    #[test]
    fn a_split_file_that_is_changed_or_gone_is_named() {
        let run = tempfile::tempdir().unwrap();
        let saving = Saving::begin(run.path()).unwrap();
        let written = write(saving.folder(), &several(), 24, (0, 1)).unwrap().unwrap();
        let path = saving.finish((7, 1), written, Keep::newest(1)).unwrap();
        for name in
            ["model-00002-of-00003.safetensors", "optimizer-00003-of-00003.safetensors", "model.safetensors.index.json"]
        {
            let file = path.join(name);
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
            let changed = load(&path).err().unwrap().to_string();
            assert!(changed.contains(name) && changed.contains("hash"), "{changed}");
            fs::remove_file(&file).unwrap();
            assert!(load(&path).err().unwrap().to_string().contains(name));
            fs::write(&file, bytes).unwrap();
        }
        load(&path).unwrap();
        // A file that `state.json` does not list is as good as gone.
        let state = fs::read_to_string(path.join(STATE_FILE)).unwrap();
        let less: Vec<&str> = state.lines().filter(|line| !line.contains("model-00002")).collect();
        fs::write(path.join(STATE_FILE), less.join("\n")).unwrap();
        assert!(load(&path).err().unwrap().to_string().contains(STATE_FILE));
    }

    #[test]
    fn a_rank_whose_disk_is_full_says_so_when_all_have_written() {
        let gone = tempfile::tempdir().unwrap().path().join("gone");
        let asked = std::cell::Cell::new(0);
        struct Counted<'a>(Content, &'a std::cell::Cell<usize>);
        impl Give for Counted<'_> {
            fn steps(&self) -> (u64, u64) {
                self.0.steps()
            }
            fn bytes(&self, set: Set) -> Vec<u64> {
                self.0.bytes(set)
            }
            fn tensors(&self, set: Set, places: Range<usize>, keep: bool) -> Result<Vec<(String, Tensor)>> {
                self.1.set(self.1.get() + 1);
                self.0.tensors(set, places, keep)
            }
        }
        let failed = write(&gone, &Counted(several(), &asked), 24, (0, 2)).unwrap().unwrap_err();
        assert!(failed.to_string().contains("gone"), "{failed}");
        assert_eq!(asked.get(), 6, "the other rank needs what this one has of every file");
    }

    #[test]
    fn a_checkpoint_just_written_stays_whatever_broken_ones_of_later_steps_are_there() {
        let run = tempfile::tempdir().unwrap();
        for step in [10, 20, 30] {
            save(run.path(), &content(step), Keep::newest(3)).unwrap();
        }
        fs::write(run.path().join("checkpoints/step-00000030/model.safetensors"), b"damaged").unwrap();
        assert_eq!(load_newest(run.path()).unwrap().unwrap().0.step, 20);
        save(run.path(), &content(24), Keep::newest(1)).unwrap();
        assert_eq!(load_newest(run.path()).unwrap().unwrap().0.step, 24);
        assert_eq!(list(run.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_kill_while_one_is_removed_or_replaced_leaves_nothing_behind_and_loses_nothing() {
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join(FOLDER);
        save(run.path(), &content(1), Keep::newest(3)).unwrap();
        save(run.path(), &content(2), Keep::newest(3)).unwrap();
        // Killed between the two renames of a replacement, and in the middle of removals of this and earlier versions.
        fs::rename(folder.join("step-00000002"), folder.join("step-00000002.replaced")).unwrap();
        for half in [".removing-step-00000000", ".building-x", "step-00000000"] {
            fs::create_dir(folder.join(half)).unwrap();
            fs::write(folder.join(half).join("model.safetensors"), b"half").unwrap();
        }
        assert_eq!(load_newest(run.path()).unwrap().unwrap().0.step, 2);
        clear(run.path()).unwrap();
        assert_eq!(load_newest(run.path()).unwrap().unwrap().0.step, 2);
        save(run.path(), &content(2), Keep::newest(3)).unwrap();
        let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["step-00000001", "step-00000002"]);
    }

    #[test]
    fn the_newest_is_told_by_its_number_however_many_digits_it_has() {
        let run = tempfile::tempdir().unwrap();
        for step in [99_999_999, 100_000_000] {
            save(run.path(), &content(step), Keep::newest(2)).unwrap();
        }
        assert_eq!(load_newest(run.path()).unwrap().unwrap().0.step, 100_000_000);
        assert_eq!(load_newest_before(run.path(), 100_000_000).unwrap().unwrap().0.step, 99_999_999);
    }

    #[test]
    fn what_others_put_beside_checkpoints_stays() {
        let run = tempfile::tempdir().unwrap();
        save(run.path(), &content(1), Keep::newest(1)).unwrap();
        let folder = run.path().join(FOLDER);
        fs::create_dir(folder.join("step-4")).unwrap();
        fs::write(folder.join("step-4/notes.txt"), b"mine").unwrap();
        fs::write(folder.join("step-00000009"), b"mine").unwrap();
        save(run.path(), &content(2), Keep::newest(1)).unwrap();
        assert!(folder.join("step-4/notes.txt").exists() && folder.join("step-00000009").exists());
        assert_eq!(list(run.path()).unwrap().len(), 1);
    }

    #[test]
    fn what_a_killed_writer_leaves_is_not_a_checkpoint() {
        let run = tempfile::tempdir().unwrap();
        save(run.path(), &content(1), Keep::newest(3)).unwrap();
        let half = run.path().join(FOLDER).join(".building-x");
        fs::create_dir(&half).unwrap();
        fs::write(half.join("model.safetensors"), b"half").unwrap();
        assert_eq!(list(run.path()).unwrap().len(), 1);
    }
}
