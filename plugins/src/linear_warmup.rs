//! Scheduler `linear_warmup`: a straight line, then constant.

use dinolab_core::contract::{At, Scheduler};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A straight line from `start` to `peak`, then constant: DINOv3's choice for the learning rate and the teacher
/// temperature (arXiv:2508.10104, section 3.2).
///
/// `value(i) = start + (peak - start) i / warmup_steps` before step `warmup_steps`, then `peak`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinearWarmup {
    /// Value at step 0.
    #[serde(default)]
    pub start: f64,
    /// Value from step `warmup_steps` on.
    pub peak: f64,
    /// Steps of the line.
    pub warmup_steps: u64,
}

impl Scheduler for LinearWarmup {
    fn value(&self, at: At) -> f64 {
        line(self.start, self.peak, at.step, self.warmup_steps)
    }

    fn pieces(&self, _: u64) -> Option<Vec<u64>> {
        Some(vec![self.warmup_steps])
    }
}

/// Point `i` of a line from `start` (i = 0) to `end` (i = `steps` and later).
pub(crate) fn line(start: f64, end: f64, i: u64, steps: u64) -> f64 {
    if i < steps {
        start + (end - start) * (i as f64 / steps as f64)
    } else {
        end
    }
}

plugin!(Scheduler, "linear_warmup", LinearWarmup);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_starts_at_start_and_holds_the_peak() {
        let schedule = LinearWarmup { start: 1.0, peak: 3.0, warmup_steps: 4 };
        let values: Vec<f64> = (0..6).map(|step| schedule.value(At { step, total: 6 })).collect();
        assert_eq!(values, [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]);
    }
}
