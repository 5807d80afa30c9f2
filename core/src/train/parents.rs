//! What a run came from: the weights that its recipe names, by their hashes, and the checkpoint that it goes on from.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folder::RunInfo;
use super::rewind::Rewinds;
use crate::checkpoint::{self, Checkpoint};
use crate::contract::Dataset;
use crate::recipe::is_within;
use crate::resolved::{changes, Resolved};
use crate::step::{frozen_sources, new_teacher, no_step_left, sources_of, Learner, Peers};
use crate::text::printable;
use crate::weights::{to_continue, Source};
use crate::{Error, Result};

/// The file in a run's folder.
const FILE: &str = "parents.json";

/// Weights that a run started from: an entry of `parents.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The key of the recipe that names them.
    pub key: String,
    /// What was read: a checkpoint, or a folder or file of weights.
    pub path: PathBuf,
    /// BLAKE3 of the file with the weights; of several files, that of their hashes.
    pub weights: String,
    /// Hash of the recipe of the run that they are of, if they are of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// Steps done, if this run goes on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Steps that were skipped on the way there.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: u64,
    /// In what this run's recipe differs from that of the run that it goes on from, and what it has that was not there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<String>,
}

impl Parent {
    /// The parents of the run in `folder`, as they were when it began; none if it has none.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(folder: &Path) -> Result<Vec<Self>> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(Vec::new());
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let help = "remove this file; a run that has a checkpoint of its own goes on without it";
        serde_json::from_str(&text).map_err(|e| Error::content(&path, e.to_string(), help))
    }

    /// The step that the run in `folder` began at, and how many before it were skipped: not 0 if it continues another.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn origin(folder: &Path) -> Result<(u64, u64)> {
        let parents = Self::read(folder)?;
        Ok(parents.iter().find_map(|parent| Some((parent.step?, parent.skipped))).unwrap_or((0, 0)))
    }

    /// Whether a key of the run in `folder` names weights that lie in another place than when it began, and are the same: a
    /// suite's folder was moved, with the trunk in it.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn only_moved(folder: &Path, resolved: &Resolved, key: &str) -> Result<bool> {
        if !resolved.is_path(key) {
            return Ok(false);
        }
        let Some((source, path)) = sources_of(&resolved.recipe)?.into_iter().find(|(source, _)| is_within(key, source))
        else {
            return Ok(false);
        };
        let now = Source::at(&path).and_then(|source| source.hash()).ok();
        Ok(Self::read(folder)?.iter().any(|before| before.key == source && Some(&before.weights) == now.as_ref()))
    }

    /// That its place has other weights now.
    fn gone(&self, folder: &Path) -> Error {
        let problem = format!("{} is no longer what this run began with: was {}", self.key, printable(&self.path));
        let help = "put it back (or name its step), or start a new run in another folder (--out)";
        Error::content(folder.join(FILE), problem, help)
    }

    fn of(key: &str, path: &Path) -> Result<Self> {
        let source = Source::at(path)?;
        let read = match &source {
            Source::Run { newest, .. } => newest.clone(),
            other => other.path().to_path_buf(),
        };
        // One that this program cannot read, of plugins that it does not have, is no reason to leave its weights.
        let recipe = Resolved::of_source(&source).ok().map(|resolved| resolved.hash);
        Ok(Self {
            key: key.into(),
            path: read,
            weights: source.hash()?,
            recipe,
            step: None,
            skipped: 0,
            differences: Vec::new(),
        })
    }
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// How a run began that has no checkpoint of its own, as it is written down.
pub(super) struct Begun {
    /// The step that it begins at: not 0 if it continues another.
    pub(super) step: u64,
    /// The checkpoint that it goes on from, if it continues another.
    pub(super) from: Option<PathBuf>,
    /// In what it differs from the run that it continues.
    pub(super) differences: Vec<String>,
    /// Data that the run it continues left out.
    pub(super) rewinds: Rewinds,
    /// The weights that it starts from.
    pub(super) parents: Vec<Parent>,
}

