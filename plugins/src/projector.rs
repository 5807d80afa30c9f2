//! The projector of BYOL, VICReg, Barlow Twins and InfoNCE: linear layers with batch norm and ReLU between them.

use dinolab_core::contract::LossCost;
use dinolab_core::nn::{Activation, Mlp};
use dinolab_core::params::ParamBuilder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `layers` linear layers (width -> hidden -> ... -> output) with batch norm and ReLU between them. The statistics of the
/// batch norm are those of all crops that go through it together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProjectorConfig {
    /// Width of the hidden layers.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub hidden: usize,
    /// Width of what it gives.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub output: usize,
    /// Linear layers.
    #[schemars(range(min = 1, max = 100))]
    pub layers: usize,
}

impl Default for ProjectorConfig {
    fn default() -> Self {
        Self { hidden: 2048, output: 256, layers: 2 }
    }
}

impl ProjectorConfig {
    fn widths(&self, from: usize) -> Vec<usize> {
        let hidden = vec![self.hidden; self.layers.max(1) - 1];
        [from].into_iter().chain(hidden).chain([self.output]).collect()
    }

    /// Declares the layers on vectors of width `from`, under `scope`.
    pub(crate) fn declare(&self, params: &mut ParamBuilder, scope: &str, from: usize) -> Mlp {
        params.scope(scope, |p| Mlp::declare(p, &self.widths(from), Activation::BatchNormRelu, true))
    }

    /// What the layers cost for one image with so many rows of the student and of the teacher.
    pub(crate) fn cost(&self, from: usize, student: f64, teacher: f64) -> LossCost {
        let widths = self.widths(from);
        let operations = 2.0 * Mlp::count(&widths, true);
        // Kept: the input of every linear layer, and of every batch norm twice (itself and centred).
        let kept = widths.iter().sum::<usize>() as f64 + 3.0 * (self.layers.max(1) - 1) as f64 * self.hidden as f64;
        LossCost {
            forward_flops: operations * student,
            project_flops: operations * teacher,
            activations: student * kept,
            outputs: student * self.output as f64,
            targets: teacher * self.output as f64,
        }
    }
}
