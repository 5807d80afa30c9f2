//! The vision transformer in the layout of Hugging Face transformers (`DINOv3ViTModel`).
//!
//! Queries, keys and values are three layers there; the keys have no bias, which is what `mask_k_bias` says here.
//! The gate of SwiGLU is `w1`, `up` is `w2`, `down` is `w3`. Rotary tables are computed, not stored.

use dinolab_core::contract::Backbone;
use dinolab_core::params::ParamSpec;
use dinolab_core::registry::Chosen;
use dinolab_core::weights::convert::{Part, Rule};
use dinolab_core::weights::{JsonTable, ModelInfo, TensorFiles};
use dinolab_core::{Error, Result};
use serde::Serialize;
use serde_json::{json, Value as Json};

use super::{Ffn, Norm, VitConfig};
use crate::published::{check_channels, check_eps, check_sizes, pixels, side, Published, HARMLESS};
use crate::rope_box::{Periods, RopeBoxConfig, TableType};

/// What `config.json` calls it.
pub const MODEL_TYPE: &str = "dinov3_vit";

/// `config.json`, as far as it says what the model computes.
#[derive(Debug, Serialize)]
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

impl Config {
    /// Takes the model's keys out of a `config.json`. What changes features has to be there: a default that is right for
    /// one version of the library is wrong for another. What is of training only may be left to the library's default.
    fn read(keys: &mut JsonTable, notes: &mut Vec<String>) -> Result<Self> {
        let mut of_training = |keys: &mut JsonTable, key: &'static str, default: f64| {
            Ok::<_, Error>(keys.take(key)?.unwrap_or_else(|| {
                notes.push(format!("config.json has no `{key}`, which is of training only: {default} is taken"));
                default
            }))
        };
        Ok(Self {
            layerscale_value: of_training(keys, "layerscale_value", 1.0)?,
            drop_path_rate: of_training(keys, "drop_path_rate", 0.0)?,
            patch_size: match side(keys, "patch_size")? {
                Some(side) => side,
                None => keys.need("patch_size")?,
            },
            hidden_size: keys.need("hidden_size")?,
            intermediate_size: keys.need("intermediate_size")?,
            num_hidden_layers: keys.need("num_hidden_layers")?,
            num_attention_heads: keys.need("num_attention_heads")?,
            num_channels: keys.need("num_channels")?,
            num_register_tokens: keys.need("num_register_tokens")?,
            hidden_act: keys.need("hidden_act")?,
            use_gated_mlp: keys.need("use_gated_mlp")?,
            mlp_bias: keys.need("mlp_bias")?,
            query_bias: keys.need("query_bias")?,
            key_bias: keys.need("key_bias")?,
            value_bias: keys.need("value_bias")?,
            proj_bias: keys.need("proj_bias")?,
            layer_norm_eps: keys.need("layer_norm_eps")?,
            rope_theta: rope_theta(keys)?,
            pos_embed_shift: keys.take("pos_embed_shift")?,
            pos_embed_jitter: keys.take("pos_embed_jitter")?,
            pos_embed_rescale: keys.take("pos_embed_rescale")?,
        })
    }
}

/// The base of the rotary periods, which versions of transformers write in three ways: `rope_theta`, or inside
/// `rope_parameters` or `rope_scaling`. Where it is there twice it has to be the same.
fn rope_theta(keys: &mut JsonTable) -> Result<f64> {
    let mut found: Option<f64> = keys.take("rope_theta")?;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(mut inner) = keys.table(key)? else { continue };
        for kind in ["rope_type", "type"] {
            if let Some(other) = inner.take::<String>(kind)?.filter(|kind| kind != "default") {
                let problem = format!("`{other}` is not known here");
                return Err(inner.wrong(kind, problem, "dinolab has the plain rotary periods of DINOv3, `default`"));
            }
        }
        let theta: Option<f64> = inner.take("rope_theta")?;
        if let (Some(a), Some(b)) = (found, theta) {
            if a != b {
                let problem = format!("{b} contradicts the {a} elsewhere in this file");
                return Err(inner.wrong("rope_theta", problem, "keep the one that the model was trained with"));
            }
        }
        found = found.or(theta);
        inner.finish()?;
    }
    let theta = found.map_or_else(|| keys.need("rope_theta"), Ok)?;
    // Outside, periods or angles are no numbers of 32 bits.
    match (1e-3..=1e9).contains(&theta) {
        true => Ok(theta),
        false => {
            Err(keys.wrong("rope_theta", format!("{theta} is no base of periods"), "it is 100 in published models"))
        }
    }
}