/// A model at the start of a run: new, or as another run left it.
///
/// # Errors
/// If it cannot be built, what `continue_from` names is no whole checkpoint or has done all steps, or weights cannot be read.
pub(super) fn begin(resolved: &Resolved, data: &dyn Dataset, peers: Peers<'_>) -> Result<(Learner, Begun)> {
    let recipe = &resolved.recipe;
    resolved.check_sources()?;
    let mut begun =
        Begun { step: 0, from: None, differences: Vec::new(), rewinds: Rewinds::default(), parents: Vec::new() };
    let learner = match &recipe.continue_from {
        None => Learner::new_with(recipe, peers)?,
        Some(from) => {
            let checkpoint = checkpoint::load(&to_continue(from)?)?;
            begun.continues(&checkpoint, resolved, data, peers)?
        }
    };
    // What is not there was not needed: a teacher of a loss that is off.
    for (key, path) in sources_of(recipe)?.into_iter().filter(|(_, path)| Source::is_named(path)) {
        begun.parents.push(match begun.from.as_ref().filter(|_| key == "continue_from") {
            Some(from) => {
                let (step, skipped, differences) = (Some(begun.step), learner.skipped(), begun.differences.clone());
                Parent { step, skipped, differences, ..Parent::of(&key, from)? }
            }
            None => Parent::of(&key, &path)?,
        });
    }
    Ok((learner, begun))
}

/// Fails if a frozen teacher, which a run reads again whenever it goes on, is another than when the run in `folder` began.
///
/// # Errors
/// As said, or if it cannot be read.
pub(super) fn check_frozen(resolved: &Resolved, folder: &Path) -> Result<()> {
    let before = Parent::read(folder)?;
    for (key, path) in frozen_sources(&resolved.recipe)? {
        let known = before.iter().find(|parent| parent.key == key);
        match known {
            Some(known) if Parent::of(&key, &path)?.weights != known.weights => return Err(known.gone(folder)),
            _ => {}
        }
    }
    Ok(())
}

impl Begun {
    /// Goes on from a checkpoint of another run.
    fn continues(
        &mut self,
        from: &Checkpoint,
        resolved: &Resolved,
        data: &dyn Dataset,
        peers: Peers<'_>,
    ) -> Result<Learner> {
        let (done, steps) = (from.step, resolved.recipe.steps);
        if done >= steps {
            return Err(no_step_left(steps, &from.path, done).into());
        }
        let parent = Resolved::of_source(&Source::at(&from.path)?)?;
        let (learner, new) = Learner::continued_with(&resolved.recipe, from, &parent.recipe, peers)?;
        let told = |key: &str| key != "name" && !key.starts_with("continue_from");
        let changed = changes(&parent.value, &resolved.value).into_iter().filter(|change| told(&change.key));
        self.differences.extend(changed.map(|change| change.to_string()));
        self.differences.extend(resolved.seams(parent.recipe.steps, done).iter().map(ToString::to_string));
        if let Some(run) = checkpoint::run_of(&from.path) {
            if RunInfo::read(&run)?.is_some_and(|info| info.data != data.fingerprint()) {
                self.differences.push("the data are others".into());
            }
            self.rewinds = Rewinds::read(&run)?.taken_over(done);
        }
        self.differences.extend(new);
        (self.step, self.from) = (done, Some(from.path.clone()));
        Ok(learner)
    }

    /// Whether it has a teacher of `[teachers]` that the run that it continues had not.
    pub(super) fn is_new(&self, teacher: &str) -> bool {
        self.differences.contains(&new_teacher(teacher))
    }

    /// Holds it to what the run in `folder` began with before it was interrupted.
    ///
    /// # Errors
    /// If a source is another than it was.
    pub(super) fn check(&self, folder: &Path) -> Result<()> {
        for (before, now) in Parent::read(folder)?.iter().zip(&self.parents) {
            if (&before.key, &before.weights) != (&now.key, &now.weights) {
                return Err(before.gone(folder));
            }
        }
        Ok(())
    }

    /// Writes it into the run's folder, with the data that are left out.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn write(&self, folder: &Path, rewinds: &Rewinds) -> Result<()> {
        if !self.parents.is_empty() {
            let text = serde_json::to_string_pretty(&self.parents).expect("plain data");
            crate::files::write_file(&folder.join(FILE), text.as_bytes())?;
        }
        rewinds.write(folder)
    }
}
