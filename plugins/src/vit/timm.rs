//! The vision transformer in timm's layout: its `Eva` with the rotary positions of DINOv3.
//!
//! Names are those of the reference but for registers, LayerScale and SwiGLU; of the biases of queries, keys and values the
//! first and the last are stored. There is no mask token: it is zero after an import. Sizes are read off the tensors; heads
//! and the base of the rotary periods come from `config.json`, or are those of every published model.

use dinolab_core::contract::Backbone;
use dinolab_core::params::ParamSpec;
use dinolab_core::registry::Chosen;
use dinolab_core::weights::convert::{Part, Rule};
use dinolab_core::weights::{JsonTable, ModelInfo, Preprocessing, TensorFiles};
use dinolab_core::{Error, Result};
use serde_json::{json, Value as Json};

use super::{hf, Ffn, Norm, VitConfig};
use crate::published::{check_sizes, Published};

/// What every DINOv3 of timm has, and no key of its configuration says.
const EPS: f64 = 1e-5;

/// Keys of `config.json` that say what the tensors' shapes do, or nothing about features.
const HARMLESS: [&str; 4] = ["num_classes", "num_features", "global_pool", "labels"];
const HARMLESS_ARGS: [&str; 15] = [
    "in_chans",
    "patch_size",
    "embed_dim",
    "depth",
    "mlp_ratio",
    "num_reg_tokens",
    "init_values",
    "qkv_bias",
    "swiglu_mlp",
    "swiglu_align_to",
    "img_size",
    "dynamic_img_size",
    "dynamic_img_pad",
    "global_pool",
    "num_classes",
];
const HARMLESS_CFG: [&str; 20] = [
    "tag",
    "url",
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "architecture",
    "custom_load",
    "num_classes",
    "pool_size",
    "crop_pct",
    "crop_mode",
    "test_input_size",
    "test_crop_pct",
    "interpolation",
    "fixed_input_size",
    "min_input_size",
    "first_conv",
    "classifier",
    "license",
];

/// The model that `config.json` and the tensors describe.
///
/// # Errors
/// If it is none that dinolab has.
pub(crate) fn read(files: &TensorFiles, mut keys: JsonTable, notes: &mut Vec<String>) -> Result<Published> {
    const NO_SUCH: &str = "dinolab reads DINOv3's ViTs of timm, vit_..._dinov3";
    let architecture: String = keys.need("architecture")?;
    if !architecture.contains("dinov3") {
        let problem = format!("these are weights of timm (`{architecture}`), which is no DINOv3");
        return Err(keys.wrong("architecture", problem, NO_SUCH));
    }
    keys.harmless(&HARMLESS);
    let mut args = keys.table("model_args")?;
    let (mut heads, mut base) = (None, None);
    if let Some(args) = &mut args {
        args.harmless(&HARMLESS_ARGS);
        (heads, base) = (args.take::<usize>("num_heads")?, args.take::<f64>("rope_temperature")?);
    }
    args.map_or(Ok(()), JsonTable::finish)?;
    let mut pixels = Preprocessing { global_size: 256, ..Preprocessing::default() };
    match keys.table("pretrained_cfg")? {
        Some(mut cfg) => {
            cfg.harmless(&HARMLESS_CFG);
            pixels.mean = cfg.take("mean")?.unwrap_or(pixels.mean);
            pixels.std = cfg.take("std")?.unwrap_or(pixels.std);
            if let Some([_, height, width]) = cfg.take::<[usize; 3]>("input_size")? {
                pixels.global_size = height.min(width);
            }
            cfg.finish()?;
        }
        None => {
            notes.push("config.json has no `pretrained_cfg`: ImageNet's mean and standard deviation are assumed".into())
        }
    }
    let file = keys.file().to_path_buf();
    keys.finish()?;
    let wrong = |problem: String| Error::content(&file, problem, NO_SUCH);
    let has = |name: &str| files.get(name).is_some();
    let shape = |name: &str, rank: usize| match files.get(name).map(|t| t.shape) {
        Some(shape) if shape.len() == rank => Ok(shape),
        other => Err(wrong(format!("{name} is {other:?}, expected {rank} dimensions"))),
    };
    let &[dim, channels, patch_size, _] = shape("patch_embed.proj.weight", 4)? else { unreachable!("checked") };
    if pixels.channels() != channels || pixels.std.len() != channels {
        let problem = format!("mean and std of its pretrained_cfg are not of {channels} channels, as its tensors are");
        return Err(wrong(problem));
    }
    let depth = (0..).take_while(|i| has(&format!("blocks.{i}.norm1.weight"))).count();
    let ffn = if has("blocks.0.mlp.fc1_g.weight") { Ffn::Swiglu } else { Ffn::Mlp };
    let first = if ffn == Ffn::Swiglu { "fc1_g" } else { "fc1" };
    let hidden = shape(&format!("blocks.0.mlp.{first}.weight"), 2)?[0];
    let registers = if has("reg_token") { shape("reg_token", 3)?[1] } else { 0 };
    let sizes: [(&str, &[usize]); 3] = [
        ("patch_embed.proj.weight", &[dim, channels, patch_size, patch_size]),
        ("blocks.0.mlp", &[dim, hidden]),
        ("blocks", &[depth, 3, dim, dim]),
    ];
    check_sizes(files, &file, &sizes)?;
    // Published heads are 64 wide, those of the 7B 128.
    let width = if dim == 4096 { 128 } else { 64 };
    let (heads, base) = (heads.unwrap_or(dim / width), base.unwrap_or(100.0));
    let (ffn_ratio, ffn_align) = ffn.ratio(hidden, dim);
    notes.push(format!("{heads} heads, rotary periods of base {base}, norm_eps {EPS}; the mask token is zero"));
    let table = json!({
        "plugin": "vit",
        "patch_size": patch_size,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "registers": registers,
        "ffn": ffn,
        "ffn_ratio": ffn_ratio,
        "ffn_align": ffn_align,
        "ffn_bias": has(&format!("blocks.0.mlp.{first}.bias")),
        "qkv_bias": has("blocks.0.attn.q_bias"),
        "mask_k_bias": true,
        "proj_bias": has("blocks.0.attn.proj.bias"),
        "norm": Norm::LayerNorm,
        "norm_eps": EPS,
        "layer_scale": if has("blocks.0.gamma_1") { 1e-5 } else { 0.0 },
        "pos_encoding": { "plugin": "rope_box", "periods": { "base": base }, "rescale": 2.0 },
    });
    let backbone: Chosen<dyn Backbone> = serde_json::from_value(table).map_err(|e| wrong(e.to_string()))?;
    let model = ModelInfo { backbone, crops: pixels };
    let (title, specs) = super::declared(&model).map_err(|e| wrong(e.problem()))?;
    let zeros = specs.iter().filter(|spec| is_left_out(spec));
    Ok(Published {
        title: format!("{title}, timm layout"),
        said_by: "config.json",
        zeros: zeros.map(|spec| (spec.name.clone(), spec.shape.clone())).collect(),
        rules: specs.iter().filter(|spec| !is_left_out(spec)).map(rule).collect(),
        model,
        unused: |name| name.starts_with("rope."),
    })
}

