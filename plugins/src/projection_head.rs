//! The projection head of DINO and iBOT: an MLP, L2 normalisation, and a linear map to prototypes.

use dinolab_core::contract::LossCost;
use dinolab_core::nn::{Activation, Linear, Mlp};
use dinolab_core::params::{Init, ParamBuilder, ParamRole, Params};
use dinolab_core::{Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A projection head: `layers` linear layers with GELU between them (width -> hidden -> ... -> bottleneck), then
/// `x / max(|x|, 1e-12)`, then a linear map without bias to the prototypes (no weight normalisation).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeadConfig {
    /// Width of the hidden layers.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub hidden: usize,
    /// Width of the normalised vector that is compared with the prototypes.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub bottleneck: usize,
    /// Number of prototypes K.
    #[schemars(range(min = 2, max = 2_147_483_647), extend("x-width" = true))]
    pub prototypes: usize,
    /// Linear layers before the normalisation.
    #[schemars(range(min = 1, max = 100))]
    pub layers: usize,
    /// Whether these layers have a bias.
    pub bias: bool,
    /// Standard deviation of the prototypes at the start. With the reference's 0.02, logits start near zero and targets
    /// start near uniform, and it takes thousands of steps to leave that state; short runs use a larger value.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 2))]
    pub prototype_std: f64,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self { hidden: 2048, bottleneck: 256, prototypes: 65_536, layers: 3, bias: true, prototype_std: 0.02 }
    }
}

#[derive(Clone, Debug)]
enum Layers {
    /// The reference names a single layer `mlp.weight`.
    One(Linear),
    /// `mlp.0.weight`, `mlp.2.weight`, ...
    Several(Mlp),
}

/// A head's parameters in a layout.
#[derive(Clone, Debug)]
pub struct Head {
    layers: Layers,
    last_layer: Linear,
}

impl Head {
    /// Declares the parameters of a head on vectors of width `dim`, under the reference's names.
    pub fn declare(params: &mut ParamBuilder, dim: usize, config: &HeadConfig) -> Self {
        let hidden = vec![config.hidden; config.layers.max(1) - 1];
        let widths: Vec<usize> = [dim].into_iter().chain(hidden).chain([config.bottleneck]).collect();
        let layers = params.scope("mlp", |p| match widths[..] {
            [from, to] => Layers::One(Linear::declare(p, from, to, config.bias)),
            _ => Layers::Several(Mlp::declare(p, &widths, Activation::Gelu, config.bias)),
        });
        let prototypes = Init::TruncatedNormal(config.prototype_std);
        let last_layer = params.role(ParamRole::LastLayer, |params| {
            params.scope("last_layer", |p| {
                Linear::declare_with(p, config.bottleneck, config.prototypes, false, prototypes)
            })
        });
        Self { layers, last_layer }
    }

    /// `[rows, D]` to logits `[rows, K]`.
    ///
    /// # Errors
    /// If the width is not that of the head, or the device fails.
    pub fn forward(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        self.last_layer.forward(params, &self.bottleneck(params, x)?)
    }

    /// `[rows, D]` to the normalised vectors `[rows, bottleneck]` that are compared with the prototypes.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn bottleneck(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        match &self.layers {
            Layers::One(layer) => layer.forward(params, x),
            Layers::Several(mlp) => mlp.forward(params, x),
        }?
        .l2_normalize(1e-12)
    }

    /// What the head costs for one image with so many rows of the student and of the teacher.
    pub fn cost(&self, student: f64, teacher: f64) -> LossCost {
        let (parameters, activations) = match &self.layers {
            Layers::One(layer) => (layer.parameters(), (layer.from + layer.to) as f64),
            Layers::Several(mlp) => (mlp.parameters(), mlp.activations()),
        };
        let operations = 2.0 * (parameters + self.last_layer.parameters());
        let (bottleneck, prototypes) = (self.last_layer.from as f64, self.last_layer.to as f64);
        LossCost {
            forward_flops: operations * student,
            project_flops: operations * teacher,
            // The bottleneck is kept before and after its normalisation.
            activations: student * (activations + bottleneck),
            outputs: student * prototypes,
            targets: teacher * prototypes,
            ..LossCost::default()
        }
    }
}
