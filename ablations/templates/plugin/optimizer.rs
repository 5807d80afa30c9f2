//! Optimizer `my_plugin`.

use dinolab_core::contract::{At, Direction, Optimizer, ParamUpdate, Reach};
use dinolab_core::params::ParamSpec;
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The momentum of every parameter, scaled to a root mean square of 1: `m = momentum m + (1 - momentum) g`,
/// `direction = m / (rms(m) + 1e-8)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// Share of the momentum that stays.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub momentum: f64,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { momentum: 0.9 }
    }
}

impl Optimizer for MyPlugin {
    fn moments(&self) -> &[&'static str] {
        &["exp_avg"]
    }

    fn direction(&self, param: &ParamUpdate<'_>) -> Result<Direction> {
        let (old, new) = (&param.moments[0], &param.gradient);
        let mean = old.scale(self.momentum)?.add(&new.scale(1.0 - self.momentum)?)?;
        // Operations only, no number read back: a step on a GPU is recorded.
        let rms = mean.square()?.mean()?.sqrt()?.shift(1e-8)?;
        Ok(Direction { direction: mean.div(&rms)?, moments: vec![mean] })
    }

    fn reach(&self, param: &ParamSpec, _: At, _: u64) -> Reach {
        // If one number holds the whole length, it is the root of their count times the root mean square.
        let most = (param.range().len() as f64).sqrt();
        Reach { memory: self.momentum, share: 1.0 - self.momentum, gain: 0.0, most }
    }
}

plugin!(Optimizer, "my_plugin", MyPlugin);
