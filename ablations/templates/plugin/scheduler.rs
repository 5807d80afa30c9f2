//! Scheduler `my_plugin`.

use dinolab_core::contract::{At, Scheduler};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Halves its distance to `end` every `half_life` steps: `value(i) = end + (start - end) 2^(-i / half_life)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MyPlugin {
    /// Value at step 0.
    pub start: f64,
    /// Value after many steps.
    #[serde(default)]
    pub end: f64,
    /// Steps until the distance to `end` has halved.
    pub half_life: f64,
}

impl Scheduler for MyPlugin {
    fn value(&self, at: At) -> f64 {
        self.end + (self.start - self.end) * 0.5f64.powf(at.step as f64 / self.half_life)
    }
}

plugin!(Scheduler, "my_plugin", MyPlugin);