/// The model that `config.json` describes, with its tensors' places.
///
/// # Errors
/// If the configuration asks for something that dinolab does not do or know, or contradicts the tensors.
pub(crate) fn read(files: &TensorFiles, mut keys: JsonTable, notes: &mut Vec<String>) -> Result<Published> {
    const NO_SUCH: &str = "dinolab has no such model";
    keys.harmless(&HARMLESS);
    let c = Config::read(&mut keys, notes)?;
    check_channels(&keys, c.num_channels)?;
    let crops = pixels(files, &mut keys, c.num_channels, notes)?;
    if keys.take("attention_dropout")?.is_some_and(|share: f64| share != 0.0) {
        notes.push("`attention_dropout` is of training only, and dinolab has none".into());
    }
    check_eps(&keys, c.layer_norm_eps)?;
    let activation = if c.use_gated_mlp { "silu" } else { "gelu" };
    if c.hidden_act != activation {
        let problem = format!("`{}` is not known here, only `{activation}` is", c.hidden_act);
        return Err(keys.wrong("hidden_act", problem, NO_SUCH));
    }
    let Config { hidden_size: dim, intermediate_size: hidden, num_hidden_layers: depth, patch_size: patch, .. } = c;
    let sizes: [(&str, &[usize]); 4] = [
        ("hidden_size", &[3, dim, dim]),
        ("hidden_size and intermediate_size", &[dim, hidden]),
        ("hidden_size and patch_size", &[dim, c.num_channels, patch, patch]),
        ("num_hidden_layers and hidden_size", &[depth, dim, dim]),
    ];
    check_sizes(files, keys.file(), &sizes)?;
    if depth > files.names().count() {
        let problem = format!("{depth} blocks, where there are {} tensors", files.names().count());
        return Err(keys.wrong("num_hidden_layers", problem, "take the configuration that belongs to the weights"));
    }
    // An empty tensor may be left in files of models without registers.
    if c.num_register_tokens == 0 && files.get(REGISTERS).is_some_and(|tensor| !tensor.bytes.is_empty()) {
        let problem = format!("0, where the weights have {REGISTERS}");
        return Err(keys.wrong("num_register_tokens", problem, "take the configuration that belongs to the weights"));
    }
    if c.num_register_tokens > 0 {
        check_sizes(files, keys.file(), &[("num_register_tokens", &[c.num_register_tokens, dim])])?;
    }
    let file = keys.file().to_path_buf();
    keys.finish()?;
    let wrong = |error: Error| Error::content(&file, error.problem(), NO_SUCH);
    let ffn = if c.use_gated_mlp { Ffn::Swiglu } else { Ffn::Mlp };
    let (ffn_ratio, ffn_align) = ffn.ratio(hidden, dim);
    let mut pos_encoding = json!({ "plugin": "rope_box", "periods": { "base": c.rope_theta } });
    for (key, value) in [("shift", c.pos_embed_shift), ("jitter", c.pos_embed_jitter), ("rescale", c.pos_embed_rescale)]
    {
        if let Some(value) = value {
            pos_encoding[key] = value.into();
        }
    }
    let table = json!({
        "plugin": "vit",
        "patch_size": patch,
        "dim": dim,
        "depth": depth,
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
    let backbone: Chosen<dyn Backbone> = serde_json::from_value(table)
        .map_err(|e| Error::content(&file, format!("not a model that can be built: {e}"), NO_SUCH))?;
    let model = ModelInfo { backbone, crops };
    // Files have `layer.0`; a state dict of transformers 5 that was saved as it is has `model.layer.0`.
    let layer = if files.names().any(|n| n.starts_with("model.layer.")) { "model.layer" } else { "layer" };
    let bias = [c.query_bias, c.key_bias, c.value_bias];
    let (title, specs) = super::declared(&model).map_err(wrong)?;
    let unknown = |name: &str| Error::content(&file, format!("nothing is known of {name}"), NO_SUCH);
    let rules = specs.iter().map(|spec| rule(spec, layer, bias).ok_or_else(|| unknown(&spec.name)));
    let unused = if c.num_register_tokens == 0 { |name: &str| name == REGISTERS } else { |_: &str| false };
    Ok(Published {
        zeros: Vec::new(),
        title: format!("{title}, Hugging Face layout"),
        said_by: "config.json",
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
pub(crate) fn write(model: &ModelInfo) -> Result<(Json, Vec<Rule>)> {
    let config = VitConfig::of(&model.backbone)?;
    let Expressible { base, rope, rescale } = expressible(&config, "the Hugging Face layout")?;
    let gated = config.ffn == Ffn::Swiglu;
    let c = Config {
        patch_size: config.patch_size,
        hidden_size: config.dim,
        intermediate_size: config.hidden(),
        num_hidden_layers: config.depth,
        num_attention_heads: config.heads,
        num_channels: model.crops.channels(),
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
    let specs = super::declared(model)?.1;
    // The norm of local crops is of training only.
    let specs = specs.iter().filter(|spec| !spec.name.starts_with("backbone.local_cls_norm."));
    let bias = [c.query_bias, c.key_bias, c.value_bias];
    let rules = specs.map(|spec| rule(spec, "layer", bias).expect("everything else was refused above")).collect();
    let mut json = serde_json::to_value(&c).expect("plain data");
    json["architectures"] = json!(["DINOv3ViTModel"]);
    json["model_type"] = MODEL_TYPE.into();
    Ok((json, rules))
}

/// What published layouts say of positions.
pub(super) struct Expressible {
    pub base: f64,
    rope: RopeBoxConfig,
    rescale: Option<f64>,
}

/// Fails, naming it, if a model has what published layouts have no words for.
///
/// # Errors
/// If it has.
pub(super) fn expressible(config: &VitConfig, layout: &str) -> Result<Expressible> {
    let refuse = |what: &str| {
        let problem = format!("{layout} cannot express a model with {what}");
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
    Ok(Expressible { base, rope, rescale })
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
