//! The projector of BYOL, VICReg, Barlow Twins and InfoNCE: linear layers with batch norm and ReLU between them.

use dinolab_core::contract::LossCost;
use dinolab_core::nn::{Activation, Mlp};
use dinolab_core::params::{ParamBuilder, Params};
use dinolab_core::{Result, Tensor};
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

/// The layers of a projector in a layout.
#[derive(Debug)]
pub(crate) struct Projector(Mlp);

impl Projector {
    /// Declares the layers on vectors of width `from`, under `scope`.
    pub(crate) fn declare(params: &mut ParamBuilder, scope: &str, from: usize, config: &ProjectorConfig) -> Self {
        let hidden = vec![config.hidden; config.layers.max(1) - 1];
        let widths: Vec<usize> = [from].into_iter().chain(hidden).chain([config.output]).collect();
        Self(params.scope(scope, |p| Mlp::declare(p, &widths, Activation::BatchNormRelu, true)))
    }

    /// `[N, D]` to `[N, output]`.
    pub(crate) fn forward(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        self.0.forward(params, x)
    }

    /// What the layers cost for one image with so many rows of the student and of the teacher.
    pub(crate) fn cost(&self, student: f64, teacher: f64) -> LossCost {
        let (operations, output) = (2.0 * self.0.parameters(), self.0.output() as f64);
        LossCost {
            forward_flops: operations * student,
            project_flops: operations * teacher,
            activations: student * self.0.activations(),
            outputs: student * output,
            targets: teacher * output,
            ..LossCost::default()
        }
    }
}
