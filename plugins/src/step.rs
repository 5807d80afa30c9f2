//! Scheduler `step`: a factor at every milestone.

use dinolab_core::contract::{At, Scheduler};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Multiplied by a factor at every milestone, constant between them.
///
/// `value(i) = value * factor^m`, `m` the number of milestones that are not after step `i`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Value at step 0.
    pub value: f64,
    /// What it is multiplied by at a milestone.
    #[serde(default = "tenth")]
    #[schemars(range(min = 0, max = 1000))]
    pub factor: f64,
    /// The first steps with the new value.
    pub milestones: Vec<u64>,
}

fn tenth() -> f64 {
    0.1
}

impl Scheduler for Step {
    fn value(&self, at: At) -> f64 {
        let passed = self.milestones.iter().filter(|&&m| m <= at.step).count();
        self.value * self.factor.powi(i32::try_from(passed).unwrap_or(i32::MAX))
    }

    fn pieces(&self, _: u64) -> Option<Vec<u64>> {
        Some(self.milestones.clone())
    }
}

plugin!(Scheduler, "step", Step);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_milestone_multiplies_once() {
        let schedule = Step { value: 8.0, factor: 0.5, milestones: vec![2, 4] };
        let values: Vec<f64> = (0..6).map(|step| schedule.value(At { step, total: 6 })).collect();
        assert_eq!(values, [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]);
    }
}
