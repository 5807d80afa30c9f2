//! What a recipe takes of weights: the model that it leaves to them, and the checkpoint that it goes on from.

use std::path::PathBuf;

use figment::value::{Dict, Value};

use super::Source;
use crate::problem::{Origin, Problem};
use crate::recipe::{BackboneConfig, ContinueFrom, OwnKeys, RawRecipe};
use crate::{Error, Result};

/// The recipe on top of the model of `backbone.weights`, if it leaves the backbone's plugin to them.
///
/// # Errors
/// If nothing says what model they are of, or the recipe has keys of the backbone that this model does not have.
pub(crate) fn with_model_of_weights(raw: RawRecipe) -> Result<RawRecipe> {
    let path = raw.get("backbone.weights").and_then(Value::as_str).map(PathBuf::from);
    let (Some(path), None) = (path, raw.get("backbone.plugin")) else { return Ok(raw) };
    let info = Source::at(&path).and_then(|source| source.known_model()).map_err(|e| match e {
        Error::Content { path, problem, help } => {
            Problem::error("backbone.weights", format!("{}: {problem}", path.display())).help(help)
        }
        other => Problem::error("backbone.weights", other.to_string()),
    });
    let info = info.map_err(|problem| problem.at(raw.origin("backbone.weights")))?;
    let Ok(Value::Dict(_, model)) = Value::serialize(info.to_table()) else { unreachable!("a struct is a table") };
    let known = model.get("backbone").and_then(Value::as_dict).cloned().unwrap_or_default();
    for key in raw.get("backbone").and_then(Value::as_dict).into_iter().flat_map(Dict::keys) {
        if !known.contains_key(key) && !BackboneConfig::KEYS.contains(&key.as_str()) {
            let key = format!("backbone.{key}");
            let m = format!("the model of {} has no such key", path.display());
            let help = "set backbone.plugin too, to describe the whole model, or remove this key";
            return Err(Problem::error(&key, m).help(help).at(raw.origin(&key)).into());
        }
    }
    Ok(raw.above(model, &Origin::Override(format!("weights {}", path.display()))))
}

/// The folder of the checkpoint that a run goes on from.
///
/// # Errors
/// If there is none, or of this step none is kept.
pub(crate) fn to_continue(from: &ContinueFrom) -> Result<PathBuf> {
    let source = match from.step {
        Some(step) => Source::step(&from.run, step)?,
        None => Source::at(&from.run)?,
    };
    match source {
        Source::Run { newest, .. } => Ok(newest),
        Source::Checkpoint(path) => Ok(path),
        other => {
            let problem = "these are weights alone: moments, state and step of a run are not there";
            let help = "name a run or a checkpoint of one, or start from the weights with `init_from`";
            Err(Error::content(other.path(), problem, help))
        }
    }
}
