//! A run's folder: one run, one process, finished when `result.json` is there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::write_file;
use crate::contract::Dataset;
use crate::cuda::Gpu;
use crate::recipe::{Overrides, Resolved};
use crate::{Device, Error, Result};

use super::RunOptions;

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
    /// What it ran on.
    pub device: String,
    /// CPU threads.
    pub threads: usize,
    /// Seconds since 1970.
    pub started_unix: u64,
}

/// A run's folder, locked while this value lives.
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Makes the folder, or opens it to go on. Nothing is written yet, so that a run that cannot start leaves no run.
    ///
    /// # Errors
    /// If the folder cannot be written, another process is in it, it holds a run and `resume` is off, or it holds a run
    /// of another recipe.
    pub(super) fn open(resolved: &Resolved, options: &RunOptions) -> Result<Self> {
        let path = options.out.clone();
        fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        let lock_path = path.join(".lock");
        let lock = File::create(&lock_path).map_err(Error::io("write in", &path))?;
        if lock.try_lock().is_err() {
            let help = "wait for it, or choose another folder with --out";
            return Err(Error::content(&path, "another process is running in this folder", help));
        }
        let recipe_path = path.join("recipe.toml");
        if recipe_path.exists() {
            if !options.resume {
                let help = "continue it with --resume, or choose another folder with --out";
                return Err(Error::content(&path, "there is a run in this folder already", help));
            }
            if Resolved::load(&recipe_path, &Overrides::default())?.hash != resolved.hash {
                let help = "start it anew in another folder (--out); `dinolab recipe diff` shows what differs";
                return Err(Error::content(&path, "the run in this folder has another recipe", help));
            }
        }
        Ok(Self { path, _lock: lock })
    }

    /// Writes what is known before the first step: the resolved recipe, and who runs it on what. Gives what a run that
    /// goes on was last run with.
    pub(super) fn begin(
        &self,
        resolved: &Resolved,
        options: &RunOptions,
        data: &dyn Dataset,
    ) -> Result<Option<RunInfo>> {
        let before = RunInfo::read(&self.path)?;
        let recipe = self.path.join("recipe.toml");
        if !recipe.exists() {
            write_file(&recipe, resolved.to_toml().as_bytes())?;
        }
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
            device: recipe_device,
            threads: rayon::current_num_threads(),
            started_unix: since.map_or(0, |d| d.as_secs()),
        };
        let info = serde_json::to_string_pretty(&info).expect("plain data");
        write_file(&self.path.join("run.json"), info.as_bytes())?;
        Ok(before)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The result, if the run is finished.
    pub(super) fn result(&self) -> Result<Option<RunResult>> {
        RunResult::read(&self.path)
    }

    pub(super) fn finish(&self, result: &RunResult) -> Result<()> {
        let text = serde_json::to_string_pretty(result).expect("plain data");
        write_file(&self.path.join("result.json"), text.as_bytes())
    }
}

impl RunResult {
    /// The result of the run in `path`; `None` if it is not finished.
    ///
    /// # Errors
    /// If `result.json` is there but cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        read_json(&path.join("result.json"), "remove this file to finish the run again with --resume")
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
