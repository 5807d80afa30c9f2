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
//! Everything is written to a temporary folder, flushed to the disk and renamed, so that a kill at any moment leaves
//! the old checkpoints, or those and a whole new one. A file whose hash does not fit is refused by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::{hash_file, new_folder, parse_tensors, sync_dir, write_file, write_tensors, NamedTensors, BUILDING};
use crate::{Error, Result, Tensor};

/// The version of the format written here.
const FORMAT: u32 = 1;
/// The folder of checkpoints inside a run folder.
pub const FOLDER: &str = "checkpoints";
/// Weights, in a checkpoint and elsewhere.
pub const MODEL_FILE: &str = "model.safetensors";
/// The rest of what a run needs to go on.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
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

/// What a checkpoint holds.
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

/// A whole checkpoint read back.
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps whose update was skipped because something was not finite.
    pub skipped: u64,
    /// Weights by role and name.
    pub model: NamedTensors,
    /// Moments and the losses' state.
    pub optimizer: NamedTensors,
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
pub fn save(run: &Path, content: &Content, keep: Keep) -> Result<PathBuf> {
    let folder = run.join(FOLDER);
    fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    let target = folder.join(folder_name(content.step));
    clear(run)?;
    let building = new_folder(&folder)?;
    let mut files = BTreeMap::new();
    // One key a file: the library writes several in any order, and a checkpoint's bytes are those of any run like it.
    for (name, tensors, key, count) in [
        (MODEL_FILE, &content.model, "step", content.step),
        (OPTIMIZER_FILE, &content.optimizer, "skipped", content.skipped),
    ] {
        let path = building.path().join(name);
        write_tensors(&path, tensors, &[(key, count.to_string())])?;
        files.insert(name.to_string(), hash_file(&path)?);
    }
    if let Some(text) = sealed_recipe(run)? {
        write_file(&building.path().join(RECIPE_FILE), text.as_bytes())?;
    }
    let state = State {
        format: FORMAT,
        dinolab: env!("CARGO_PKG_VERSION").into(),
        step: content.step,
        skipped: content.skipped,
        files,
    };
    write_file(
        &building.path().join(STATE_FILE),
        serde_json::to_string_pretty(&state).expect("plain data").as_bytes(),
    )?;
    sync_dir(building.path())?;
    if target.exists() {
        // The same step was written before. It stays a checkpoint, under another name, until the new one is in its place.
        let old = folder.join(format!("{}{REPLACED}", folder_name(content.step)));
        fs::rename(&target, &old).map_err(Error::io("replace", &target))?;
    }
    fs::rename(building.keep(), &target).map_err(Error::io("write", &target))?;
    sync_dir(&folder)?;
    prune(run, content.step, keep)?;
    Ok(target)
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

/// Reads one checkpoint folder.
///
/// # Errors
/// If a file is missing, cut off or changed, or written by a newer version.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let state = read_state(path)?;
    let model = read(path, &state, MODEL_FILE)?;
    Ok(Checkpoint {
        path: path.into(),
        step: state.step,
        skipped: state.skipped,
        model,
        optimizer: read(path, &state, OPTIMIZER_FILE)?,
    })
}

/// The weights of a checkpoint alone.
///
/// # Errors
/// As [`load`].
pub(crate) fn read_model(path: &Path) -> Result<NamedTensors> {
    read(path, &read_state(path)?, MODEL_FILE)
}

/// A file of tensors of a checkpoint, if it is what was written, of the same step.
fn read(path: &Path, state: &State, name: &str) -> Result<NamedTensors> {
    let file = path.join(name);
    let bytes = fs::read(&file).map_err(Error::io("read", &file))?;
    if state.files.get(name) != Some(&blake3::hash(&bytes).to_hex().to_string()) {
        return Err(changed(&file));
    }
    let tensors = parse_tensors(&file, &bytes)?;
    // `state.json` has no hash of its own: what it counts is in the files as well.
    for (key, says) in [("step", state.step), ("skipped", state.skipped)] {
        match tensors.metadata.get(key) {
            Some(written) if *written != says.to_string() => {
                let problem = format!("{key} is {says} here, {written} in {name}: it was changed");
                return Err(Error::content(path.join(STATE_FILE), problem, AGAIN));
            }
            _ => {}
        }
    }
    Ok(tensors)
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

/// The file of weights by role of a checkpoint, found to be what was written.
///
/// # Errors
/// If it is missing or was changed.
pub(crate) fn model_file(checkpoint: &Path) -> Result<PathBuf> {
    let state = read_state(checkpoint)?;
    let file = checkpoint.join(MODEL_FILE);
    match state.files.get(MODEL_FILE) == Some(&hash_file(&file)?) {
        true => Ok(file),
        false => Err(changed(&file)),
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
        assert_eq!(newest.model.get("student.w").unwrap().to_f64_vec(), [30.0, 2.0, 3.0]);
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
