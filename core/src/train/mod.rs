//! A run from its first step to its last: reading data, stepping, logging, probing, checkpointing, stopping, resuming.
//!
//! ```text
//! <run>/
//!   recipe.toml            the resolved recipe, every default filled in, written before step 0
//!   run.json               version, revision, data, device, threads
//!   metrics.jsonl          one object a logged step: the source of truth
//!   messages.jsonl         warnings, one object each
//!   tensorboard/           the same numbers, pictures of crops, histograms
//!   checkpoints/           see `checkpoint`
//!   captures/              batches and weights of steps that were not finite
//!   result.json            written last: a run that has it is finished
//! ```

mod capture;
mod folder;
mod log;
mod probes;
mod trained;
mod verdict;

pub use capture::replay;
pub use folder::{RunFolder, RunInfo, RunResult};
pub use trained::Trained;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::contract::Dataset;
use crate::data::{Loader, LoaderSpec};
use crate::recipe::{OnNonFinite, Recipe, Resolved};
use crate::registry::DataContext;
use crate::step::{Learner, Report};
use crate::{checkpoint, Error, Result};

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
    /// A run starts, or continues after `step` steps.
    fn started(&mut self, recipe: &Recipe, step: u64) {
        let _ = (recipe, step);
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
    LoaderSpec {
        batch: recipe.batch.clone(),
        crops: recipe.crops.clone(),
        masking: recipe.masking.clone(),
        patch_size: learner.model().backbone.patch_size(),
        gram_crop_size: learner.gram_crop_size(),
        seed: recipe.seed,
        device: learner.device(),
        dtype: learner.features_dtype(),
        start_step: start,
        total_steps: recipe.steps,
    }
}

/// Runs a recipe to its end, or until asked to stop.
///
/// # Errors
/// If the recipe cannot be built, the folder cannot be used, data cannot be read, or a loss is not finite (see
/// [`OnNonFinite`]).
pub fn run(resolved: &Resolved, options: &RunOptions, observer: &mut dyn Observer) -> Result<Outcome> {
    let recipe = &resolved.recipe;
    let folder = RunFolder::open(resolved, options)?;
    if let Some(result) = folder.result()? {
        return Ok(Outcome::Finished(result));
    }
    let mut messages = Vec::new();
    let (learner, start) = match checkpoint::load_newest(folder.path())? {
        Some((checkpoint, passed)) => {
            let passed = passed.into_iter().map(|e| ("checkpoint", format!("passed over a broken checkpoint: {e}")));
            messages.extend(passed);
            (Learner::from_checkpoint(recipe, &checkpoint)?, checkpoint.step)
        }
        None => (Learner::new(recipe)?, 0),
    };
    let (train, test) = datasets(recipe)?;
    resolved.check_data(test.as_ref())?;
    let spec = loader_spec(recipe, &learner, start);
    let probes = probes::Probes::new(recipe, train.clone(), test)?;
    let loader = Loader::new(train.clone(), spec)?;
    let before = folder.begin(resolved, options, train.as_ref())?;
    if start > 0 && before.is_some_and(|before| before.data != train.fingerprint()) {
        let text =
            "files came, went or changed in the data folder since this run was started: it goes on, but not to the \
            bits of an uninterrupted run";
        messages.push(("data", text.into()));
    }
    let (log, seconds) = log::Log::open(&folder, recipe, start)?;
    let mut run = Run {
        log,
        probes,
        loader,
        verdict: verdict::Verdict::default(),
        told_eager: false,
        window: Window::default(),
        seconds,
        observer,
        resolved,
        recipe,
        folder,
        learner,
        data: train,
    };
    run.observer.started(recipe, start);
    for (kind, text) in messages {
        run.warn(start, kind, &text)?;
    }
    let losses = run.learner.model().losses.iter();
    let notes: Vec<String> =
        losses.filter_map(|l| l.loss.note().map(|note| format!("loss `{}` {note}", l.name))).collect();
    for text in notes {
        run.warn(start, "loss", &text)?;
    }
    run.steps(start, &options.stop)
}

/// Throughput over the steps since the last logged one.
#[derive(Default)]
struct Window {
    steps: u32,
    elapsed: Duration,
    waited: Duration,
}

struct Run<'a> {
    resolved: &'a Resolved,
    recipe: &'a Recipe,
    folder: RunFolder,
    learner: Learner,
    data: Arc<dyn Dataset>,
    loader: Loader,
    log: log::Log,
    probes: probes::Probes,
    verdict: verdict::Verdict,
    told_eager: bool,
    window: Window,
    /// Time spent in steps, over all parts of an interrupted run.
    seconds: f64,
    observer: &'a mut dyn Observer,
}

