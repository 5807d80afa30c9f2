//! The projection head of DINO and iBOT: an MLP, L2 normalisation, and a linear map to prototypes.

use serde::{Deserialize, Serialize};

use crate::ops::Linear;
use crate::params::{Init, ParamBuilder, ParamId, ParamRole, Params};
use crate::{Result, Tensor};

/// A projection head: `layers` linear layers with GELU between them (width -> hidden -> ... -> bottleneck), then
/// `x / max(|x|, 1e-12)`, then a linear map without bias to the prototypes (no weight normalisation).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HeadConfig {
    /// Width of the hidden layers.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub hidden: usize,
    /// Width of the normalised vector that is compared with the prototypes.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub bottleneck: usize,
    /// Number of prototypes K.
    #[schemars(range(min = 2, max = 2_147_483_647))]
    pub prototypes: usize,
    /// Linear layers before the normalisation.
    #[schemars(range(min = 1, max = 100))]
    pub layers: usize,
    /// Whether these layers have a bias.
    pub bias: bool,
    /// Standard deviation of the prototypes at the start. With the reference's 0.02 logits begin near zero and targets
    /// near uniform, and it takes thousands of steps until they are not; short runs begin with more.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 2))]
    pub prototype_std: f64,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self { hidden: 2048, bottleneck: 256, prototypes: 65_536, layers: 3, bias: true, prototype_std: 0.02 }
    }
}

/// A head's parameters in a layout.
#[derive(Clone, Debug)]
pub struct Head {
    layers: Vec<(ParamId, Option<ParamId>)>,
    last_layer: ParamId,
}

impl Head {
    /// Declares the parameters of a head on vectors of width `dim`, under the reference's names.
    pub fn declare(params: &mut ParamBuilder, dim: usize, config: &HeadConfig) -> Self {
        let n = config.layers.max(1);
        let widths: Vec<usize> =
            [dim].into_iter().chain(vec![config.hidden; n - 1]).chain([config.bottleneck]).collect();
        let init = Init::TruncatedNormal(0.02);
        let layers = params.scope("mlp", |p| {
            let declare = |p: &mut ParamBuilder, i: usize| {
                let weight = p.add("weight", &[widths[i + 1], widths[i]], init);
                (weight, config.bias.then(|| p.add_plain("bias", &[widths[i + 1]], Init::Zeros)))
            };
            // The reference names a single layer `mlp.weight`; of several, every other index is an activation.
            match n {
                1 => vec![declare(p, 0)],
                _ => (0..n).map(|i| p.scope((2 * i).to_string(), |p| declare(p, i))).collect(),
            }
        });
        let prototypes = Init::TruncatedNormal(config.prototype_std);
        let shape = [config.prototypes, config.bottleneck];
        let last_layer = params
            .role(ParamRole::LastLayer, |params| params.scope("last_layer", |p| p.add("weight", &shape, prototypes)));
        Self { layers, last_layer }
    }

    /// `[rows, D]` to logits `[rows, K]`.
    pub fn forward(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        self.bottleneck(params, x)?.linear(&params.get(self.last_layer), None)
    }

    /// `[rows, D]` to the normalised vectors `[rows, bottleneck]` that are compared with the prototypes.
    pub fn bottleneck(&self, params: &Params<'_>, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, &(weight, bias)) in self.layers.iter().enumerate() {
            let (weight, bias) = (params.get(weight), bias.map(|bias| params.get(bias)));
            let layer = Linear::new(&weight, bias.as_ref());
            x = if i == 0 { layer.of(&x)? } else { layer.after_gelu().of(&x)? };
        }
        x.l2_normalize(1e-12)
    }
}
