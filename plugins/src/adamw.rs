//! Optimizer `adamw`.

use dinolab_core::contract::Optimizer;
use dinolab_core::params::ParamSpec;
use dinolab_core::{ops, plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// AdamW, as PyTorch computes it: the optimizer of a recipe that names none.
///
/// The direction of a weight with gradient g at update t:
///
/// ```text
/// m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
/// direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
/// ```
///
/// (Loshchilov and Hutter, arXiv:1711.05101; Kingma and Ba, arXiv:1412.6980). Moments are `exp_avg` and `exp_avg_sq`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Decay of the first and second moment.
    #[schemars(extend("items" = { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Less than 1e-20 is lost beside it: the squares of such gradients are zero in
    /// single precision.
    #[schemars(range(min = 1e-20, max = 1000))]
    pub eps: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], eps: 1e-8 }
    }
}

impl Optimizer for AdamW {
    fn moments(&self) -> &[&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn adamw(&self, _: &ParamSpec) -> Option<ops::AdamW> {
        let [beta1, beta2] = self.betas;
        Some(ops::AdamW { beta1, beta2, eps: self.eps })
    }
}

plugin!(default Optimizer, "adamw", AdamW);
