//! What a run gets that fails: another try, as often as the suite allows it, or smaller micro-batches where memory was
//! short. What was tried is written into the run's folder, from which the report tells it.

use std::path::{Path, PathBuf};

use dinolab_core::files::write_file;
use dinolab_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::Value;

use super::file::{Overrides, Suite};
use super::record::{read_json, Failure, FAILURE};

/// The file in a run's folder.
const FILE: &str = "attempts.json";
/// The key that lets a batch fit.
pub(super) const MICRO_BATCHES: &str = "batch.micro_batches";

/// What becomes of a run that does not fit into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnOutOfMemory {
    /// It fails like any other.
    #[default]
    Fail,
    /// It begins anew with at least twice as many micro-batches, again and again until it fits.
    MoreMicroBatches,
}

impl OnOutOfMemory {
    /// Whether a run that ended with `error` is tried with smaller micro-batches.
    pub fn shrinks(self, error: &str) -> bool {
        self == Self::MoreMicroBatches && is_out_of_memory(error)
    }
}

/// Whether an error says that memory was short: the driver's, or the forecast before the first step.
fn is_out_of_memory(error: &str) -> bool {
    let forecast =
        error.contains("needs about") && ["this machine has", "the GPU has"].iter().any(|h| error.contains(h));
    forecast || error.contains("CUDA_ERROR_OUT_OF_MEMORY")
}

/// Further tries of a run whose process lost its GPU. It need not be the run's fault: a card, a driver or a library may be
/// to blame, and what comes of the next try has the same bits.
const TRIES_WITHOUT_FAULT: usize = 3;

/// Whether an error leaves its process without a GPU: whatever runs next in it fails as well.
pub(crate) fn loses_the_gpu(error: &str) -> bool {
    const FAULTS: [&str; 8] = [
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE",
        "HARDWARE_STACK_ERROR",
        "ECC_UNCORRECTABLE",
    ];
    FAULTS.iter().any(|fault| error.contains(&format!("CUDA_ERROR_{fault}")))
}

/// A try of a run that ended with an error and was followed by another: an entry of `attempts.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What it ended with.
    pub error: String,
    /// `batch.micro_batches` of the tries that follow, if they have others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batches: Option<u64>,
}

impl Attempt {
    /// Those of the run in `dir`, the first one first; none of one that was tried once.
    ///
    /// # Errors
    /// If the file cannot be understood.
    pub fn read(dir: &Path) -> Result<Vec<Self>> {
        Ok(read_json(&dir.join(FILE))?.unwrap_or_default())
    }
}

/// What was changed in the recipe of the run in `dir` so that it fits.
///
/// # Errors
/// If its attempts cannot be read.
pub(super) fn changed(suite: &Suite, dir: &Path) -> Result<Overrides> {
    if suite.on_out_of_memory == OnOutOfMemory::Fail {
        return Ok(Overrides::new());
    }
    let parts = Attempt::read(dir)?.iter().rev().find_map(|attempt| attempt.micro_batches);
    Ok(parts.map(|parts| (MICRO_BATCHES.to_string(), Value::Integer(parts as i64))).into_iter().collect())
}

/// Records that the run in `dir` ended with `error`.
pub(crate) fn record_failure(dir: &Path, error: &str) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let text = serde_json::to_string_pretty(&Failure { error: error.into() }).expect("a failure is plain data");
    write_file(&dir.join(FAILURE), text.as_bytes())
}

/// What follows an error.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// The run goes on from its newest checkpoint.
    Again,
    /// The run begins anew with these changes to its recipe.
    MoreMicroBatches(Overrides),
    /// The run has failed.
    Fails,
}

/// The tries that a run has left.
pub(crate) struct Budget {
    dir: PathBuf,
    policy: OnOutOfMemory,
    left: usize,
    /// Beside them, for errors that lose the GPU.
    left_for_gpu: usize,
    attempts: Vec<Attempt>,
}

