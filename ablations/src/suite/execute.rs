//! Doing the runs of a plan: those that are not done yet, one after the other, each under a lock of its own.
//!
//! A second process on the same folder takes runs that nobody holds, so several can work on one suite; processes that do
//! one run each are started by [`cluster`](crate::cluster). Every arm is first tried for a few steps, so that a broken arm
//! or a misspelt metric costs seconds and not hours.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dinolab_core::{Error, Result};
use fs4::{FileExt, TryLockError};

use super::file::{nearest, Overrides};
use super::plan::{Event, Job, Outcome, Plan, PlannedRun, Prepare};
use super::progress::Progress;
use super::record::{RunResult, Status, FAILURE};
use super::retry::{record_failure, Budget, Next};
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
    claim(plan)?;
    if !smoke(plan, &untried(plan, &runs)?, options, prepare, progress)? {
        return Ok(Tally { interrupted: Some(("a trial run".into(), 0)), ..Tally::default() });
    }
    let mut tally = Tally::default();
    for run in with_trunks(plan, &runs) {
        if options.stop.load(Ordering::Relaxed) {
            tally.interrupted = Some((run.label(), 0));
            break;
        }
        let before = tally.failed.len();
        one(plan, run, options, prepare, progress, &mut tally)?;
        if tally.interrupted.is_some() || (options.fail_fast && tally.failed.len() > before) {
            break;
        }
    }
    progress.finish();
    Ok(tally)
}

/// Does the run in `dir` of the suite's folder and no other, as [`execute`] does it.
///
/// # Errors
/// If the plan has no such run, its recipe is another than when the suite was submitted, or the folder cannot be used or
/// belongs to something else.
pub fn execute_run(
    plan: &Plan,
    dir: &Path,
    options: &ExecuteOptions,
    prepare: Prepare<'_>,
    progress: &Progress,
) -> Result<Tally> {
    let run = plan.all_runs().find(|run| run.dir == dir).ok_or_else(|| {
        let help =
            "its runs are trunk/seed-<n> and arms/<arm>/seed-<n>; the suite may have changed since it was submitted";
        Error::content(&plan.suite.path, format!("the suite has no run {}", dir.display()), help)
    })?;
    if !plan.is_claimed(run)? {
        claim(plan)?;
    }
    let mut tally = Tally::default();
    one(plan, run, options, prepare, progress, &mut tally)?;
    progress.finish();
    Ok(tally)
}

/// Tries the arms that were chosen and have not begun, and does no run; false if it was asked to stop.
///
/// # Errors
/// As [`execute`].
pub fn try_arms(plan: &Plan, options: &ExecuteOptions, prepare: Prepare<'_>, progress: &Progress) -> Result<bool> {
    let runs = select(plan, &options.arms, &options.seeds)?;
    if !plan.out.join("suite.json").exists() {
        claim(plan)?;
    }
    let done = smoke(plan, &untried(plan, &runs)?, options, prepare, progress)?;
    progress.finish();
    Ok(done)
}

/// Makes the suite's folder, or holds the plan to what is in it.
///
/// # Errors
/// If it cannot be used or belongs to something else.
pub fn claim(plan: &Plan) -> Result<()> {
    std::fs::create_dir_all(&plan.out).map_err(Error::io("create", &plan.out))?;
    let _lock = lock_folder(plan)?;
    dinolab_core::checkpoint::remove_unfinished(&plan.out)?;
    plan.claim_folder()
}

/// Of each arm none of whose `runs` has begun the first.
///
/// # Errors
/// If a run's folder has files that cannot be understood.
pub fn untried<'a>(plan: &Plan, runs: &[&'a PlannedRun]) -> Result<Vec<&'a PlannedRun>> {
    let mut tried = Vec::new();
    for arm in &plan.suite.arms {
        let mine: Vec<_> = runs.iter().filter(|r| r.arm == arm.name).collect();
        let mut begun = false;
        for run in &mine {
            begun |= Status::of(&plan.out.join(&run.dir))? != Status::Pending;
        }
        tried.extend(mine.first().filter(|_| !begun).copied().copied());
    }
    Ok(tried)
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
///
/// # Errors
/// If the trunk's folder has files that cannot be understood.
pub fn has_trunk(plan: &Plan, run: &PlannedRun) -> Result<bool> {
    let trunk = plan.trunks.iter().find(|trunk| trunk.seed == run.seed && run.arm != TRUNK);
    trunk.map_or(Ok(true), |trunk| Ok(matches!(Status::of(&plan.out.join(&trunk.dir))?, Status::Finished(_))))
}

