//! A run's folder: one run, one process, finished when `result.json` is there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::comm::Ranks;
use crate::contract::Dataset;
use crate::cuda::Gpu;
use crate::files::{remove_unfinished, write_file};
use crate::recipe::Overrides;
use crate::resolved::{changes, Change, Resolved};
use crate::{Device, Error, Result};

use super::RunOptions;

/// The file that says that a run is finished.
const RESULT: &str = "result.json";

/// What a finished run leaves: `result.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunResult {
    /// Steps done.
    pub steps: u64,
    /// Seconds spent in steps, probes not counted.
    pub seconds: f64,
    /// Steps whose update was skipped because something was not finite.
    pub skipped: u64,
    /// Losses of the last step and final probe scores, by name.
    pub metrics: BTreeMap<String, f64>,
    /// Why it ended before its steps were done, if it did: the recipe's `stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
}

/// What a run was made of, beside its recipe: `run.json`, of the last time that it was started or continued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The program's version.
    pub dinolab: String,
    /// Its git revision.
    pub revision: String,
    /// Hash of the resolved recipe.
    pub recipe_hash: String,
    /// Hash of what the dataset found, if the recipe does not say it all.
    pub data: Option<String>,
    /// Hash of when the files of the data were written, if it has files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_stamp: Option<String>,
    /// What it ran on.
    pub device: String,
    /// CPU threads.
    pub threads: usize,
    /// Processes that share its steps, and what joins them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RanksInfo>,
    /// BLAKE3 of the weights that it started from, by the key that names them: see `parents.json`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parents: BTreeMap<String, String>,
    /// Seconds since 1970.
    pub started_unix: u64,
}

/// The processes that share the steps of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RanksInfo {
    /// How many.
    pub world: usize,
    /// What joins them.
    pub engine: String,
}

impl RanksInfo {
    /// Of a run on several ranks.
    pub(super) fn of(ranks: &Ranks) -> Option<Self> {
        (ranks.world() > 1).then(|| Self { world: ranks.world(), engine: ranks.engine() })
    }
}

/// What a run writes after its recipe.
const WRITTEN: [&str; 6] = ["metrics.jsonl", "events.jsonl", "messages.jsonl", RUN, "parents.json", checkpoint::FOLDER];

/// What a suite and a chain of stages are known by, whose runs lie in folders of their own.
const OF_OTHERS: [(&str, &str); 2] = [("suite.json", "a suite"), ("stages.json", "a chain of stages")];

/// The file that whoever is in the folder holds.
const LOCK: &str = ".lock";

/// Who runs it, on what.
const RUN: &str = "run.json";

/// The way out where a run cannot go on.
const ANEW: &str =
    "start a new run in another folder (--out) that goes on from this one (--set continue_from=...), or from \
    its weights alone (--set init_from=...)";

/// The key that a run may change although it changes numbers: a run may become longer.
const STEPS: &str = "steps";

/// A run's folder, locked while this value lives.
pub struct RunFolder {
    path: PathBuf,
    /// Keys in which a run that goes on differs from what it was: its steps, keys that change no number, and where the weights
    /// lie that it started from.
    changes: Vec<Change>,
    /// Steps that it had when it was last run, if it has others now.
    old_steps: Option<u64>,
    /// Whether `recipe.toml` says what the run goes on with.
    written: bool,
    /// Whether it was made for this run.
    made: bool,
    _lock: File,
}

impl Drop for RunFolder {
    /// A run that was refused before it wrote anything leaves no folder that was not there: removing one that is not empty fails.
    fn drop(&mut self) {
        if !self.made {
            return;
        }
        let lock = self.path.join(LOCK);
        let is_lock = |entry: std::io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.path() == lock);
        if fs::read_dir(&self.path).is_ok_and(|mut entries| entries.all(is_lock)) {
            let _ = fs::remove_file(&lock).and_then(|()| fs::remove_dir(&self.path));
        }
    }
}

