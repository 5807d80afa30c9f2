//! A part of a suite as a command that another process runs.

use std::path::{Path, PathBuf};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use super::slot::PROGRAM;
use crate::given::program;
use crate::style::shell;
use crate::suite::{has_trunk, Plan, PlannedRun, Status, TRUNK};

/// The commands that do parts of a suite, from any working directory.
pub struct Jobs {
    program: PathBuf,
    here: PathBuf,
    suite: PathBuf,
    out: PathBuf,
    sets: Vec<String>,
    smoke_steps: u64,
}

impl Jobs {
    /// Those of a plan, whose arms are tried for so many steps, by the program at this path.
    ///
    /// # Errors
    /// If the working directory is gone.
    pub fn new(plan: &Plan, smoke_steps: u64, program: PathBuf) -> Result<Self> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(Error::io("find", path));
        let (suite, out, here) = (absolute(&plan.suite.path)?, absolute(&plan.out)?, absolute(Path::new("."))?);
        let sets = plan.set.iter().map(|(key, value)| format!("{key}={value}")).collect();
        Ok(Self { program, here, suite, out, sets, smoke_steps })
    }

    /// Fails if its commands are not one line each.
    pub(super) fn check_lines(&self) -> Result<()> {
        let text = format!("{} {}", self.here.display(), self.run_command("", false));
        if text.chars().any(char::is_control) {
            let problem =
                format!("a command for a scheduler has to be one line, and this one is not: {}", printable(&text));
            let help =
                "names of folders and files, values of --set and of variables DINOLAB_... may have no line break";
            return Err(Error::user(problem, help));
        }
        Ok(())
    }

    /// The suite's folder.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// The working directory, from which recipes name data and weights.
    pub fn here(&self) -> &Path {
        &self.here
    }

    /// Whether arms are tried.
    pub fn tries(&self) -> bool {
        self.smoke_steps > 0
    }

    /// The arguments that do one run; with `again` although it failed.
    pub fn run(&self, run: &str, again: bool) -> Vec<String> {
        let more = ["--run".to_string(), run.into()];
        self.arguments(more.into_iter().chain(again.then(|| "--retry-failed".into())))
    }

    /// The arguments that try these arms, with commas between them.
    pub fn trial(&self, arms: &str) -> Vec<String> {
        self.arguments(["--trial", "--smoke-steps", &self.smoke_steps.to_string(), "--arms", arms].map(String::from))
    }

    /// A command line for a shell that does the run that `variable` names.
    pub(super) fn run_command(&self, variable: &str, again: bool) -> String {
        self.command(&self.run("", again), variable)
    }

    /// A command line for a shell that tries the arms that `variable` names.
    pub(super) fn trial_command(&self, variable: &str) -> String {
        self.command(&self.trial(""), variable)
    }

    /// A command line for a shell that writes the report.
    pub(super) fn report_command(&self) -> String {
        self.command(&self.arguments(["--report".to_string()]), "")
    }

    /// A command line for a shell; `variable` stands in the place of an empty argument.
    fn command(&self, arguments: &[String], variable: &str) -> String {
        let words = arguments.iter().map(|word| if word.is_empty() { variable.to_string() } else { shell(word) });
        let program = shell(&self.program.display().to_string());
        // Keys of recipes that the environment sets, which other machines do not have.
        let keys = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let keys = keys.filter(|(name, _)| name.starts_with("DINOLAB_"));
        let keys: String = keys.map(|(name, value)| format!("{name}={} ", shell(&value.to_string_lossy()))).collect();
        let keys = if keys.is_empty() { keys } else { format!("env {keys}") };
        format!("{keys}{program} {}", words.collect::<Vec<_>>().join(" "))
    }

    fn arguments(&self, more: impl IntoIterator<Item = String>) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let mut all = vec!["ablate".into(), path(&self.suite), "--out".into(), path(&self.out)];
        all.extend(self.sets.iter().flat_map(|set| ["--set".into(), set.clone()]));
        all.extend(more);
        all
    }
}

/// A copy of this program in the suite's folder: jobs that wait run what was there when they were submitted.
///
/// # Errors
/// If it cannot be written.
pub fn freeze(out: &Path) -> Result<PathBuf> {
    let bytes = std::fs::read(PROGRAM).map_err(Error::io("read", PROGRAM))?;
    let hash = blake3::hash(&bytes).to_hex();
    let folder = std::path::absolute(out).map_err(Error::io("find", out))?.join("jobs").join(&hash[..8]);
    // Reports name the program.
    let path = folder.join(program());
    if !path.exists() {
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        dinolab_core::files::write_file(&path, &bytes)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).map_err(Error::io("write", &path))?;
    }
    Ok(path)
}

/// Of these runs those that are to be done, trunks first, each with whether it failed before. An arm whose trunk failed and
/// stays so is left out.
///
/// # Errors
/// If a run's folder has files that cannot be understood.
pub fn left<'a>(plan: &Plan, runs: &[&'a PlannedRun], retry_failed: bool) -> Result<Vec<(&'a PlannedRun, bool)>> {
    let mut left = Vec::new();
    for &run in runs {
        match Status::of(&plan.out.join(&run.dir))? {
            Status::Finished(_) => {}
            failed if failed.final_failure(retry_failed).is_some() => {}
            status => left.push((run, matches!(status, Status::Failed(_)))),
        }
    }
    let mut possible = Vec::new();
    for &(run, again) in &left {
        let comes = left.iter().any(|(other, _)| other.arm == TRUNK && other.seed == run.seed);
        if comes || has_trunk(plan, run)? {
            possible.push((run, again));
        }
    }
    possible.sort_by_key(|(run, _)| run.arm != TRUNK);
    Ok(possible)
}

/// The arms that are tried together: each alone, or all after the trunk that they share.
pub(super) fn trials<'a>(plan: &Plan, untried: &[&'a PlannedRun]) -> Vec<Vec<&'a str>> {
    let arms: Vec<&str> = untried.iter().map(|run| run.arm.as_str()).collect();
    match plan.suite.trunk {
        Some(_) if arms.is_empty() => Vec::new(),
        Some(_) => vec![arms],
        None => arms.into_iter().map(|arm| vec![arm]).collect(),
    }
}
