//! What a run left in its folder: how it ended, its scores, its curves.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use dinolab_core::train::{Lines, RunEvent};
use dinolab_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::plan::PlannedRun;
use super::retry::Attempt;
use super::rules::DROPPED;

/// Written into a run's folder when it ends with an error, so that the suite knows on its next start.
pub(crate) const FAILURE: &str = "failure.json";

/// How far a run is, by what its folder holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Status {
    /// Nothing was begun.
    Pending,
    /// Begun, but it neither finished nor failed.
    Interrupted,
    /// It ended with this error.
    Failed(String),
    /// It did all its steps.
    Finished(RunResult),
}

/// `result.json` of a finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Steps done.
    pub steps: u64,
    /// Seconds spent in steps, over all sessions of the run.
    pub seconds: f64,
    /// Final value of every metric; `None` where it is not a finite number.
    pub metrics: BTreeMap<String, Option<f64>>,
    /// Why it ended before its steps were done, if it did.
    #[serde(default)]
    pub stopped: Option<String>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) error: String,
}

impl Status {
    /// The status of the run in `dir`.
    ///
    /// # Errors
    /// If the folder has files that cannot be read or understood.
    pub fn of(dir: &Path) -> Result<Self> {
        if let Some(failure) = read_json::<Failure>(&dir.join(FAILURE))? {
            return Ok(Self::Failed(failure.error));
        }
        if let Some(result) = read_json::<RunResult>(&dir.join("result.json"))? {
            return Ok(Self::Finished(result));
        }
        // A run writes its recipe before anything else.
        Ok(if dir.join("recipe.toml").exists() { Self::Interrupted } else { Self::Pending })
    }

    /// The error of a run that failed and stays so, and what is said of it: unless failed runs are to be done again, or for good if a
    /// rule dropped it, since from its checkpoint it would go on behind what the rule forbids.
    pub fn final_failure(&self, retry_failed: bool) -> Option<(&str, &'static str)> {
        match self {
            Self::Failed(error) if error.starts_with(DROPPED) => {
                Some((error, "was dropped before; without its folder it is done again"))
            }
            Self::Failed(error) if !retry_failed => Some((error, "failed before; --retry-failed does it again")),
            _ => None,
        }
    }

    /// In one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Interrupted => "interrupted",
            Self::Failed(_) => "failed",
            Self::Finished(_) => "finished",
        }
    }
}

/// A curve: (step, value), steps ascending.
pub type Series = Vec<(u64, f64)>;

/// One run of a suite with what it left.
#[derive(Clone, Debug)]
pub struct RunRecord {
    /// Name of the arm.
    pub arm: String,
    /// The seed.
    pub seed: u64,
    /// Its folder, relative to the suite's.
    pub dir: String,
    /// How far it is.
    pub status: Status,
    /// Every number of `metrics.jsonl` by name.
    pub curves: BTreeMap<String, Series>,
    /// The warnings of `messages.jsonl`: sicknesses seen while training, samples that could not be read.
    pub warnings: Vec<Warning>,
    /// What happened in it, from `events.jsonl`.
    pub events: Vec<RunEvent>,
    /// What it ran on, from `run.json`.
    pub device: Option<String>,
    /// CPU threads, from `run.json`.
    pub threads: Option<u64>,
    /// The revision of the program that ran it last, from `run.json`.
    pub revision: Option<String>,
    /// The hash of the recipe that it was run with, from `run.json`.
    pub recipe_hash: Option<String>,
    /// Hashes of what it was made of, from `run.json`: of the data, and of weights by the key that names them.
    pub made_of: BTreeMap<String, String>,
    /// The tries before the last, which ended with an error.
    pub attempts: Vec<Attempt>,
}

/// A line of `messages.jsonl`.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct Warning {
    /// Steps done when it was said.
    pub step: u64,
    /// What it is about; one kind is told once for all runs.
    pub kind: String,
    /// What was said.
    pub text: String,
}

impl RunRecord {
    /// Reads the folder of `run` under the suite's folder `out`.
    ///
    /// # Errors
    /// If a file cannot be read or understood.
    pub fn read(run: &PlannedRun, out: &Path) -> Result<Self> {
        Self::of(&run.arm, run.seed, run.dir.to_string_lossy().into_owned(), &out.join(&run.dir))
    }

    /// Reads the folder of a run that is shown as `shown`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn of(arm: &str, seed: u64, shown: String, dir: &Path) -> Result<Self> {
        let status = Status::of(dir)?;
        let info: Option<serde_json::Value> = read_json(&dir.join("run.json"))?;
        let device = info.as_ref().and_then(|i| i["device"].as_str().map(String::from));
        let threads = info.as_ref().and_then(|i| i["threads"].as_u64());
        let revision = info.as_ref().and_then(|i| i["revision"].as_str().map(String::from));
        let recipe_hash = info.as_ref().and_then(|i| i["recipe_hash"].as_str().map(String::from));
        let made_of = info.as_ref().map_or_else(BTreeMap::new, |info| {
            let text = |value: &serde_json::Value| value.as_str().map(String::from);
            let weights = info["parents"].as_object().into_iter().flatten();
            let weights = weights.filter_map(|(key, hash)| Some((key.clone(), text(hash)?)));
            weights.chain(text(&info["data"]).map(|hash| ("data".to_string(), hash))).collect()
        });
        let (arm, curves, warnings) = (arm.to_string(), BTreeMap::new(), Vec::new());
        let events = RunEvent::read(dir)?;
        let attempts = Attempt::read(dir)?;
        let mut record = Self {
            arm,
            seed,
            dir: shown,
            status,
            curves,
            warnings,
            events,
            device,
            threads,
            revision,
            recipe_hash,
            made_of,
            attempts,
        };
        let (metrics, messages) = (Lines::read(&dir.join("metrics.jsonl"))?, Lines::read(&dir.join("messages.jsonl"))?);
        for (name, lines) in [("metrics.jsonl", &metrics), ("messages.jsonl", &messages)] {
            let damage = lines.problem().map(|problem| format!("{name}: {problem}: what is whole is shown"));
            record.warnings.extend(damage.map(|text| Warning { step: 0, kind: "log".into(), text }));
        }
        for line in metrics.objects {
            let Some(step) = line.get("step").and_then(serde_json::Value::as_u64) else { continue };
            for (name, value) in line {
                if let Some(value) = value.as_f64().filter(|_| name != "step") {
                    record.curves.entry(name).or_default().push((step, value));
                }
            }
        }
        for line in messages.objects {
            record.warnings.extend(serde_json::from_value(line.into()));
        }
        Ok(record)
    }

    /// What the finished run measured.
    pub fn result(&self) -> Option<&RunResult> {
        match &self.status {
            Status::Finished(result) => Some(result),
            _ => None,
        }
    }

    /// The final value of `metric` if the run finished and the value is finite.
    pub fn score(&self, metric: &str) -> Option<f64> {
        self.result()?.metrics.get(metric).copied().flatten().filter(|v| v.is_finite())
    }
}

pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    let help = "remove this file, and the same command finishes the run again from its newest checkpoint";
    serde_json::from_str(&text).map(Some).map_err(|e| Error::content(path, format!("unreadable: {e}"), help))
}
