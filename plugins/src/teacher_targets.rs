//! How teacher logits become targets: Sinkhorn-Knopp, or softmax after centring. Shared by the losses on prototypes.

use dinolab_core::contract::{Schedule, StateSpec, StepContext, Targets};
use dinolab_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How teacher logits become targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Centering {
    /// Equal mass to every prototype over the batch (Caron et al., "SwAV", arXiv:2006.09882; three iterations).
    #[default]
    SinkhornKnopp,
    /// `softmax((logits - centre) / temperature)`, the centre an exponential moving average of the batch mean (Caron et
    /// al., "DINO", arXiv:2104.14294).
    Softmax,
}

/// The centre that is used next, and the mean that waits to be folded into it.
const CENTER: &str = "center";
const PENDING_MEAN: &str = "pending_mean";

/// The keys that the losses on prototypes share.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Centered<'a> {
    pub(crate) centering: Centering,
    pub(crate) iterations: usize,
    pub(crate) center_momentum: f64,
    pub(crate) temperature: &'a Schedule,
}

impl Centered<'_> {
    /// Softmax centring carries the centre that is used next, and the mean that waits to be folded into it: the
    /// reference defers the update to the next step.
    pub(crate) fn state(&self, prototypes: usize) -> Vec<StateSpec> {
        match self.centering {
            Centering::SinkhornKnopp => Vec::new(),
            Centering::Softmax => vec![
                StateSpec { name: CENTER, shape: vec![prototypes] },
                StateSpec { name: PENDING_MEAN, shape: vec![prototypes] },
            ],
        }
    }

    pub(crate) fn compute(&self, logits: &Tensor, context: &StepContext<'_>) -> Result<Targets> {
        let temperature = context.scalar(self.temperature);
        match self.centering {
            Centering::SinkhornKnopp => {
                logits.sinkhorn_knopp(&temperature, self.iterations, context.shards).map(Targets::of)
            }
            Centering::Softmax => {
                let (center, pending) = (context.state(CENTER)?, context.state(PENDING_MEAN)?);
                let m = self.center_momentum;
                // Both start at zero, so the first step folds nothing in.
                let center = center.scale(m)?.add(&pending.scale(1.0 - m)?)?;
                let rows = logits.centered_softmax(&center, &temperature)?;
                let mean = logits.mean_row(context.shards)?;
                Ok(Targets { rows, state: vec![(CENTER, center), (PENDING_MEAN, mean)] })
            }
        }
    }
}
