//! The vision transformer in the layout of Hugging Face transformers (`DINOv3ViTModel`).
//!
//! Queries, keys and values are three layers there; the keys have no bias, which is what `mask_k_bias` says here.
//! The gate of SwiGLU is `w1`, `up` is `w2`, `down` is `w3`. Rotary tables are computed, not stored.

use dinolab_core::contract::Backbone;
use dinolab_core::params::ParamSpec;
use dinolab_core::registry::Chosen;
use dinolab_core::weights::convert::{Part, Rule};
use dinolab_core::weights::{ModelInfo, Pixels, TensorFiles};
use dinolab_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value as Json};

use super::{Ffn, Norm, VitConfig};
use crate::published::Published;
use crate::rope_box::{Periods, RopeBoxConfig, TableType};

/// What `config.json` calls it.
pub const MODEL_TYPE: &str = "dinov3_vit";

/// `config.json`, as far as it changes the model; what is not written has the library's default.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Config {
    patch_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_channels: usize,
    num_register_tokens: usize,
    hidden_act: String,
    use_gated_mlp: bool,
    mlp_bias: bool,
    query_bias: bool,
    key_bias: bool,
    value_bias: bool,
    proj_bias: bool,
    layer_norm_eps: f64,
    layerscale_value: f64,
    drop_path_rate: f64,
    rope_theta: f64,
    pos_embed_shift: Option<f64>,
    pos_embed_jitter: Option<f64>,
    pos_embed_rescale: Option<f64>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            patch_size: 16,
            hidden_size: 384,
            intermediate_size: 1536,
            num_hidden_layers: 12,
            num_attention_heads: 6,
            num_channels: 3,
            num_register_tokens: 0,
            hidden_act: "gelu".into(),
            use_gated_mlp: false,
            mlp_bias: true,
            query_bias: true,
            key_bias: false,
            value_bias: true,
            proj_bias: true,
            layer_norm_eps: 1e-5,
            layerscale_value: 1.0,
            drop_path_rate: 0.0,
            rope_theta: 100.0,
            pos_embed_shift: None,
            pos_embed_jitter: None,
            pos_embed_rescale: Some(2.0),
        }
    }
}

/// The model that `config.json` describes, with its tensors' places.
///
/// # Errors
/// If the configuration asks for something that dinolab does not do.
pub(crate) fn read(files: &TensorFiles, config: &Json, crops: Pixels) -> Result<Published> {
    let wrong =
        |problem: String| Error::content(files.path(), format!("config.json: {problem}"), "dinolab has no such model");
    let c = Config::deserialize(config).map_err(|e| wrong(e.to_string()))?;
    let ffn = if c.use_gated_mlp { Ffn::Swiglu } else { Ffn::Mlp };
    let activation = if c.use_gated_mlp { "silu" } else { "gelu" };
    if c.hidden_act != activation {
        return Err(wrong(format!("hidden_act is {}, only {activation} is known here", c.hidden_act)));
    }
    if c.num_channels != 3 {
        return Err(wrong(format!("num_channels is {}, dinolab's images have 3", c.num_channels)));
    }
    let (ffn_ratio, ffn_align) = ffn.ratio(c.intermediate_size, c.hidden_size);
    let mut pos_encoding = json!({ "plugin": "rope_box", "periods": { "base": c.rope_theta } });
    for (key, value) in [("shift", c.pos_embed_shift), ("jitter", c.pos_embed_jitter), ("rescale", c.pos_embed_rescale)]
    {
        if let Some(value) = value {
            pos_encoding[key] = value.into();
        }
    }
    let table = json!({
        "plugin": "vit",
        "patch_size": c.patch_size,
        "dim": c.hidden_size,
        "depth": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "registers": c.num_register_tokens,
        "ffn": ffn,
        "ffn_ratio": ffn_ratio,
        "ffn_align": ffn_align,
        "ffn_bias": c.mlp_bias,
        "qkv_bias": c.query_bias || c.key_bias || c.value_bias,
        "mask_k_bias": !c.key_bias,
        "proj_bias": c.proj_bias,
        "norm": Norm::LayerNorm,
        "norm_eps": c.layer_norm_eps,
        // The layer is there in any case; 0 would mean none here.
        "layer_scale": if c.layerscale_value == 0.0 { 1.0 } else { c.layerscale_value },
        "drop_path": c.drop_path_rate,
        "pos_encoding": pos_encoding,
    });
    let backbone: Chosen<dyn Backbone> = serde_json::from_value(table).map_err(|e| wrong(e.to_string()))?;
    let model = ModelInfo { backbone, crops };
    // Files have `layer.0`; a state dict of transformers 5 that was saved as it is has `model.layer.0`.
    let layer = if files.names().any(|n| n.starts_with("model.layer.")) { "model.layer" } else { "layer" };
    let bias = [c.query_bias, c.key_bias, c.value_bias];
    let (title, specs) = super::declared(&model)?;
    let rules = specs
        .iter()
        .map(|spec| rule(spec, layer, bias).ok_or_else(|| wrong(format!("nothing is known of {}", spec.name))));
    let unused = if c.num_register_tokens == 0 { |name: &str| name == REGISTERS } else { |_: &str| false };
    Ok(Published {
        title: format!("{title}, Hugging Face layout"),
        rules: rules.collect::<Result<_>>()?,
        model,
        unused,
    })
}

/// In files of models without registers this tensor is empty.
pub const REGISTERS: &str = "embeddings.register_tokens";

