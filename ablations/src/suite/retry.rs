//! What a run gets that fails: another try, as often as the suite allows it, or smaller micro-batches where memory was
//! short. What was tried is written into the run's folder, from which the report tells it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dinolab_core::checkpoint::newest_step;
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

/// Further tries from one checkpoint of a run whose process lost its GPU. It need not be the run's fault: a card, a driver or a
/// library may be to blame, and what comes of the next try has the same bits. A run that lost it twice at one step has none left:
/// the next try would end there as well.
const TRIES_FROM_A_STEP: usize = 10;
/// The most that the newest checkpoint of a run ages that lost its GPU before.
const SAVE_WITHIN: Duration = Duration::from_secs(30);

/// Whether an error leaves its process without a GPU: whatever runs next in it fails as well.
pub(crate) fn loses_the_gpu(error: &str) -> bool {
    const FAULTS: [&str; 14] = [
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_ASSERT",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "CUDA_ERROR_UNKNOWN",
        // What cuBLASLt says of a device that failed before.
        "CUBLAS_STATUS_EXECUTION_FAILED",
        "CUBLAS_STATUS_INTERNAL_ERROR",
    ];
    FAULTS.iter().any(|fault| error.contains(fault))
}

/// A try of a run that ended with an error and was followed by another: an entry of `attempts.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What it ended with.
    pub error: String,
    /// `batch.micro_batches` of the tries that follow, if they have others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batches: Option<u64>,
    /// Whether it lost the GPU and was no matter of the suite's `retries`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lost_gpu: bool,
    /// The newest checkpoint when it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// The step at which it ended, as far as that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<u64>,
    /// Whether the run was asked to be done again afterwards: it does not count.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub past: bool,
}

impl Attempt {
    /// Those of the run in `dir`, the first one first; none of one that was tried once.
    ///
    /// # Errors
    /// If the file cannot be understood.
    pub fn read(dir: &Path) -> Result<Vec<Self>> {
        Ok(read_json(&dir.join(FILE))?.unwrap_or_default())
    }

    fn write(all: &[Self], dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(all).expect("plain data");
        write_file(&dir.join(FILE), text.as_bytes())
    }
}

