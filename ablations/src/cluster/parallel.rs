//! Runs side by side on one machine: one process a run, each on a GPU of its own or on its share of the CPU's cores.
//!
//! This process trains nothing. It starts the others, tells what they do, passes on a request to stop, and takes note of
//! those that die without a word.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dinolab_core::{Error, Result};

use super::board::{Board, Row};
use super::job::Jobs;
use super::slot::{Slot, PROGRAM};
use crate::cli::RESUMABLE;
use crate::suite::{
    chosen, claim, has_trunk, record_failure_of, untried, Budget, ExecuteOptions, Next, Plan, PlannedRun, Status,
    Tally, TRUNK,
};

/// How often processes are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How often their progress is.
const SHOW: Duration = Duration::from_millis(500);
/// A process at work.
struct Worker<'a> {
    child: Child,
    slot: usize,
    label: String,
    /// The run that it does; none tries an arm.
    run: Option<&'a PlannedRun>,
    /// The run's folder, or that of the trial.
    dir: PathBuf,
    log: PathBuf,
    row: Row,
}

/// Processes, at most one a slot.
struct Pool<'a> {
    slots: &'a [Slot],
    workers: Vec<Worker<'a>>,
    board: Board,
    shown: Instant,
    stopping: bool,
}

impl<'a> Pool<'a> {
    /// A slot that nobody uses.
    fn free(&self) -> Option<usize> {
        (0..self.slots.len()).find(|slot| self.workers.iter().all(|worker| worker.slot != *slot))
    }

