//! Where a recipe takes weights from, checked before a run and without reading a tensor.

use std::path::{Path, PathBuf};

use super::distillation::{fits, fits_student};
use super::weights::{check_role, role_of, start_of_student, Shapes, EVALUATED, RGB};
use super::{declare, Declared};
use crate::checkpoint;
use crate::contract::Role;
use crate::params::Layout;
use crate::problem::Problem;
use crate::recipe::Recipe;
use crate::text::printable;
use crate::weights::{check_same_model, run_at_step, to_continue, Source};
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
/// what is not there (yet) a warning, as weights may lie on another machine than recipes. No tensor is read.
///
/// # Errors
/// If the recipe's model cannot be built.
pub fn check_sources(recipe: &Recipe) -> Result<Vec<Problem>> {
    let model = declare(recipe)?;
    let check = |key: &str, path: &Path, how: Use| match how {
        Use::Start => {
            let source = Source::at(path)?;
            source.check_same_model(model.backbone.as_ref())?;
            let adapted = other_channels(channels_at(path, model.channels)?, path, key, model.channels)?;
            shapes_fit(recipe, key, &source.shapes()?, path, &model)?;
            Ok(adapted)
        }
        Use::Distil => fits_student(path, &model).map(|()| None),
    };
    let mut problems = Vec::new();
    for (key, path, how) in sources(recipe)? {
        if path.as_os_str().is_empty() {
            problems.push(Problem::error(&key, "the path is empty").help("name weights, or remove the key"));
            continue;
        }
        if !Source::is_named(&path) {
            problems.push(Problem::warning(&key, format!("{} is not there (yet)", path.display())));
            continue;
        }
        if let Some(from) = recipe.continue_from.as_ref().filter(|_| key == "continue_from") {
            match to_continue(from).map(|checkpoint| checkpoint::step_at(&checkpoint)) {
                Ok(Some(done)) if done >= recipe.steps => problems.push(no_step_left(recipe.steps, &path, done)),
                Ok(_) => {}
                Err(error) => {
                    problems.push(refused(&key, error));
                    continue;
                }
            }
        }
        problems.extend(check(&key, &path, how).unwrap_or_else(|error| Some(refused(&key, error))));
    }
    Ok(problems)
}

/// What `recipe` takes of a run of `parent` that will be in the folder `run`, and that does not fit its model.
///
/// # Errors
/// If a model cannot be built.
pub fn check_sources_of(recipe: &Recipe, run: &Path, parent: &Recipe) -> Result<Vec<Problem>> {
    let (model, theirs) = (declare(recipe)?, declare(parent)?);
    let mut shapes = Shapes::new();
    let mut has = |role: &str, layout: &Layout| {
        shapes.extend(layout.specs().iter().map(|spec| (format!("{role}.{}", spec.name), spec.shape.clone())));
    };
    has("student", &theirs.layout);
    if parent.teacher.build(&mut ())?.exists() {
        has("teacher", &theirs.layout);
    }
    theirs.teachers().into_iter().for_each(|name| has(&role_of(name), &theirs.layout.part("backbone.")));

    let check = |key: &str, path: &Path, how: Use| match how {
        Use::Start => {
            check_same_model(theirs.backbone.as_ref(), model.backbone.as_ref(), path)?;
            other_channels(theirs.channels, path, key, model.channels)?;
            shapes_fit(recipe, key, &shapes, path, &model)
        }
        Use::Distil => fits(path, &theirs, &model),
    };
    let of_run = |path: &Path| path.starts_with(run) || run_at_step(path).is_some_and(|(named, _)| named == run);
    let named = sources(recipe)?.into_iter().filter(|(_, path, _)| of_run(path));
    Ok(named.filter_map(|(key, path, how)| check(&key, &path, how).err().map(|error| refused(&key, error))).collect())
}

