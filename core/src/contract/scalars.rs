//! Numbers that change from step to step, where a recorded step finds them.
//!
//! A step asks for the values of schedules in the same order every time. On a GPU the n-th one asked for is the n-th
//! element of a buffer, which is filled before the step begins.

use std::cell::RefCell;

use super::{At, Schedule};
use crate::tensor::cannot_record;
use crate::{DType, Device, Result, Tensor};

/// More than any set of losses asks for.
const MOST: usize = 256;

/// The schedules that a step asked for, in order, and their values on a GPU (f32).
pub(crate) struct Feed {
    schedules: Vec<Schedule>,
    values: Tensor,
    next: usize,
}

thread_local! {
    static FEED: RefCell<Option<Feed>> = const { RefCell::new(None) };
}

impl Feed {
    pub(crate) fn new(device: Device) -> Self {
        let values = device.with(|| Tensor::zeros(&[MOST], DType::F32));
        Self { schedules: Vec::new(), values, next: 0 }
    }

    /// Runs a step with the values of its schedules on the GPU.
    pub(crate) fn during<R>(&mut self, at: At, f: impl FnOnce() -> Result<R>) -> Result<R> {
        self.fill(at)?;
        let here = Self { schedules: std::mem::take(&mut self.schedules), values: self.values.clone(), next: 0 };
        FEED.set(Some(here));
        let result = f();
        let used = FEED.take().expect("put there above");
        self.schedules = used.schedules;
        result
    }

    /// Writes the values at `at` of all schedules known so far.
    pub(crate) fn fill(&self, at: At) -> Result<()> {
        let values: Vec<f32> = self.schedules.iter().map(|s| s.at(at) as f32).collect();
        self.write(0, &values)
    }

    fn write(&self, start: usize, values: &[f32]) -> Result<()> {
        let gpu = self.values.gpu().expect("the feed is on a GPU");
        gpu.upload(self.values.device_address() + 4 * start as u64, bytemuck::cast_slice(values))
    }

    fn take(&mut self, schedule: &Schedule, at: At) -> Result<Tensor> {
        let slot = self.next;
        self.next += 1;
        if slot >= MOST {
            cannot_record(|| format!("more than {MOST} values of schedules"));
            return Ok(Tensor::scalar(schedule.at(at), DType::F32));
        }
        if self.schedules.get(slot) != Some(schedule) {
            cannot_record(|| "the schedules that the step asks for change".into());
            self.schedules.truncate(slot);
            self.schedules.push(schedule.clone());
            self.write(slot, &[schedule.at(at) as f32])?;
        }
        Ok(self.values.view(slot, &[]))
    }
}

/// The value of `schedule` at `at`, rank 0.
///
/// # Panics
/// If the device fails, with an [`Error`](crate::Error) that [`catch_out_of_memory`](crate::tensor::catch_out_of_memory)
/// gives back.
pub(crate) fn scalar(schedule: &Schedule, at: At, dtype: DType) -> Tensor {
    let fed = FEED.with_borrow_mut(|feed| feed.as_mut().map(|feed| feed.take(schedule, at)));
    match fed {
        Some(Ok(value)) => value,
        Some(Err(error)) => std::panic::resume_unwind(Box::new(error)),
        None => Tensor::scalar(schedule.at(at), dtype),
    }
}
