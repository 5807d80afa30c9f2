//! Doing the stages that are not done yet, one after the other.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use dinolab_core::train::Parent;
use dinolab_core::weights::Source;
use dinolab_core::{Error, Result};

use super::file::{Stage, Stages};
use crate::suite::{Event, Job, Outcome, Overrides, Prepare, Prepared, Progress, Status};

/// A stage with its resolved recipe.
pub struct PlannedStage {
    /// What the file says.
    pub stage: Stage,
    /// Its run's folder.
    pub dir: PathBuf,
    /// What to run.
    pub prepared: Box<dyn Prepared>,
}

/// Every stage with its recipe, under `extra` overrides from the command line.
///
/// # Errors
/// If a recipe cannot be resolved.
pub fn plan(stages: &Stages, out: &Path, extra: &Overrides, prepare: Prepare<'_>) -> Result<Vec<PlannedStage>> {
    let here = std::path::absolute(out).map_err(Error::io("find", out))?;
    let mut planned = Vec::new();
    for stage in &stages.stages {
        let mut set = extra.clone();
        set.extend(stage.placed(&here));
        let prepared = prepare(&stage.recipe, &set)?;
        planned.push(PlannedStage { stage: stage.clone(), dir: out.join(&stage.name), prepared });
    }
    Ok(planned)
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
        let job = Job { out: dir, resume, stop: stop.clone(), watch: &mut watch };
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
    for parent in Parent::read(&stage.dir)? {
        let now = Source::at(&parent.path).and_then(|source| source.hash());
        if now.is_ok_and(|now| now != parent.weights) {
            other.push(parent.key);
        }
    }
    Ok(other)
}
