//! Whose a suite's folder is: what was run in it before is held to what the suite is now.

use std::path::Path;

use dinolab_core::checkpoint::newest_step;
use dinolab_core::recipe::is_within;
use dinolab_core::resolved::Resolved;
use dinolab_core::{Error, Result};

use super::changes::{changed_keys, said};
use super::file::Metric;
use super::plan::{Plan, PlannedRun, Prepared};
use super::record::Status;
use super::state::{Origin, State};
use super::trunk::{self, TRUNK};

impl Plan {
    /// Compares the plan with what the folder was used for before, and records it in `suite.json`.
    ///
    /// A run that was started with a recipe that gives other numbers is an error that names the keys; new arms and seeds
    /// are welcome.
    ///
    /// # Errors
    /// If the folder belongs to another suite, or a run in it to another recipe, or it cannot be written.
    pub fn claim_folder(&self) -> Result<()> {
        self.checked_folder()?.write(&self.out)
    }

    /// The same without a record of it.
    ///
    /// # Errors
    /// As [`claim_folder`](Self::claim_folder).
    pub fn check_folder(&self) -> Result<()> {
        self.checked_folder().map(drop)
    }

    /// What `suite.json` is to say.
    fn checked_folder(&self) -> Result<State> {
        let known = State::read(&self.out)?;
        if known.is_none() && !self.out.join("arms").is_dir() {
            not_of_others(
                &self.out,
                &["stages.json", "run.json", "report.html", "summary.json", "summary.md"],
                "suite",
            )?;
        }
        let mut state = known.unwrap_or_else(|| State { suite: self.suite.name.clone(), ..State::default() });
        if state.suite != self.suite.name {
            let problem = format!("this folder holds the suite `{}`, not `{}`", state.suite, self.suite.name);
            return Err(Error::content(&self.out, problem, "use another --out"));
        }
        let file = std::path::absolute(&self.suite.path).map_err(Error::io("find", &self.suite.path))?;
        state.origin = Some(Origin { file, set: self.set.clone() });
        let rules = state.drop.replace(self.suite.drop.clone());
        let other_rules = rules.is_some_and(|rules| rules != self.suite.drop);
        for run in self.all_runs() {
            if Status::of(&self.out.join(&run.dir))? != Status::Pending {
                self.check_unchanged(run)?;
                if other_rules {
                    let problem = format!("{} was held to other rules than [[drop]] of the suite has now", run.label());
                    let help = "use another --out for the changed suite, or take back the change";
                    return Err(Error::content(&self.out, problem, help));
                }
            }
            state.runs.insert(run.dir.clone(), run.hash.clone());
        }
        Ok(state)
    }

    /// Holds a run to the recipe that it had when the folder was last claimed: a job that waited does what was submitted.
    /// False if nobody has claimed it.
    ///
    /// # Errors
    /// If the run has another recipe now.
    pub(super) fn is_claimed(&self, run: &PlannedRun) -> Result<bool> {
        let known = State::read(&self.out)?.filter(|state| state.suite == self.suite.name);
        match known.and_then(|state| state.runs.get(&run.dir).cloned()) {
            None => Ok(false),
            Some(hash) if hash == run.hash => Ok(true),
            Some(_) => {
                let problem =
                    format!("{} has another recipe than when the suite was submitted or last run", run.label());
                let help =
                    "the suite or a recipe was edited since: undo it, or give the whole suite again, which takes note";
                Err(Error::content(&self.suite.path, problem, help))
            }
        }
    }

    /// Fails if a run was started with a recipe that gives other numbers than the suite's.
    fn check_unchanged(&self, run: &PlannedRun) -> Result<()> {
        let dir = self.out.join(&run.dir);
        // A finished run has the scores of the probes, and the end, that its recipe had.
        let probe = |metric: &Metric| Some(metric.name.strip_prefix("probe/")?.split('/').next()?.to_string());
        let scores = match Status::of(&dir)? {
            Status::Finished(_) if run.arm != TRUNK => self.suite.metrics.iter().filter_map(probe).collect(),
            _ => Vec::new(),
        };
        check_unchanged(&dir, run.prepared.as_ref(), "suite", &scores, &|_, _, _| false)
    }
}

/// Whether a key may change from a value to another, either of which may be missing.
pub type MayChange<'a> = &'a dyn Fn(&str, Option<&str>, Option<&str>) -> bool;

/// Fails if the run in `dir` was started with a recipe that gives other numbers than that of `by`, which is given now, but for
/// keys that `may` change so; or, where it gave the scores of some probes, other scores.
pub fn check_unchanged(
    dir: &Path,
    prepared: &dyn Prepared,
    by: &str,
    scores: &[String],
    may: MayChange<'_>,
) -> Result<()> {
    let file = dir.join("recipe.toml");
    // It failed before it began: there is nothing that another recipe would change.
    if !file.exists() && !dir.join("result.json").exists() && newest_step(dir)?.is_none() {
        return Ok(());
    }
    // Keys that came with a later version of the program have their defaults.
    let resolved = Resolved::load(&file, &Default::default()).ok().map(|resolved| resolved.to_toml());
    let old = resolved.or_else(|| std::fs::read_to_string(file).ok()).and_then(|t| t.parse::<toml::Table>().ok());
    let changes: String = match old {
        Some(old) => {
            let mut changes = changed_keys(&old, prepared.recipe());
            // A probe that it did not have has no score, which the report says.
            let had = |probe: &&String| old.get("probes").and_then(|probes| probes.get(probe.as_str())).is_some();
            let scored: Vec<String> = scores.iter().filter(had).map(|probe| format!("probes.{probe}")).collect();
            let gave = |key: &str| {
                let of = |probe: &String| is_within(key, probe) && key != format!("{probe}.every");
                scored.iter().any(of) || !scored.is_empty() && is_within(key, "stop")
            };
            changes.retain(|(key, was, is)| {
                let allowed = || may(key, was.as_deref(), is.as_deref()) || trunk::are_same_place(was, is);
                (prepared.matters(key) || gave(key)) && !allowed()
            });
            if changes.is_empty() {
                return Ok(());
            }
            changes.iter().map(|change| format!("\n  {}", said(change))).collect()
        }
        None => ", which cannot be read".into(),
    };
    let problem = format!("this run was started with another recipe than the {by} gives now{changes}");
    let help = format!("use another --out for the changed {by}, or move this run's folder away");
    Err(Error::content(dir, problem, help))
}

/// Fails if files are in `folder` that a suite or a chain of stages (`what`), which was not begun there, would write over.
pub fn not_of_others(folder: &Path, written: &[&str], what: &str) -> Result<()> {
    let Some(name) = written.iter().find(|name| folder.join(name).exists()) else { return Ok(()) };
    let problem = format!("this {what} was not begun in this folder, and would write over what is there: {name}");
    Err(Error::content(folder, problem, "use another --out, or move it away"))
}
