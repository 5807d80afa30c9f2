//! Doing the runs of a plan: those that are not done yet, one after the other, each under a lock of its own.
//!
//! A second process on the same folder takes runs that nobody holds, so several can work on one suite. Every arm is
//! first tried for a few steps, so that a broken arm or a misspelt metric costs seconds and not hours.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dinolab_core::{Error, Result};
use fs4::{FileExt, TryLockError};

use super::file::nearest;
use super::plan::{Event, Job, Outcome, Plan, PlannedRun, Prepare};
use super::progress::Progress;
use super::record::{record_failure, RunResult, Status, FAILURE};
use super::trunk::TRUNK;

/// What to do of a plan, and how.
#[derive(Clone, Debug)]
pub struct ExecuteOptions {
    /// Arms to run; all if empty.
    pub arms: Vec<String>,
    /// Seeds to run; all if empty.
    pub seeds: Vec<u64>,
    /// Steps of the trial run of every arm; 0: no trial.
    pub smoke_steps: u64,
    /// End at the first run that fails, instead of going on with the others.
    pub fail_fast: bool,
    /// Do failed runs again, from their newest checkpoint if they have one.
    pub retry_failed: bool,
    /// Set by signals: finish the step, save, and return.
    pub stop: Arc<AtomicBool>,
}

/// What was done and what is left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs that this process finished.
    pub finished: usize,
    /// Runs that had been finished before.
    pub skipped: usize,
    /// Runs that failed, now or before: folder and error.
    pub failed: Vec<(String, String)>,
    /// Runs that another process holds.
    pub elsewhere: Vec<String>,
    /// Runs whose trunk failed, or is being run by another process.
    pub waiting: Vec<String>,
    /// The run that was asked to stop, and its step.
    pub interrupted: Option<(String, u64)>,
}

/// Does every selected run of `plan` that is not finished.
///
/// Finished runs are neither repeated nor touched, interrupted ones continue from their newest checkpoint, failed ones
/// stay failed unless `retry_failed`. A run that fails is recorded and the others go on, unless `fail_fast`.
///
/// # Errors
/// If the selection names no arm or seed of the suite, the folder cannot be used or belongs to something else, or a
/// trial run fails.
pub fn execute(plan: &Plan, options: &ExecuteOptions, prepare: Prepare<'_>, progress: &Progress) -> Result<Tally> {
    let runs = select(plan, &options.arms, &options.seeds)?;
    std::fs::create_dir_all(&plan.out).map_err(Error::io("create", &plan.out))?;
    {
        let _lock = lock_folder(plan)?;
        dinolab_core::checkpoint::remove_unfinished(&plan.out)?;
        plan.claim_folder()?;
    }
    if options.smoke_steps > 0 && !smoke(plan, &runs, options, prepare, progress)? {
        return Ok(Tally { interrupted: Some(("a trial run".into(), 0)), ..Tally::default() });
    }
    let mut tally = Tally::default();
    for run in with_trunks(plan, &runs) {
        if options.stop.load(Ordering::Relaxed) {
            tally.interrupted = Some((label(run), 0));
            break;
        }
        if !has_trunk(plan, run)? {
            progress.say(&format!("{}: waits for its trunk", label(run)));
            tally.waiting.push(label(run));
            continue;
        }
        let before = tally.failed.len();
        one(plan, run, options, progress, &mut tally)?;
        if tally.interrupted.is_some() || (options.fail_fast && tally.failed.len() > before) {
            break;
        }
    }
    progress.finish();
    Ok(tally)
}

/// The runs of these arms and seeds; no names mean all.
///
/// # Errors
/// If the suite has no such arm or seed.
fn select<'a>(plan: &'a Plan, arms: &[String], seeds: &[u64]) -> Result<Vec<&'a PlannedRun>> {
    let known: Vec<&str> = plan.suite.arms.iter().map(|a| a.name.as_str()).collect();
    if let Some(arm) = arms.iter().find(|a| !known.contains(&a.as_str())) {
        let help = format!("its arms are {}; did you mean `{}`?", known.join(", "), nearest(arm, &known));
        return Err(Error::user(format!("the suite has no arm `{arm}`"), help));
    }
    if let Some(seed) = seeds.iter().find(|s| !plan.suite.seeds.contains(s)) {
        let help = format!("its seeds are {:?}; add yours to `seeds` in the suite", plan.suite.seeds);
        return Err(Error::user(format!("the suite has no seed {seed}"), help));
    }
    let chosen = |run: &&PlannedRun| {
        (arms.is_empty() || arms.contains(&run.arm)) && (seeds.is_empty() || seeds.contains(&run.seed))
    };
    Ok(plan.runs.iter().filter(chosen).collect())
}

