//! ConvNeXt (Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545), with the features that DINOv3 takes from it.
//!
//! Options and presets are here; `model` has the forward pass, `block` one block, `hugging_face` the published names, `onnx`
//! the graph.

use dinolab_core::contract::Backbone;
use dinolab_core::params::{ParamBuilder, ParamSpec};
use dinolab_core::registry::Chosen;
use dinolab_core::weights::ModelInfo;
use dinolab_core::{plugin, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod block;
pub(crate) mod hugging_face;
mod model;
pub(crate) mod onnx;

use model::ConvNext;

plugin!(Backbone, "convnext", ConvNextConfig, ConvNext::build);

/// Pixels between neighbours of the last stage's map: the stem takes 4x4, three stages halve.
pub(crate) const STRIDE: usize = 32;
/// Stages.
pub(crate) const STAGES: usize = 4;

/// An architecture that DINOv3 publishes weights of (arXiv:2508.10104, table 14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// ConvNeXt-T: depths 3, 3, 9, 3; widths 96 to 768; 29M parameters.
    Tiny,
    /// ConvNeXt-S: depths 3, 3, 27, 3; widths 96 to 768; 50M parameters.
    Small,
    /// ConvNeXt-B: depths 3, 3, 27, 3; widths 128 to 1024; 89M parameters.
    Base,
    /// ConvNeXt-L: depths 3, 3, 27, 3; widths 192 to 1536; 198M parameters.
    Large,
}

/// ConvNeXt, a convolutional network in four stages.
///
/// CLS is the mean of the last stage's map after the final norm, patches are the map itself. It has no mask token: where
/// a loss masks patches, it sees them, as in the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct ConvNextConfig {
    pub(crate) preset: Option<Preset>,
    pub(crate) depths: [usize; STAGES],
    pub(crate) dims: [usize; STAGES],
    pub(crate) patch_size: usize,
    pub(crate) layer_scale: f64,
    pub(crate) norm_eps: f64,
    pub(crate) drop_path: f64,
}

/// What may be written in a recipe: anything left out comes from the preset.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(
    title = "ConvNextConfig",
    description = "ConvNeXt, a convolutional network in four stages.\n\nCLS is the mean of the last stage's map after \
    the final norm, patches are the map itself. It has no mask token: where a loss masks patches, it sees them, as in \
    the reference."
)]
pub struct Written {
    /// Architecture that fills in what is not set here.
    #[serde(default)]
    preset: Option<Preset>,
    /// Blocks of each stage.
    #[serde(default)]
    #[schemars(inner(range(min = 1, max = 1000)))]
    depths: Option<[usize; STAGES]>,
    /// Channels of each stage.
    #[serde(default)]
    #[schemars(inner(range(min = 1, max = 1_000_000)))]
    dims: Option<[usize; STAGES]>,
    /// Side in pixels of a patch of the features. The last stage has one feature every 32 pixels. For another patch size
    /// its map is resized (bilinear, anti-aliased) before the final norm, so that its patches lie at the same places as
    /// the patches of a ViT.
    #[serde(default)]
    #[schemars(range(min = 1, max = 4096))]
    patch_size: Option<usize>,
    /// Start of LayerScale (Touvron et al., arXiv:2103.17239); 0: none.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1000))]
    layer_scale: Option<f64>,
    /// Added to the variance in normalisation.
    #[serde(default)]
    #[schemars(range(min = 1e-12, max = 1))]
    norm_eps: Option<f64>,
    /// Share of images that skip the last block (stochastic depth by sample subset); it grows linearly from 0 at the
    /// first block.
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    drop_path: Option<f64>,
}

impl JsonSchema for ConvNextConfig {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        Written::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Written::json_schema(generator)
    }
}

impl ConvNextConfig {
    /// The configuration of a backbone that is a ConvNeXt.
    pub(crate) fn of(backbone: &Chosen<dyn Backbone>) -> Result<Self> {
        serde_json::from_value(backbone.config().clone()).map_err(|e| Error::user(e.to_string(), "name a `convnext`"))
    }
}

/// The parameters that a model declares.
fn specs(model: &ModelInfo) -> Result<Vec<ParamSpec>> {
    let mut params = ParamBuilder::new();
    model.build(&mut params)?;
    Ok(params.finish().specs().to_vec())
}

impl Preset {
    fn dimensions(self) -> ([usize; STAGES], [usize; STAGES]) {
        match self {
            Self::Tiny => ([3, 3, 9, 3], [96, 192, 384, 768]),
            Self::Small => ([3, 3, 27, 3], [96, 192, 384, 768]),
            Self::Base => ([3, 3, 27, 3], [128, 256, 512, 1024]),
            Self::Large => ([3, 3, 27, 3], [192, 384, 768, 1536]),
        }
    }
}

impl From<Written> for ConvNextConfig {
    fn from(w: Written) -> Self {
        // Without a preset, what is not written is ConvNeXt-T's.
        let (depths, dims) = w.preset.unwrap_or(Preset::Tiny).dimensions();
        Self {
            preset: w.preset,
            depths: w.depths.unwrap_or(depths),
            dims: w.dims.unwrap_or(dims),
            patch_size: w.patch_size.unwrap_or(STRIDE),
            layer_scale: w.layer_scale.unwrap_or(1e-6),
            norm_eps: w.norm_eps.unwrap_or(1e-6),
            drop_path: w.drop_path.unwrap_or(0.0),
        }
    }
}
