//! Scheduler `linear_warmup_cosine`: a straight line, half a cosine, then constant.

use std::f64::consts::PI;

use dinolab_core::contract::{At, Scheduler};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::linear_warmup::line;

/// A straight line from `start` to `peak`, half a cosine down to `end`, then constant: the reference's
/// `linear_warmup_cosine_decay`.
///
/// Steps `0..W` are the line without its endpoint; the next `C` steps are `end + (peak - end) (1 + cos(pi j / (C - 1))) / 2`
/// for `j = 0..C`, which begins at `peak` exactly and ends at `end` exactly (a single point is `peak`); all later steps are
/// `end`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinearWarmupCosine {
    /// Value at step 0.
    #[serde(default)]
    pub start: f64,
    /// Value where the line ends and the cosine begins.
    pub peak: f64,
    /// Value where the cosine ends, and after it.
    pub end: f64,
    /// Steps W of the line.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Steps C of the cosine; by default all that remain of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine_steps: Option<u64>,
}

impl Scheduler for LinearWarmupCosine {
    fn value(&self, at: At) -> f64 {
        let Some(j) = at.step.checked_sub(self.warmup_steps) else {
            return line(self.start, self.peak, at.step, self.warmup_steps);
        };
        let points = self.cosine_steps.unwrap_or(at.total.saturating_sub(self.warmup_steps));
        match (j, points) {
            (j, points) if j >= points => self.end,
            (0, _) => self.peak,
            (j, points) => {
                self.end + (self.peak - self.end) * 0.5 * (1.0 + (PI * j as f64 / (points - 1) as f64).cos())
            }
        }
    }

    fn pieces(&self, total: u64) -> Option<Vec<u64>> {
        let points = self.cosine_steps.unwrap_or(total.saturating_sub(self.warmup_steps));
        Some(vec![self.warmup_steps, self.warmup_steps.saturating_add(points)])
    }
}

plugin!(Scheduler, "linear_warmup_cosine", LinearWarmupCosine);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cosine_holds_both_ends() {
        let schedule = LinearWarmupCosine { start: 0.0, peak: 2.0, end: 1.0, warmup_steps: 2, cosine_steps: None };
        let values: Vec<f64> = (0..6).map(|step| schedule.value(At { step, total: 5 })).collect();
        assert_eq!(values, [0.0, 1.0, 2.0, 1.5, 1.0, 1.0]);
    }

    #[test]
    fn one_cosine_step_is_the_peak_and_none_is_the_end() {
        let mut schedule =
            LinearWarmupCosine { start: 0.0, peak: 2.0, end: 1.0, warmup_steps: 1, cosine_steps: Some(1) };
        let values = |s: &LinearWarmupCosine| (0..4).map(|step| s.value(At { step, total: 4 })).collect::<Vec<_>>();
        assert_eq!(values(&schedule), [0.0, 2.0, 1.0, 1.0]);
        schedule.cosine_steps = Some(0);
        assert_eq!(values(&schedule), [0.0, 1.0, 1.0, 1.0]);
    }
}
