//! Batches made ahead of time, on threads of their own.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, Receiver, RecvTimeoutError, Sender};

use super::batch::StepBatches;
use super::gpu::{pack, DeviceBatches, Staged};
use super::pipeline::{list, BrokenSample, LoaderSpec, Pipeline};
use crate::contract::Dataset;
use crate::cuda::Staging;
use crate::tensor::catch_out_of_memory;
use crate::{Error, Result};

/// A share of broken samples is judged over at least this many (or all, if the dataset has fewer).
const EVIDENCE: u64 = 1000;

/// How often a loop that waits for data looks whether it is asked to stop.
const LOOK: Duration = Duration::from_millis(20);
/// How long a loader that is dropped waits for what its threads are reading.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes the batches of each step in order, `prefetch` steps ahead, until the run's last; then the iterator ends.
///
/// One thread goes from step to step; `loader_threads` others read and augment its images. Dropping the loader stops
/// them, and waits for what they are reading, though not for ever.
///
/// For a GPU the threads only read, draw and upload, while the device works on steps before. The crops are made there
/// when a step is taken, in place of those of the step taken before: only the newest step's batches are valid.
///
/// An item is an error, and the last, when a thread fails, or too many samples cannot be read: more than one, and more
/// than `max_broken_share` of the different ones tried so far (of the first thousand, or of the dataset if it is smaller,
/// as long as fewer were tried).
#[derive(Debug)]
pub struct Loader {
    pipeline: Arc<Pipeline>,
    steps: Option<Receiver<Result<Made>>>,
    on_gpu: Option<OnGpu>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A step as the thread makes it.
enum Made {
    Whole(StepBatches),
    /// Its images are on their way to the GPU.
    Staged(Staged),
}

/// Where crops are made on a GPU, and what images are uploaded with: memory goes back to the thread when it is read.
#[derive(Debug)]
struct OnGpu {
    batches: DeviceBatches,
    free: Sender<Staging>,
}

impl Loader {
    /// Starts the threads.
    ///
    /// # Errors
    /// Those of [`Pipeline::new`], and if the system gives no threads.
    pub fn new(dataset: Arc<dyn Dataset>, spec: LoaderSpec) -> Result<Self> {
        let pipeline = Arc::new(Pipeline::new(dataset.clone(), spec)?);
        let spec = pipeline.spec();
        let no_threads = |e: &dyn std::fmt::Display| {
            Error::user(format!("cannot start the loader's threads: {e}"), "set batch.loader_threads = 1")
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads(spec.batch.loader_threads))
            .thread_name(|i| format!("loader-{i}"))
            .build()
            .map_err(|e| no_threads(&e))?;
        let mut tally = Tally::new(spec.batch.max_broken_share, dataset.len() as u64);
        // The step that waits to be sent counts as prepared too.
        let (sender, steps) = bounded(spec.batch.prefetch.saturating_sub(1));
        let (on_gpu, staging) = match spec.device.gpu() {
            None => (None, None),
            Some(gpu) => {
                // One for each prepared step, and one for that whose crops are being made.
                let (free, staging) = bounded(spec.batch.prefetch.max(1) + 1);
                for _ in 0..spec.batch.prefetch.max(1) + 1 {
                    free.send(Staging::new(gpu)?).expect("there is room for all");
                }
                (Some(OnGpu { batches: DeviceBatches::new(gpu, spec.dtype)?, free }), Some(staging))
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (range, source, stopped) = (spec.start_step..spec.total_steps, pipeline.clone(), stop.clone());
        let make = move |step| match &staging {
            None => source.step_unless(step, &stopped).map(|made| Some(Made::Whole(made))),
            Some(staging) => {
                let Some(raw) = source.raw_unless(step, &stopped)? else { return Ok(None) };
                // No memory comes back any more: the loader was dropped.
                let Ok(staging) = staging.recv() else { return Ok(None) };
                pack(&source, raw, staging).map(|staged| Some(Made::Staged(staged)))
            }
        };
        let stopped = stop.clone();
        let run = move || {
            for step in range {
                let made = catch_unwind(AssertUnwindSafe(|| pool.install(|| make(step))));
                let Some(made) = made.unwrap_or_else(|panic| Err(failure(panic))).transpose() else { return };
                let made = made.and_then(|made| tally.judge(&made).map(|()| made));
                let last = made.is_err() || stopped.load(Ordering::Relaxed);
                if sender.send(made).is_err() || last {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("loader".into()).spawn(run).map_err(|e| no_threads(&e))?;
        Ok(Self { pipeline, steps: Some(steps), on_gpu, stop, thread: Some(thread) })
    }

    /// What makes the batches: any step can be made again with it.
    pub fn pipeline(&self) -> &Arc<Pipeline> {
        &self.pipeline
    }

    /// The next step's batches; `None` after the last, and if `stop` turns true before they are there.
    pub fn next_unless(&mut self, stop: &AtomicBool) -> Option<Result<StepBatches>> {
        let start = Instant::now();
        loop {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            match self.steps.as_ref()?.recv_timeout(LOOK) {
                Ok(made) => {
                    let made = made.and_then(|made| self.finish(made));
                    return Some(made.map(|made| StepBatches { waited: start.elapsed(), ..made }));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.steps = None;
                    return None;
                }
            }
        }
    }

    fn finish(&mut self, made: Made) -> Result<StepBatches> {
        let staged = match made {
            Made::Whole(made) => return Ok(made),
            Made::Staged(staged) => staged,
        };
        let OnGpu { batches, free } = self.on_gpu.as_mut().expect("staged steps are for a GPU");
        let (step, broken) = (staged.step, staged.broken.clone());
        let (batches, staging) = catch_out_of_memory(|| batches.augment(staged))?;
        // The thread may have ended with the last step.
        let _ = free.send(staging);
        Ok(StepBatches { step, batches: batches.to_vec(), waited: Duration::ZERO, broken })
    }
}

impl Iterator for Loader {
    type Item = Result<StepBatches>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_unless(&AtomicBool::new(false))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Closing the channels wakes a thread that waits to send, or for memory.
        self.steps = None;
        self.on_gpu = None;
        let Some(thread) = self.thread.take() else { return };
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        // A thread that hangs in a read (a dead network drive) must not keep a run from ending.
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

/// What made a thread of the loader panic, as an error of the run.
fn failure(panic: Box<dyn Any + Send>) -> Error {
    let panic = match panic.downcast::<Error>() {
        Ok(error) => return *error,
        Err(panic) => panic,
    };
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
    let help = "if a plugin reads the data, look there; otherwise this is a defect: please report it";
    Error::user(format!("a loader thread failed: {text}"), help)
}

fn threads(configured: usize) -> usize {
    match configured {
        0 => rayon::current_num_threads(),
        n => n,
    }
}

/// Counts samples that could not be read, and judges whether a run may go on.
struct Tally {
    max_share: f64,
    samples: u64,
    tried: u64,
    broken: BTreeMap<usize, BrokenSample>,
}

impl Tally {
    fn new(max_share: f64, samples: u64) -> Self {
        Self { max_share, samples, tried: 0, broken: BTreeMap::new() }
    }

    fn judge(&mut self, made: &Made) -> Result<()> {
        let (read, broken) = match made {
            Made::Whole(made) => (made.batches.iter().map(|b| b.images()).sum(), &made.broken),
            Made::Staged(staged) => (staged.images(), &staged.broken),
        };
        self.tried += (read + broken.len()) as u64;
        self.broken.extend(broken.iter().map(|b| (b.index, b.clone())));
        // In a later epoch the same samples are tried again, and the same are broken.
        let (failed, tried, share) = (self.broken.len(), self.tried.min(self.samples), self.max_share);
        let of = self.tried.max(EVIDENCE).min(self.samples);
        if failed <= 1 || failed as f64 <= share * of as f64 {
            return Ok(());
        }
        Err(Error::user(
            format!(
                "{failed} of {tried} samples cannot be read, more than batch.max_broken_share = {share} allows:\n{}",
                list(self.broken.values())
            ),
            "mend or remove these files, or raise batch.max_broken_share",
        ))
    }
}
