//! Keys that are given and not read: of a loss or probe that is off, or beside a key that makes them idle.

use std::collections::BTreeSet;

use figment::value::{Dict, Value};
use serde_json::Value as Json;

use crate::contract::{At, Backbone, TeacherPolicy};
use crate::params::ParamBuilder;
use crate::problem::{Origin, Problem, Severity};
use crate::recipe::{RawRecipe, Recipe};
use crate::registry::Chosen;
use crate::step::{build_loss, declare, Declared};
use crate::{DType, Device};

/// A preset that was chosen over keys that it would fill in, which stay as they were.
fn presets(recipe: &Recipe, raw: &RawRecipe) -> Option<Problem> {
    let chosen = raw.set_by("backbone.preset");
    let backbone = &recipe.backbone.plugin;
    let preset = backbone.config().get("preset")?.as_str().filter(|_| chosen != Origin::Default)?;
    let filled = |preset: Option<&str>| {
        let table = preset.into_iter().map(|name| ("preset".to_string(), Value::from(name)));
        let table = table.chain([("plugin".to_string(), Value::from(backbone.name()))]).collect::<Dict>();
        Chosen::<dyn Backbone>::from_value(&table.into(), None).ok().map(|chosen| chosen.config().clone())
    };
    let (with, without) = (filled(Some(preset))?, filled(None)?);
    let stays = |(key, value): (&String, &Json)| {
        let origin = raw.set_by(&format!("backbone.{key}"));
        let own = backbone.config().get(key)?;
        let earlier = origin != Origin::Default && raw.layer(&origin) < raw.layer(&chosen);
        let of_preset = without.get(key) != Some(value) && key != "preset";
        (earlier && of_preset && own != value).then(|| format!("{key} = {own} ({origin}), not {value}"))
    };
    let stays: Vec<String> = with.as_object()?.iter().filter_map(stays).collect();
    let message = format!("the preset fills in what is not said, and the recipe has {}", stays.join(", "));
    let help = "set these keys as well, or begin from a recipe that leaves them to the preset";
    (!stays.is_empty()).then(|| Problem::warning("backbone.preset", message).help(help))
}

/// What was given and is not read. `idle` are keys beside a key that makes them idle, and what that would have to be.
///
/// What was typed for this run is a warning. A file may keep values ready for a suite that turns the part on, and weights
/// bring all keys of their model: a note.
pub(super) fn check(recipe: &Recipe, raw: &RawRecipe, idle: Vec<(String, String)>) -> Vec<Problem> {
    let mut found: Vec<Problem> = presets(recipe, raw).into_iter().collect();
    let mut tell = |table: String, keys: Vec<String>, message: &dyn Fn(&str) -> String, help: String| {
        if keys.is_empty() {
            return;
        }
        let typed = keys.iter().find(|key| matches!(raw.set_by(key), Origin::Set(_) | Origin::Env(_)));
        let problem = Problem::warning(typed.cloned().unwrap_or(table), message(&keys.join(", "))).help(help);
        found.push(if typed.is_some() { problem } else { Problem { severity: Severity::Note, ..problem } });
    };
    let losses = recipe.losses.0.iter().map(|(name, entry)| ("losses", name, entry.enabled));
    let probes = recipe.probes.0.iter().map(|(name, entry)| ("probes", name, entry.enabled));
    for (kind, name, _) in losses.chain(probes).filter(|(.., enabled)| !enabled) {
        let table = format!("{kind}.{name}");
        let message = |keys: &str| format!("is off, so nothing reads {keys}");
        tell(table.clone(), given(raw, &table), &message, format!("set {table}.enabled = true, or remove the keys"));
    }
    let model = declare(recipe).ok();
    for teacher in model.iter().flat_map(|model| waiting(recipe, model)) {
        let table = format!("teachers.{teacher}");
        let message = |keys: &str| format!("no loss that is on learns from this teacher, so nothing reads {keys}");
        let help = "turn on a loss that does, or remove the keys".to_string();
        tell(table.clone(), given(raw, &table), &message, help);
    }
    let locals = ["crops.local_count", "crops.local_size"].map(String::from).into_iter();
    let locals: Vec<String> = locals.filter(|key| raw.get(key).is_some()).collect();
    if model.as_ref().is_some_and(|model| !model.student_sees()[1]) {
        let message = |keys: &str| format!("no loss that is on reads local crops, so nothing reads {keys}");
        tell("crops".into(), locals, &message, "remove the keys, or turn on a loss that does".into());
    }
    // A device that is not here may be there where the recipe runs.
    let is_wide = recipe.device().is_ok_and(|device| recipe.dtype(device) != DType::BF16);
    if recipe.optimizer.offload && is_wide {
        let key = "optimizer.offload".to_string();
        let message =
            |key: &str| format!("nothing reads {key}: only features in bf16, on a GPU, leave weights a lower half");
        tell(key.clone(), vec![key], &message, "remove it, or choose another device or precision".into());
    }
    if recipe.optimizer.offload_moments && recipe.device().is_ok_and(|device| device == Device::Cpu) {
        let key = "optimizer.offload_moments".to_string();
        let message = |key: &str| format!("nothing reads {key}: on a CPU moments are in its memory anyway");
        tell(key.clone(), vec![key], &message, "remove it, or choose another device".into());
    }
    for (key, needed) in idle {
        let message = |key: &str| format!("nothing reads {key}: it is read with {needed} only");
        tell(key.clone(), vec![key.clone()], &message, "remove it".into());
    }
    for teacher in model.iter().flat_map(|model| never_asked(recipe, model)) {
        let message =
            format!("is asked at none of {} steps, so losses that learn from it change nothing", recipe.steps);
        let problem = Problem::warning(format!("teachers.{teacher}"), message);
        found.push(problem.help("let it begin earlier, or name more steps"));
    }
    found
}

