//! The loop of a run: step, probes, log, checkpoints, and what happens when a step is not finite.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::broken::Broken;
use super::ranks::{Lead, Order};
use super::students::Student;
use super::timeline::RunEvent;
use super::{
    capture, crash, log, patience, probes, rewind, verdict, Observer, Outcome, Progress, RunFolder, RunResult,
};
use crate::contract::Dataset;
use crate::data::{Loader, LoaderSpec, Pipeline};
use crate::recipe::{OnNonFinite, Recipe};
use crate::resolved::Resolved;
use crate::step::{Learner, Report};
use crate::{checkpoint, Error, Result};

/// The error that a run unwound with: one of the device, thrown from where no error can be returned. A broken invariant
/// unwinds further.
pub(super) fn failure(payload: Box<dyn Any + Send>, run: &mut Run<'_>) -> Error {
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
pub(super) struct Window {
    steps: u32,
    elapsed: Duration,
    waited: Duration,
}

/// Where the batches of a run come from.
pub(super) enum Feed<'a> {
    Own(Box<Loader>),
    /// They are those of other students as well.
    Common(&'a Student),
}

/// A run that is under way.
pub(super) struct Run<'a> {
    pub(super) resolved: &'a Resolved,
    pub(super) recipe: &'a Recipe,
    pub(super) folder: RunFolder,
    pub(super) learner: Learner,
    pub(super) data: Arc<dyn Dataset>,
    pub(super) feed: Feed<'a>,
    pub(super) spec: LoaderSpec,
    pub(super) log: log::Log,
    pub(super) probes: probes::Probes,
    pub(super) patience: Option<patience::Patience>,
    /// What the recipe says will happen, by step.
    pub(super) planned: BTreeMap<u64, Vec<RunEvent>>,
    pub(super) verdict: verdict::Verdict,
    pub(super) told_eager: bool,
    /// Warnings that are said once.
    pub(super) told: BTreeSet<String>,
    pub(super) broken: Broken,
    /// Whether the run goes on from an earlier step.
    pub(super) went_back: bool,
    pub(super) window: Window,
    /// Time spent in steps, over all parts of an interrupted run.
    pub(super) seconds: f64,
    /// The step of the newest checkpoint.
    pub(super) saved: Option<u64>,
    pub(super) aging: Aging,
    /// The step that the run began at: not 0 if it continues another.
    pub(super) origin: u64,
    /// Steps that were skipped before it.
    pub(super) skipped_before: u64,
    /// The step that is being done, and the images in its batch.
    pub(super) at: u64,
    pub(super) batch: Vec<usize>,
    pub(super) observer: &'a mut dyn Observer,
    pub(super) lead: &'a Lead,
}

