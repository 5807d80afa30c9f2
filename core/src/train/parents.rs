//! What a run came from: the weights that its recipe names, by their hashes, and the checkpoint that it goes on from.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folder::RunInfo;
use super::rewind::Rewinds;
use crate::checkpoint::{self, Checkpoint};
use crate::recipe::{changes, Problem, Recipe, Resolved};
use crate::step::sources_of;
use crate::text::printable;
use crate::weights::Source;
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
    /// BLAKE3 of the file with the weights.
    pub weights: String,
    /// Hash of the recipe of the run that they are of, if they are of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// Steps done, if this run goes on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
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

    /// The step that the run in `folder` began at: not 0 if it continues another.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn origin(folder: &Path) -> Result<u64> {
        Ok(Self::read(folder)?.iter().find_map(|parent| parent.step).unwrap_or(0))
    }

    fn of(key: &str, path: &Path) -> Result<Self> {
        let source = Source::at(path)?;
        let read = match &source {
            Source::Run { newest, .. } => newest.clone(),
            other => other.path().to_path_buf(),
        };
        let recipe = if source.has_roles() { Some(source.recipe()?.hash) } else { None };
        Ok(Self { key: key.into(), path: read, weights: source.hash()?, recipe, step: None, differences: Vec::new() })
    }
}

/// The checkpoint of another run that a run goes on from.
pub(super) struct Origin {
    pub(super) checkpoint: Checkpoint,
    /// The recipe of the other run.
    pub(super) recipe: Recipe,
    /// In what the recipes differ.
    differences: Vec<String>,
}

impl Origin {
    /// Reads what `continue_from` names, if the recipe has it.
    ///
    /// # Errors
    /// If it is no whole checkpoint, or all steps are done there.
    pub(super) fn of(resolved: &Resolved) -> Result<Option<Self>> {
        let Some(from) = &resolved.recipe.continue_from else { return Ok(None) };
        let checkpoint = checkpoint::load(&from.checkpoint()?)?;
        let (done, steps) = (checkpoint.step, resolved.recipe.steps);
        if done >= steps {
            let message = format!("{steps} steps are all done: {} has done {done}", printable(&checkpoint.path));
            let problem = Problem::error("steps", message);
            return Err(problem
                .help("they are counted from the start of the run that this one continues: name more")
                .into());
        }
        let parent = Source::at(&checkpoint.path)?.recipe()?;
        let told = |key: &str| key != "name" && !key.starts_with("continue_from");
        let all = changes(&parent.value, &resolved.value).into_iter().filter(|change| told(&change.key));
        let mut differences: Vec<String> = all.map(|change| change.to_string()).collect();
        differences.extend(resolved.seams(parent.recipe.steps, done).iter().map(ToString::to_string));
        Ok(Some(Self { checkpoint, recipe: parent.recipe, differences }))
    }

    /// Where it is, for people.
    pub(super) fn name(&self) -> String {
        printable(&self.checkpoint.path)
    }
}

/// Writes down what the run in `folder` starts from, before its first step, and takes over what its origin knows of data to
/// leave out. Gives in what the run differs from its origin; `new` is what it has that was not there.
///
/// # Errors
/// If a source cannot be read, is another than when the run in this folder began, or the folder cannot be written.
pub(super) fn begin(
    folder: &Path,
    recipe: &Recipe,
    origin: Option<&Origin>,
    data: Option<&str>,
    new: Vec<String>,
) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    let mut parents = Vec::new();
    // What is not there was not needed: a teacher of a loss that is off.
    for (key, path) in sources_of(recipe)?.into_iter().filter(|(_, path)| Source::is_named(path)) {
        parents.push(match origin.filter(|_| key == "continue_from") {
            Some(origin) => {
                differences.clone_from(&origin.differences);
                let run = checkpoint::run_of(&origin.checkpoint.path);
                let info = run.as_deref().map(RunInfo::read).transpose()?.flatten();
                if info.is_some_and(|info| info.data.as_deref() != data) {
                    differences.push("the data are others".into());
                }
                differences.extend(new.iter().cloned());
                let (step, differences) = (Some(origin.checkpoint.step), differences.clone());
                Parent { step, differences, ..Parent::of(&key, &origin.checkpoint.path)? }
            }
            None => Parent::of(&key, &path)?,
        });
    }
    let file = folder.join(FILE);
    for (before, now) in Parent::read(folder)?.iter().zip(&parents) {
        if (&before.key, &before.weights) != (&now.key, &now.weights) {
            let problem = format!("{} is no longer what this run began with: was {}", now.key, printable(&before.path));
            let help = "put it back (or name its step), or start a new run in another folder (--out)";
            return Err(Error::content(&file, problem, help));
        }
    }
    if !parents.is_empty() {
        let text = serde_json::to_string_pretty(&parents).expect("plain data");
        checkpoint::write_file(&file, text.as_bytes())?;
    }
    if let Some(origin) = origin {
        if let Some(run) = checkpoint::run_of(&origin.checkpoint.path) {
            Rewinds::read(&run)?.until(origin.checkpoint.step).write(folder)?;
        }
    }
    Ok(differences)
}
