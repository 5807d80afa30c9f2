//! `dinolab ablate`: a suite from its file to its report.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::Table;
use dinolab_core::recipe::{cost, parse_set, Overrides as Sets, RawRecipe, Resolved};
use dinolab_core::text::printable;
use dinolab_core::train::{self, Observer, RunOptions, Start};
use dinolab_core::{Device, Result};

use crate::cli::{DeviceArgs, RESUMABLE};
use crate::report::{self, duration, Provenance};
use crate::suite::{
    chosen, execute, execute_run, try_arms, Event, ExecuteOptions, Job, Outcome, Overrides, Plan, PlannedRun, Prepared,
    Progress, Status, Suite, Tally, TRUNK,
};
use crate::{cluster, signals, style};

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
    /// Steps that every arm is tried for before any run; 0: no trial
    #[arg(long, default_value_t = 2, value_name = "STEPS")]
    smoke_steps: u64,
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
    let plan = Plan::new(suite, out, &extra, &prepare)?;
    for warning in plan.recipe_warnings.iter().chain(&plan.warnings) {
        style::warn(warning);
    }
    let base = &plan.runs[0];
    let device = || resolve(&base.base, &base.overrides)?.recipe.device();
    let cluster = &args.cluster;
    if let Some(scheduler) = cluster.on {
        let (dry, retry_failed, smoke_steps) = (args.dry_run, args.retry_failed, args.smoke_steps);
        let gpu = scheduler == cluster::Scheduler::Kubernetes;
        let device = if gpu { device()? } else { Device::Cpu };
        let handover = cluster::Handover { args: cluster, dry, retry_failed, smoke_steps, device };
        let runs = chosen(&plan, &args.arms, &args.seeds)?;
        return handover.give(&plan, &runs, scheduler).map(|()| ExitCode::SUCCESS);
    }
    if args.dry_run {
        return dry_run(&plan, &chosen(&plan, &args.arms, &args.seeds)?).map(|()| ExitCode::SUCCESS);
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
        return conclude(&plan, &Tally { failed: failed(&plan)?, ..Tally::default() });
    }
    let options = ExecuteOptions {
        arms: args.arms.clone(),
        seeds: args.seeds.clone(),
        smoke_steps: args.smoke_steps,
        fail_fast: args.fail_fast,
        retry_failed: args.retry_failed,
        stop: signals::stop_flag(),
    };
    let all: Vec<&PlannedRun> = plan.all_runs().collect();
    let progress =
        || -> Result<Progress> { Ok(Progress::new(&plan.suite.name, all.len(), finished(&plan, &all)?.len())) };
    if cluster.trial {
        let done = try_arms(&plan, &options, &prepare, &progress()?)?;
        return Ok(if done { ExitCode::SUCCESS } else { ExitCode::from(RESUMABLE) });
    }
    if let Some(run) = &cluster.run {
        let tally = execute_run(&plan, run, &options, &prepare, &progress()?)?;
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
            let jobs = cluster::Jobs::new(&plan, args.smoke_steps, cluster::PROGRAM.into())?;
            cluster::execute(&plan, &options, &jobs, &slots)?
        }
        None => execute(&plan, &options, &prepare, &progress()?)?,
    };
    if let Some((run, step)) = &tally.interrupted {
        let (done, runs) = (finished(&plan, &all)?.len(), all.len());
        style::say(&format!(
            "stopped at {run}, step {step}, saved; {done} of {runs} runs are finished; go on with the same command"
        ));
        return Ok(ExitCode::from(RESUMABLE));
    }
    conclude(&plan, &tally)
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
    let command = std::env::args().skip(1).map(|a| if a.contains(' ') { format!("'{a}'") } else { a });
    let provenance = Provenance {
        version: env!("CARGO_PKG_VERSION").into(),
        revision: Some(crate::REVISION.to_string()).filter(|r| !r.is_empty()),
        device: None,
        command: ["dinolab".to_string()].into_iter().chain(command).collect::<Vec<_>>().join(" "),
    };
    let (summary, report) = report::write(plan, provenance, &|run| report::look(run, None))?;
    for comparison in &summary.comparisons {
        style::say(&comparison.sentence);
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
    Ok(if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A resolved recipe and the trainer.
struct Recipe {
    resolved: Resolved,
    table: toml::Table,
}

fn resolve(base: &Path, overrides: &Overrides) -> Result<Resolved> {
    let environment = Sets { sets: Vec::new(), env: true };
    let pairs = overrides.iter().map(|(key, value)| (key.as_str(), value));
    RawRecipe::load(base)?.with(&environment)?.with_overrides("suite", pairs)?.resolve()?.absolute()
}

/// A recipe of a suite, ready to run.
///
/// # Errors
/// If it cannot be resolved.
pub(super) fn prepare(base: &Path, overrides: &Overrides) -> Result<Box<dyn Prepared>> {
    let resolved = resolve(base, overrides)?;
    let table = resolved.to_toml().parse().expect("a resolved recipe is written as TOML");
    Ok(Box::new(Recipe { resolved, table }))
}

impl Prepared for Recipe {
    fn recipe(&self) -> &toml::Table {
        &self.table
    }

    fn hash(&self) -> &str {
        &self.resolved.hash
    }

    fn matters(&self, key: &str) -> bool {
        self.resolved.matters(key)
    }

    fn warnings(&self) -> Vec<String> {
        self.resolved.warnings.iter().map(ToString::to_string).collect()
    }

    fn run(&self, job: Job<'_>) -> Result<Outcome> {
        let Job { out, resume, stop, watch } = job;
        let options = RunOptions { out: out.to_path_buf(), resume, stop, revision: crate::REVISION.into() };
        Ok(match train::run(&self.resolved, &options, &mut Watcher(watch))? {
            train::Outcome::Finished(_) => Outcome::Finished,
            train::Outcome::Interrupted { step } => Outcome::Interrupted { step },
        })
    }
}

/// Hands the trainer's news to the suite.
struct Watcher<'a>(&'a mut dyn FnMut(Event<'_>));

impl Observer for Watcher<'_> {
    fn started(&mut self, start: &Start) {
        (self.0)(Event::Started(&start.to_string()));
    }

    fn step(&mut self, p: &train::Progress<'_>) {
        let loss = p.report.losses.get("loss/total").copied().unwrap_or(f64::NAN);
        let text = format!("loss {loss:.3}, {:.0} img/s", p.images_per_s);
        (self.0)(Event::Step { step: p.step, steps: p.total, text: &text });
    }

    fn warning(&mut self, text: &str) {
        (self.0)(Event::Message(text));
    }
}

/// Every finished run of the plan: the steps that it did itself, and the seconds that they took.
fn finished(plan: &Plan, runs: &[&PlannedRun]) -> Result<Vec<(u64, f64)>> {
    let mut found = Vec::new();
    for run in runs {
        if let Status::Finished(result) = Status::of(&plan.out.join(&run.dir))? {
            found.push((result.steps.saturating_sub(start(plan, run)), result.seconds));
        }
    }
    Ok(found)
}

/// The step that a run begins at: the fork, for an arm of a suite with a trunk.
fn start(plan: &Plan, run: &PlannedRun) -> u64 {
    plan.suite.trunk.as_ref().filter(|_| run.arm != TRUNK).map_or(0, |trunk| trunk.fork)
}

/// The expansion of a suite's runs: arms, seeds, state and cost.
fn dry_run(plan: &Plan, runs: &[&PlannedRun]) -> Result<()> {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "arm",
        "changes",
        "steps",
        "memory",
        "TFLOP a run",
        "for probes",
        "runs",
    ]);
    let (mut total, mut probed) = ((0, 0.0), 0.0);
    let mut arms: Vec<&PlannedRun> = Vec::new();
    for run in runs {
        if arms.iter().all(|other| other.arm != run.arm) {
            arms.push(run);
        }
    }
    for run in arms {
        let recipe = resolve(&run.base, &run.overrides)?.recipe;
        let steps = recipe.steps - start(plan, run);
        let of_step = cost::cost_on(&recipe, recipe.device()?)?;
        let tera = of_step.flops_per_image * recipe.batch.size as f64 * steps as f64 / 1e12;
        let (taken, images, flops) = cost::probes(&recipe, start(plan, run))?;
        let probes = flops / 1e12;
        let mut states = Vec::new();
        for other in runs.iter().filter(|r| r.arm == run.arm) {
            states.push(format!("seed {} {}", other.seed, Status::of(&plan.out.join(&other.dir))?.word()));
        }
        total = (total.0 + steps * states.len() as u64, total.1 + tera * states.len() as f64);
        probed += probes * states.len() as f64;
        let probes =
            format!("{probes:.3} ({:.0}%)\n{taken} times, {images:.0} images", 100.0 * probes / tera.max(1e-12));
        let shown =
            if start(plan, run) > 0 { format!("{} to {}", start(plan, run), recipe.steps) } else { steps.to_string() };
        table.add_row([
            run.arm.clone(),
            changes(plan, run),
            shown,
            style::bytes(of_step.total_memory()),
            format!("{tera:.3}"),
            probes,
            states.join("\n"),
        ]);
    }
    style::print(&format!("{table}\n"));
    let (count, done) = (runs.len(), finished(plan, runs)?);
    let left = count - done.len();
    style::print(&format!(
        "{count} runs in {}, {left} of them to do: {:.3} TFLOP in all, and {probed:.3} for probes\n",
        printable(&plan.out),
        total.1
    ));
    let (steps, seconds) = done.iter().fold((0, 0.0), |sum, run| (sum.0 + run.0, sum.1 + run.1));
    if steps > 0 {
        let each = seconds / steps as f64;
        let all = duration(each * total.0.saturating_sub(steps) as f64);
        style::print(&format!("{steps} steps took {} so far, so about {all} are left\n", duration(seconds)));
    }
    Ok(())
}

/// What a run changes in its recipe, beside what all share.
fn changes(plan: &Plan, run: &PlannedRun) -> String {
    let shown = |set: &Overrides| set.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>();
    let Some(arm) = plan.suite.arm(&run.arm) else {
        return plan.suite.trunk.as_ref().map_or(Vec::new(), |trunk| shown(&trunk.set)).join("\n");
    };
    let mut changes = shown(&arm.set);
    let follows = plan.differences(&arm.name).into_iter().filter(|(key, ..)| !arm.set.contains_key(key));
    let follows = follows.filter(|(key, ..)| plan.suite.follows.iter().any(|f| key.starts_with(f.as_str())));
    changes.extend(follows.map(|(key, _, is)| format!("follows: {key} = {}", is.unwrap_or_else(|| "none".into()))));
    changes.join("\n")
}
