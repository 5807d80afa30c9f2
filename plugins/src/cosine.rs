//! Scheduler `cosine`: half a cosine after an optional freeze and warm-up.

use std::f64::consts::PI;

use dinolab_core::contract::{At, Scheduler};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Half a cosine from `peak` to `end`, after steps of zero and a straight line: DINOv2's schedule, the reference's
/// `CosineScheduler`.
///
/// Steps `0..F` are 0; the next `W` are a line from `start` to `peak` *with* its endpoint; the remaining `n = total - F - W`
/// are `end + (peak - end) (1 + cos(pi i / n)) / 2`, which does not reach `end` before step `total`. With
/// `trunc_extra = e` the cosine is laid over `int((1 + e) n)` points, both ends included, cut after `n` and stretched to
/// end at `end`: its end is steeper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cosine {
    /// Value where the line begins.
    #[serde(default)]
    pub start: f64,
    /// Value where the cosine begins.
    pub peak: f64,
    /// Value from step `total` on.
    pub end: f64,
    /// Steps W of the line.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Steps F at value 0 before everything else.
    #[serde(default)]
    pub freeze_steps: u64,
    /// Share by which the cosine is lengthened before it is cut.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100))]
    pub trunc_extra: f64,
    /// Steps of the whole curve; by default those of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

impl Cosine {
    /// How much of `peak - end` is left at point `i` of `n`.
    fn share(&self, i: u64, n: u64) -> f64 {
        let half_cosine = |i: u64, points: f64| 0.5 * (1.0 + (PI * i as f64 / points).cos());
        // A single point has nothing to fall to.
        if self.trunc_extra == 0.0 || n == 1 {
            return half_cosine(i, n as f64);
        }
        let intervals = ((1.0 + self.trunc_extra) * n as f64).floor() - 1.0;
        let last = half_cosine(n - 1, intervals);
        (half_cosine(i, intervals) - last) / (1.0 - last)
    }
}

impl Scheduler for Cosine {
    fn value(&self, at: At) -> f64 {
        let total = self.total.unwrap_or(at.total);
        if at.step >= total {
            return self.end;
        }
        let Some(i) = at.step.checked_sub(self.freeze_steps) else { return 0.0 };
        let Some(i) = i.checked_sub(self.warmup_steps) else {
            // With its endpoint; a line of one point is its start, as in NumPy's linspace.
            let last = self.warmup_steps - 1;
            return if last == 0 { self.start } else { crate::linear_warmup::line(self.start, self.peak, i, last) };
        };
        let share = self.share(i, total - self.freeze_steps - self.warmup_steps);
        self.end + (self.peak - self.end) * share
    }

    fn pieces(&self, total: u64) -> Option<Vec<u64>> {
        let line = self.freeze_steps.saturating_add(self.warmup_steps);
        Some(vec![self.freeze_steps, line, self.total.unwrap_or(total)])
    }
}

plugin!(Scheduler, "cosine", Cosine);

#[cfg(test)]
mod tests {
    use super::*;

    fn values(schedule: &Cosine, n: u64) -> Vec<f64> {
        (0..n).map(|step| schedule.value(At { step, total: 8 })).collect()
    }

    #[test]
    fn the_warmup_holds_its_endpoint_and_the_cosine_never_ends() {
        let mut schedule = Cosine {
            start: 0.5,
            peak: 1.5,
            end: 0.5,
            warmup_steps: 3,
            freeze_steps: 1,
            trunc_extra: 0.0,
            total: Some(6),
        };
        assert_eq!(values(&schedule, 8), [0.0, 0.5, 1.0, 1.5, 1.5, 1.0, 0.5, 0.5]);
        schedule.trunc_extra = 0.5;
        assert_eq!(values(&schedule, 8), [0.0, 0.5, 1.0, 1.5, 1.5, 0.5, 0.5, 0.5]);
    }

    #[test]
    fn without_a_total_the_curve_spans_the_run() {
        let schedule =
            Cosine { start: 0.0, peak: 1.0, end: 0.0, warmup_steps: 0, freeze_steps: 0, trunc_extra: 0.0, total: None };
        assert!((values(&schedule, 8)[4] - 0.5).abs() < 1e-15);
    }
}
