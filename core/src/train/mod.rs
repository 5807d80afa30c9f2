//! A run from its first step to its last: reading data, stepping, logging, probing, checkpointing, stopping, resuming.
//!
//! ```text
//! <run>/
//!   recipe.toml            the resolved recipe, every default filled in, written before step 0
//!   run.json               version, revision, data, device, threads
//!   metrics.jsonl          one object a logged step: the source of truth
//!   messages.jsonl         warnings, one object each
//!   events.jsonl           what happened at a step: teachers, phases of schedules, resumes, forks
//!   tensorboard/           the same numbers, pictures of crops, histograms
//!   checkpoints/           see `checkpoint`
//!   parents.json           weights that the run started from, by hash, and in what it differs from the run it continues
//!   captures/              batches and weights of steps that were not finite
//!   crash/                 what is known of a run that ended by an error
//!   rewinds.json           from where to where the run went back, if it did
//!   result.json            written last: a run that has it is finished
//! ```

mod broken;
mod capture;
mod crash;
mod events;
mod folder;
mod lines;
mod log;
mod parents;
mod patience;
mod probes;
mod ranks;
mod rewind;
mod run;
mod start;
mod students;
mod timeline;
mod trained;
mod verdict;

pub use capture::replay;
pub use events::{write_pictures, StepPicture};
pub use folder::{RanksInfo, RunFolder, RunInfo, RunResult};
pub use lines::Lines;
pub use parents::Parent;
pub use ranks::{follow, join_in, Lead};
pub use start::Start;
pub use students::{run_students, StudentRun};
pub use timeline::RunEvent;
pub use trained::Trained;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Duration;

use self::broken::Broken;
use self::ranks::Order;
use self::run::{failure, Aging, Feed, Run, Window};
use self::students::Student;
use crate::contract::{DataContext, Dataset};
use crate::data::{Loader, LoaderSpec};
use crate::recipe::Recipe;
use crate::resolved::{fit, Resolved};
use crate::step::{Learner, Peers, Report};
use crate::text::printable;
use crate::{checkpoint, step, Error, Result};

/// Where and how a run runs.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run's folder.
    pub out: PathBuf,
    /// Continue what is in the folder; without, a folder with a run in it is refused.
    pub resume: bool,
    /// When this turns true the step is finished, a checkpoint written, and the run returns.
    pub stop: Arc<AtomicBool>,
    /// The program's git revision, for the record.
    pub revision: String,
    /// Maximum age of the newest checkpoint, if it is shorter than the recipe's `checkpoint.minutes`.
    pub save_within: Option<Duration>,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// All steps done.
    Finished(RunResult),
    /// Stopped on request; `resume` continues.
    Interrupted {
        /// Steps done.
        step: u64,
    },
}

/// One step, for a progress display.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    /// Steps done.
    pub step: u64,
    /// Steps of the run.
    pub total: u64,
    /// What the step gave.
    pub report: &'a Report,
    /// Images a second, smoothed over the last steps.
    pub images_per_s: f64,
    /// Share of the time spent waiting for data, smoothed over the last steps.
    pub data_wait: f64,
}