/// The run in `dir` has not failed, and what was tried before does not count.
///
/// # Errors
/// If its folder cannot be written.
pub(super) fn forget_failure(dir: &Path) -> Result<()> {
    let mut attempts = Attempt::read(dir)?;
    if !attempts.is_empty() {
        attempts.iter_mut().for_each(|attempt| attempt.past = true);
        Attempt::write(&attempts, dir)?;
    }
    match std::fs::remove_file(dir.join(FAILURE)) {
        // Another process was faster.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::io("remove", dir.join(FAILURE))),
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
    attempts: Vec<Attempt>,
}

impl Budget {
    /// Of the run in `dir`.
    ///
    /// # Errors
    /// If its attempts cannot be read.
    pub(crate) fn of(suite: &Suite, dir: &Path) -> Result<Self> {
        let attempts = Attempt::read(dir)?;
        let counts = |attempt: &&Attempt| attempt.micro_batches.is_none() && !attempt.lost_gpu && !attempt.past;
        let left = (suite.retries as usize).saturating_sub(attempts.iter().filter(counts).count());
        Ok(Self { dir: dir.to_path_buf(), policy: suite.on_out_of_memory, left, attempts })
    }

    /// The most that the newest checkpoint ages in the next try, where that is less than the recipe says.
    pub(crate) fn save_within(&self) -> Option<Duration> {
        self.attempts.iter().any(|a| a.lost_gpu && !a.past).then_some(SAVE_WITHIN)
    }

    /// What follows `error`, at step `at`, of a run of `recipe`. Takes it from the budget, and what a run that begins anew left: with
    /// the fewest micro-batches that its recipe `accepts`.
    ///
    /// # Errors
    /// If the run's folder cannot be written.
    pub(crate) fn next(
        &mut self,
        error: &str,
        at: Option<u64>,
        recipe: &toml::Table,
        accepts: &dyn Fn(&Overrides) -> bool,
    ) -> Result<Next> {
        let set = |parts| Overrides::from([(MICRO_BATCHES.to_string(), Value::Integer(parts as i64))]);
        let mut fewer =
            more_micro_batches(recipe).filter(|_| self.policy.shrinks(error)).map(|parts| (parts, set(parts)));
        if let Some((parts, changes)) = fewer.find(|(_, changes)| accepts(changes)) {
            clear(&self.dir)?;
            self.record(Attempt { error: error.into(), micro_batches: Some(parts), ..Attempt::default() })?;
            return Ok(Next::MoreMicroBatches(changes));
        }
        let step = newest_step(&self.dir)?;
        let lost = self.attempts.iter().filter(|a| a.lost_gpu && !a.past);
        let from_here: Vec<&Attempt> = lost.filter(|a| a.step == step).collect();
        let there_again = at.is_some() && from_here.last().is_some_and(|last| last.at == at);
        let lost_gpu = loses_the_gpu(error) && from_here.len() < TRIES_FROM_A_STEP && !there_again;
        if !lost_gpu && self.left == 0 {
            return Ok(Next::Fails);
        }
        self.left -= usize::from(!lost_gpu);
        self.record(Attempt { error: error.into(), lost_gpu, step, at, ..Attempt::default() })?;
        Ok(Next::Again)
    }

    fn record(&mut self, attempt: Attempt) -> Result<()> {
        self.attempts.push(attempt);
        Attempt::write(&self.attempts, &self.dir)
    }
}

/// The numbers of micro-batches that are at least twice that of `recipe` and divide its batch, the smallest first.
fn more_micro_batches(recipe: &toml::Table) -> impl Iterator<Item = u64> {
    let batch = |key: &str| recipe.get("batch")?.get(key)?.as_integer().and_then(|n| u64::try_from(n).ok());
    let (size, now) = (batch("size").unwrap_or(0), batch("micro_batches").unwrap_or(1));
    (2 * now..=size).filter(move |parts| size.is_multiple_of(*parts))
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
    fn a_gpu_that_is_lost_twice_at_one_step_is_the_runs_fault() {
        let dir = tempfile::tempdir().unwrap();
        let budget = || Budget {
            dir: dir.path().to_path_buf(),
            policy: OnOutOfMemory::Fail,
            left: 0,
            attempts: Attempt::read(dir.path()).unwrap(),
        };
        let lost = |at| budget().next("CUDA_ERROR_LAUNCH_FAILED", at, &toml::Table::new(), &|_| true).unwrap();
        assert_eq!(budget().save_within(), None);
        assert_eq!([Some(7), Some(3), Some(7), None, None].map(lost), [(); 5].map(|()| Next::Again));
        assert_eq!(budget().save_within(), Some(SAVE_WITHIN));
        assert_eq!([Some(8), Some(8)].map(lost), [Next::Again, Next::Fails]);
        // Whatever the steps, a checkpoint is gone on from so often.
        assert_eq!(
            (10..15).map(|at| lost(Some(at))).filter(|next| *next == Next::Again).count(),
            TRIES_FROM_A_STEP - 6
        );
    }

    #[test]
    fn a_run_is_not_begun_anew_with_what_its_recipe_refuses() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metrics.jsonl"), "kept").unwrap();
        let policy = OnOutOfMemory::MoreMicroBatches;
        let mut budget = Budget { dir: dir.path().into(), policy, left: 0, attempts: Vec::new() };
        let recipe = "batch = { size = 12 }".parse().unwrap();
        let error = "needs about 98 GiB, and the GPU has 78 GiB";
        assert_eq!(budget.next(error, None, &recipe, &|_| false).unwrap(), Next::Fails);
        assert!(dir.path().join("metrics.jsonl").exists() && Attempt::read(dir.path()).unwrap().is_empty());
        let by_three = |changes: &Overrides| changes[MICRO_BATCHES].as_integer().is_some_and(|parts| parts % 3 == 0);
        let next = budget.next(error, None, &recipe, &by_three).unwrap();
        assert!(matches!(next, Next::MoreMicroBatches(changes) if changes[MICRO_BATCHES].as_integer() == Some(3)));
        assert!(!dir.path().join("metrics.jsonl").exists());
    }

    #[test]
    fn micro_batches_at_least_double_and_divide_the_batch() {
        let parts = |batch: &str| more_micro_batches(&format!("batch = {{ {batch} }}").parse().unwrap()).next();
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
