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

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::broken::Broken;
use self::ranks::Order;
use self::students::Student;
use crate::contract::{DataContext, Dataset};
use crate::data::{Loader, LoaderSpec, Pipeline};
use crate::recipe::{OnNonFinite, Recipe};
use crate::resolved::{fit, Resolved};
use crate::step::{Learner, Report};
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
    /// The most that the newest checkpoint ages, where that is less than the recipe's `checkpoint.minutes`.
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
/// [`OnNonFinite`]).
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
    if let Some(fit) = fit(recipe, recipe.device()?)? {
        return Err(fit.into_error());
    }
    let folder = RunFolder::open(resolved, options, &|key| Parent::only_moved(&options.out, resolved, key))?;
    if let Some(result) = folder.result(recipe.steps)? {
        return Ok(Some(Outcome::Finished(result)));
    }
    checkpoint::clear(folder.path())?;
    let (mut messages, mut happened) = (Vec::new(), Vec::new());
    let (train, test) = datasets(recipe)?;
    resolved.check_data(test.as_ref())?;
    let shared = student.map(Student::teacher);
    let own = newest_checkpoint(&folder, recipe)?;
    let (resumed, from) = (own.is_some(), own.as_ref().map(|(checkpoint, _)| checkpoint.path.clone()));
    let (mut learner, start, begun) = match own {
        Some((checkpoint, passed)) => {
            parents::check_frozen(resolved, folder.path())?;
            let passed = passed.into_iter().map(|e| ("checkpoint", format!("passed over a broken checkpoint: {e}")));
            messages.extend(passed);
            (Learner::from_checkpoint_beside(recipe, &checkpoint, shared)?, checkpoint.step, None)
        }
        None => {
            messages.extend(step::adaptations(recipe)?.into_iter().map(|text| ("weights", text)));
            let (learner, begun) = parents::begin(resolved, train.as_ref(), shared)?;
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
    let origin = if resumed { Parent::origin(folder.path())? } else { start };
    let rewinds = match (rewind::Rewinds::read(folder.path())?, &begun) {
        (none, Some(begun)) if none.count() == 0 => begun.rewinds.clone(),
        (own, _) => own,
    };
    if let Some(rewind::Rewind { at, to }) = rewinds.before(start) {
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
    let stop = recipe.stop.as_ref().map(|stop| patience::Patience::new(stop, &folder.path().join("metrics.jsonl")));
    let mut run = Run {
        planned,
        patience: stop.transpose()?,
        seconds: log.seconds(),
        log,
        probes,
        feed,
        spec,
        verdict: verdict::Verdict::default(),
        told_eager: false,
        told: BTreeSet::new(),
        broken: Broken::default(),
        went_back: false,
        window: Window::default(),
        saved: resumed.then_some(start),
        aging: Aging::new(recipe.checkpoint.minutes, options.save_within),
        origin,
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

/// The error that a run unwound with: one of the device, thrown from where no error can be returned. A broken invariant
/// unwinds further.
fn failure(payload: Box<dyn Any + Send>, run: &mut Run<'_>) -> Error {
    match payload.downcast::<Error>() {
        Ok(error) => *error,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string()));
            if let Some(report) = run.crash(&format!("panic: {}", text.unwrap_or_default())) {
                run.observer.warning(&format!("what is known of the run is in {}", report.display()));
            }
            resume_unwind(payload)
        }
    }
}

/// Throughput over the steps since the last logged one.
#[derive(Default)]
struct Window {
    steps: u32,
    elapsed: Duration,
    waited: Duration,
}

/// Where the batches of a run come from.
enum Feed<'a> {
    Own(Box<Loader>),
    /// They are those of other students as well.
    Common(&'a Student),
}

struct Run<'a> {
    resolved: &'a Resolved,
    recipe: &'a Recipe,
    folder: RunFolder,
    learner: Learner,
    data: Arc<dyn Dataset>,
    feed: Feed<'a>,
    spec: LoaderSpec,
    log: log::Log,
    probes: probes::Probes,
    patience: Option<patience::Patience>,
    /// What the recipe says will happen, by step.
    planned: BTreeMap<u64, Vec<RunEvent>>,
    verdict: verdict::Verdict,
    told_eager: bool,
    /// Warnings that are said once.
    told: BTreeSet<String>,
    broken: Broken,
    /// Whether the run goes on from an earlier step.
    went_back: bool,
    window: Window,
    /// Time spent in steps, over all parts of an interrupted run.
    seconds: f64,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    aging: Aging,
    /// The step that the run began at: not 0 if it continues another.
    origin: u64,
    /// The step that is being done, and the images in its batch.
    at: u64,
    batch: Vec<usize>,
    observer: &'a mut dyn Observer,
    lead: &'a Lead,
}

