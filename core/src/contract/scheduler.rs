//! Numbers that change over time.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// A moment of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// 0-based step about to be run.
    pub step: u64,
    /// Steps of the whole run.
    pub total: u64,
}

/// A number as a function of the step: learning rate, weight decay, EMA momentum, temperature, a loss weight.
///
/// A scheduler is a pure function, so that a resumed run continues on the same curve and a timeline can be drawn
/// before a run.
///
/// ```
/// use dinolab_core::contract::{At, Scheduler};
///
/// /// Halves every `every` steps.
/// #[derive(Debug)]
/// struct HalfLife {
///     start: f64,
///     every: u64,
/// }
///
/// impl Scheduler for HalfLife {
///     fn value(&self, at: At) -> f64 {
///         self.start * 0.5f64.powf(at.step as f64 / self.every as f64)
///     }
///     fn pieces(&self, _: u64) -> Option<Vec<u64>> {
///         Some(Vec::new()) // It only ever falls.
///     }
/// }
///
/// let lr = HalfLife { start: 1.0, every: 10 };
/// assert_eq!(lr.value(At { step: 20, total: 100 }), 0.25);
/// ```
pub trait Scheduler: fmt::Debug + Send + Sync {
    /// The value at a step.
    fn value(&self, at: At) -> f64;

    /// The steps at which a new piece of the curve begins, over a run of `total` steps. Within a piece the value only rises
    /// or only falls, so the ends of the pieces bound its values. They are used to check all values of a run against the
    /// range of a key. `None`: not known; then steps spread evenly over the run are checked.
    fn pieces(&self, total: u64) -> Option<Vec<u64>> {
        let _ = total;
        None
    }
}

/// Steps of a run that are looked at where a scheduler does not know its pieces.
const SPREAD: u64 = 4096;

/// A scheduler in a recipe: a bare number is constant, a table names a plugin. The [`registry`](crate::registry) reads it, as it
/// knows the plugins.
#[derive(Clone)]
pub struct Schedule {
    scheduler: Arc<dyn Scheduler>,
    /// As written, every default filled in.
    source: serde_json::Value,
}

#[derive(Debug)]
struct Bare(f64);

impl Scheduler for Bare {
    fn value(&self, _: At) -> f64 {
        self.0
    }

    fn pieces(&self, _: u64) -> Option<Vec<u64>> {
        Some(Vec::new())
    }
}

impl Schedule {
    /// The same value at every step.
    pub fn constant(value: f64) -> Self {
        Self { scheduler: Arc::new(Bare(value)), source: value.into() }
    }

    /// A plugin, and the table that it was made of with every default filled in.
    pub(crate) fn of(scheduler: Arc<dyn Scheduler>, source: serde_json::Value) -> Self {
        Self { scheduler, source }
    }

    /// The value at a step.
    pub fn at(&self, at: At) -> f64 {
        self.scheduler.value(at)
    }

    /// The steps of a run of `total` (at least 1) steps that have its least and greatest value, in order: both ends of every
    /// [piece](Scheduler::pieces), or steps spread evenly over the run where the scheduler does not know its pieces.
    pub fn landmarks(&self, total: u64) -> Vec<u64> {
        let last = total.max(1) - 1;
        let mut steps = match self.scheduler.pieces(total) {
            Some(begins) => begins.into_iter().flat_map(|step| [step.saturating_sub(1), step]).collect(),
            None => {
                let n = last.min(SPREAD - 1);
                (0..=n).map(|i| (u128::from(i) * u128::from(last) / u128::from(n.max(1))) as u64).collect::<Vec<_>>()
            }
        };
        steps.extend([0, last]);
        steps.retain(|step| *step <= last);
        steps.sort_unstable();
        steps.dedup();
        steps
    }

    /// The steps of a run of `total` steps at which a new [piece](Scheduler::pieces) of the curve begins and the value still
    /// changes or did before; none where the scheduler does not know its pieces.
    pub fn phases(&self, total: u64) -> Vec<u64> {
        let mut steps = self.scheduler.pieces(total).unwrap_or_default();
        steps.retain(|step| (1..total).contains(step));
        steps.sort_unstable();
        steps.dedup();
        let value = |step| self.at(At { step, total });
        steps.retain(|&step| value(0) != value(step) || value(step) != value(total - 1));
        steps
    }

    /// The number, if it was written as a bare number.
    pub fn as_constant(&self) -> Option<f64> {
        self.source.as_f64()
    }
}

impl From<f64> for Schedule {
    fn from(value: f64) -> Self {
        Self::constant(value)
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule({})", self.source)
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Serialize for Schedule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.source.serialize(serializer)
    }
}