/// `config.json` of a backbone that was trained on these pixels, and where each tensor goes.
///
/// # Errors
/// If the layout cannot express the backbone.
pub(crate) fn write(model: &ModelInfo) -> Result<(Json, Vec<Rule>)> {
    let (config, pixels) = (VitConfig::of(&model.backbone)?, &model.crops);
    let base = hf::expressible(&config, "timm's layout")?.base;
    let refuse = |what: &str| {
        let problem = format!("timm's layout cannot express a model with {what}");
        Err(Error::user(problem, "export it with --format hf or --format safetensors"))
    };
    if config.norm_eps != EPS {
        return refuse("another `norm_eps` than 1e-5");
    }
    if !config.ffn_bias || !config.proj_bias {
        return refuse("no biases (backbone.ffn_bias, backbone.proj_bias)");
    }
    if config.qkv_bias && !config.mask_k_bias {
        return refuse("biases of keys (backbone.mask_k_bias = false)");
    }
    let gated = config.ffn == Ffn::Swiglu;
    let architecture = if gated { "vit_small_plus_patch16_dinov3" } else { "vit_small_patch16_dinov3" };
    let bias = if config.qkv_bias { "_qkvb" } else { "" };
    let side = pixels.global_size;
    let mut json = json!({
        "architecture": format!("{architecture}{bias}"),
        "num_classes": 0,
        "num_features": config.dim,
        "model_args": {
            "img_size": side,
            "patch_size": config.patch_size,
            "embed_dim": config.dim,
            "depth": config.depth,
            "num_heads": config.heads,
            // Half a unit above: timm rounds down.
            "mlp_ratio": (config.hidden() as f64 + 0.5) / config.dim as f64,
            "in_chans": pixels.channels(),
            "num_reg_tokens": config.registers,
            "rope_temperature": base,
        },
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [pixels.channels(), side, side],
            "fixed_input_size": false,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": pixels.mean,
            "std": pixels.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    });
    if gated {
        json["model_args"]["swiglu_align_to"] = 1.into();
    }
    let specs = super::declared(model)?.1;
    Ok((json, specs.iter().filter(|spec| !is_left_out(spec)).map(rule).collect()))
}

/// Parameters of training only.
fn is_left_out(spec: &ParamSpec) -> bool {
    spec.name == "backbone.mask_token" || spec.name.starts_with("backbone.local_cls_norm.")
}

/// Where a parameter is in the layout.
fn rule(spec: &ParamSpec) -> Rule {
    let shape = spec.shape.as_slice();
    let name = spec.name.strip_prefix("backbone.").expect("a backbone's parameters have this prefix");
    if let Some(attention) = name.strip_suffix("qkv.bias") {
        let part = |kind: Option<&str>| Part {
            name: kind.map(|kind| format!("{attention}{kind}_bias")),
            shape: vec![shape[0] / 3],
        };
        let parts = [Some("q"), None, Some("v")].map(part).into();
        return Rule { name: spec.name.clone(), shape: shape.to_vec(), parts };
    }
    let theirs = [
        ("storage_tokens", "reg_token"),
        (".ls1.gamma", ".gamma_1"),
        (".ls2.gamma", ".gamma_2"),
        (".mlp.w1.", ".mlp.fc1_g."),
        (".mlp.w2.", ".mlp.fc1_x."),
        (".mlp.w3.", ".mlp.fc2."),
    ];
    let theirs = theirs.iter().fold(name.to_string(), |name, (ours, theirs)| name.replace(ours, theirs));
    Rule::renamed(&spec.name, shape, theirs, shape)
}
