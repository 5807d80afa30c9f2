//! The trial of every arm before any run: a few steps in a folder that is thrown away.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use dinolab_core::train::Lines;
use dinolab_core::{Error, Result};

use super::file::nearest;
use super::locks::{lock, locks};
use super::options::ExecuteOptions;
use super::plan::{Event, Job, Outcome, Plan, PlannedRun, Prepare};
use super::progress::Progress;
use super::record::Status;
use super::retry::loses_the_gpu;
use super::trunk::TRUNK;
use crate::style::duration;

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

/// What became of trials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    /// All went well.
    Well,
    /// They were asked to stop.
    Stopped,
    /// Their process lost its GPU.
    LostGpu,
}

/// A short run of the runs in `tried`, in a folder that is thrown away.
pub(super) fn smoke(
    plan: &Plan,
    tried: &[&PlannedRun],
    options: &ExecuteOptions,
    prepare: Prepare<'_>,
    progress: &Progress,
) -> Result<Tried> {
    let mut broken = Vec::new();
    if options.smoke_steps == 0 {
        return Ok(Tried::Well);
    }
    // Arms are tried from a trunk that was tried, which is kept until all are.
    let trunk = tried.first().and_then(|first| plan.trunks.iter().find(|trunk| trunk.seed == first.seed));
    let mut trunk_trial = None;
    let mut seconds = 0.0;
    for run in trunk.into_iter().chain(tried.iter().copied()) {
        // One process at a time tries an arm; a killed one may have left its folder.
        let mut took = None;
        let lock = lock(&locks(plan)?.join(format!("trial-{}.lock", run.arm)))?;
        let folder = Trial::begin(plan.out.join(format!(".trial-{}", run.arm)))?;
        progress.begin(&format!("trying {}", run.arm));
        let overrides = plan.trial_of(run, options.smoke_steps);
        let out = folder.0.clone();
        let mut last = None;
        let mut watch = |event: Event<'_>| {
            if let Event::Step { .. } = event {
                let now = Instant::now();
                // The first step has no step before it, and does what is done once.
                took = last.replace(now).map(|before: Instant| (now - before).as_secs_f64());
            }
            progress.watch(&event);
        };
        let job = Job { out: &out, resume: false, stop: options.stop.clone(), save_within: None, watch: &mut watch };
        // The report of an error goes with the folder.
        let ended = prepare(&run.base, &overrides).and_then(|p| p.run(job)).map_err(Error::without_report);
        match ended {
            Ok(Outcome::Interrupted { .. }) => return Ok(Tried::Stopped),
            Ok(Outcome::Finished) if run.arm == TRUNK => trunk_trial = Some((folder, lock)),
            Ok(Outcome::Finished) => {
                broken.extend(unmeasured(plan, &run.arm, &out)?);
                let all = plan.runs.iter().filter(|other| other.arm == run.arm).count();
                seconds += took.unwrap_or(f64::NAN) * steps_of(plan, run) * all as f64;
            }
            // Its runs will be tried with more micro-batches.
            Err(error) if plan.suite.on_out_of_memory.shrinks(&error.to_string()) => {}
            Err(error) if loses_the_gpu(&error.to_string()) => {
                progress.say(&format!(
                    "{}: its trial lost the GPU; another process goes on without trials: {error}",
                    run.arm
                ));
                return Ok(Tried::LostGpu);
            }
            Err(error) => broken.push(format!("{}: {error}", run.arm)),
        }
        if run.arm == TRUNK && trunk_trial.is_none() {
            break;
        }
    }
    drop(trunk_trial);
    if broken.is_empty() {
        if seconds > 0.0 {
            let all = duration(seconds);
            progress.say(&format!(
                "by the last steps of the trials, arms take about {all} one after the other, without probes"
            ));
        }
        return Ok(Tried::Well);
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
    // A score that is not a number after so few steps is none of the result's, and measured all the same.
    let logged = Lines::read(&out.join("metrics.jsonl"))?.objects;
    let of_log = |wanted: &dyn Fn(&str) -> bool| -> Vec<String> {
        let keys = logged.iter().flat_map(|line| line.keys()).chain(result.metrics.keys());
        keys.filter(|key| wanted(key)).cloned().collect::<BTreeSet<_>>().into_iter().collect()
    };
    // Runs are compared by what their results have; a rule sees every number of a step.
    let of_results = of_log(&|key| ["loss/", "probe/"].iter().any(|kind| key.starts_with(kind)));
    let of_steps = of_log(&|key| key != "step" && !key.starts_with("throughput/"));
    let say = |what: &str, name: &str, known: &[String]| {
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let meant = nearest(name, &known);
        format!("{arm}: {what} `{name}` is not measured; did you mean `{meant}`? ({})", known.join(", "))
    };
    let metrics = plan.suite.metrics.iter().map(|metric| ("metric", &metric.name, &of_results));
    let all = metrics.chain(plan.suite.drop.iter().map(|rule| ("the rule's metric", &rule.metric, &of_steps)));
    let missing = all.filter(|(_, name, known)| !known.contains(name));
    // A loss that an arm switches off is missing there by design; `Plan::warnings` said so. One that no arm has is misspelt.
    let by_design = |w: &String, name: &str| w.contains(name) && !w.ends_with("by any arm");
    let unsaid = missing.filter(|(_, name, _)| !plan.warnings.iter().any(|w| by_design(w, name)));
    Ok(unsaid.map(|(what, name, known)| say(what, name, known)).collect())
}

/// Steps that a run does itself.
fn steps_of(plan: &Plan, run: &PlannedRun) -> f64 {
    let steps = run.prepared.recipe().get("steps").and_then(toml::Value::as_integer).unwrap_or(0);
    let before = plan.suite.trunk.as_ref().map_or(0, |trunk| trunk.fork as i64);
    (steps - before) as f64
}
