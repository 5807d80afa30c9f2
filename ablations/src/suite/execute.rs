//! Doing the runs of a plan: those that are not done yet, one after the other, each under a lock of its own.
//!
//! A second process on the same folder takes runs that nobody holds, so several can work on one suite; processes that do
//! one run each are started by `cluster`. Every arm is first tried for a few steps, so that a broken arm
//! or a misspelt metric costs seconds and not hours.

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use dinolab_core::checkpoint::newest_step;
use dinolab_core::{Error, Result};

use super::file::{nearest, Overrides};
use super::locks::{lock_folder, lock_path, try_lock};
use super::options::{ExecuteOptions, LostIn, Tally};
use super::plan::{Event, Job, Outcome, Plan, PlannedRun, Prepare, Prepared};
use super::progress::Progress;
use super::record::{RunResult, Status};
use super::retry::{self, loses_the_gpu, record_failure, Budget, Next};
use super::rules;
use super::trial::{smoke, untried, Tried};
use super::trunk::TRUNK;

/// How often a run under rules looks whether all are asked to stop.
const PASS_ON: Duration = Duration::from_millis(20);

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
    let mut tally = Tally::default();
    match smoke(plan, &untried(plan, &runs)?, options, prepare, progress)? {
        Tried::Well => {}
        Tried::Stopped => {
            tally.interrupted = Some(("a trial run".into(), None));
            return Ok(tally);
        }
        Tried::LostGpu => {
            tally.lost_gpu = Some(LostIn::Trial);
            return Ok(tally);
        }
    }
    let all = with_trunks(plan, &runs, options.retry_failed)?;
    for (i, run) in all.iter().enumerate() {
        if options.stop.load(Ordering::Relaxed) {
            tally.interrupted = Some((run.label(), Some(0)));
            break;
        }
        let before = tally.failed.len();
        let is_old = Status::of(&plan.out.join(&run.dir))?.final_failure(options.retry_failed).is_some();
        one(plan, run, options, prepare, progress, &mut tally)?;
        if options.fail_fast && !is_old && tally.failed.len() > before {
            tally.lost_gpu = None;
            break;
        }
        if tally.lost_gpu.is_some() {
            // Whoever goes on does not do failed runs again, or it would do this one for ever.
            for later in all[i + 1..].iter().filter(|_| options.retry_failed) {
                let dir = plan.out.join(&later.dir);
                let status = Status::of(&dir)?;
                let is_done_again = matches!(status, Status::Failed(_)) && status.final_failure(true).is_none();
                let lock = if is_done_again { try_lock(&lock_path(plan, later)?)? } else { None };
                if lock.is_some() {
                    retry::forget_failure(&dir)?;
                }
            }
            break;
        }
        if tally.interrupted.is_some() {
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

/// Tries the arms that were chosen and have not begun, and does no run.
///
/// # Errors
/// As [`execute`].
pub fn try_arms(plan: &Plan, options: &ExecuteOptions, prepare: Prepare<'_>, progress: &Progress) -> Result<Tried> {
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
    dinolab_core::files::remove_unfinished(&plan.out)?;
    plan.claim_folder()
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
pub fn chosen<'a>(plan: &'a Plan, arms: &[String], seeds: &[u64], retry_failed: bool) -> Result<Vec<&'a PlannedRun>> {
    with_trunks(plan, &select(plan, arms, seeds)?, retry_failed)
}

/// These runs, each seed's after its trunk. A trunk that is not there is trained for arms that are to be done, and no others: those
/// that are finished or failed for good need it no more.
fn with_trunks<'a>(plan: &'a Plan, runs: &[&'a PlannedRun], retry_failed: bool) -> Result<Vec<&'a PlannedRun>> {
    let mut open = Vec::new();
    for run in runs {
        let status = Status::of(&plan.out.join(&run.dir))?;
        let is_closed = matches!(status, Status::Finished(_)) || status.final_failure(retry_failed).is_some();
        open.extend((!is_closed).then_some(run.seed));
    }
    let mut all = Vec::new();
    for run in plan.all_runs() {
        let of_seed = || runs.iter().any(|arm| arm.seed == run.seed);
        let chosen = match run.arm == TRUNK {
            true => open.contains(&run.seed) || of_seed() && is_finished(plan, run)?,
            false => runs.iter().any(|arm| (&arm.arm, arm.seed) == (&run.arm, run.seed)),
        };
        all.extend(chosen.then_some(run));
    }
    Ok(all)
}

fn is_finished(plan: &Plan, run: &PlannedRun) -> Result<bool> {
    Ok(matches!(Status::of(&plan.out.join(&run.dir))?, Status::Finished(_)))
}

/// Whether the trunk that an arm goes on from is done; true where there is none to wait for.
///
/// # Errors
/// If the trunk's folder has files that cannot be understood.
pub fn has_trunk(plan: &Plan, run: &PlannedRun) -> Result<bool> {
    let trunk = plan.trunks.iter().find(|trunk| trunk.seed == run.seed && run.arm != TRUNK);
    trunk.map_or(Ok(true), |trunk| is_finished(plan, trunk))
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
    let is_open = Status::of(&dir)?.final_failure(options.retry_failed).is_none();
    if is_open && !has_trunk(plan, run)? {
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
    let status = Status::of(&dir)?;
    if let Some((error, why)) = status.final_failure(options.retry_failed) {
        progress.say(&format!("{label}: {why}"));
        progress.done();
        tally.failed.push((run.dir.display().to_string(), error.into()));
        return Ok(());
    }
    let mut resume = match status {
        Status::Finished(_) => {
            tally.skipped += 1;
            return Ok(());
        }
        Status::Failed(_) => {
            retry::forget_failure(&dir)?;
            Status::of(&dir)? != Status::Pending
        }
        Status::Interrupted => true,
        Status::Pending => false,
    };
    std::fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    if let Some(why) = rules::with_its_arm(plan, run)? {
        return fails(plan, run, &why, progress, tally);
    }
    let mut budget = Budget::of(&plan.suite, &dir)?;
    let mut changed = None;
    loop {
        progress.begin(&label);
        let how = How { resume, save_within: budget.save_within() };
        let (ended, dropped) =
            under_rules(plan, changed.as_ref().unwrap_or(&run.prepared).as_ref(), &dir, &how, options, progress);
        let error = match ended {
            Ok(Outcome::Finished) => {
                let Status::Finished(result) = Status::of(&dir)? else { break };
                // A rule may have been broken by the last step, or by a probe that runs at the end alone.
                let why = dropped.or_else(|| rules::judge_end(&plan.suite.drop, &result));
                // Another seed may have dropped the arm meanwhile.
                match why.map_or_else(|| rules::with_its_arm(plan, run), |why| Ok(Some(why)))? {
                    Some(why) => return fails(plan, run, &why, progress, tally),
                    None => break,
                }
            }
            Ok(Outcome::Interrupted { .. }) if dropped.is_some() => {
                return fails(plan, run, &dropped.unwrap_or_default(), progress, tally);
            }
            Ok(Outcome::Interrupted { step }) => {
                tally.interrupted = Some((label, Some(step)));
                return Ok(());
            }
            Err(error) => error,
        };
        let at = if let Error::Run { step, .. } = &error { Some(*step) } else { None };
        let error = error.to_string();
        let with = |changes: &Overrides| {
            let all = run.overrides.iter().chain(changes).map(|(key, value)| (key.clone(), value.clone()));
            prepare(&run.base, &all.collect())
        };
        let recipe = changed.as_ref().unwrap_or(&run.prepared).recipe();
        let next = budget.next(&error, at, recipe, &|changes| with(changes).is_ok())?;
        tally.lost_gpu = loses_the_gpu(&error).then_some(LostIn::Run);
        match next {
            Next::Again if options.stop.load(Ordering::Relaxed) => {
                tally.lost_gpu = None;
                tally.interrupted = Some((label, Some(newest_step(&dir)?.unwrap_or(0))));
                return Ok(());
            }
            Next::Again if tally.lost_gpu.is_some() => {
                progress.say(&format!("{label}: is tried again by another process: {error}"));
                return Ok(());
            }
            Next::Again => {
                progress.say(&format!("{label}: failed, and is tried again: {error}"));
                resume = Status::of(&dir)? == Status::Interrupted;
            }
            Next::MoreMicroBatches(overrides) => {
                progress.say(&format!("{label}: out of memory, and begun anew with {}", said(&overrides)));
                (resume, changed) = (false, Some(with(&overrides)?));
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

/// How a run goes on.
struct How {
    /// From its newest checkpoint, or from the beginning.
    resume: bool,
    /// See [`Job::save_within`].
    save_within: Option<Duration>,
}

/// Runs what was prepared; if a rule of the suite ends it before its steps are done, with the reason.
fn under_rules(
    plan: &Plan,
    prepared: &dyn Prepared,
    dir: &Path,
    how: &How,
    options: &ExecuteOptions,
    progress: &Progress,
) -> (Result<Outcome>, Option<String>) {
    let How { resume, save_within } = *how;
    let rules = &plan.suite.drop;
    let mut dropped = None;
    if rules.is_empty() {
        let mut watch = |event: Event<'_>| progress.watch(&event);
        return (
            prepared.run(Job { out: dir, resume, stop: options.stop.clone(), save_within, watch: &mut watch }),
            None,
        );
    }
    // A rule ends this run; a signal ends all, and this one with them.
    let (own, done) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                own.fetch_or(options.stop.load(Ordering::Relaxed), Ordering::Relaxed);
                std::thread::sleep(PASS_ON);
            }
        });
        let mut watch = |event: Event<'_>| {
            progress.watch(&event);
            if dropped.is_none() {
                dropped = rules::judge(rules, &event);
                own.fetch_or(dropped.is_some(), Ordering::Relaxed);
            }
        };
        // Whatever ends the run ends the thread.
        let ended = catch_unwind(AssertUnwindSafe(|| {
            prepared.run(Job { out: dir, resume, stop: own.clone(), save_within, watch: &mut watch })
        }));
        done.store(true, Ordering::Relaxed);
        ended.unwrap_or_else(|payload| resume_unwind(payload))
    });
    (ended, dropped)
}

/// Records and tells that a run ended with `error`.
fn fails(plan: &Plan, run: &PlannedRun, error: &str, progress: &Progress, tally: &mut Tally) -> Result<()> {
    record_failure(&plan.out.join(&run.dir), error)?;
    progress.say(&format!("{}: failed: {error}", run.label()));
    // Whichever seed comes first: those of the arm that are finished go with it.
    for other in rules::of_its_arm(plan, run, error) {
        if is_finished(plan, other)? {
            record_failure_of(plan, other, &rules::with(run))?;
        }
    }
    progress.done();
    tally.failed.push((run.dir.display().to_string(), error.into()));
    Ok(())
}

/// Records how a run ended whose process is gone, unless another process does it by now; says whether it is recorded.
///
/// # Errors
/// If the lock or the folder cannot be written.
pub(crate) fn record_failure_of(plan: &Plan, run: &PlannedRun, error: &str) -> Result<bool> {
    let lock = try_lock(&lock_path(plan, run)?)?;
    if lock.is_some() {
        record_failure(&plan.out.join(&run.dir), error)?;
    }
    Ok(lock.is_some())
}

/// Overrides in words.
fn said(overrides: &Overrides) -> String {
    overrides.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", ")
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