/// Someone who watches a run.
pub trait Observer {
    /// A run starts, or goes on.
    fn started(&mut self, start: &Start) {
        let _ = start;
    }
    /// A step is done.
    fn step(&mut self, progress: &Progress<'_>) {
        let _ = progress;
    }
    /// Something to tell the user, which is as it should be.
    fn note(&mut self, text: &str) {
        self.warning(text);
    }
    /// Something to warn the user of.
    fn warning(&mut self, text: &str) {
        let _ = text;
    }
    /// Probes were run after `step` steps.
    fn probed(&mut self, step: u64, scores: &BTreeMap<String, f64>) {
        let _ = (step, scores);
    }
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// The datasets of a recipe: for training, and held out for probes (the same if none is).
pub fn datasets(recipe: &Recipe) -> Result<(Arc<dyn Dataset>, Arc<dyn Dataset>)> {
    let train: Arc<dyn Dataset> = recipe.data.build(&mut DataContext { seed: recipe.seed })?.into();
    let test = train.held_out().unwrap_or_else(|| train.clone());
    Ok((train, test))
}

/// What the loader needs to know to make batches for `learner` from step `start`.
pub fn loader_spec(recipe: &Recipe, learner: &Learner, start: u64) -> LoaderSpec {
    let [_, locals] = learner.model().student_sees();
    let mut crops = recipe.crops.clone();
    if !locals {
        crops.own.local_count = 0;
    }
    LoaderSpec {
        batch: recipe.batch.clone(),
        part: learner.ranks().part(recipe.batch.micro_batches),
        crops,
        augmentations: learner.model().augmentations(recipe),
        masking: recipe.masking.clone(),
        patch_size: learner.model().backbone.patch_size(),
        teacher_crop_size: learner.teacher_crop_size(),
        seed: recipe.seed,
        device: learner.device(),
        dtype: learner.features_dtype(),
        start_step: start,
        total_steps: recipe.steps,
        left_out: Vec::new(),
    }
}

/// Runs a recipe to its end, or until asked to stop. Paths in the recipe are made absolute, so that the run can be
/// repeated and continued from anywhere.
///
/// # Errors
/// If the recipe cannot be built, the folder cannot be used, data cannot be read, or a loss is not finite (see
/// [`OnNonFinite`](crate::recipe::OnNonFinite)).
pub fn run(resolved: &Resolved, options: &RunOptions, observer: &mut dyn Observer) -> Result<Outcome> {
    lead(resolved, options, &Lead::alone(), observer)
}

/// The same for rank 0 of several, which have to [`follow`].
///
/// # Errors
/// As [`run`], and if a rank has failed.
pub fn lead(resolved: &Resolved, options: &RunOptions, lead: &Lead, observer: &mut dyn Observer) -> Result<Outcome> {
    run_beside(resolved, options, lead, None, observer)
}

/// The same for one of several students, if it is one.
fn run_beside(
    resolved: &Resolved,
    options: &RunOptions,
    lead: &Lead,
    student: Option<&Student>,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let resolved = &resolved.clone().absolute()?;
    let mut options = options.clone();
    loop {
        if let Some(outcome) = run_on(resolved, &options, lead, student, observer)? {
            return Ok(outcome);
        }
        // It went back, and goes on as a run does that was killed there.
        options.resume = true;
    }
}

/// Runs on from the newest checkpoint; nothing if the run went back to an earlier one.
fn run_on(
    resolved: &Resolved,
    options: &RunOptions,
    lead: &Lead,
    student: Option<&Student>,
    observer: &mut dyn Observer,
) -> Result<Option<Outcome>> {
    let recipe = &resolved.recipe;
    lead.check(recipe)?;
    if let Some(fit) = fit(recipe, recipe.device()?, lead.comm().world())? {
        return Err(fit.into_error());
    }
    let folder = RunFolder::open(resolved, options, &|key| Parent::only_moved(&options.out, resolved, key))?;
    if let Some(result) = folder.result(recipe.steps)? {
        return Ok(Some(Outcome::Finished(result)));
    }
    let left = checkpoint::clear(folder.path())?.into_iter().map(|left| ("checkpoint", left));
    let (mut messages, mut happened) = (left.collect::<Vec<_>>(), Vec::new());
    let (train, test) = datasets(recipe)?;
    resolved.check_data(test.as_ref())?;
    let peers = Peers { teacher: student.map(Student::teacher), ..Peers::of(lead.comm().as_ref()) };
    let own = newest_checkpoint(&folder, recipe)?;
    let (resumed, from) = (own.is_some(), own.as_ref().map(|(checkpoint, _)| checkpoint.path.clone()));
    let (mut learner, start, begun) = match own {
        Some((checkpoint, passed)) => {
            parents::check_frozen(resolved, folder.path())?;
            let passed = passed.into_iter().map(|e| ("checkpoint", format!("passed over a broken checkpoint: {e}")));
            messages.extend(passed);
            (Learner::from_checkpoint_with(recipe, &checkpoint, peers)?, checkpoint.step, None)
        }
        None => {
            messages.extend(step::adaptations(recipe)?.into_iter().map(|text| ("weights", text)));
            let (learner, begun) = parents::begin(resolved, train.as_ref(), peers)?;
            begun.check(folder.path())?;
            (learner, begun.step, Some(begun))
        }
    };
    let mut planned = timeline::planned(resolved)?;
    if let Some((begun, from)) = begun.as_ref().and_then(|begun| Some((begun, begun.from.as_deref()?))) {
        messages.push(("fork", format!("the run goes on from {}", printable(from))));
        happened.push(RunEvent::new(start, "fork", "goes on from a checkpoint of another run"));
        for begins in timeline::beginnings(&resolved.recipe, start, |teacher| begun.is_new(teacher))? {
            // What would have been done to it at this step was done to none.
            planned.entry(start).or_default().retain(|event| event.kind != begins.kind);
            happened.push(begins);
        }
    }
    messages.extend(begun.iter().flat_map(|begun| &begun.differences).map(|text| ("fork", text.clone())));
    let (origin, skipped_before) = if resumed { Parent::origin(folder.path())? } else { (start, learner.skipped()) };
    let rewinds = match (rewind::Rewinds::read(folder.path())?, &begun) {
        (none, Some(begun)) if none.count() == 0 => begun.rewinds.clone(),
        (own, _) => own,
    };
    if let Some(rewind::Rewind { at, to, .. }) = rewinds.before(start) {
        let at = at + 1;
        let text =
            format!("step {at} was not finite: the run went back to step {to} and goes on with the data behind it");
        messages.push(("non_finite", text));
        happened.push(RunEvent::new(start, "rewind", format!("went back from step {at}")));
    } else if resumed {
        happened.push(RunEvent::new(start, "resume", "resumed"));
    }
    happened.extend(folder.longer().map(|steps| RunEvent::new(start, "longer", steps)));
    let left_out = rewinds.left_out();
    let begin = Order::Begin {
        recipe: resolved.hash.clone(),
        data: train.fingerprint(),
        checkpoint: from,
        folder: folder.path().into(),
        start,
        left_out: left_out.clone(),
    };
    lead.together(&begin, || learner.join(lead.comm().clone()))?;
    let spec = LoaderSpec { left_out, ..loader_spec(recipe, &learner, start) };
    let probes = probes::Probes::new(recipe, train.clone(), test)?;
    let feed = match student {
        None => Feed::Own(Loader::new(train.clone(), spec.clone())?.into()),
        Some(student) => Feed::Common(student.reads(&spec)?),
    };
    let parents = match &begun {
        Some(begun) => begun.parents.clone(),
        None => Parent::read(folder.path())?,
    };
    let parents = parents.into_iter().map(|parent| (parent.key, parent.weights)).collect();
    messages.extend(
        folder
            .begin(resolved, options, train.as_ref(), learner.ranks(), (start, resumed), parents)?
            .into_iter()
            .map(|text| ("resume", text)),
    );
    if let Some(begun) = &begun {
        begun.write(folder.path(), &rewinds)?;
    }
    let (log, problems) = log::Log::open(&folder, recipe, start)?;
    messages.extend(problems.into_iter().map(|text| ("log", text)));
    observer.started(&Start::of(recipe, &learner, train.as_ref(), folder.path(), start)?);
    let lines = Lines::read(&folder.path().join("metrics.jsonl"))?.objects;
    let verdict = verdict::Verdict::of(&lines, learner.model());
    let mut run = Run {
        planned,
        patience: recipe.stop.as_ref().map(|stop| patience::Patience::new(stop, &lines)),
        seconds: log.seconds(),
        log,
        probes,
        feed,
        spec,
        verdict,
        told_eager: false,
        told: BTreeSet::new(),
        broken: Broken::default(),
        went_back: false,
        window: Window::default(),
        saved: resumed.then_some(start),
        aging: Aging::new(recipe.checkpoint.minutes, options.save_within),
        origin,
        skipped_before,
        at: start,
        batch: Vec::new(),
        observer,
        resolved,
        recipe,
        folder,
        learner,
        data: train,
        lead,
    };
    let ended = catch_unwind(AssertUnwindSafe(|| {
        for (kind, text) in messages {
            run.warn(start, kind, &text)?;
        }
        for event in happened {
            run.happened(&event)?;
        }
        let losses = run.learner.model().losses.iter();
        let notes: Vec<String> =
            losses.filter_map(|l| l.loss.note().map(|note| format!("loss `{}` {note}", l.name))).collect();
        for text in notes {
            run.warn(start, "loss", &text)?;
        }
        run.steps(start, &options.stop)
    }));
    ended.unwrap_or_else(|payload| Err(failure(payload, &mut run))).map_err(|error| run.report(error))
}

/// The newest checkpoint that a run can go on from. The losses of the step that a run ends with, after all of them or by its rule, are no
/// part of it: where the log does not have them, the step is done again from an earlier one, if there is one.
fn newest_checkpoint(folder: &RunFolder, recipe: &Recipe) -> Result<Option<(checkpoint::Checkpoint, Vec<Error>)>> {
    let newest = checkpoint::load_newest(folder.path())?;
    // A rule ends a run where a probe is taken, and there is a line of the log.
    let taken = |step: u64| recipe.probes.0.values().any(|p| p.enabled && p.every > 0 && step.is_multiple_of(p.every));
    let may_end = |step: u64| step >= recipe.steps || (recipe.stop.is_some() && step > 0 && taken(step));
    let Some((last, _)) = newest.as_ref().filter(|(checkpoint, _)| may_end(checkpoint.step)) else {
        return Ok(newest);
    };
    let lines = Lines::read(&folder.path().join("metrics.jsonl"))?;
    // The learning rate is in the line of every step that was done.
    let logged = lines
        .objects
        .iter()
        .any(|line| line.get("step").and_then(serde_json::Value::as_u64) == Some(last.step) && line.contains_key("lr"));
    if logged {
        return Ok(newest);
    }
    Ok(checkpoint::load_newest_before(folder.path(), last.step).ok().flatten().or(newest))
}
