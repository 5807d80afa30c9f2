//! Doing the stages that are not done yet, one after the other.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use dinolab_core::checkpoint::newest_step;
use dinolab_core::recipe::is_within;
use dinolab_core::train::Parent;
use dinolab_core::weights::Source;
use dinolab_core::{Error, Result};

use super::file::{Stage, Stages, FILE, REPORT};
use crate::suite::{
    check_unchanged, keeps, named_steps, not_of_others, put_over, Event, Job, Outcome, Overrides, Prepare, Prepared,
    Progress, Status,
};

/// A stage with its resolved recipe.
pub struct PlannedStage {
    /// What the file says.
    pub stage: Stage,
    /// Its run's folder.
    pub dir: PathBuf,
    /// What to run.
    pub prepared: Box<dyn Prepared>,
}

impl PlannedStage {
    /// The steps of its run.
    pub fn steps(&self) -> u64 {
        steps_of(self.prepared.recipe())
    }
}

fn steps_of(recipe: &toml::Table) -> u64 {
    recipe.get("steps").and_then(toml::Value::as_integer).unwrap_or(0) as u64
}

/// Every stage with its recipe, under `extra` overrides from the command line.
///
/// # Errors
/// If a recipe cannot be resolved.
pub fn plan(stages: &Stages, out: &Path, extra: &Overrides, prepare: Prepare<'_>) -> Result<Vec<PlannedStage>> {
    check_folder(stages, out)?;
    let here = std::path::absolute(out).map_err(Error::io("find", out))?;
    if here.to_str().is_none() {
        let help = "name another --out: stages name each other's folders in their recipes, which are UTF-8";
        return Err(Error::content(out, "the name of this folder is not UTF-8", help));
    }
    let mut planned = Vec::new();
    for stage in &stages.stages {
        let mut set = extra.clone();
        put_over(&mut set, &stage.placed(&here));
        let prepared = prepare(&stage.recipe, &set).map_err(|error| unknown_model(stage, &here, error))?;
        check_parents(stage, prepared.recipe(), &planned)?;
        let dir = out.join(&stage.name);
        if Status::of(&dir)? != Status::Pending {
            // A stage may become longer; the folders of other stages may have been moved with its own.
            let step = |named: Option<&str>| named?.trim_matches('"').rsplit_once('@')?.1.parse::<u64>().ok();
            let may = |key: &str, was: Option<&str>, is: Option<&str>| {
                let of_parent =
                    || stage.parents.iter().any(|(named, _)| is_within(key, named)) && step(was) == step(is);
                key == "steps" || of_parent()
            };
            check_unchanged(&dir, prepared.as_ref(), "chain", &[], &may)?;
            let (done, steps) = (newest_step(&dir)?.unwrap_or(0), steps_of(prepared.recipe()));
            if steps < done {
                let problem = format!("this stage has done {done} steps, and its recipe now has {steps}");
                return Err(Error::content(dir, problem, "set its steps to as many, or move this folder away"));
            }
        }
        for parent in &planned {
            prepared.check_parent(&here.join(&parent.stage.name), parent.prepared.recipe())?;
        }
        planned.push(PlannedStage { stage: stage.clone(), dir, prepared });
    }
    Ok(planned)
}

/// The error of a stage's recipe, or that its model is that of weights which are not there yet.
fn unknown_model(stage: &Stage, here: &Path, error: Error) -> Error {
    let of_weights = |(key, parent): &&(String, String)| key == "backbone.weights" && !here.join(parent).exists();
    match stage.parents.iter().find(of_weights) {
        Some((key, parent)) => Error::user(
            format!(
                "stage `{}` takes its model from {key}, the weights of `{parent}`, which is not trained yet",
                stage.name
            ),
            "say `backbone.plugin` and its keys in the stage's recipe",
        ),
        None => error,
    }
}

/// Fails if the folder is that of something else.
fn check_folder(stages: &Stages, out: &Path) -> Result<()> {
    not_of_others(out, &["suite.json", "run.json"], "chain of stages")?;
    let path = out.join(FILE);
    if !path.exists() {
        return match stages.stages.iter().any(|stage| out.join(&stage.name).is_dir()) {
            true => Ok(()),
            false => not_of_others(out, &[REPORT], "chain of stages"),
        };
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let known: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::content(&path, e.to_string(), "remove this file: it is written anew"))?;
    match known["name"].as_str() {
        Some(name) if name != stages.name => {
            let problem = format!("this folder holds the stages of `{name}`, not of `{}`", stages.name);
            Err(Error::content(out, problem, "use another --out"))
        }
        _ => Ok(()),
    }
}