/// The runs of these arms and seeds, each seed's after its trunk; no names mean all.
///
/// # Errors
/// If the suite has no such arm or seed.
pub fn chosen<'a>(plan: &'a Plan, arms: &[String], seeds: &[u64]) -> Result<Vec<&'a PlannedRun>> {
    Ok(with_trunks(plan, &select(plan, arms, seeds)?))
}

/// These runs, each seed's after its trunk.
fn with_trunks<'a>(plan: &'a Plan, runs: &[&'a PlannedRun]) -> Vec<&'a PlannedRun> {
    let chosen = |run: &&PlannedRun| {
        runs.iter().any(|r| r.seed == run.seed && (run.arm == TRUNK || (&r.arm, r.seed) == (&run.arm, run.seed)))
    };
    plan.all_runs().filter(chosen).collect()
}

/// Whether the trunk that an arm goes on from is done; true where there is none to wait for.
fn has_trunk(plan: &Plan, run: &PlannedRun) -> Result<bool> {
    let trunk = plan.trunks.iter().find(|trunk| trunk.seed == run.seed && run.arm != TRUNK);
    trunk.map_or(Ok(true), |trunk| Ok(matches!(Status::of(&plan.out.join(&trunk.dir))?, Status::Finished(_))))
}

/// Does one run if it is to be done and nobody else does it.
fn one(plan: &Plan, run: &PlannedRun, options: &ExecuteOptions, progress: &Progress, tally: &mut Tally) -> Result<()> {
    let (dir, label) = (plan.out.join(&run.dir), label(run));
    let Some(_lock) = try_lock(&lock_path(plan, run)?)? else {
        progress.say(&format!("{label}: another process is at it"));
        tally.elsewhere.push(label);
        return Ok(());
    };
    // The status is read under the lock: another process may have ended this run a moment ago.
    let resume = match Status::of(&dir)? {
        Status::Finished(_) => {
            tally.skipped += 1;
            return Ok(());
        }
        Status::Failed(error) if !options.retry_failed => {
            progress.say(&format!("{label}: failed before; --retry-failed does it again"));
            progress.done();
            tally.failed.push((run.dir.display().to_string(), error));
            return Ok(());
        }
        Status::Failed(_) => {
            std::fs::remove_file(dir.join(FAILURE)).map_err(Error::io("remove", dir.join(FAILURE)))?;
            Status::of(&dir)? == Status::Interrupted
        }
        Status::Interrupted => true,
        Status::Pending => false,
    };
    std::fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    progress.begin(&label);
    let mut watch = |event: Event<'_>| progress.watch(&event);
    let job = Job { out: &dir, resume, stop: options.stop.clone(), watch: &mut watch };
    match run.prepared.run(job) {
        Ok(Outcome::Finished) => {
            let Status::Finished(result) = Status::of(&dir)? else {
                return Err(Error::content(
                    dir,
                    "the run ended but left no result.json",
                    "this is a bug of the trainer",
                ));
            };
            progress.say(&format!("{label}: {}", headline(plan, &result)));
            progress.done();
            tally.finished += 1;
        }
        Ok(Outcome::Interrupted { step }) => tally.interrupted = Some((label, step)),
        Err(error) => {
            let error = error.to_string();
            record_failure(&dir, &error)?;
            progress.say(&format!("{label}: failed: {error}"));
            progress.done();
            tally.failed.push((run.dir.display().to_string(), error));
        }
    }
    Ok(())
}

/// A short run of every arm that has not begun, in a folder that is thrown away; false if it was asked to stop.
fn smoke(
    plan: &Plan,
    runs: &[&PlannedRun],
    options: &ExecuteOptions,
    prepare: Prepare<'_>,
    progress: &Progress,
) -> Result<bool> {
    let mut broken = Vec::new();
    let mut tried = Vec::new();
    for arm in &plan.suite.arms {
        let mine: Vec<_> = runs.iter().filter(|r| r.arm == arm.name).collect();
        let mut begun = false;
        for run in &mine {
            begun |= Status::of(&plan.out.join(&run.dir))? != Status::Pending;
        }
        tried.extend(mine.first().filter(|_| !begun).copied().copied());
    }
    // Arms are tried from a trunk that was tried, which is kept until all are.
    let trunk = tried.first().and_then(|first| plan.trunks.iter().find(|trunk| trunk.seed == first.seed));
    let mut trunk_trial = None;
    for run in trunk.into_iter().chain(tried) {
        // One process at a time tries an arm; a killed one may have left its folder.
        let lock = lock(&locks(plan)?.join(format!("trial-{}.lock", run.arm)))?;
        let folder = Trial::begin(plan.out.join(format!(".trial-{}", run.arm)))?;
        progress.begin(&format!("trying {}", run.arm));
        let overrides = plan.trial_of(run, options.smoke_steps);
        let out = folder.0.clone();
        let mut watch = |event: Event<'_>| progress.watch(&event);
        let job = Job { out: &out, resume: false, stop: options.stop.clone(), watch: &mut watch };
        match prepare(&run.base, &overrides).and_then(|p| p.run(job)) {
            Ok(Outcome::Interrupted { .. }) => return Ok(false),
            Ok(Outcome::Finished) if run.arm == TRUNK => trunk_trial = Some((folder, lock)),
            Ok(Outcome::Finished) => broken.extend(unmeasured(plan, &run.arm, &out)?),
            Err(error) => broken.push(format!("{}: {error}", run.arm)),
        }
        if run.arm == TRUNK && trunk_trial.is_none() {
            break;
        }
    }
    drop(trunk_trial);
    if broken.is_empty() {
        return Ok(true);
    }
    progress.finish();
    let problem = format!("a trial of {} steps shows:\n  {}", options.smoke_steps, broken.join("\n  "));
    let help = "nothing was run yet; mend it, or go ahead without trials: --smoke-steps 0";
    Err(Error::content(&plan.suite.path, problem, help))
}

/// The folder of a trial run, which goes with it.
struct Trial(PathBuf);

impl Trial {
    fn begin(path: PathBuf) -> Result<Self> {
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
        std::fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        Ok(Self(path))
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // What cannot be removed now is removed before the next trial of the arm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Metrics of the suite that the trial run in `out` did not measure.
fn unmeasured(plan: &Plan, arm: &str, out: &Path) -> Result<Vec<String>> {
    let Status::Finished(result) = Status::of(out)? else {
        return Ok(vec![format!("{arm}: the run ended but left no result.json")]);
    };
    let known: Vec<&str> = result.metrics.keys().map(String::as_str).collect();
    let missing = plan.suite.metrics.iter().filter(|m| !known.contains(&m.name.as_str()));
    let say = |name: &str| {
        format!(
            "{arm}: metric `{name}` is not measured; did you mean `{}`? ({})",
            nearest(name, &known),
            known.join(", ")
        )
    };
    // A loss that an arm switches off is missing there by design; `Plan::warnings` said so.
    Ok(missing.filter(|m| !plan.warnings.iter().any(|w| w.contains(&m.name))).map(|m| say(&m.name)).collect())
}

fn headline(plan: &Plan, result: &RunResult) -> String {
    let metric = &plan.suite.metrics[0].name;
    let value = match result.metrics.get(metric) {
        Some(Some(value)) => format!("{value:.4}"),
        Some(None) => "not a finite number".into(),
        None => "not measured".into(),
    };
    format!("{metric} {value}, {} steps in {:.0} s", result.steps, result.seconds)
}

fn label(run: &PlannedRun) -> String {
    format!("{} seed {}", run.arm, run.seed)
}

/// Locks live beside the runs, so that a run's folder holds nothing but the run.
fn locks(plan: &Plan) -> Result<PathBuf> {
    let folder = plan.out.join("locks");
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    Ok(folder)
}

fn lock_path(plan: &Plan, run: &PlannedRun) -> Result<PathBuf> {
    Ok(locks(plan)?.join(format!("{}-seed-{}.lock", run.arm, run.seed)))
}

/// The lock under which the files of the suite's folder are written.
///
/// # Errors
/// If it cannot be taken.
pub fn lock_folder(plan: &Plan) -> Result<File> {
    lock(&plan.out.join("suite.lock"))
}

/// The lock, held until the file is dropped; the operating system frees it when a process dies.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    FileExt::lock(&file).map_err(Error::io("lock", path))?;
    Ok(file)
}

/// As [`lock`], but `None` if somebody holds it.
fn try_lock(path: &Path) -> Result<Option<File>> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    match FileExt::try_lock(&file) {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", path)(e)),
    }
}