/// The files of a backbone: `config.json`, and where each tensor goes.
///
/// # Errors
/// If the layout cannot express the backbone.
pub(crate) fn write(backbone: &Chosen<dyn Backbone>) -> Result<(Json, Vec<Rule>)> {
    let config = VitConfig::of(backbone)?;
    let refuse = |what: &str| {
        let problem = format!("the Hugging Face layout cannot express a model with {what}");
        Err(Error::user(problem, "export it with --format safetensors"))
    };
    if config.norm != Norm::LayerNorm {
        return refuse("RMSNorm (backbone.norm)");
    }
    if config.layer_scale == 0.0 {
        return refuse("no LayerScale (backbone.layer_scale = 0)");
    }
    if config.untie_cls_and_patch_norms {
        return refuse("a norm of its own for CLS (backbone.untie_cls_and_patch_norms)");
    }
    let position = &config.pos_encoding;
    if position.name() != "rope_box" {
        return refuse(&format!("the position encoding `{}`", position.name()));
    }
    let rope: RopeBoxConfig = serde_json::from_value(position.config().clone()).expect("it was checked when read");
    let Periods::Base(base) = rope.periods else {
        return refuse("rotary periods given as a range (backbone.pos_encoding.periods)");
    };
    if rope.normalize != crate::box_coords::Normalize::Separate || rope.dtype != TableType::F32 {
        return refuse("a rotary box other than `normalize = \"separate\"`, `dtype = \"f32\"` (backbone.pos_encoding)");
    }
    let rescale = match rope.rescale {
        Some(crate::box_coords::Rescale::LogUniform(s)) => Some(s),
        _ => None,
    };
    let gated = config.ffn == Ffn::Swiglu;
    let c = Config {
        patch_size: config.patch_size,
        hidden_size: config.dim,
        intermediate_size: config.hidden(),
        num_hidden_layers: config.depth,
        num_attention_heads: config.heads,
        num_channels: 3,
        num_register_tokens: config.registers,
        hidden_act: if gated { "silu" } else { "gelu" }.into(),
        use_gated_mlp: gated,
        mlp_bias: config.ffn_bias,
        query_bias: config.qkv_bias,
        key_bias: config.qkv_bias && !config.mask_k_bias,
        value_bias: config.qkv_bias,
        proj_bias: config.proj_bias,
        layer_norm_eps: config.norm_eps,
        layerscale_value: config.layer_scale,
        drop_path_rate: config.drop_path,
        rope_theta: base,
        pos_embed_shift: rope.shift,
        pos_embed_jitter: rope.jitter,
        pos_embed_rescale: rescale,
    };
    let model = ModelInfo { backbone: backbone.clone(), crops: Pixels::default() };
    let specs = super::declared(&model)?.1;
    // The norm of local crops is of training only.
    let specs = specs.iter().filter(|spec| !spec.name.starts_with("backbone.local_cls_norm."));
    let bias = [c.query_bias, c.key_bias, c.value_bias];
    let rules = specs.map(|spec| rule(spec, "layer", bias).expect("everything else was refused above")).collect();
    let mut json = serde_json::to_value(&c).expect("plain data");
    json["architectures"] = json!(["DINOv3ViTModel"]);
    json["model_type"] = MODEL_TYPE.into();
    Ok((json, rules))
}

/// Where a parameter is in the layout; `None` if it has no place there. `bias` says which of queries, keys and values
/// have one.
fn rule(spec: &ParamSpec, layer: &str, bias: [bool; 3]) -> Option<Rule> {
    let shape = spec.shape.as_slice();
    let renamed = |name: String| Some(Rule::renamed(&spec.name, shape, name, shape));
    let name = spec.name.strip_prefix("backbone.")?;
    match name {
        "cls_token" => return renamed("embeddings.cls_token".into()),
        "storage_tokens" => return renamed(REGISTERS.into()),
        "mask_token" => {
            return Some(Rule::renamed(&spec.name, shape, "embeddings.mask_token", &[1, 1, shape[1]]));
        }
        "patch_embed.proj.weight" => return renamed("embeddings.patch_embeddings.weight".into()),
        "patch_embed.proj.bias" => return renamed("embeddings.patch_embeddings.bias".into()),
        "norm.weight" | "norm.bias" => return renamed(name.into()),
        _ => {}
    }
    let (block, inner) = name.strip_prefix("blocks.")?.split_once('.')?;
    let (module, kind) = inner.rsplit_once('.')?;
    if module == "attn.qkv" {
        let shape_of_one = [&[shape[0] / 3], &shape[1..]].concat();
        let part = |(projection, bias): (&str, bool)| Part {
            name: (kind == "weight" || bias).then(|| format!("{layer}.{block}.attention.{projection}_proj.{kind}")),
            shape: shape_of_one.clone(),
        };
        let parts = ["q", "k", "v"].into_iter().zip(bias).map(part).collect();
        return Some(Rule { name: spec.name.clone(), shape: shape.to_vec(), parts });
    }
    let theirs = match module {
        "norm1" | "norm2" => module,
        "attn.proj" => "attention.o_proj",
        "ls1" => return renamed(format!("{layer}.{block}.layer_scale1.lambda1")),
        "ls2" => return renamed(format!("{layer}.{block}.layer_scale2.lambda1")),
        "mlp.fc1" | "mlp.w2" => "mlp.up_proj",
        "mlp.fc2" | "mlp.w3" => "mlp.down_proj",
        "mlp.w1" => "mlp.gate_proj",
        _ => return None,
    };
    renamed(format!("{layer}.{block}.{theirs}.{kind}"))
}