    fn start(
        &mut self,
        arguments: &[String],
        what: (String, Option<&'a PlannedRun>),
        dir: PathBuf,
        log: PathBuf,
    ) -> Result<()> {
        let slot = self.free().expect("whoever starts a process has looked for a slot");
        let (label, run) = what;
        let steps = run.and_then(|run| run.prepared.recipe().get("steps")?.as_integer());
        let row = self.board.begin(&label, steps.and_then(|steps| u64::try_from(steps).ok()));
        let child = self.slots[slot].start(arguments, &log)?;
        self.workers.push(Worker { child, slot, label, run, dir, log, row });
        Ok(())
    }

    /// Waits until a process has ended, and passes on a request to stop.
    fn next(&mut self, options: &ExecuteOptions) -> Result<(Worker<'a>, ExitStatus)> {
        loop {
            if options.stop.load(Ordering::Relaxed) {
                self.stop();
            }
            for (i, worker) in self.workers.iter_mut().enumerate() {
                if let Some(status) = worker.child.try_wait().map_err(Error::io("wait for", PROGRAM))? {
                    let worker = self.workers.swap_remove(i);
                    self.board.end(&worker.row);
                    return Ok((worker, status));
                }
            }
            if self.shown.elapsed() >= SHOW {
                self.shown = Instant::now();
                self.workers.iter_mut().for_each(|worker| self.board.look(&mut worker.row, &worker.dir));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Asks all to save and stop, once.
    fn stop(&mut self) {
        if !std::mem::replace(&mut self.stopping, true) {
            for worker in &self.workers {
                // SAFETY: the child was not waited for yet, so that its number is still its own.
                unsafe { libc::kill(worker.child.id() as libc::pid_t, libc::SIGTERM) };
            }
        }
    }

    /// Waits for all that were asked to stop.
    fn drain(&mut self, options: &ExecuteOptions) -> Result<Vec<(Worker<'a>, ExitStatus)>> {
        self.stop();
        let mut ended = Vec::new();
        while !self.workers.is_empty() {
            ended.push(self.next(options)?);
        }
        Ok(ended)
    }
}

/// Does every selected run of `plan` that is not finished, as [`suite::execute`](crate::suite::execute()) does, in so many
/// processes at a time as there are `slots`; trunks before arms.
///
/// # Errors
/// As there; and if processes cannot be started, or one cannot begin its run.
pub fn execute(plan: &Plan, options: &ExecuteOptions, jobs: &Jobs, slots: &[Slot]) -> Result<Tally> {
    let mut left: Vec<&PlannedRun> = chosen(plan, &options.arms, &options.seeds, options.retry_failed)?;
    left.sort_by_key(|run| run.arm != TRUNK);
    claim(plan)?;
    let mut tally = Tally::default();
    let board = Board::new(&plan.suite.name, plan.all_runs().count(), 0);
    let mut pool = Pool { slots, workers: Vec::new(), board, shown: Instant::now(), stopping: false };
    if options.smoke_steps > 0 && !trials(plan, options, jobs, &left, &mut pool)? {
        pool.board.finish();
        return Ok(Tally { interrupted: Some(("a trial run".into(), None)), ..tally });
    }
    let mut todo = VecDeque::new();
    for run in left {
        let status = Status::of(&plan.out.join(&run.dir))?;
        if let Some((error, why)) = status.final_failure(options.retry_failed) {
            pool.board.say(&format!("{}: {why}", run.label()));
            pool.board.done();
            tally.failed.push((run.dir.display().to_string(), error.into()));
            continue;
        }
        match status {
            Status::Finished(_) => {
                tally.skipped += 1;
                pool.board.done();
            }
            status => todo.push_back((run, matches!(status, Status::Failed(_)))),
        }
    }
    loop {
        while let Some(at) = pool.free().filter(|_| !pool.stopping).and_then(|_| ready(plan, &todo).transpose()) {
            let (run, again) = todo.remove(at?).expect("it was just found");
            let dir = plan.out.join(&run.dir);
            std::fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
            let log = dir.join("run.log");
            pool.start(&jobs.run(&run.dir.display().to_string(), again), (run.label(), Some(run)), dir, log)?;
        }
        if pool.workers.is_empty() {
            break;
        }
        let (worker, status) = pool.next(options)?;
        let failed = tally.failed.len();
        match ended(plan, pool.stopping, &worker, status, &pool.board, &mut tally) {
            Ok(Some(run)) => todo.push_front((run, false)),
            Ok(None) => {}
            Err(error) => {
                pool.drain(options)?;
                pool.board.finish();
                return Err(error);
            }
        }
        if options.fail_fast && tally.failed.len() > failed {
            pool.stop();
        }
    }
    match (options.stop.load(Ordering::Relaxed), pool.stopping) {
        (true, _) if tally.interrupted.is_none() => {
            tally.interrupted = todo.front().map(|(run, _)| (run.label(), Some(0)));
        }
        // The first failure ended the others.
        (false, true) => tally.interrupted = None,
        _ => tally.waiting.extend(todo.iter().map(|(run, _)| run.label())),
    }
    pool.board.finish();
    Ok(tally)
}

/// The first run whose trunk is there.
fn ready(plan: &Plan, todo: &VecDeque<(&PlannedRun, bool)>) -> Result<Option<usize>> {
    for (at, (run, _)) in todo.iter().enumerate() {
        if has_trunk(plan, run)? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// Takes note of how a run's process ended; a run that is to be done again is given back.
fn ended<'a>(
    plan: &Plan,
    asked_to_stop: bool,
    worker: &Worker<'a>,
    status: ExitStatus,
    board: &Board,
    tally: &mut Tally,
) -> Result<Option<&'a PlannedRun>> {
    let run = worker.run.expect("trials are over");
    let (label, shown) = (&worker.label, run.dir.display().to_string());
    match (Status::of(&worker.dir)?, status.code()) {
        (Status::Finished(result), _) => {
            board.say(&format!("{label}: {} steps in {:.0} s", result.steps, result.seconds));
            board.done();
            tally.finished += 1;
        }
        (Status::Failed(error), _) => {
            board.say(&format!("{label}: failed: {error}"));
            board.done();
            tally.failed.push((shown, error));
        }
        // One that was asked to stop before it could listen ended at once, with nothing lost.
        (_, code) if code == Some(i32::from(RESUMABLE)) || asked_to_stop && status.signal() == Some(libc::SIGTERM) => {
            let step = super::board::newest(&worker.dir).map_or(0, |(step, _)| step);
            tally.interrupted = Some((label.clone(), Some(step)));
        }
        (_, Some(1)) => {
            board.say(&format!("{label}: {}", last_words(&worker.log)));
            tally.elsewhere.push(label.clone());
        }
        (_, Some(2)) => {
            let help = "nothing of it was lost; mend it, and the same command goes on";
            return Err(Error::content(
                &worker.log,
                format!("{label} could not begin: {}", last_words(&worker.log)),
                help,
            ));
        }
        // It died without a word: killed, out of memory, a defect.
        _ => {
            let how = status.signal().map_or_else(|| format!("{status}"), |signal| format!("signal {signal}"));
            let error = format!("its process ended by {how}; what it said is in {}", worker.log.display());
            let mut budget = Budget::of(&plan.suite, &worker.dir)?;
            if budget.next(&error, None, run.prepared.recipe(), &|_| false)? == Next::Again {
                board.say(&format!("{label}: failed, and is tried again: {error}"));
                return Ok(Some(run));
            }
            if !record_failure_of(plan, run, &error)? {
                tally.elsewhere.push(label.clone());
                return Ok(None);
            }
            board.say(&format!("{label}: failed: {error}"));
            board.done();
            tally.failed.push((shown, error));
        }
    }
    Ok(None)
}

/// Tries every arm that has not begun, each in a process of its own (after its trunk: all in one); false if it was asked to
/// stop.
fn trials<'a>(
    plan: &'a Plan,
    options: &ExecuteOptions,
    jobs: &Jobs,
    runs: &[&PlannedRun],
    pool: &mut Pool<'a>,
) -> Result<bool> {
    let (mut todo, mut broken, mut stopped) = (super::job::trials(plan, &untried(plan, runs)?), Vec::new(), false);
    todo.reverse();
    let folder = plan.out.join("trials");
    if !todo.is_empty() {
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    }
    loop {
        while !todo.is_empty() && !pool.stopping && pool.free().is_some() {
            let arms = todo.pop().expect("it is not empty");
            let log = folder.join(format!("{}.log", arms[0]));
            File::create(&log).map_err(Error::io("write", &log))?;
            let dir = plan.out.join(format!(".trial-{}", arms[0]));
            pool.start(&jobs.trial(&arms.join(",")), (format!("trying {}", arms.join(", ")), None), dir, log)?;
        }
        if pool.workers.is_empty() {
            break;
        }
        let (worker, status) = pool.next(options)?;
        match status.code() {
            Some(0) => {}
            Some(code) if code == i32::from(RESUMABLE) => stopped = true,
            _ if pool.stopping => stopped = true,
            _ => broken.push(last_words(&worker.log)),
        }
    }
    if !broken.is_empty() {
        pool.board.finish();
        let help = "no run was begun; mend it, or go ahead without trials: --smoke-steps 0";
        return Err(Error::content(&plan.suite.path, broken.join("\n"), help));
    }
    // The logs of trials that went well say nothing.
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
    }
    Ok(!stopped && !pool.stopping)
}

/// The error in a log, or else its last lines.
fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let text = text.trim_end();
    let error = text.rfind("error: ").map(|at| &text[at + "error: ".len()..]);
    let lines: Vec<&str> = text.lines().collect();
    error.map_or_else(|| lines[lines.len().saturating_sub(5)..].join("\n"), String::from)
}
