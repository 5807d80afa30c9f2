//! The vision transformer of DINOv3: register tokens, pre-norm blocks with LayerScale, a pluggable position encoding.
//!
//! Options and presets are here; `model` has the forward pass, `block` one block, `onnx` the graph of both, `hf` and `original` the layouts of
//! published weights.

use dinolab_core::contract::{Backbone, PosEncoding};
use dinolab_core::params::{ParamBuilder, ParamSpec};
use dinolab_core::registry::Chosen;
use dinolab_core::weights::ModelInfo;
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub mod block;
pub(crate) mod hf;
mod model;
pub(crate) mod onnx;
pub(crate) mod original;
pub(crate) mod timm;

use model::Vit;

plugin!(Backbone, "vit", VitConfig, Vit::build);

/// A published architecture (Siméoni et al., "DINOv3", 2025, table 1 and the released models).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// Width 96, 3 blocks, 3 heads, patch 8: trains in seconds on a CPU.
    VitTinyTest,
    /// ViT-S/16, 22M parameters.
    VitS16,
    /// ViT-S+/16 with SwiGLU, 29M parameters.
    VitS16plus,
    /// ViT-B/16, 86M parameters.
    VitB16,
    /// ViT-L/16, 300M parameters.
    VitL16,
    /// ViT-H+/16 with SwiGLU, 840M parameters.
    VitH16plus,
    /// ViT-7B/16 with SwiGLU and no query/key/value bias, 6.7B parameters.
    #[serde(rename = "vit_7b16")]
    Vit7b16,
}

/// The feed-forward layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ffn {
    /// `fc2(gelu(fc1(x)))`, hidden width `dim * ffn_ratio`.
    Mlp,
    /// `w3(silu(w1 x) * w2 x)`, hidden width two thirds of `dim * ffn_ratio`, rounded up to `ffn_align`
    /// (Shazeer, arXiv:2002.05202).
    Swiglu,
}

/// The normalisation before each branch and at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// LayerNorm with weight and bias.
    LayerNorm,
    /// RMSNorm with weight (Zhang and Sennrich, arXiv:1910.07467).
    RmsNorm,
}

/// What is kept from the forward to the backward pass of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// Everything.
    #[default]
    None,
    /// Everything except the inside of the feed-forward branch, which is computed again: two fifths of a block's memory
    /// for about a fifth more time.
    Selective,
    /// Nothing but the tokens that go into the block: about a third more time.
    Full,
}

/// Vision transformer with register tokens, as in DINOv3.
///
/// A preset fills in the architecture; every key can be set beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct VitConfig {
    pub(crate) preset: Option<Preset>,
    pub(crate) patch_size: usize,
    pub(crate) dim: usize,
    pub(crate) depth: usize,
    pub(crate) heads: usize,
    pub(crate) registers: usize,
    pub(crate) ffn: Ffn,
    pub(crate) ffn_ratio: f64,
    pub(crate) ffn_align: usize,
    pub(crate) ffn_bias: bool,
    pub(crate) qkv_bias: bool,
    pub(crate) mask_k_bias: bool,
    pub(crate) proj_bias: bool,
    pub(crate) norm: Norm,
    pub(crate) norm_eps: f64,
    pub(crate) layer_scale: f64,
    pub(crate) drop_path: f64,
    pub(crate) checkpointing: Checkpointing,
    pub(crate) untie_cls_and_patch_norms: bool,
    pub(crate) untie_global_and_local_cls_norm: bool,
    pub(crate) pos_encoding: Chosen<dyn PosEncoding>,
}