impl Run<'_> {
    /// Nothing if the run went back.
    pub(super) fn steps(&mut self, start: u64, stop: &AtomicBool) -> Result<Option<Outcome>> {
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
        if !probes.is_empty() && self.learner.is_sharded() {
            self.lead.together(&Order::Evaluated, || self.learner.gather_evaluated())?;
        }
        let (scores, warnings) = self.probes.run(probes, &self.learner, self.recipe);
        self.learner.forget_evaluated();
        self.warn_once(done, "probe", warnings)?;
        let undefined = scores.iter().filter(|(_, score)| !score.is_finite());
        let undefined = undefined.map(|(name, _)| format!("{name} is not a number here: nothing is written of it"));
        self.warn_once(done, "probe", undefined.collect::<Vec<_>>())?;
        if !scores.is_empty() {
            self.observer.probed(done, &scores);
        }
        if let Some(Err(error)) = self.patience.as_mut().map(|patience| patience.measured(done, &scores)) {
            // Who corrects the key goes on from here.
            self.save_besides(done)?;
            return Err(error);
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
        // What is said of a step counts it as the log does: the first is step 1.
        let done = step + 1;
        self.warn_once(done, "data", texts)?;
        if step == self.origin {
            let lost = self.log.crops(&batches.batches, self.recipe);
            self.warn_of(done, "log", lost)?;
        }
        let report = report?;
        if let Some(reason) = self.learner.eager_reason().filter(|_| !self.told_eager).map(String::from) {
            self.told_eager = true;
            self.warn(done, "device", &format!("steps are not recorded as a graph, which is slower: {reason}"))?;
        }
        if let Some(what) = &report.non_finite {
            self.non_finite(step, what, &batches.batches)?;
        }
        if let Some(limit) = report.spike {
            let loss = report.losses["loss/total"];
            let text = format!("the loss jumped to {loss:.4}, above {limit:.4}; the update was skipped");
            self.warn(done, "spike", &text)?;
        }
        if (report.non_finite.is_some() || report.spike.is_some()) && !self.went_back {
            self.lead.together(&Order::PassOver(step), || self.learner.pass_over(step))?;
        }
        let elapsed = begin.elapsed();
        self.seconds += elapsed.as_secs_f64();
        self.window.steps += 1;
        self.window.elapsed += elapsed;
        self.window.waited += waited;
        let (images_per_s, data_wait) = self.window.rates(self.recipe.batch.size);
        let progress = Progress { step: done, total: self.recipe.steps, report: &report, images_per_s, data_wait };
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
        let content = self.lead.together(&Order::Content, || self.learner.content(step))?;
        let rewinds = rewind::Rewinds::read(self.folder.path())?;
        let path = capture::write(&self.folder, content, self.resolved, (step, rewinds.count()), batches)?;
        let skipped = self.learner.skipped() - self.skipped_before - self.learner.spikes();
        match self.recipe.on_non_finite {
            OnNonFinite::Skip(most) if skipped <= most => {
                let text = format!(
                    "{what} is not finite; the update was skipped ({skipped} of at most {most}), captured in {}",
                    path.display()
                );
                self.warn(step + 1, "non_finite", &text)
            }
            OnNonFinite::Rewind(most) if rewinds.own() < most => {
                let count = rewinds.own() + 1;
                let to = rewinds.go_back(self.folder.path(), self.recipe.checkpoint.every, step, self.origin)?.to;
                let text = format!(
                    "{what} is not finite; the run goes back to step {to} ({count} of at most {most}), captured in {}",
                    path.display()
                );
                self.went_back = true;
                self.warn(step + 1, "non_finite", &text)
            }
            policy => {
                let mut help = format!("look at it with `dinolab replay {}`", path.display());
                help += "; usual causes: learning rate too high, a temperature too low, a loss without epsilon";
                if policy == OnNonFinite::Stop {
                    help += "; to go on over rare ones set `on_non_finite = { skip = 3 }` or `{ rewind = 3 }`";
                }
                Err(Error::NonFinite { step: step + 1, what: what.into(), capture: Some(path), help })
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
            let gradients = self.lead.together(&Order::Gradients, || self.learner.gradients())?;
            let lost = self.log.histograms(done, &self.learner, &gradients)?;
            self.warn_of(done, "log", lost)?;
        }
        self.window = Window::default();
        for (kind, text) in self.verdict.judge(report, &self.learner, self.data.as_ref()) {
            self.warn(done, kind, &text)?;
        }
        Ok(())
    }

    /// Writes down something that happened.
    pub(super) fn happened(&mut self, event: &RunEvent) -> Result<()> {
        let lost = self.log.event(event)?;
        self.warn_of(event.step, "log", lost)
    }

    /// Tells of something of a `kind` (reports gather by it), after `step` steps.
    pub(super) fn warn(&mut self, step: u64, kind: &str, text: &str) -> Result<()> {
        let said = format!("step {step}: {text}");
        match kind {
            // It is what was asked for.
            "fork" => self.observer.note(&said),
            _ => self.observer.warning(&said),
        }
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
            let left = checkpoint::prune(self.folder.path(), step, keep)?;
            return self.warn_once(step, "checkpoint", left);
        }
        if self.folder.keep_recipe(self.resolved)? {
            self.warn(step, "folder", "the run's recipe.toml was gone while it ran, and is written again")?;
        }
        self.log.sync()?;
        let saving = checkpoint::Saving::begin(self.folder.path())?;
        let written = self.lead.save(&self.learner, step, &saving, config.file_bytes())?;
        let saved = saving.finish((step, self.learner.skipped()), written, keep)?;
        self.warn_once(step, "checkpoint", saved.left)?;
        self.saved = Some(step);
        self.aging.saved(begin.elapsed());
        Ok(())
    }

    /// The error that ended the run, with the report that it leaves.
    pub(super) fn report(&self, error: Error) -> Error {
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
pub(super) struct Aging {
    most: Duration,
    since: Instant,
    /// How long the last one took to be written.
    took: Duration,
    /// The step of the last that was written for its age alone.
    besides: Option<u64>,
}

impl Aging {
    pub(super) fn new(minutes: f64, within: Option<Duration>) -> Self {
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
