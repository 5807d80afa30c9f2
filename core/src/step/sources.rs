//! Where a recipe takes weights from, checked before a run and without reading a tensor.

use std::path::PathBuf;

use super::declare;
use super::distillation::fits_student;
use crate::contract::Role;
use crate::recipe::{Problem, Recipe};
use crate::weights::Source;
use crate::{Error, Result};

/// How weights are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// A model of the recipe's own starts from them.
    Start,
    /// They are a teacher with an architecture of its own.
    Distil,
}

/// Whether the weights that a recipe starts from are there and fit its model: what cannot be used is an error at its key,
/// what is not there (yet) a warning, as weights may lie on another machine than recipes.
///
/// # Errors
/// If the recipe's model cannot be built.
pub fn check_sources(recipe: &Recipe) -> Result<Vec<Problem>> {
    let model = declare(recipe)?;
    let fits = |path: &PathBuf, how: Use| match how {
        Use::Start => Source::at(path)?.check_same_model(model.backbone.as_ref()),
        Use::Distil => fits_student(path, &model),
    };
    let mut problems = Vec::new();
    for (key, path, how) in sources(recipe)? {
        if !Source::is_named(&path) {
            problems.push(Problem::warning(&key, format!("{} is not there (yet)", path.display())));
            continue;
        }
        problems.extend(fits(&path, how).err().map(|error| match error {
            Error::Content { path, problem, help } => {
                Problem::error(&key, format!("{}: {problem}", path.display())).help(help)
            }
            other => Problem::error(&key, other.to_string()),
        }));
    }
    Ok(problems)
}

/// Keys of a recipe that name weights, with what they name, in the order in which they are read.
///
/// # Errors
/// If a policy cannot be built.
pub fn sources_of(recipe: &Recipe) -> Result<Vec<(String, PathBuf)>> {
    Ok(sources(recipe)?.into_iter().map(|(key, path, _)| (key, path)).collect())
}

/// Keys that name weights, the paths, and how they are used.
fn sources(recipe: &Recipe) -> Result<Vec<(String, PathBuf, Use)>> {
    let mut found = Vec::new();
    found.extend(recipe.backbone.weights.clone().map(|path| ("backbone.weights".into(), path, Use::Start)));
    found.extend(recipe.init_from.clone().map(|path| ("init_from".into(), path, Use::Start)));
    if recipe.continue_from.is_some() {
        // What a new run would start from is not read.
        found.clear();
    }
    found.extend(recipe.continue_from.as_ref().map(|from| ("continue_from".into(), from.path(), Use::Start)));
    for (key, chosen) in recipe.all_teachers() {
        let policy = chosen.build(&mut ())?;
        if let Role::Checkpoint(path) = policy.start() {
            found.push((key.clone(), path, Use::Start));
        }
        found.extend(policy.distils().map(|path| (key, path.to_path_buf(), Use::Distil)));
    }
    Ok(found)
}
