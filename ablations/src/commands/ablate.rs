//! `dinolab ablate`: a suite from its file to its report.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use dinolab_core::recipe::parse_set;
use dinolab_core::text::printable;
use dinolab_core::{Device, Error, Result};

use super::dry_run::{dry_run, finished};
use super::prepared::{prepare, resolve};
use crate::cli::{DeviceArgs, RESUMABLE};
use crate::report::{self, Provenance};
use crate::suite::{
    chosen, execute, execute_run, try_arms, ExecuteOptions, LostIn, Overrides, Plan, PlannedRun, Progress, Status,
    Suite, Tally, Tried, DROPPED,
};
use crate::{cluster, given, signals, style};

/// Runs an ablation: every arm of a suite with every seed, then statistics and a report.
///
/// Run it again to continue: finished runs are kept, an interrupted run goes on from its checkpoint. --parallel does several
/// runs side by side.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The suite, such as ablations/gram_on_off.toml
    suite: PathBuf,
    /// The suite's folder; by default one named like the suite in runs/
    #[arg(long)]
    out: Option<PathBuf>,
    /// Run these arms only
    #[arg(long, value_delimiter = ',', value_name = "ARM,...")]
    arms: Vec<String>,
    /// Run these seeds only
    #[arg(long, value_delimiter = ',', value_name = "SEED,...")]
    seeds: Vec<u64>,
    /// Steps of every run, in place of the recipe's
    #[arg(long)]
    steps: Option<u32>,
    /// Change the recipe of all arms, such as --set batch.size=32
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Number of trial steps of every arm before the first run; 0: no trial
    #[arg(long, default_value_t = 2, value_name = "STEPS")]
    smoke_steps: u32,
    /// End at the first run that fails, instead of going on with the others
    #[arg(long)]
    fail_fast: bool,
    /// Do failed runs again
    #[arg(long)]
    retry_failed: bool,
    /// Show what would be run, and what it costs, and run nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    cluster: cluster::Args,
}

/// Runs the command.
///
/// # Errors
/// If the suite or a recipe is wrong, a trial fails, or the folder cannot be used.
pub fn run(args: Args) -> Result<ExitCode> {
    let suite = Suite::load(&args.suite)?;
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&suite.name));
    let mut extra = args
        .set
        .iter()
        .cloned()
        .chain(args.device.sets())
        .map(|text| parse_set(&text))
        .collect::<Result<Overrides>>()?;
    if let Some(steps) = args.steps {
        extra.insert("steps".into(), i64::from(steps).into());
    }
    let prepare = |base: &Path, overrides: &Overrides| prepare(&args.suite, base, overrides);
    if std::env::var_os("DINOLAB_SEED").is_some() {
        let problem = "DINOLAB_SEED is set, and every run of a suite has one of its `seeds`";
        return Err(Error::user(problem, "unset it; change `seeds` in the suite, or choose some with --seeds"));
    }
    let plan = Plan::new(suite, out, &extra, &prepare)?;
    for warning in plan.recipe_warnings.iter().chain(&plan.warnings) {
        style::warn(warning);
    }
    let base = &plan.runs[0];
    let device = || resolve(&args.suite, &base.base, &base.overrides)?.recipe.device();
    let cluster = &args.cluster;
    if let Some(scheduler) = cluster.on {
        let (dry, retry_failed, smoke_steps) = (args.dry_run, args.retry_failed, args.smoke_steps.into());
        let gpu = scheduler == cluster::Scheduler::Kubernetes;
        let device = if gpu { device()? } else { Device::Cpu };
        let handover =
            cluster::Handover { args: cluster, dry, retry_failed, fail_fast: args.fail_fast, smoke_steps, device };
        let runs = chosen(&plan, &args.arms, &args.seeds, args.retry_failed)?;
        return handover.give(&plan, &runs, scheduler).map(|()| ExitCode::SUCCESS);
    }
    if args.dry_run {
        return dry_run(&plan, &chosen(&plan, &args.arms, &args.seeds, args.retry_failed)?).map(|()| ExitCode::SUCCESS);
    }
    if cluster.status {
        style::print(&cluster::table(&plan)?);
        return Ok(ExitCode::SUCCESS);
    }
    if cluster.cancel {
        style::say(&format!("{} jobs were taken out of the queue", cluster::cancel(&plan.out)?));
        return Ok(ExitCode::SUCCESS);
    }
    if cluster.report {
        if !plan.out.is_dir() {
            let problem = format!("{}: there is no such folder: no run of the suite was begun", printable(&plan.out));
            return Err(Error::user(problem, "run the suite first, or name its folder with --out"));
        }
        return conclude(&plan, &Tally { failed: failed(&plan)?, ..Tally::default() });
    }
    let options = ExecuteOptions {
        arms: args.arms.clone(),
        seeds: args.seeds.clone(),
        smoke_steps: args.smoke_steps.into(),
        fail_fast: args.fail_fast,
        retry_failed: args.retry_failed,
        stop: signals::stop_flag(),
    };
    let all: Vec<&PlannedRun> = chosen(&plan, &args.arms, &args.seeds, args.retry_failed)?;
    let progress =
        || -> Result<Progress> { Ok(Progress::new(&plan.suite.name, all.len(), finished(&plan, &all)?.len())) };
    if cluster.trial {
        return match try_arms(&plan, &options, &prepare, &progress()?)? {
            Tried::Well => Ok(ExitCode::SUCCESS),
            Tried::Stopped => Ok(ExitCode::from(RESUMABLE)),
            Tried::LostGpu => Err(anew(LostIn::Trial)),
        };
    }
    if let Some(run) = &cluster.run {
        let tally = execute_run(&plan, run, &options, &prepare, &progress()?)?;
        if let Some(lost) = tally.lost_gpu.filter(|_| tally.failed.is_empty()) {
            return Err(anew(lost));
        }
        return Ok(match tally {
            Tally { interrupted: Some(_), .. } => ExitCode::from(RESUMABLE),
            Tally { finished: 0, skipped: 0, .. } => ExitCode::FAILURE,
            _ => ExitCode::SUCCESS,
        });
    }
    let tally = match cluster.parallel.filter(|n| *n > 1) {
        Some(n) => {
            let (slots, said) = cluster::Slot::divide(usize::from(n), device()?)?;
            said.iter().for_each(style::note);
            let jobs = cluster::Jobs::new(&plan, args.smoke_steps.into(), cluster::PROGRAM.into())?;
            cluster::execute(&plan, &options, &jobs, &slots)?
        }
        None => execute(&plan, &options, &prepare, &progress()?)?,
    };
    if let Some(lost) = tally.lost_gpu {
        return Err(anew(lost));
    }
    if let Some((run, step)) = &tally.interrupted {
        let (done, runs) = (finished(&plan, &all)?.len(), all.len());
        let at = step.map_or("of which nothing is kept".into(), |step| format!("step {step}, saved"));
        style::say(&format!("stopped at {run}, {at}; {done} of {runs} runs are finished; go on with the same command"));
        return Ok(ExitCode::from(RESUMABLE));
    }
    conclude(&plan, &tally)
}