impl Budget {
    /// Of the run in `dir`; with `anew` what was tried before does not count.
    ///
    /// # Errors
    /// If its attempts cannot be read.
    pub(crate) fn of(suite: &Suite, dir: &Path, anew: bool) -> Result<Self> {
        let attempts = Attempt::read(dir)?;
        let used = attempts.iter().filter(|attempt| attempt.micro_batches.is_none() && !anew);
        let (of_gpu, used): (Vec<_>, Vec<_>) = used.partition(|attempt| loses_the_gpu(&attempt.error));
        let beyond = of_gpu.len().saturating_sub(TRIES_WITHOUT_FAULT);
        let left = (suite.retries as usize).saturating_sub(used.len() + beyond);
        let left_for_gpu = TRIES_WITHOUT_FAULT.saturating_sub(of_gpu.len());
        Ok(Self { dir: dir.to_path_buf(), policy: suite.on_out_of_memory, left, left_for_gpu, attempts })
    }

    /// What follows `error` of a run of `recipe`. Takes it from the budget, and what a run that begins anew left.
    ///
    /// # Errors
    /// If the run's folder cannot be written.
    pub(crate) fn next(&mut self, error: &str, recipe: &toml::Table) -> Result<Next> {
        if let Some(parts) = self.policy.shrinks(error).then(|| more_micro_batches(recipe)).flatten() {
            clear(&self.dir)?;
            self.write(Attempt { error: error.into(), micro_batches: Some(parts) })?;
            let set = [(MICRO_BATCHES.to_string(), Value::Integer(parts as i64))];
            return Ok(Next::MoreMicroBatches(set.into()));
        }
        let left = match loses_the_gpu(error) && self.left_for_gpu > 0 {
            true => &mut self.left_for_gpu,
            false => &mut self.left,
        };
        if *left == 0 {
            return Ok(Next::Fails);
        }
        *left -= 1;
        self.write(Attempt { error: error.into(), micro_batches: None })?;
        Ok(Next::Again)
    }

    fn write(&mut self, attempt: Attempt) -> Result<()> {
        self.attempts.push(attempt);
        let text = serde_json::to_string_pretty(&self.attempts).expect("plain data");
        write_file(&self.dir.join(FILE), text.as_bytes())
    }
}

/// The smallest number of micro-batches that is at least twice that of `recipe` and divides its batch.
fn more_micro_batches(recipe: &toml::Table) -> Option<u64> {
    let batch = |key: &str| recipe.get("batch")?.get(key)?.as_integer().and_then(|n| u64::try_from(n).ok());
    let (size, now) = (batch("size")?, batch("micro_batches").unwrap_or(1));
    (2 * now..=size).find(|parts| size.is_multiple_of(*parts))
}

/// Removes what a run left but for its logs. `recipe.toml`, by which a run is known, goes last.
fn clear(dir: &Path) -> Result<()> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("read", dir))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_none_or(|end| end != "log") && !path.ends_with(FILE));
    paths.sort_by_key(|path| path.ends_with("recipe.toml"));
    for path in paths {
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(Error::io("remove", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_gpu_is_no_matter_of_memory_or_numbers() {
        let lost = "the GPU failed: cuMemcpyDtoHAsync: unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED)";
        assert!(loses_the_gpu(lost) && !is_out_of_memory(lost));
        assert!(!loses_the_gpu("(CUDA_ERROR_OUT_OF_MEMORY)") && !loses_the_gpu("step 7: loss/dino is not finite"));
    }

    #[test]
    fn micro_batches_at_least_double_and_divide_the_batch() {
        let parts = |batch: &str| more_micro_batches(&format!("batch = {{ {batch} }}").parse().unwrap());
        assert_eq!(parts("size = 12"), Some(2));
        assert_eq!(parts("size = 12, micro_batches = 2"), Some(4));
        assert_eq!(parts("size = 12, micro_batches = 4"), Some(12));
        assert_eq!(parts("size = 12, micro_batches = 12"), None);
    }

    #[test]
    fn only_what_says_that_memory_was_short_is_out_of_memory() {
        for short in [
            "the GPU failed: cuMemCreate: out of memory (CUDA_ERROR_OUT_OF_MEMORY)",
            "batch.size: with 64 the run needs about 98 GiB, and the GPU has 78 GiB",
            "needs about 98 GiB, and this machine has 7 GiB",
        ] {
            assert!(is_out_of_memory(short), "{short}");
        }
        assert!(!is_out_of_memory("step 7: loss/dino is not finite") && !is_out_of_memory("needs about a day"));
    }
}
