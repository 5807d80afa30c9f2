//! A suite as jobs of Slurm: a trial of every arm, then trunks, then arms as arrays, then the report.
//!
//! What is submitted lies in a numbered folder of the suite's `jobs/`: the scripts, the runs (one a line, by which an index
//! finds its own), the program as it was, and the numbers of the jobs. An index that is asked to stop saves, ends with code
//! 75 and puts itself back into the queue.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use dinolab_core::files::write_file;
use dinolab_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::job::{trials, Jobs};
use crate::style::shell;
use crate::suite::{Plan, PlannedRun, TRUNK};

/// The largest array where Slurm does not say it: its default.
const ARRAY: usize = 1001;
/// What `sbatch` is given unless `--slurm` says otherwise. Two minutes before its time is over, or when it is preempted, a
/// job is asked to save.
const OPTIONS: [(&str, Option<&str>); 3] =
    [("requeue", None), ("open-mode", Some("append")), ("signal", Some("USR2@120"))];
/// The file in a submission's folder that says what was submitted.
const FILE: &str = "slurm.json";

/// What is asked of Slurm, on the command line.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Options of `sbatch`: `time=24:00:00`, `gpus=1`, `exclusive`.
    pub sbatch: Vec<String>,
    /// Runs at a time, at most.
    pub parallel: Option<usize>,
}

/// A job array that was submitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitted {
    /// Its number.
    pub job: String,
    /// Its script.
    pub script: String,
    /// The runs of its indexes, from 0 on; none of the trial and of the report.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<PathBuf>,
}

/// One call of `sbatch`.
struct Call {
    script: &'static str,
    /// The number of indexes.
    size: usize,
    /// At most so many at a time.
    at_once: Option<usize>,
    /// The line of the first index in the list of the script.
    offset: usize,
    runs: Vec<PathBuf>,
}

/// The scripts of a submission, and the calls that submit them, in order.
pub struct Submission {
    folder: PathBuf,
    files: Vec<(&'static str, String)>,
    calls: Vec<Call>,
    chained: bool,
}

impl Submission {
    /// The trial of `untried` arms, the runs in `left`, and a report, to be written into `folder`; arrays of at most `largest`.
    pub fn new(
        plan: &Plan,
        jobs: &Jobs,
        (left, untried): (&[(&PlannedRun, bool)], &[&PlannedRun]),
        options: &Options,
        (folder, largest): (PathBuf, usize),
    ) -> Self {
        let (mut files, mut calls) = (Vec::new(), Vec::new());
        let header = header(plan, jobs, &folder, options);
        let list = |lines: &[String]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        let own = |name: &str| shell(&folder.join(name).display().to_string());
        // Arrays of `n` indexes in all, each at most as long as Slurm takes them.
        let arrays = |script, n: usize, runs: &[PathBuf]| -> Vec<Call> {
            let array = |offset: usize| {
                let indexes = offset..n.min(offset + largest.max(1));
                let (size, runs) = (indexes.len(), runs.get(indexes).unwrap_or_default().to_vec());
                Call { script, size, at_once: options.parallel, offset, runs }
            };
            (0..n).step_by(largest.max(1)).map(array).collect()
        };
        let arms: Vec<String> = trials(plan, untried).iter().map(|arms| arms.join(",")).collect();
        if !arms.is_empty() && jobs.tries() {
            let find = find("arms", &own("arms.txt"));
            let command = jobs.trial_command("\"$arms\"");
            files.push(("arms.txt", list(&arms)));
            files.push(("trial.sh", format!("{header}{find}{}", step(&command))));
            calls.extend(arrays("trial.sh", arms.len(), &[]));
        }
        let of = |trunk: bool| left.iter().filter(move |(run, _)| (run.arm == TRUNK) == trunk);
        for (script, lines, trunk) in [("trunks.sh", "trunks.txt", true), ("runs.sh", "runs.txt", false)] {
            let (runs, again): (Vec<PathBuf>, Vec<bool>) =
                of(trunk).map(|(run, again)| (run.dir.clone(), *again)).unzip();
            if runs.is_empty() {
                continue;
            }
            let again = again.contains(&true);
            let log = format!("{}/\"$run\"", shell(&jobs.out().display().to_string()));
            let find = find("run", &own(lines));
            let enter = format!("mkdir -p {log} && exec >> {log}/run.log 2>&1\n");
            let command = jobs.run_command("\"$run\"", again);
            files.push((lines, list(&runs.iter().map(|run| run.display().to_string()).collect::<Vec<_>>())));
            files.push((script, format!("{header}{find}{enter}{}", step(&command))));
            calls.extend(arrays(script, runs.len(), &runs));
        }
        files.push(("report.sh", format!("{header}{}\n", jobs.report_command())));
        calls.push(Call { script: "report.sh", size: 0, at_once: None, offset: 0, runs: Vec::new() });
        Self { folder, files, calls, chained: options.parallel.is_some() }
    }