impl Run<'_> {
    /// Nothing if the run went back.
    fn steps(&mut self, start: u64, stop: &AtomicBool) -> Result<Option<Outcome>> {
        let recipe = self.recipe;
        self.measure_again(start)?;
        if let Some(why) = self.is_out() {
            let missing = self.probes.names();
            self.measure_missing(start, missing)?;
            return self.finish(start, Some(why));
        }
        for step in start..recipe.steps {
            if let Feed::Common(student) = &self.feed {
                student.turn(step);
            }
            let done = step + 1;
            let logged = step == 0 || done % recipe.log.every.max(1) == 0 || done == recipe.steps;
            let Some(report) = self.one_step(step, logged, stop)? else {
                self.save(step)?;
                return Ok(Some(Outcome::Interrupted { step }));
            };
            if self.went_back {
                return Ok(None);
            }
            // A run that is asked to stop leaves its probes to whoever goes on, who finds the rest of the line.
            let stopped = stop.load(Ordering::Relaxed);
            let due = self.probes.due(done, recipe);
            let mut scores = self.measure(done, if stopped { &[] } else { &due })?;
            let out = self.is_out();
            if out.is_some() {
                let mut rest = self.probes.names();
                rest.retain(|name| !due.contains(name));
                scores.extend(self.measure(done, &rest)?);
            }
            if logged || !due.is_empty() {
                self.log_step(done, &report, &scores)?;
            }
            if stopped || recipe.checkpoint.is_due(done) || done == recipe.steps {
                self.save(done)?;
            } else if self.aging.is_over() {
                self.save_besides(done)?;
            }
            if stopped {
                return Ok(Some(Outcome::Interrupted { step: done }));
            }
            if out.is_some() && done < recipe.steps {
                return self.finish(done, out);
            }
        }
        self.finish(recipe.steps, None)
    }

    /// Ends the run after `done` steps, all of them or those that `stopped` says were enough.
    fn finish(&mut self, done: u64, stopped: Option<String>) -> Result<Option<Outcome>> {
        self.warn_once(done, "data", self.broken.total())?;
        if let Some(why) = &stopped {
            self.warn(done, "stop", &format!("the run ends after step {done} of {}: {why}", self.recipe.steps))?;
            self.happened(&RunEvent::new(done, "stop", why.clone()))?;
        }
        // A run without steps is saved as it starts.
        self.save(done)?;
        let mut metrics = self.log.measured(done);
        metrics.retain(|_, v| v.is_finite());
        let (seconds, skipped) = (self.seconds, self.learner.skipped());
        let result = RunResult { steps: done, seconds, skipped, metrics, stopped };
        self.folder.finish(&result)?;
        Ok(Some(Outcome::Finished(result)))
    }

    /// Why the run ends here although steps are left, if it does.
    fn is_out(&self) -> Option<String> {
        self.patience.as_ref().and_then(patience::Patience::is_out)
    }

    /// Runs the probes that were due after `start` steps and whose scores the log does not have: the run was stopped
    /// before them, or lost them.
    fn measure_again(&mut self, start: u64) -> Result<()> {
        if start == 0 {
            return Ok(());
        }
        if start == self.recipe.steps && !self.log.line_of(start).is_some_and(|line| line.contains_key("lr")) {
            let text = "metrics.jsonl does not have the losses of the last step, and they cannot be measured again";
            self.warn(start, "log", text)?;
        }
        let due = self.probes.due(start, self.recipe);
        self.measure_missing(start, due)
    }

    /// Runs those of the probes whose scores after `start` steps, the last that were done, the log does not have.
    fn measure_missing(&mut self, start: u64, mut probes: Vec<String>) -> Result<()> {
        let known = self.log.measured(start);
        probes.retain(|name| !known.keys().any(|key| key.starts_with(&format!("probe/{name}/"))));
        let scores = self.measure(start, &probes)?;
        if !scores.is_empty() {
            let lost = self.log.add_scores(start, &scores)?;
            self.warn_of(start, "log", lost)?;
        }
        Ok(())
    }

    /// Scores of probes after `done` steps: `probe/<name>/<score>`.
    fn measure(&mut self, done: u64, probes: &[String]) -> Result<BTreeMap<String, f64>> {
        let (scores, warnings) = self.probes.run(probes, &self.learner, self.recipe);
        self.warn_once(done, "probe", warnings)?;
        let undefined = scores.iter().filter(|(_, score)| !score.is_finite());
        let undefined = undefined.map(|(name, _)| format!("{name} is not a number here: nothing is written of it"));
        self.warn_once(done, "probe", undefined.collect::<Vec<_>>())?;
        if !scores.is_empty() {
            self.observer.probed(done, &scores);
        }
        if let Some(patience) = &mut self.patience {
            patience.measured(done, &scores)?;
        }
        Ok(scores)
    }

    /// Does a step, unless asked to stop before its batch is there.
    fn one_step(&mut self, step: u64, logged: bool, stop: &AtomicBool) -> Result<Option<Report>> {
        let begin = Instant::now();
        (self.at, self.batch) = (step, Vec::new());
        for event in self.planned.remove(&step).into_iter().flatten() {
            self.happened(&event)?;
        }
        let made = match &mut self.feed {
            Feed::Own(loader) => loader.next_unless(stop),
            Feed::Common(student) => student.batches(step, &self.data, &self.spec, stop),
        };
        let batches = match made {
            None if stop.load(Ordering::Relaxed) => return Ok(None),
            batches => batches.expect("the loader gives every step of the run")?,
        };
        assert_eq!(batches.step, step, "the batches are those of the step");
        self.batch = batches.batches.iter().flat_map(|b| b.indices()).collect();
        let (waited, mut broken) = (batches.waited, batches.broken);
        let report = self.lead.together(&Order::Step(step), || {
            let report = self.learner.step(step, &batches.batches, logged)?;
            let (asked, of_others) = self.lead.notes(stop.load(Ordering::Relaxed))?;
            stop.fetch_or(asked, Ordering::Relaxed);
            broken.extend(of_others);
            Ok(report)
        });
        let texts = self.broken.count(broken);
        self.warn_once(step, "data", texts)?;
        if step == self.origin {
            let lost = self.log.crops(&batches.batches, self.recipe);
            self.warn_of(step, "log", lost)?;
        }
        let report = report?;
        if let Some(reason) = self.learner.eager_reason().filter(|_| !self.told_eager).map(String::from) {
            self.told_eager = true;
            self.warn(step, "device", &format!("steps are not recorded as a graph, which is slower: {reason}"))?;
        }
        if let Some(what) = &report.non_finite {
            self.non_finite(step, what, &batches.batches)?;
        }
        if let Some(limit) = report.spike {
            let loss = report.losses["loss/total"];
            let text = format!("the loss jumped to {loss:.4}, above {limit:.4}; the update was skipped");
            self.warn(step, "spike", &text)?;
        }
        let elapsed = begin.elapsed();
        self.seconds += elapsed.as_secs_f64();
        self.window.steps += 1;
        self.window.elapsed += elapsed;
        self.window.waited += waited;
        let (images_per_s, data_wait) = self.window.rates(self.recipe.batch.size);
        let progress = Progress { step: step + 1, total: self.recipe.steps, report: &report, images_per_s, data_wait };
        self.observer.step(&progress);
        Ok(Some(report))
    }

    /// The batch and weights are captured; then the run stops, or goes on if the recipe allows it.
    fn non_finite(&mut self, step: u64, what: &str, batches: &[crate::data::Batch]) -> Result<()> {
        // Of several ranks each has a part.
        let of_others = match self.learner.ranks().world() {
            1 => Vec::new(),
            _ => {
                let spec = LoaderSpec { part: 0..self.recipe.batch.micro_batches, ..self.spec.clone() };
                Pipeline::new(self.data.clone(), spec)?.step(step)?.batches
            }
        };
        let batches = if of_others.is_empty() { batches } else { &of_others };
        let path = capture::write(&self.folder, &self.learner, self.resolved, step, batches)?;
        let skipped = self.learner.skipped() - self.learner.spikes();
        match self.recipe.on_non_finite {
            OnNonFinite::Skip(most) if skipped <= most => {
                let text = format!(
                    "{what} is not finite; the update was skipped ({skipped} of at most {most}), captured in {}",
                    path.display()
                );
                self.warn(step, "non_finite", &text)
            }
            OnNonFinite::Rewind(most) if rewind::Rewinds::read(self.folder.path())?.count() < most => {
                let rewinds = rewind::Rewinds::read(self.folder.path())?;
                let count = rewinds.count() + 1;
                let to = rewinds.go_back(self.folder.path(), self.recipe.checkpoint.every, step, self.origin)?.to;
                let text = format!(
                    "{what} is not finite; the run goes back to step {to} ({count} of at most {most}), captured in {}",
                    path.display()
                );
                self.went_back = true;
                self.warn(step, "non_finite", &text)
            }
            policy => {
                let mut help = format!("look at it with `dinolab replay {}`", path.display());
                help += "; usual causes: learning rate too high, a temperature too low, a loss without epsilon";
                if policy == OnNonFinite::Stop {
                    help += "; to go on over rare ones set `on_non_finite = { skip = 3 }` or `{ rewind = 3 }`";
                }
                Err(Error::NonFinite { step, what: what.into(), capture: Some(path), help })
            }
        }
    }

    fn log_step(&mut self, done: u64, report: &Report, scores: &BTreeMap<String, f64>) -> Result<()> {
        let (images_per_s, data_wait) = self.window.rates(self.recipe.batch.size);
        let rates = [
            ("throughput/images_per_s", images_per_s),
            ("throughput/data_wait", data_wait),
            ("throughput/seconds", self.seconds),
        ];
        let lost = self.log.step(done, report, scores, &rates)?;
        self.warn_of(done, "log", lost)?;
        if self.recipe.log.histograms_every > 0 && done.is_multiple_of(self.recipe.log.histograms_every) {
            let lost = self.log.histograms(done, &self.learner);
            self.warn_of(done, "log", lost)?;
        }
        self.window = Window::default();
        for (kind, text) in self.verdict.judge(report, &self.learner, self.data.as_ref()) {
            self.warn(done, kind, &text)?;
        }
        Ok(())
    }

    /// Writes down something that happened.
    fn happened(&mut self, event: &RunEvent) -> Result<()> {
        let lost = self.log.event(event)?;
        self.warn_of(event.step, "log", lost)
    }

    /// Warns of something of a `kind` (reports gather by it), after `step` steps.
    fn warn(&mut self, step: u64, kind: &str, text: &str) -> Result<()> {
        self.observer.warning(&format!("step {step}: {text}"));
        self.log.warning(step, kind, text)
    }

    /// As [`warn`](Self::warn), if there is something to say.
    fn warn_of(&mut self, step: u64, kind: &str, text: Option<String>) -> Result<()> {
        text.map_or(Ok(()), |text| self.warn(step, kind, &text))
    }

    /// Warns of what was not yet said.
    fn warn_once(&mut self, step: u64, kind: &str, texts: impl IntoIterator<Item = String>) -> Result<()> {
        for text in texts {
            if self.told.insert(text.clone()) {
                self.warn(step, kind, &text)?;
            }
        }
        Ok(())
    }

    /// Writes a checkpoint, unless there is one of this step, and removes those that are not kept.
    fn save(&mut self, step: u64) -> Result<()> {
        self.save_and_keep(step, 0)?;
        self.aging.besides = None;
        Ok(())
    }

    /// Writes one that nobody asked for, beside those that are kept and in place of the last such.
    fn save_besides(&mut self, step: u64) -> Result<()> {
        self.save_and_keep(step, 1)?;
        self.aging.besides = Some(step);
        Ok(())
    }

    fn save_and_keep(&mut self, step: u64, more: usize) -> Result<()> {
        let begin = Instant::now();
        let config = &self.recipe.checkpoint;
        let newest = match self.recipe.on_non_finite {
            OnNonFinite::Rewind(_) => rewind::kept(self.folder.path(), config.every, step, config.keep)?,
            _ => config.keep,
        };
        let replaced = self.aging.besides.filter(|besides| *besides != step);
        let keep = checkpoint::Keep { newest: newest.saturating_add(more), every: config.keep_every, replaced };
        if self.saved == Some(step) {
            // A kill may have come between its writing and the removal of an older one.
            return checkpoint::prune(self.folder.path(), step, keep);
        }
        self.log.sync()?;
        checkpoint::save(self.folder.path(), &self.learner.content(step)?, keep)?;
        self.saved = Some(step);
        self.aging.saved(begin.elapsed());
        Ok(())
    }

    /// The error that ended the run, with the report that it leaves.
    fn report(&self, error: Error) -> Error {
        match self.crash(&error.to_string()) {
            Some(report) => Error::Run { error: error.into(), step: self.at, report },
            None => error,
        }
    }

    fn crash(&self, message: &str) -> Option<PathBuf> {
        let samples: Vec<String> = self.batch.iter().map(|&index| self.data.describe(index)).collect();
        crash::write(&self.folder, self.resolved, &self.log, self.at, &samples, message)
    }
}

/// When the newest checkpoint is so old that another is written.
struct Aging {
    most: Duration,
    since: Instant,
    /// How long the last one took to be written.
    took: Duration,
    /// The step of the last that was written for its age alone.
    besides: Option<u64>,
}

impl Aging {
    fn new(minutes: f64, within: Option<Duration>) -> Self {
        let of_recipe = if minutes > 0.0 { Duration::from_secs_f64(60.0 * minutes) } else { Duration::MAX };
        let most = of_recipe.min(within.unwrap_or(Duration::MAX));
        Self { most, since: Instant::now(), took: Duration::ZERO, besides: None }
    }

    fn is_over(&self) -> bool {
        self.since.elapsed() >= self.most.max(20 * self.took)
    }

    fn saved(&mut self, took: Duration) {
        (self.since, self.took) = (Instant::now(), took);
    }
}

impl Window {
    /// Images a second, and the share of time spent waiting for data.
    fn rates(&self, images: usize) -> (f64, f64) {
        let elapsed = self.elapsed.as_secs_f64().max(1e-9);
        (f64::from(self.steps) * images as f64 / elapsed, self.waited.as_secs_f64() / elapsed)
    }
}
