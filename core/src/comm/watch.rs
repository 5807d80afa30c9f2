//! What moves between ranks, counted, and the calls that ranks are in.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Comm, Reduction};
use crate::{DType, Result};

/// What was moved, and how long that took; waiting for orders is not counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Calls.
    pub calls: u64,
    /// Bytes that came from other ranks.
    pub bytes: u64,
    /// Time in these calls, which includes waiting for ranks that are late.
    pub time: Duration,
}

/// The calls that a rank is in, one in the other, and since when, for [`Comm::waits`].
#[derive(Default)]
pub(super) struct Inside(Mutex<Vec<(&'static str, Instant)>>);

impl Inside {
    pub(super) fn enter(&self, what: &'static str) {
        lock(&self.0).push((what, Instant::now()));
    }

    pub(super) fn leave(&self) {
        lock(&self.0).pop();
    }

    pub(super) fn waits(&self) -> Option<(&'static str, Duration)> {
        lock(&self.0).last().map(|(what, since)| (*what, since.elapsed()))
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An engine whose traffic is counted.
#[derive(Debug)]
pub(super) struct Watched {
    inner: Arc<dyn Comm>,
    traffic: Mutex<Traffic>,
}

impl Watched {
    pub(super) fn new(inner: Arc<dyn Comm>) -> Self {
        Self { inner, traffic: Mutex::default() }
    }

    pub(super) fn traffic(&self) -> Traffic {
        *lock(&self.traffic)
    }

    fn timed(&self, bytes: usize, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        let done = call();
        let mut traffic = lock(&self.traffic);
        traffic.calls += 1;
        traffic.bytes += bytes as u64;
        traffic.time += start.elapsed();
        done
    }
}

impl Comm for Watched {
    fn world(&self) -> usize {
        self.inner.world()
    }
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.timed(all.len() - own.len(), || self.inner.all_gather(own, all))
    }
    fn gather_ranges(&self, all: &mut [u8], ranges: &[Range<usize>]) -> Result<()> {
        let others = ranges.iter().map(Range::len).sum::<usize>() - ranges[self.rank()].len();
        self.timed(others, || self.inner.gather_ranges(all, ranges))
    }
    fn exchange(&self, pieces: &[u8], received: &mut [u8]) -> Result<()> {
        self.timed(pieces.len() - pieces.len() / self.world(), || self.inner.exchange(pieces, received))
    }
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        self.inner.broadcast(bytes)
    }
    fn reduction(&self) -> Reduction {
        self.inner.reduction()
    }
    fn reduce_scatter(&self, pieces: &[u8], dtype: DType, sum: &mut [u8]) -> Result<()> {
        self.timed(sum.len(), || self.inner.reduce_scatter(pieces, dtype, sum))
    }
    fn abort(&self) {
        self.inner.abort();
    }
    fn engine(&self) -> String {
        self.inner.engine()
    }
    fn enter(&self, what: &'static str) {
        self.inner.enter(what);
    }
    fn leave_call(&self) {
        self.inner.leave_call();
    }
    fn waits(&self) -> Option<(&'static str, Duration)> {
        self.inner.waits()
    }
}