/// An error of the weights that are named at `key`, as one of the key.
fn refused(key: &str, error: Error) -> Problem {
    match error {
        Error::Content { path, problem, help } => {
            Problem::error(key, format!("{}: {problem}", path.display())).help(help)
        }
        other => Problem::error(key, other.to_string()),
    }
}

/// Fails if what a run loads of tensors at `path`, which is named at `key`, has other shapes than its model.
fn shapes_fit(recipe: &Recipe, key: &str, shapes: &Shapes, path: &Path, model: &Declared) -> Result<()> {
    match key {
        "continue_from" => check_role(&model.layout, shapes, &["student."], path),
        "init_from" => check_role(&model.layout, shapes, start_of_student(recipe.init_role), path),
        "teacher" => check_role(&model.layout, shapes, EVALUATED, path),
        _ => check_role(&model.layout.part("backbone."), shapes, EVALUATED, path),
    }
}

/// Channels of the images that the model at `path` sees; `otherwise` where nothing says so.
fn channels_at(path: &Path, otherwise: usize) -> Result<usize> {
    Ok(Source::at(path)?.model()?.map_or(otherwise, |model| model.crops.channels()))
}

/// That a run of so many steps has none left after the run or checkpoint at `from`, which has done `done`.
pub(crate) fn no_step_left(steps: u64, from: &Path, done: u64) -> Problem {
    let message = format!("{steps} steps are all done: {} has done {done}", printable(from));
    Problem::error("steps", message)
        .help("they are counted from the start of the run that this one continues: name more")
}

/// What becomes of weights of other channels that a recipe starts from, a sentence each.
///
/// # Errors
/// If they are of a number that is not adapted.
pub fn adaptations(recipe: &Recipe) -> Result<Vec<String>> {
    let start = sources(recipe)?.into_iter().filter(|(_, path, how)| *how == Use::Start && Source::is_named(path));
    let channels = recipe.crops.channels();
    let found = start.map(|(key, path, _)| other_channels(channels_at(&path, channels)?, &path, &key, channels));
    let found: Vec<Option<Problem>> = found.collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().map(|problem| format!("{}: {}", problem.key, problem.message)).collect())
}

/// What becomes of a patch embedding of `theirs` channels, where the recipe has `channels`.
fn other_channels(theirs: usize, path: &Path, key: &str, channels: usize) -> Result<Option<Problem>> {
    if theirs == channels {
        return Ok(None);
    }
    if theirs != RGB || key == "continue_from" {
        let problem = format!("its patch embedding is of {theirs} channels, and crops.mean has {channels} numbers");
        let help = match key {
            "continue_from" => "a run goes on with images of as many channels: start from the weights with `init_from`",
            _ => "only weights of RGB are adapted to another number of channels: choose others",
        };
        return Err(Error::content(path, problem, help));
    }
    let how = match channels {
        1 => "the sum over red, green and blue".to_string(),
        n => format!("red, green and blue repeated up to {n} channels, times 3/{n}"),
    };
    let message =
        format!("{}: its patch embedding is of RGB, the recipe's of {channels}: it becomes {how}", path.display());
    Ok(Some(Problem::warning(key, message).help("channels are taken in the order of the images'")))
}

/// Keys of a recipe that name weights, with what they name, in the order in which they are read.
///
/// # Errors
/// If a policy cannot be built.
pub fn sources_of(recipe: &Recipe) -> Result<Vec<(String, PathBuf)>> {
    Ok(sources(recipe)?.into_iter().map(|(key, path, _)| (key, path)).collect())
}

/// Those of them that name a model to distil from, which is read whenever a run begins or goes on.
///
/// # Errors
/// If a policy cannot be built.
pub(crate) fn frozen_sources(recipe: &Recipe) -> Result<Vec<(String, PathBuf)>> {
    let frozen = sources(recipe)?.into_iter().filter(|(.., how)| *how == Use::Distil);
    Ok(frozen.map(|(key, path, _)| (key, path)).collect())
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