impl Run<'_> {
    fn steps(&mut self, start: u64, stop: &AtomicBool) -> Result<Outcome> {
        let recipe = self.recipe;
        let mut report = Report::default();
        let mut scores = BTreeMap::new();
        for step in start..recipe.steps {
            if stop.load(Ordering::Relaxed) {
                self.save(step)?;
                return Ok(Outcome::Interrupted { step });
            }
            let done = step + 1;
            let logged = step == start || done % recipe.log.every.max(1) == 0 || done == recipe.steps;
            report = self.one_step(step, logged)?;
            if report.non_finite.is_none() {
                scores = self.probes.run(&self.learner, done, recipe)?;
            }
            if !scores.is_empty() {
                self.observer.probed(done, &scores);
            }
            if logged || !scores.is_empty() {
                self.log_step(done, &report, &scores)?;
            }
            let every = recipe.checkpoint.every;
            if every > 0 && done % every == 0 && done < recipe.steps {
                self.save(done)?;
            }
        }
        self.save(recipe.steps)?;
        let mut metrics = report.losses;
        metrics.extend(scores);
        metrics.retain(|_, v| v.is_finite());
        let result = RunResult { steps: recipe.steps, seconds: self.seconds, skipped: self.learner.skipped(), metrics };
        self.folder.finish(&result)?;
        Ok(Outcome::Finished(result))
    }

    fn one_step(&mut self, step: u64, logged: bool) -> Result<Report> {
        let begin = Instant::now();
        let batches = self.loader.next().expect("the loader gives every step of the run")?;
        let (waited, broken) = (batches.waited, batches.broken);
        for sample in broken {
            let text = format!("{} cannot be used and was replaced: {}", sample.name, sample.reason);
            self.warn(step, "data", &text)?;
        }
        if logged && step == 0 {
            self.log.crops(&batches.batches, self.recipe);
        }
        let report = self.learner.step(step, &batches.batches, logged)?;
        if let Some(reason) = self.learner.eager_reason().filter(|_| !self.told_eager).map(String::from) {
            self.told_eager = true;
            self.warn(step, "device", &format!("steps are not recorded as a graph, which is slower: {reason}"))?;
        }
        if let Some(what) = &report.non_finite {
            self.non_finite(step, what, &batches.batches)?;
        }
        let elapsed = begin.elapsed();
        self.seconds += elapsed.as_secs_f64();
        self.window.steps += 1;
        self.window.elapsed += elapsed;
        self.window.waited += waited;
        let (images_per_s, data_wait) = self.window.rates(self.recipe.batch.size);
        let progress = Progress { step: step + 1, total: self.recipe.steps, report: &report, images_per_s, data_wait };
        self.observer.step(&progress);
        Ok(report)
    }

    /// The batch and weights are captured; then the run stops, or goes on if the recipe allows it.
    fn non_finite(&mut self, step: u64, what: &str, batches: &[crate::data::Batch]) -> Result<()> {
        let path = capture::write(&self.folder, &self.learner, self.resolved, step, batches)?;
        let skipped = self.learner.skipped();
        match self.recipe.on_non_finite {
            OnNonFinite::Skip(most) if skipped <= most => {
                let text = format!(
                    "{what} is not finite; the update was skipped ({skipped} of at most {most}), captured in {}",
                    path.display()
                );
                self.warn(step, "non_finite", &text)
            }
            policy => {
                let mut help = format!("look at it with `dinolab replay {}`", path.display());
                help += "; usual causes: learning rate too high, a temperature too low, a loss without epsilon";
                if policy == OnNonFinite::Stop {
                    help += "; to go on over rare ones set `on_non_finite = { skip = 3 }`";
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
        self.log.step(done, report, scores, &rates)?;
        if self.recipe.log.histograms_every > 0 && done.is_multiple_of(self.recipe.log.histograms_every) {
            self.log.histograms(done, &self.learner);
        }
        self.window = Window::default();
        for (kind, text) in self.verdict.judge(report, &self.learner, self.data.as_ref()) {
            self.warn(done, kind, &text)?;
        }
        Ok(())
    }

    /// Warns of something of a `kind` (reports gather by it), after `step` steps.
    fn warn(&mut self, step: u64, kind: &str, text: &str) -> Result<()> {
        self.observer.warning(&format!("step {step}: {text}"));
        self.log.warning(step, kind, text)
    }

    fn save(&mut self, step: u64) -> Result<()> {
        self.log.flush()?;
        let content = self.learner.weights().content(step, self.learner.model());
        checkpoint::save(self.folder.path(), &content, self.recipe.checkpoint.keep).map(drop)
    }
}

impl Window {
    /// Images a second, and the share of time spent waiting for data.
    fn rates(&self, images: usize) -> (f64, f64) {
        let elapsed = self.elapsed.as_secs_f64().max(1e-9);
        (f64::from(self.steps) * images as f64 / elapsed, self.waited.as_secs_f64() / elapsed)
    }
}