    /// Scripts and calls, to be read.
    pub fn shown(&self) -> String {
        let mut text = String::new();
        for (name, content) in &self.files {
            let _ = writeln!(text, "# {}\n{content}", self.folder.join(name).display());
        }
        let mut before: Vec<(&str, String)> = Vec::new();
        for (k, call) in self.calls.iter().enumerate() {
            let job = format!("<job {}>", k + 1);
            let _ = writeln!(text, "sbatch {}    # {job}", self.arguments(call, &before).join(" "));
            before.push((call.script, job));
        }
        text
    }

    /// Writes the scripts and submits them.
    ///
    /// # Errors
    /// If the folder cannot be written, or `sbatch` refuses a job or gives no number: then what was submitted before is
    /// cancelled.
    pub fn submit(&self) -> Result<Vec<Submitted>> {
        std::fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        for (name, content) in &self.files {
            write_file(&self.folder.join(name), content.as_bytes())?;
        }
        let mut submitted: Vec<Submitted> = Vec::new();
        for call in &self.calls {
            let before: Vec<(&str, String)> = submitted.iter().map(|s| (s.script.as_str(), s.job.clone())).collect();
            let answer = ask("sbatch", &self.arguments(call, &before));
            // Of a cluster among several the answer is `number;cluster`.
            let number = answer.map(|text| text.trim().split(';').next().unwrap_or_default().to_string());
            let job = match number {
                Ok(job) if job.chars().all(|c| c.is_ascii_digit()) && !job.is_empty() => job,
                other => {
                    let said = other.map_or_else(|error| error, |_| "it gave no number of a job".into());
                    let jobs: Vec<String> = submitted.iter().map(|s| s.job.clone()).collect();
                    let undone = if jobs.is_empty() { Ok(String::new()) } else { ask("scancel", &jobs) };
                    let rest = undone.map_or_else(|_| format!("; cancel {}", jobs.join(", ")), |_| String::new());
                    let help =
                        format!("nothing is in the queue{rest}; mend it (options: --slurm key=value) and submit again");
                    return Err(Error::user(format!("sbatch {}: {said}", call.script), help));
                }
            };
            submitted.push(Submitted { job, script: call.script.into(), runs: call.runs.clone() });
        }
        let text = serde_json::to_string_pretty(&submitted).expect("plain data");
        write_file(&self.folder.join(FILE), text.as_bytes())?;
        Ok(submitted)
    }