impl RunFolder {
    /// Makes the folder, or opens it to go on. Nothing is written yet, so that a run that cannot start leaves no run.
    /// `only_moved` says whether a key names the same weights as before, in another place.
    ///
    /// # Errors
    /// If the folder cannot be written, another process is in it, it holds a run and `resume` is off, or it holds a run
    /// of a recipe that gives other numbers.
    pub(super) fn open(
        resolved: &Resolved,
        options: &RunOptions,
        only_moved: &dyn Fn(&str) -> Result<bool>,
    ) -> Result<Self> {
        let path = options.out.clone();
        let made = !path.exists();
        fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        let lock_path = path.join(LOCK);
        let lock = File::create(&lock_path).map_err(Error::io("write in", &path))?;
        if lock.try_lock().is_err() {
            let help = "wait for it, or choose another folder (--out, or another `name` of the recipe)";
            return Err(Error::content(&path, "another process is running in this folder", help));
        }
        remove_unfinished(&path)?;
        let recipe_path = path.join("recipe.toml");
        let is_run = checkpoint::newest_step(&path)?.is_some() || path.join(RESULT).exists();
        let text = fs::read_to_string(&recipe_path).ok();
        let own = text.as_ref().is_some_and(|text| *text == resolved.to_toml());
        let written = WRITTEN.into_iter().find(|name| path.join(name).exists());
        // A run that lost its `run.json` has its own recipe, and what it wrote after it.
        let begun = text.is_some() && path.join(RUN).exists() || own && written.is_some();
        if !begun && !is_run {
            if let Some((_, what)) = OF_OTHERS.into_iter().find(|(name, _)| path.join(name).exists()) {
                let problem = format!("this is the folder of {what}, and no place for a run");
                return Err(Error::content(&path, problem, "choose another folder (--out)"));
            }
            // A run that was ended before it wrote more leaves its own recipe.
            if let Some(name) = written.or((text.is_some() && !own).then_some("recipe.toml")) {
                let problem = format!("there is no run in this folder, and it has what one would write over: {name}");
                return Err(Error::content(&path, problem, "move it away, or choose another folder (--out)"));
            }
            return Ok(Self { path, changes: Vec::new(), old_steps: None, written: false, made, _lock: lock });
        }
        if !options.resume {
            let help = "continue it with --resume, or choose another folder (--out, or another `name` of the recipe)";
            return Err(Error::content(&path, "there is a run in this folder already", help));
        }
        if !recipe_path.exists() {
            let problem = "the run in this folder has lost its recipe.toml, which says what it was started with";
            let help = format!("put it back (every checkpoint has a copy of it), or {ANEW}");
            return Err(Error::content(&path, problem, help));
        }
        let written = Resolved::load(&recipe_path, &Overrides::default())?;
        let before = written.clone().absolute()?;
        let all = changes(&before.value, &resolved.value);
        let written = all.is_empty() && before.hash == written.hash;
        let (mut other, mut changes) = (Vec::new(), Vec::new());
        for change in all {
            let same = change.key == STEPS || !resolved.matters(&change.key) || only_moved(&change.key)?;
            if same { &mut changes } else { &mut other }.push(change);
        }
        // Who changed the run's own recipe.toml is told as well: its newest checkpoint has the one that it was made with.
        for change in since_checkpoint(&path, resolved)? {
            let known = change.key == STEPS || other.iter().any(|known| known.key == change.key);
            // Weights may have been moved twice since; whether they are the same is held to their hashes.
            if !known && resolved.matters(&change.key) && !resolved.is_path(&change.key) {
                other.push(change);
            }
        }
        if !other.is_empty() {
            let keys: String = other.iter().map(|change| format!("\n  {change}")).collect();
            let problem = format!("the run in this folder was started with a recipe that gives other numbers:{keys}");
            return Err(Error::content(&path, problem, format!("go on with these keys as they were, or {ANEW}")));
        }
        let old_steps = changes.iter().any(|c| c.key == STEPS).then_some(before.recipe.steps);
        let done = checkpoint::newest_step(&path)?.filter(|_| old_steps.is_some());
        if let Some(done) = done.filter(|done| *done > resolved.recipe.steps) {
            let problem = format!("steps = {}, and this run has done {done} steps already", resolved.recipe.steps);
            return Err(Error::content(
                &path,
                problem,
                format!("name at least {done} (--set steps={done}), or {ANEW}"),
            ));
        }
        Ok(Self { path, changes, old_steps, written, made: false, _lock: lock })
    }

    /// Writes what is known before the first step: the resolved recipe, and who runs it on what. Gives in what a
    /// run that is `resumed` after `start` steps differs from what it was.
    ///
    /// # Errors
    /// If the run's data, or the kind of its device, are others than it was started with; or if the folder cannot be
    /// written.
    pub(super) fn begin(
        &self,
        resolved: &Resolved,
        options: &RunOptions,
        data: &dyn Dataset,
        ranks: &Ranks,
        (start, resumed): (u64, bool),
        parents: BTreeMap<String, String>,
    ) -> Result<Vec<String>> {
        let recipe_device = match resolved.recipe.device()? {
            Device::Cpu => "cpu".to_string(),
            Device::Cuda(ordinal) => format!("cuda:{ordinal} ({})", Gpu::get(ordinal)?.info().name),
        };
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let info = RunInfo {
            dinolab: env!("CARGO_PKG_VERSION").into(),
            revision: options.revision.clone(),
            recipe_hash: resolved.hash.clone(),
            data: data.fingerprint(),
            data_stamp: data.stamp(),
            device: recipe_device,
            threads: rayon::current_num_threads(),
            ranks: RanksInfo::of(ranks),
            parents,
            started_unix: since.map_or(0, |d| d.as_secs()),
        };
        let mut notes = if resumed { self.compare(&info)? } else { Vec::new() };
        let told = self.changes.iter().filter(|change| change.key != "name");
        notes.extend(told.map(|change| format!("the run goes on with a change: {change}")));
        let seams = self.old_steps.map_or(Vec::new(), |old| resolved.seams(old, start));
        if !seams.is_empty() {
            notes.extend(seams.iter().map(ToString::to_string));
            notes.push(format!("so this is not the run that had {} steps from the start", resolved.recipe.steps));
        }
        if !self.written {
            write_file(&self.path.join("recipe.toml"), resolved.to_toml().as_bytes())?;
        }
        // The result of a run that was shorter. What it says is in the log as well.
        let result = self.path.join(RESULT);
        if result.exists() {
            fs::remove_file(&result).map_err(Error::io("remove", &result))?;
        }
        let info = serde_json::to_string_pretty(&info).expect("plain data");
        write_file(&self.path.join(RUN), info.as_bytes())?;
        Ok(notes)
    }