/// Fails if a stage needs a checkpoint that the stage before does not keep, or has no step left to do after it.
fn check_parents(stage: &Stage, recipe: &toml::Table, before: &[PlannedStage]) -> Result<()> {
    let parent = |name: &String| before.iter().find(|planned| planned.stage.name == *name).map(|p| p.prepared.recipe());
    let of = |(_, parent): &(String, String)| {
        named_steps(&stage.set, parent).into_iter().map(|step| (parent.clone(), step)).collect::<Vec<_>>()
    };
    let (name, named) = (&stage.name, stage.parents.iter().flat_map(of).collect::<Vec<_>>());
    for (other, step) in &named {
        let Some(recipe) = parent(other).filter(|recipe| !keeps(recipe, steps_of(recipe), *step)) else { continue };
        if *step > steps_of(recipe) {
            let problem =
                format!("stage `{name}` needs step {step} of `{other}`, which has {} steps", steps_of(recipe));
            return Err(Error::user(problem, format!("name a step that it has, or set more steps in `{other}`")));
        }
        let problem = format!("stage `{name}` needs step {step} of `{other}`, and its checkpoint would not be kept");
        let help =
            format!("set checkpoint.keep_every of `{other}` to a divisor of {step}, at most {}", steps_of(recipe));
        return Err(Error::user(problem, help));
    }
    for (key, other) in stage.parents.iter().filter(|(key, _)| is_within(key, "continue_from")) {
        let from = stage.set.iter().filter(|(key, _)| is_within(key, "continue_from"));
        let from: Overrides = from.map(|(key, value)| (key.clone(), value.clone())).collect();
        let written = named_steps(&from, other).first().copied();
        let step_key = recipe.get("continue_from").and_then(|from| from.get("step")).and_then(toml::Value::as_integer);
        let of_key = step_key.and_then(|step| u64::try_from(step).ok());
        let Some(done) = written.or(of_key).or_else(|| parent(other).map(steps_of)) else { continue };
        let steps = steps_of(recipe);
        if steps <= done {
            let problem = format!("stage `{name}` has {steps} steps, all done at step {done} of `{other}` ({key})");
            return Err(Error::user(problem, "steps are counted from the start of the first stage: name more"));
        }
    }
    Ok(())
}

/// Does every stage that is not done; gives the stage that was asked to stop, and its step.
///
/// # Errors
/// If a run fails, or a stage that was begun has another recipe now.
pub fn execute(planned: &[PlannedStage], stop: &Arc<AtomicBool>, progress: &Progress) -> Result<Option<(String, u64)>> {
    for stage in planned {
        let (name, dir) = (&stage.stage.name, &stage.dir);
        let before = Status::of(dir)?;
        progress.begin(name);
        let mut watch = |event: Event<'_>| progress.watch(&event);
        let resume = before != Status::Pending;
        let job = Job { out: dir, resume, stop: stop.clone(), save_within: None, watch: &mut watch };
        if let Outcome::Interrupted { step } = stage.prepared.run(job)? {
            progress.finish();
            return Ok(Some((name.clone(), step)));
        }
        if !matches!(before, Status::Finished(_)) {
            progress.done();
        }
        for key in stale(stage)? {
            let text = format!(
                "{name} was trained from other weights than {key} names now: remove {} to do it again",
                dir.display()
            );
            progress.say(&format!("warning: {text}"));
        }
    }
    progress.finish();
    Ok(None)
}

/// The keys of a stage that name other weights now than when its run began: a stage before it was done anew.
///
/// # Errors
/// If what the run wrote of its parents cannot be read.
pub fn stale(stage: &PlannedStage) -> Result<Vec<String>> {
    let mut other = Vec::new();
    let sources = stage.prepared.sources()?;
    for parent in Parent::read(&stage.dir)? {
        let named = sources.iter().find(|(key, _)| *key == parent.key).map_or(&parent.path, |(_, path)| path);
        let now = Source::at(named).and_then(|source| source.hash());
        if now.is_ok_and(|now| now != parent.weights) {
            other.push(parent.key);
        }
    }
    Ok(other)
}