    /// Those of `sbatch`, after the jobs that were submitted `before`.
    fn arguments(&self, call: &Call, before: &[(&str, String)]) -> Vec<String> {
        let mut all = vec!["--parsable".to_string()];
        if call.size > 0 {
            let at_once = call.at_once.map_or(String::new(), |n| format!("%{n}"));
            all.push(format!("--array=0-{}{at_once}", call.size - 1));
        }
        let jobs = |script: &str| {
            before.iter().filter(|(of, _)| *of == script).map(|(_, job)| job.clone()).collect::<Vec<_>>()
        };
        let after = |kind: &str, jobs: Vec<String>| (!jobs.is_empty()).then(|| format!("{kind}:{}", jobs.join(":")));
        let earlier = match call.script {
            "runs.sh" => {
                // Arrays that follow each other keep to the number of runs at a time.
                let last = jobs("runs.sh").into_iter().next_back().filter(|_| self.chained);
                [jobs("trunks.sh"), last.into_iter().collect()].concat()
            }
            "report.sh" => [jobs("trunks.sh"), jobs("runs.sh")].concat(),
            _ => Vec::new(),
        };
        let trial = jobs("trial.sh").into_iter().filter(|_| call.script != "trial.sh").collect();
        let needs: Vec<String> = [after("afterok", trial), after("afterany", earlier)].into_iter().flatten().collect();
        if !needs.is_empty() {
            all.push(format!("--dependency={}", needs.join(",")));
            all.push("--kill-on-invalid-dep=yes".into());
        }
        all.push(self.folder.join(call.script).display().to_string());
        if call.offset > 0 {
            all.push(call.offset.to_string());
        }
        all
    }
}

/// The first lines of every script.
fn header(plan: &Plan, jobs: &Jobs, folder: &Path, options: &Options) -> String {
    let mut text = "#!/bin/bash\n".to_string();
    let given: Vec<(&str, Option<&str>)> =
        options.sbatch.iter().map(|o| o.split_once('=').map_or((o.as_str(), None), |(k, v)| (k, Some(v)))).collect();
    let (name, log) = (plan.suite.name.as_str(), folder.join("slurm-%x-%A_%a.log").display().to_string());
    let own = [("job-name", Some(name)), ("output", Some(log.as_str()))];
    let own = own.into_iter().chain(OPTIONS).filter(|(key, _)| given.iter().all(|(other, _)| other != key));
    for (key, value) in own.chain(given.iter().copied()) {
        // sbatch takes quotes in these lines as a shell does.
        let value = value.map_or(String::new(), |value| format!("={}", shell(value)));
        let _ = writeln!(text, "#SBATCH --{key}{value}");
    }
    let here = shell(&jobs.here().display().to_string());
    let _ = writeln!(text, "cd {here} || exit 2");
    text
}

/// Finds the line of an index in a list.
fn find(name: &str, list: &str) -> String {
    format!("{name}=$(sed -n \"$((${{1:-0}} + SLURM_ARRAY_TASK_ID + 1))p\" {list})\n")
}

/// Does the step, and puts the index back into the queue if it was asked to stop: not if it was cancelled.
fn step(command: &str) -> String {
    format!(
        "# A signal ends the waiting; the step, which gets it too, saves.\ntrap : TERM USR1 USR2\nsrun -K {command} &\nstep=$!\n\
         wait $step; code=$?\n\
         while [ $code -gt 128 ]; do wait $step; again=$?; [ $again = 127 ] && break; code=$again; done\n\
         index=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID\n\
         if [ $code = {} ] && [ \"$(squeue -h -j \"$index\" -o %T)\" = RUNNING ]; then scontrol requeue \"$index\"; fi\nexit $code\n",
        crate::cli::RESUMABLE
    )
}

/// What a command of Slurm prints, or why it could not be asked.
pub(super) fn ask(program: &str, arguments: &[String]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|e| format!("cannot run {program}: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    }
}

/// The most indexes of an array, as Slurm says it.
pub fn largest_array() -> usize {
    let config = ask("scontrol", &["show".into(), "config".into()]).unwrap_or_default();
    let line =
        config.lines().find_map(|line| line.strip_prefix("MaxArraySize")?.split('=').nth(1)?.trim().parse().ok());
    line.unwrap_or(ARRAY)
}

/// Everything that was submitted of the suite in `out`, the newest last.
///
/// # Errors
/// If a list of jobs cannot be understood.
pub fn submitted(out: &Path) -> Result<Vec<Submitted>> {
    let mut all = Vec::new();
    for number in 1.. {
        let folder = folder(out, number);
        if !folder.exists() {
            break;
        }
        let path = folder.join(FILE);
        // A submission that failed has none.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let help = "`squeue` and `scancel` tell and end what is in the queue; remove this file";
        let jobs: Vec<Submitted> =
            serde_json::from_str(&text).map_err(|e| Error::content(&path, e.to_string(), help))?;
        all.extend(jobs);
    }
    Ok(all)
}

/// The folder of a new submission.
pub fn new_folder(out: &Path) -> PathBuf {
    let numbers = 1..;
    numbers.map(|number| folder(out, number)).find(|folder| !folder.exists()).expect("some number is free")
}

fn folder(out: &Path, number: u32) -> PathBuf {
    out.join("jobs").join(number.to_string())
}

/// An index of an array in the queue, or a whole job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queued {
    /// The number of its job.
    pub job: String,
    /// Its index, if it is one.
    pub index: Option<usize>,
    /// `PENDING`, `RUNNING` and so on, with the reason.
    pub state: String,
}

/// What of these jobs is in the queue.
///
/// # Errors
/// If Slurm does not answer.
pub fn queue(submitted: &[Submitted]) -> Result<Vec<Queued>> {
    if submitted.is_empty() {
        return Ok(Vec::new());
    }
    let user = std::env::var("USER").ok().or_else(|| ask("id", &["-un".into()]).ok()).unwrap_or_default();
    let arguments = ["-h", "-r", "-u", &user, "-o", "%F|%K|%T|%r"].map(String::from);
    let help = "without Slurm the state of the runs is in their folders; is this the machine that submitted them?";
    let text =
        ask("squeue", &arguments).map_err(|said| Error::user(format!("squeue does not answer: {said}"), help))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let parts: Vec<&str> = line.trim().split('|').collect();
        let [job, index, state, reason] = parts[..] else { continue };
        if submitted.iter().any(|s| s.job == job) {
            let state = if reason == "None" { state.to_string() } else { format!("{state} ({reason})") };
            found.push(Queued { job: job.into(), index: index.parse().ok(), state });
        }
    }
    Ok(found)
}

/// The run of what is in the queue, if it does one.
pub fn run_of<'a>(submitted: &'a [Submitted], queued: &Queued) -> Option<&'a Path> {
    let array = submitted.iter().find(|s| s.job == queued.job)?;
    array.runs.get(queued.index?).map(PathBuf::as_path)
}