    /// Writes the recipe again if somebody removed it, or the folder: without it nobody could go on from a checkpoint. Says whether it
    /// did.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn keep_recipe(&self, resolved: &Resolved) -> Result<bool> {
        let file = self.path.join("recipe.toml");
        if file.exists() {
            return Ok(false);
        }
        fs::create_dir_all(&self.path).map_err(Error::io("create", &self.path))?;
        write_file(&file, resolved.to_toml().as_bytes()).map(|()| true)
    }

    /// Holds what a run goes on with to what it was last run with.
    fn compare(&self, now: &RunInfo) -> Result<Vec<String>> {
        let Some(before) = RunInfo::read(&self.path)? else {
            let text =
                "run.json is gone: whether data and device are those that the run was started with cannot be told";
            return Ok(vec![text.into()]);
        };
        // Data that do not tell their content are known by where they are.
        let moved = now.data.is_none() && self.changes.iter().any(|change| change.key.starts_with("data."));
        if before.data != now.data || moved {
            let problem = "the data are not those that this run was started with: files came, went or changed";
            let help = format!("put the data back as they were (they may lie in another place), or {ANEW}");
            return Err(Error::content(&self.path, problem, help));
        }
        let kind = |device: &str| device.split(':').next().unwrap_or_default().to_string();
        let name = |device: &str| device.split_once(' ').map(|(_, name)| name.to_string());
        let (was, is) = (&before.device, &now.device);
        if kind(was) != kind(is) {
            let problem = format!(
                "this run was started on another kind of device, which gives other numbers: was {was}, is {is}"
            );
            return Err(Error::content(
                &self.path,
                problem,
                format!("go on where it was started (--device), or {ANEW}"),
            ));
        }
        let rewritten = before.data_stamp.is_some() && before.data_stamp != now.data_stamp;
        let rewritten = rewritten.then(|| {
            "files of the data were copied or written over since the run was started: names and lengths are the same, and their \
             content is not compared"
                .to_string()
        });
        let other = (name(was) != name(is)).then(|| {
            format!(
                "the run goes on on another device, and not to the bits of an uninterrupted one: was {was}, is {is}"
            )
        });
        let build = (before.revision != now.revision).then(|| {
            let (was, is) = (&before.revision, &now.revision);
            format!("the run goes on with another build of dinolab, which may give other bits: was {was}, is {is}")
        });
        Ok(rewritten.into_iter().chain(build).chain(other).collect())
    }

    /// Its new number of steps with the old one, if it has another.
    pub(super) fn longer(&self) -> Option<String> {
        let change = self.changes.iter().find(|change| change.key == STEPS)?;
        Some(change.to_string())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The result, if the run has done the recipe's steps, or ended before by a rule that is still the recipe's.
    pub(super) fn result(&self, steps: u64) -> Result<Option<RunResult>> {
        let same_rule = || !self.changes.iter().any(|change| change.key.starts_with("stop."));
        let ended = |result: &RunResult| result.steps >= steps || (result.stopped.is_some() && same_rule());
        Ok(RunResult::read(&self.path)?.filter(ended))
    }

    pub(super) fn finish(&self, result: &RunResult) -> Result<()> {
        let text = serde_json::to_string_pretty(result).expect("plain data");
        write_file(&self.path.join(RESULT), text.as_bytes())
    }
}

/// In what `resolved` differs from the recipe of the newest checkpoint of the run in `path`, if it has one that can be read.
fn since_checkpoint(path: &Path, resolved: &Resolved) -> Result<Vec<Change>> {
    let Some(newest) = checkpoint::list(path)?.pop() else { return Ok(Vec::new()) };
    // A checkpoint that was changed is passed over when it is loaded.
    let Ok(Some(file)) = checkpoint::recipe_file(&newest) else { return Ok(Vec::new()) };
    let before = Resolved::load(file, &Overrides::default()).and_then(Resolved::absolute);
    Ok(before.map_or(Vec::new(), |before| changes(&before.value, &resolved.value)))
}

impl RunResult {
    /// The result of the run in `path`; `None` if it is not finished.
    ///
    /// # Errors
    /// If `result.json` is there but cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        read_json(&path.join(RESULT), "remove this file; the run writes it again with --resume")
    }
}

impl RunInfo {
    /// What the run in `path` was made of; `None` if it never began.
    ///
    /// # Errors
    /// If `run.json` is there but cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        read_json(&path.join("run.json"), "remove this file; the run writes it again with --resume")
    }
}

fn read_json<T: serde::de::DeserializeOwned>(file: &Path, help: &str) -> Result<Option<T>> {
    if !file.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    serde_json::from_str(&text).map(Some).map_err(|e| Error::content(file, e.to_string(), help))
}
