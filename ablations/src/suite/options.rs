//! What is to be done of a suite, and what was.

use std::sync::atomic::AtomicBool;
use std::sync::Arc;

/// What to do of a plan, and how.
#[derive(Clone, Debug)]
pub struct ExecuteOptions {
    /// Arms to run; all if empty.
    pub arms: Vec<String>,
    /// Seeds to run; all if empty.
    pub seeds: Vec<u64>,
    /// Steps of the trial run of every arm; 0: no trial.
    pub smoke_steps: u64,
    /// End at the first run that fails, instead of going on with the others.
    pub fail_fast: bool,
    /// Do failed runs again, from their newest checkpoint if they have one.
    pub retry_failed: bool,
    /// Set by signals: finish the step, save, and return.
    pub stop: Arc<AtomicBool>,
}

/// What ran when a process lost its GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostIn {
    /// The trial of an arm.
    Trial,
    /// A run, which goes on from its newest checkpoint, or has failed.
    Run,
}

/// What was done and what is left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs that this process finished.
    pub finished: usize,
    /// Runs that had been finished before.
    pub skipped: usize,
    /// Runs that failed, now or before: folder and error.
    pub failed: Vec<(String, String)>,
    /// Runs that another process holds.
    pub elsewhere: Vec<String>,
    /// Runs whose trunk failed, or is being run by another process.
    pub waiting: Vec<String>,
    /// Where this process lost its GPU: what is left is for another.
    pub lost_gpu: Option<LostIn>,
    /// The run that was asked to stop, and its step; a trial run keeps none.
    pub interrupted: Option<(String, Option<u64>)>,
}