/// Becomes a process that goes on where this one lost its GPU, which it cannot have back. Gives why not, if it cannot.
fn anew(lost: LostIn) -> Error {
    let mut args = std::env::args_os();
    // The program that runs, even if another lies in its place by now.
    let mut program = Command::new(cluster::PROGRAM);
    program.arg0(args.next().unwrap_or_default());
    while let Some(arg) = args.next() {
        match arg.to_str() {
            // What failed before and is to be done again has been told apart from what failed now.
            Some("--retry-failed") => {}
            Some("--smoke-steps") if lost == LostIn::Trial => _ = args.next(),
            Some(text) if lost == LostIn::Trial && text.starts_with("--smoke-steps=") => {}
            _ => _ = program.arg(arg),
        }
    }
    if lost == LostIn::Trial {
        program.arg("--smoke-steps=0");
    }
    let refused = program.exec();
    Error::user(
        format!("the GPU is lost to this process, and no other could be started: {refused}"),
        "run the command again",
    )
}

/// The runs of a plan that failed, with their errors.
fn failed(plan: &Plan) -> Result<Vec<(String, String)>> {
    let mut failed = Vec::new();
    for run in plan.all_runs() {
        if let Status::Failed(error) = Status::of(&plan.out.join(&run.dir))? {
            failed.push((run.dir.display().to_string(), error));
        }
    }
    Ok(failed)
}

fn conclude(plan: &Plan, tally: &Tally) -> Result<ExitCode> {
    let (summary, report) = report::write(plan, Provenance::of(given::command()), &|run| report::look(run, None))?;
    for comparison in &summary.comparisons {
        style::say(&comparison.sentence);
    }
    for other in summary.reproduction.iter().filter(|r| r.agrees == Some(false)) {
        style::say(&other.sentence());
    }
    if !summary.reproduction.is_empty() {
        let agree = summary.reproduction.iter().filter(|r| r.agrees != Some(false)).count();
        style::say(&format!("{agree} of {} values are as the suite's file says", summary.reproduction.len()));
    }
    for run in &tally.elsewhere {
        style::say(&format!("{run} is being run by another process, which will write the report again"));
    }
    for run in &tally.waiting {
        style::say(&format!("{run} was not begun: its trunk is not done"));
    }
    for (run, error) in &tally.failed {
        style::line(&format!("failed: {run}: {error}"));
    }
    style::say(&format!("report: {}", printable(&report)));
    // A run that a rule dropped is what the suite asked for.
    let failed = tally.failed.iter().any(|(_, error)| !error.starts_with(DROPPED));
    Ok(if !failed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
