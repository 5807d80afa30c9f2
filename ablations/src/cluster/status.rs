//! How far the runs of a suite are, by their folders, and which of them a scheduler has.

use std::path::{Path, PathBuf};

use dinolab_core::Result;

use super::board::newest;
use super::slurm::{queue, run_of, submitted, Queued, Submitted};
use crate::style;
use crate::suite::{Plan, Status};

/// The table of `--status`: every run with its state, its step, and what the scheduler says of it.
///
/// # Errors
/// If a run's folder cannot be understood.
pub fn table(plan: &Plan) -> Result<String> {
    let jobs = submitted(&plan.out)?;
    let queued = queue(&jobs);
    let mut rows = Vec::new();
    let (mut lost, mut counts) = (0, [0; 4]);
    for run in plan.all_runs() {
        let dir = plan.out.join(&run.dir);
        let status = Status::of(&dir)?;
        let steps = run.prepared.recipe().get("steps").and_then(toml::Value::as_integer).unwrap_or(0);
        let step = newest(&dir).map_or("".into(), |(step, _)| format!("step {step} of {steps}"));
        let mine = queued.as_ref().ok().and_then(|queued| find(&jobs, queued, &run.dir));
        let gone = mine.is_none() && queued.is_ok() && of(&jobs, &run.dir).is_some();
        let said = match (&status, mine) {
            (_, Some(queued)) => format!("job {}: {}", shown(queued), queued.state),
            (Status::Failed(error), None) => error.lines().next().unwrap_or_default().into(),
            (Status::Pending | Status::Interrupted, None) if gone => {
                lost += 1;
                let job = of(&jobs, &run.dir).expect("it was just found");
                let why = accounted(&job).map_or(String::new(), |why| format!(": {why}"));
                format!("not in the queue any more (was job {job}{why})")
            }
            _ => String::new(),
        };
        let place = match status {
            Status::Finished(_) => 0,
            Status::Interrupted => 1,
            Status::Pending => 2,
            Status::Failed(_) => 3,
        };
        counts[place] += 1;
        rows.push(vec![run.dir.display().to_string(), status.word().into(), step, said]);
    }
    let mut text = style::table(rows);
    let [finished, begun, pending, failed] = counts;
    text += &format!("\n{finished} finished, {begun} begun, {pending} pending, {failed} failed\n");
    if let Err(error) = &queued {
        text += &format!("{}\n", error.problem());
    }
    if lost > 0 {
        text += &format!("{lost} to be submitted again: the same command with --on slurm takes what is left\n");
    }
    Ok(text)
}

/// The runs that the queue has: they are not submitted again.
///
/// # Errors
/// If Slurm does not answer.
pub fn in_queue(out: &Path) -> Result<Vec<PathBuf>> {
    let jobs = submitted(out)?;
    let queued = queue(&jobs)?;
    Ok(queued.iter().filter_map(|queued| run_of(&jobs, queued)).map(Path::to_path_buf).collect())
}

fn find<'a>(jobs: &[Submitted], queued: &'a [Queued], run: &Path) -> Option<&'a Queued> {
    queued.iter().rev().find(|queued| run_of(jobs, queued) == Some(run))
}

fn shown(queued: &Queued) -> String {
    queued.index.map_or(queued.job.clone(), |index| format!("{}_{index}", queued.job))
}

/// The newest job of a run.
fn of(jobs: &[Submitted], run: &Path) -> Option<String> {
    jobs.iter().rev().find_map(|array| {
        let index = array.runs.iter().position(|dir| dir == run)?;
        Some(format!("{}_{index}", array.job))
    })
}

/// How a job ended, where Slurm keeps accounts.
fn accounted(job: &str) -> Option<String> {
    let arguments = ["-n", "-X", "-P", "-j", job, "-o", "State,ExitCode"].map(String::from);
    let text = super::slurm::ask("sacct", &arguments).ok()?;
    let (state, code) = text.lines().next_back()?.split_once('|')?;
    Some(format!("{state}, exit code {code}"))
}
