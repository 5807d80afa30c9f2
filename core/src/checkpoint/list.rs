//! The checkpoints of a run: where they are, which are kept, and what is left of those that are not.

use std::fs;
use std::path::{Path, PathBuf};

use super::{FOLDER, RECIPE_FILE, STATE_FILE};
use crate::files::BUILDING;
use crate::{Error, Result};

pub(super) fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step in the name of a checkpoint's folder, and whether the folder is in its place: not about to be replaced.
pub(super) fn step_of(path: &Path) -> Option<(u64, bool)> {
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

/// Removes the checkpoints of `run` beside that of `step`, which is whole: those that are not to be kept, and those of later
/// steps. Gives what is to be said of those that stay because they cannot be removed; the next save tries again.
///
/// # Errors
/// If one of a later step cannot be removed: a resumed run would go on from it.
pub fn prune(run: &Path, step: u64, keep: Keep) -> Result<Vec<String>> {
    let target = run.join(FOLDER).join(folder_name(step));
    let (earlier, other): (Vec<_>, Vec<_>) =
        list(run)?.into_iter().partition(|path| step_of(path).is_some_and(|(earlier, _)| earlier < step));
    let stale = other.into_iter().filter(|path| *path != target);
    let forever = |path: &PathBuf| step_of(path).is_some_and(|(s, _)| keep.every > 0 && s.is_multiple_of(keep.every));
    let is_replaced = |path: &PathBuf| step_of(path).is_some_and(|(s, _)| keep.replaced == Some(s));
    let (replaced, earlier): (Vec<_>, Vec<_>) = earlier.into_iter().partition(is_replaced);
    let old = earlier.into_iter().rev().skip(keep.newest.max(1) - 1);
    let (mut hidden, mut left) = (stale.map(|path| hide(&path)).collect::<Result<Vec<_>>>()?, Vec::new());
    for path in replaced.into_iter().chain(old).filter(|path| !forever(path)) {
        match hide(&path) {
            Ok(path) => hidden.push(path),
            Err(error) => left.push(stays(&error)),
        }
    }
    left.extend(remove_all(hidden));
    Ok(left)
}

/// What is appended to the name of a checkpoint that another of the same step is about to replace.
pub(super) const REPLACED: &str = ".replaced";

/// Gives a checkpoint that is about to be removed a name by which it is none, so that a kill leaves no half of one.
fn hide(checkpoint: &Path) -> Result<PathBuf> {
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    let hidden = checkpoint.with_file_name(format!("{REMOVING}{name}"));
    fs::rename(checkpoint, &hidden).map_err(Error::io("remove", checkpoint))?;
    Ok(hidden)
}

/// Removes folders that are no checkpoints; gives what is to be said of those that stay.
fn remove_all(folders: impl IntoIterator<Item = PathBuf>) -> Vec<String> {
    let removed = folders.into_iter().map(|path| fs::remove_dir_all(&path).map_err(Error::io("remove", &path)));
    removed.filter_map(|removed| removed.err().map(|error| stays(&error))).collect()
}

fn stays(error: &Error) -> String {
    format!("an old checkpoint takes up space until it can be removed, which every save tries: {error}")
}

/// What the name of a checkpoint that is being removed begins with.
const REMOVING: &str = ".removing-";

/// Removes what a process left that was killed while it wrote or removed a checkpoint of `run`; gives what is to be said of what
/// cannot be removed, which is no checkpoint.
///
/// # Errors
/// If the folder cannot be listed.
pub fn clear(run: &Path) -> Result<Vec<String>> {
    let folder = run.join(FOLDER);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut left = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let half = step_of(&path).is_some() && path.is_dir() && !path.join(STATE_FILE).exists();
        // The newer one of the same step is in its place.
        let replaced = name.strip_suffix(REPLACED).is_some_and(|name| folder.join(name).join(STATE_FILE).exists());
        if half || replaced || name.starts_with(BUILDING) || name.starts_with(REMOVING) {
            left.push(path);
        }
    }
    Ok(remove_all(left))
}

#[cfg(test)]
mod tests {
    use super::super::{content, load_newest, load_newest_before, save};
    use super::*;

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
    fn one_that_cannot_be_removed_is_told_and_stays_unless_it_would_be_resumed() {
        let run = tempfile::tempdir().unwrap();
        for step in [10, 20, 30] {
            save(run.path(), &content(step), Keep::newest(3)).unwrap();
        }
        // The name that it would get is taken.
        let taken = |step: u64| {
            let path = run.path().join(FOLDER).join(format!("{REMOVING}{}", folder_name(step)));
            fs::create_dir(&path).unwrap();
            fs::write(path.join("open"), b"").unwrap();
        };
        taken(10);
        let told = prune(run.path(), 30, Keep::newest(1)).unwrap();
        assert!(told.len() == 1 && told[0].contains("step-00000010"), "{told:?}");
        assert_eq!(steps(run.path()).unwrap(), [10, 30]);
        taken(30);
        assert!(prune(run.path(), 10, Keep::newest(1)).unwrap_err().to_string().contains("step-00000030"));
        // What was in the way goes with the next save, and the old one with it.
        let saved = save(run.path(), &content(40), Keep::newest(1)).unwrap();
        assert!(saved.left.is_empty(), "{:?}", saved.left);
        assert_eq!(steps(run.path()).unwrap(), [40]);
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