/// The teachers that losses learn from and that are active at no step. Of long runs a thousand steps and the last are looked at.
fn never_asked(recipe: &Recipe, model: &Declared) -> Vec<String> {
    let (steps, wanted) = (recipe.steps, model.teachers());
    let last = steps.saturating_sub(1);
    let some = || (0..last).step_by((steps / 1000).max(1) as usize).chain([last]);
    let never = |policy: Box<dyn TeacherPolicy>| some().all(|step| !policy.active(At { step, total: steps }));
    let wanted = recipe.teachers.0.iter().filter(|(name, _)| wanted.contains(name.as_str()));
    wanted.filter(|(_, entry)| entry.build(&mut ()).is_ok_and(never)).map(|(name, _)| name.clone()).collect()
}

/// The teachers from which only losses that are off would learn.
fn waiting(recipe: &Recipe, model: &Declared) -> Vec<String> {
    let off = recipe.losses.0.values().filter(|entry| !entry.enabled);
    let asked = off.flat_map(|entry| {
        let built = build_loss(recipe, model.backbone.as_ref(), &mut ParamBuilder::new(), &entry.loss);
        built.map(|loss| loss.needs().teachers).unwrap_or_default()
    });
    let asked: BTreeSet<String> = asked.collect();
    let there = |name: &String| recipe.teachers.0.contains_key(name) && !model.teachers().contains(name.as_str());
    asked.into_iter().filter(there).collect()
}

/// The keys that were given in a table, but for those that say which plugin it is and whether it is on.
fn given(raw: &RawRecipe, table: &str) -> Vec<String> {
    let mut keys = Vec::new();
    leaves(raw.get(table), table, &mut keys);
    keys.retain(|key| !["plugin", "enabled"].iter().any(|own| *key == format!("{table}.{own}")));
    keys
}

fn leaves(value: Option<&Value>, path: &str, keys: &mut Vec<String>) {
    match value {
        Some(Value::Dict(_, table)) => {
            table.iter().for_each(|(key, value)| leaves(Some(value), &format!("{path}.{key}"), keys));
        }
        Some(_) => keys.push(path.into()),
        None => {}
    }
}