/// What may be written in a recipe: anything left out comes from the preset.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(
    title = "VitConfig",
    description = "Vision transformer with register tokens, as in DINOv3.\n\nA preset fills \
    in the architecture; every key can be set beside it."
)]
pub struct Written {
    /// Architecture that fills in what is not set here.
    #[serde(default)]
    preset: Option<Preset>,
    /// Side of a patch in pixels.
    #[serde(default)]
    #[schemars(range(min = 1, max = 4096))]
    patch_size: Option<usize>,
    /// Width D of a token.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_000_000))]
    dim: Option<usize>,
    /// Number of blocks.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1000))]
    depth: Option<usize>,
    /// Attention heads.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_000_000))]
    heads: Option<usize>,
    /// Register (storage) tokens (Darcet et al., arXiv:2309.16588).
    #[serde(default)]
    #[schemars(range(max = 10_000))]
    registers: Option<usize>,
    /// Feed-forward layer.
    #[serde(default)]
    ffn: Option<Ffn>,
    /// Hidden width of the feed-forward layer over `dim` (before SwiGLU's two thirds).
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1000))]
    ffn_ratio: Option<f64>,
    /// SwiGLU's hidden width is rounded up to a multiple of this.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_000_000), extend("x-with" = { "ffn": "swiglu" }))]
    ffn_align: Option<usize>,
    /// Bias in the feed-forward layer.
    #[serde(default)]
    ffn_bias: Option<bool>,
    /// Bias of queries, keys and values.
    #[serde(default)]
    qkv_bias: Option<bool>,
    /// Keep the keys' part of that bias at zero (it has no effect on attention but drifts).
    #[serde(default)]
    #[schemars(extend("x-with" = { "qkv_bias": true }))]
    mask_k_bias: Option<bool>,
    /// Bias of the attention's output projection.
    #[serde(default)]
    proj_bias: Option<bool>,
    /// Normalisation.
    #[serde(default)]
    norm: Option<Norm>,
    /// Added to the variance (or mean square) in normalisation. 1e-5 is DINOv3's; the reference's plain `layernorm`
    /// uses 1e-6.
    #[serde(default)]
    #[schemars(range(min = 1e-12, max = 1))]
    norm_eps: Option<f64>,
    /// Start of LayerScale (Touvron et al., arXiv:2103.17239); 0: none.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1000))]
    layer_scale: Option<f64>,
    /// Share of images that skip each branch (stochastic depth by sample subset, the same in every block).
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    drop_path: Option<f64>,
    /// Activation checkpointing: which activations of a block are recomputed in the backward pass to save memory.
    /// Results are bit-identical with and without it.
    #[serde(default)]
    checkpointing: Checkpointing,
    /// A final norm of their own for CLS and register tokens.
    #[serde(default)]
    untie_cls_and_patch_norms: Option<bool>,
    /// A final norm of their own for CLS and register tokens of local crops, in training.
    #[serde(default)]
    untie_global_and_local_cls_norm: Option<bool>,
    /// How the model knows where a patch is: a plugin; `rope_box` with the paper's jitter if not given.
    #[serde(default)]
    pos_encoding: Option<Chosen<dyn PosEncoding>>,
}

impl JsonSchema for VitConfig {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        Written::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Written::json_schema(generator)
    }
}

impl Preset {
    /// (patch, dim, depth, heads, ffn, ffn_ratio, ffn_align, qkv_bias)
    fn dimensions(self) -> (usize, usize, usize, usize, Ffn, f64, usize, bool) {
        match self {
            Self::VitTinyTest => (8, 96, 3, 3, Ffn::Mlp, 4.0, 8, true),
            Self::VitS16 => (16, 384, 12, 6, Ffn::Mlp, 4.0, 8, true),
            Self::VitS16plus => (16, 384, 12, 6, Ffn::Swiglu, 6.0, 8, true),
            Self::VitB16 => (16, 768, 12, 12, Ffn::Mlp, 4.0, 8, true),
            Self::VitL16 => (16, 1024, 24, 16, Ffn::Mlp, 4.0, 8, true),
            Self::VitH16plus => (16, 1280, 32, 20, Ffn::Swiglu, 6.0, 8, true),
            Self::Vit7b16 => (16, 4096, 40, 32, Ffn::Swiglu, 3.0, 64, false),
        }
    }
}

