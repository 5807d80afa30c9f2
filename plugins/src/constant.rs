//! Scheduler `constant`: one value for the whole run.

use dinolab_core::contract::{At, Scheduler};
use dinolab_core::plugin;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The same value at every step; a bare number in a recipe means the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Constant {
    /// The value.
    pub value: f64,
}

impl Scheduler for Constant {
    fn value(&self, _: At) -> f64 {
        self.value
    }

    fn pieces(&self, _: u64) -> Option<Vec<u64>> {
        Some(Vec::new())
    }
}

plugin!(Scheduler, "constant", Constant);
