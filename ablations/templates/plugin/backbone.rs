//! Backbone `my_plugin`.

use std::num::NonZeroUsize;

use dinolab_core::contract::{Backbone, BackboneContext, Cost, Crops, Features, Grid, Mode};
use dinolab_core::params::{Init, ParamBuilder, ParamId, ParamRole, Params};
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A bag of patches: every patch goes through the same two layers with GELU between them, and the CLS is their mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Width of the features.
    pub dim: NonZeroUsize,
    /// Side of a patch in pixels.
    pub patch_size: NonZeroUsize,
}

impl Default for Config {
    fn default() -> Self {
        let positive = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self { dim: positive(64), patch_size: positive(8) }
    }
}

/// The model: it owns no weights, only their places.
#[derive(Debug)]
pub struct MyPlugin {
    config: Config,
    channels: usize,
    /// Weight and bias of each layer.
    layers: [(ParamId, ParamId); 2],
}

impl MyPlugin {
    /// Declares the parameters.
    pub fn new(config: Config, context: &mut BackboneContext<'_>) -> Result<Box<dyn Backbone>> {
        let (dim, pixels) = (config.dim.get(), context.channels * config.patch_size.get().pow(2));
        let layer = |params: &mut ParamBuilder, name, inputs| {
            params.scope(name, |params| {
                let weight = params.add("weight", &[dim, inputs], Init::TruncatedNormal(0.02));
                // Weight decay does not act on it.
                (weight, params.add_plain("bias", &[dim], Init::Zeros))
            })
        };
        // The recipe's `optimizer.patch_embed_lr_mult` is for layers of this role.
        let embed = context.params.role(ParamRole::PatchEmbed, |params| layer(params, "patch_embed", pixels));
        let layers = [embed, layer(context.params, "mlp", dim)];
        Ok(Box::new(Self { config, channels: context.channels, layers }))
    }
}

impl Backbone for MyPlugin {
    fn dim(&self) -> usize {
        self.config.dim.get()
    }

    fn patch_size(&self) -> usize {
        self.config.patch_size.get()
    }

    fn hides_masked_patches(&self) -> bool {
        // There is no mask token: a loss on masked patches would be one on patches in plain sight.
        false
    }

    fn forward(&self, params: &Params<'_>, crops: &[Crops], _: Mode<'_>) -> Result<Vec<Features>> {
        let [(w1, b1), (w2, b2)] = self.layers.map(|(weight, bias)| (params.get(weight), params.get(bias)));
        let of_kind = |crops: &Crops| {
            let (b, dim, patch) = (crops.pixels.dim(0), self.dim(), self.patch_size());
            let grid = Grid { height: crops.pixels.dim(2) / patch, width: crops.pixels.dim(3) / patch };
            let rows = crops.pixels.patchify(patch)?.cast(params.dtype())?;
            let rows = rows.linear(&w1, Some(&b1))?.gelu()?.linear(&w2, Some(&b2))?;
            let patches = rows.reshape(&[b, grid.patches(), dim])?;
            let registers = Tensor::zeros(&[b, 0, dim], params.dtype());
            Ok(Features { cls: patches.mean_axis(1)?, registers, prenorm: patches.clone(), patches, layers: Vec::new(), grid })
        };
        crops.iter().map(of_kind).collect()
    }

    fn cost(&self, crops: &[(usize, Grid)]) -> Cost {
        let patches: usize = crops.iter().map(|(n, grid)| n * grid.patches()).sum();
        let (dim, pixels) = (self.dim(), self.channels * self.patch_size().pow(2));
        Cost {
            forward_flops: 2.0 * (patches * dim * (pixels + dim)) as f64,
            activations: (patches * (pixels + 2 * dim)) as f64,
            features: (patches * dim) as f64,
            working: (2 * patches * dim) as f64,
        }
    }
}

plugin!(Backbone, "my_plugin", Config, MyPlugin::new);