impl From<Written> for VitConfig {
    fn from(w: Written) -> Self {
        // Without a preset, what is not written is ViT-S/16's.
        let (patch_size, dim, depth, heads, ffn, ffn_ratio, ffn_align, qkv_bias) =
            w.preset.unwrap_or(Preset::VitS16).dimensions();
        let untie = w.preset == Some(Preset::Vit7b16);
        Self {
            preset: w.preset,
            patch_size: w.patch_size.unwrap_or(patch_size),
            dim: w.dim.unwrap_or(dim),
            depth: w.depth.unwrap_or(depth),
            heads: w.heads.unwrap_or(heads),
            registers: w.registers.unwrap_or(4),
            ffn: w.ffn.unwrap_or(ffn),
            ffn_ratio: w.ffn_ratio.unwrap_or(ffn_ratio),
            ffn_align: w.ffn_align.unwrap_or(ffn_align),
            ffn_bias: w.ffn_bias.unwrap_or(true),
            qkv_bias: w.qkv_bias.unwrap_or(qkv_bias),
            mask_k_bias: w.mask_k_bias.unwrap_or(true),
            proj_bias: w.proj_bias.unwrap_or(true),
            norm: w.norm.unwrap_or(Norm::LayerNorm),
            norm_eps: w.norm_eps.unwrap_or(1e-5),
            layer_scale: w.layer_scale.unwrap_or(1e-5),
            drop_path: w.drop_path.unwrap_or(0.0),
            checkpointing: w.checkpointing,
            untie_cls_and_patch_norms: w.untie_cls_and_patch_norms.unwrap_or(false),
            untie_global_and_local_cls_norm: w.untie_global_and_local_cls_norm.unwrap_or(untie),
            pos_encoding: w.pos_encoding.unwrap_or_else(rope_box),
        }
    }
}

/// DINOv3's default: `rope_box` with its own defaults and the paper's rescaling of the box by up to 2.
fn rope_box() -> Chosen<dyn PosEncoding> {
    let table = figment::value::Value::from(figment::util::map! { "rescale" => 2.0 });
    Chosen::from_value(&table, Some("rope_box")).expect("`rope_box` is built in and takes `rescale`")
}

impl Ffn {
    /// Hidden width for a ratio and an alignment.
    fn hidden(self, dim: usize, ratio: f64, align: usize) -> usize {
        let hidden = (dim as f64 * ratio) as usize;
        match self {
            Self::Mlp => hidden,
            Self::Swiglu => ((hidden as f64 * 2.0 / 3.0) as usize).div_ceil(align) * align,
        }
    }

    /// A ratio and an alignment that give this hidden width, round numbers where there are any.
    fn ratio(self, hidden: usize, dim: usize) -> (f64, usize) {
        // Before SwiGLU's two thirds.
        let whole = hidden as f64 * if self == Self::Mlp { 1.0 } else { 1.5 };
        let round = (whole / dim as f64, 8);
        // Half a unit, or two thirds of one, above the width: rounding down gives it.
        let safe = ((whole + if self == Self::Mlp { 0.5 } else { 1.0 }) / dim as f64, 1);
        if self.hidden(dim, round.0, round.1) == hidden {
            round
        } else {
            safe
        }
    }
}

impl VitConfig {
    /// The configuration of a backbone that is a `vit`.
    fn of(backbone: &Chosen<dyn Backbone>) -> Result<Self> {
        dinolab_core::registry::read_config(backbone.name(), backbone.config().clone())
    }

    /// Hidden width of the feed-forward layer.
    pub(crate) fn hidden(&self) -> usize {
        self.ffn.hidden(self.dim, self.ffn_ratio, self.ffn_align)
    }
}

/// Names of the published models, with the presets that have their sizes.
const PUBLISHED: [(&str, Preset); 6] = [
    ("ViT-S", Preset::VitS16),
    ("ViT-S+", Preset::VitS16plus),
    ("ViT-B", Preset::VitB16),
    ("ViT-L", Preset::VitL16),
    ("ViT-H+", Preset::VitH16plus),
    ("ViT-7B", Preset::Vit7b16),
];

/// What a model is called, and the parameters that it declares.
fn declared(model: &ModelInfo) -> Result<(String, Vec<ParamSpec>)> {
    let config = VitConfig::of(&model.backbone)?;
    let mut params = ParamBuilder::new();
    model.build(&mut params)?;
    let is = |preset: Preset| {
        let (_, dim, depth, heads, ffn, ratio, align, qkv_bias) = preset.dimensions();
        (dim, depth, heads, ffn, ffn.hidden(dim, ratio, align), qkv_bias)
            == (config.dim, config.depth, config.heads, config.ffn, config.hidden(), config.qkv_bias)
    };
    let name = PUBLISHED.iter().find(|(_, preset)| is(*preset)).map_or("ViT", |(name, _)| name);
    let VitConfig { patch_size, dim, depth, heads, registers, .. } = config;
    let title = format!("{name}/{patch_size}: width {dim}, {depth} blocks, {heads} heads, {registers} registers");
    Ok((title, params.finish().specs().to_vec()))
}