/// Does one run if it is to be done, its trunk is there and nobody else does it; again, as often as the suite allows it.
fn one(
    plan: &Plan,
    run: &PlannedRun,
    options: &ExecuteOptions,
    prepare: Prepare<'_>,
    progress: &Progress,
    tally: &mut Tally,
) -> Result<()> {
    let (dir, label) = (plan.out.join(&run.dir), run.label());
    if !has_trunk(plan, run)? {
        progress.say(&format!("{label}: waits for its trunk"));
        tally.waiting.push(label);
        return Ok(());
    }
    let Some(_lock) = try_lock(&lock_path(plan, run)?)? else {
        progress.say(&format!("{label}: another process is at it"));
        tally.elsewhere.push(label);
        return Ok(());
    };
    // The status is read under the lock: another process may have ended this run a moment ago.
    let mut resume = match Status::of(&dir)? {
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
    let mut budget = Budget::of(&plan.suite, &dir, options.retry_failed)?;
    let mut changed = None;
    loop {
        progress.begin(&label);
        let mut watch = |event: Event<'_>| progress.watch(&event);
        let job = Job { out: &dir, resume, stop: options.stop.clone(), watch: &mut watch };
        let error = match changed.as_ref().unwrap_or(&run.prepared).run(job) {
            Ok(Outcome::Finished) => break,
            Ok(Outcome::Interrupted { step }) => {
                tally.interrupted = Some((label, step));
                return Ok(());
            }
            Err(error) => error.to_string(),
        };
        match budget.next(&error, changed.as_ref().unwrap_or(&run.prepared).recipe())? {
            Next::Again => {
                progress.say(&format!("{label}: failed, and is tried again: {error}"));
                resume = Status::of(&dir)? == Status::Interrupted;
            }
            Next::MoreMicroBatches(overrides) => {
                progress.say(&format!("{label}: out of memory, and begun anew with {}", said(&overrides)));
                let all = run.overrides.iter().chain(&overrides).map(|(key, value)| (key.clone(), value.clone()));
                resume = false;
                match prepare(&run.base, &all.collect()) {
                    Ok(prepared) => changed = Some(prepared),
                    Err(refused) => return fails(plan, run, &refused.to_string(), progress, tally),
                }
            }
            Next::Fails => return fails(plan, run, &error, progress, tally),
        }
    }
    let Status::Finished(result) = Status::of(&dir)? else {
        return Err(Error::content(dir, "the run ended but left no result.json", "this is a bug of the trainer"));
    };
    progress.say(&format!("{label}: {}", headline(plan, &result)));
    progress.done();
    tally.finished += 1;
    Ok(())
}

/// Records and tells that a run ended with `error`.
fn fails(plan: &Plan, run: &PlannedRun, error: &str, progress: &Progress, tally: &mut Tally) -> Result<()> {
    record_failure(&plan.out.join(&run.dir), error)?;
    progress.say(&format!("{}: failed: {error}", run.label()));
    progress.done();
    tally.failed.push((run.dir.display().to_string(), error.into()));
    Ok(())
}

/// Overrides in words.
fn said(overrides: &Overrides) -> String {
    overrides.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", ")
}

/// A short run of the runs in `tried`, in a folder that is thrown away; false if it was asked to stop.
fn smoke(
    plan: &Plan,
    tried: &[&PlannedRun],
    options: &ExecuteOptions,
    prepare: Prepare<'_>,
    progress: &Progress,
) -> Result<bool> {
    let mut broken = Vec::new();
    if options.smoke_steps == 0 {
        return Ok(true);
    }
    // Arms are tried from a trunk that was tried, which is kept until all are.
    let trunk = tried.first().and_then(|first| plan.trunks.iter().find(|trunk| trunk.seed == first.seed));
    let mut trunk_trial = None;
    for run in trunk.into_iter().chain(tried.iter().copied()) {
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
            // Its runs will be tried with more micro-batches.
            Err(error) if plan.suite.on_out_of_memory.shrinks(&error.to_string()) => {}
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
