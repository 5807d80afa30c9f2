//! Going back: a run that met numbers that are not finite goes on from an earlier checkpoint, past the data it met them
//! on.
//!
//! Where it goes back to is the last of the checkpoints that `checkpoint.every` asks for, whatever others an interruption
//! left, so that a run that was stopped and resumed goes back to the same place and ends with the same numbers.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::files::write_file;
use crate::{Error, Result};

/// The file in a run's folder.
const FILE: &str = "rewinds.json";

/// A step that was not finite, and the step that the run went on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rewind {
    pub(super) at: u64,
    pub(super) to: u64,
    /// Whether it was another run's, which this one continues.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    inherited: bool,
}

/// All of a run, in order.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Rewinds(Vec<Rewind>);

impl Rewinds {
    /// Those of the run in `folder`.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let broken =
            |e: serde_json::Error| Error::content(&path, e.to_string(), "start the run anew in another folder");
        serde_json::from_str(&text).map_err(broken)
    }

    /// How many there were.
    pub(super) fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// How many of them were the run's own.
    pub(super) fn own(&self) -> u64 {
        self.0.iter().filter(|rewind| !rewind.inherited).count() as u64
    }

    /// That after which the run goes on from `start`.
    pub(super) fn before(&self, start: u64) -> Option<Rewind> {
        self.0.last().copied().filter(|last| last.to == start)
    }

    /// The data that the run passes over, for the loader.
    pub(super) fn left_out(&self) -> Vec<(u64, u64)> {
        self.0.iter().map(|r| (r.to, r.at - r.to + 1)).collect()
    }

    /// Goes back from step `at` of a run that began at step `origin`: removes the checkpoints behind the one to go on from, and writes down that it did. A kill
    /// between the two leaves a run that meets the step again.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub(super) fn go_back(mut self, folder: &Path, every: u64, at: u64, origin: u64) -> Result<Rewind> {
        let all = checkpoints(folder)?;
        let to = all.iter().map(|(step, _)| *step).filter(|step| is_regular(*step, every) && *step <= at).max();
        let rewind = Rewind { at, to: to.unwrap_or(origin), inherited: false };
        for (_, path) in all.into_iter().filter(|(step, _)| *step > rewind.to) {
            std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
        self.0.push(rewind);
        self.write(folder)?;
        Ok(rewind)
    }

    /// Those that a checkpoint of `step` steps is behind: what a run that goes on from it has to know.
    pub(super) fn taken_over(mut self, step: u64) -> Self {
        self.0.retain(|rewind| rewind.to <= step);
        self.0.iter_mut().for_each(|rewind| rewind.inherited = true);
        self
    }

    /// Writes them into a run's folder, if there are any.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(self).expect("plain data");
        write_file(&folder.join(FILE), text.as_bytes())
    }
}

/// Whether `checkpoint.every` asks for a checkpoint after `step` steps.
fn is_regular(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// How many checkpoints of the run in `folder` have to be kept after `step` steps, at least `keep`: so many that the one to
/// go back to is among them.
///
/// # Errors
/// If the folder cannot be listed.
pub(super) fn kept(folder: &Path, every: u64, step: u64, keep: usize) -> Result<usize> {
    let mut steps: Vec<u64> = checkpoints(folder)?.into_iter().map(|(s, _)| s).filter(|s| *s < step).collect();
    steps.push(step);
    steps.sort_unstable_by(|a, b| b.cmp(a));
    let regular = steps.iter().position(|s| is_regular(*s, every));
    Ok(keep.max(regular.map_or(0, |at| at + 1)))
}

/// The checkpoints of a run with their steps.
fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let step = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
    Ok(checkpoint::list(folder)?.into_iter().filter_map(|path| Some((step(&path)?, path))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_over_is_left_out_and_no_budget_of_the_run_that_goes_on() {
        let [parent, child] = [0, 1].map(|_| tempfile::tempdir().unwrap());
        Rewinds::default().go_back(parent.path(), 0, 5, 0).unwrap();
        let rewinds = Rewinds::read(parent.path()).unwrap();
        assert_eq!((rewinds.count(), rewinds.own()), (1, 1));
        rewinds.taken_over(10).write(child.path()).unwrap();
        Rewinds::read(child.path()).unwrap().go_back(child.path(), 0, 12, 10).unwrap();
        let rewinds = Rewinds::read(child.path()).unwrap();
        assert_eq!((rewinds.count(), rewinds.own()), (2, 1));
        assert_eq!(rewinds.left_out(), [(0, 6), (10, 3)]);
    }
}
