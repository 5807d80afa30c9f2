//! The reference's names for a model's options, translated to a recipe's.

use serde_json::{json, Value};

/// A recipe's `backbone` table for the reference's constructor arguments (`options.vit` of a golden file, or the
/// `student` table of its configuration with the architecture's sizes). An argument that is not given has the
/// reference's default, but for the rotary tables: they are in full precision unless the options say otherwise.
pub fn backbone(options: &Value) -> Value {
    let get = |key: &str, default: Value| options.get(key).cloned().unwrap_or(default);
    let (ffn, align) = ffn(options["ffn_layer"].as_str().unwrap_or("mlp"));
    let (norm, eps) = match get("norm_layer", "layernorm".into()).as_str() {
        Some("layernorm") => ("layer_norm", 1e-6),
        Some("layernormbf16") => ("layer_norm", 1e-5),
        Some("rmsnorm") => ("rms_norm", 1e-5),
        other => panic!("the norm {other:?}"),
    };
    let layer_scale = options.get("layerscale_init").or(options.get("layerscale")).and_then(Value::as_f64);
    json!({
        "plugin": "vit",
        "patch_size": get("patch_size", 16.into()),
        "dim": get("embed_dim", 768.into()),
        "depth": get("depth", 12.into()),
        "heads": get("num_heads", 12.into()),
        "registers": get("n_storage_tokens", 0.into()),
        "ffn": ffn,
        "ffn_ratio": get("ffn_ratio", 4.0.into()),
        "ffn_align": align,
        "ffn_bias": get("ffn_bias", true.into()),
        "qkv_bias": get("qkv_bias", true.into()),
        "mask_k_bias": get("mask_k_bias", false.into()),
        "proj_bias": get("proj_bias", true.into()),
        "norm": norm,
        "norm_eps": eps,
        "layer_scale": layer_scale.unwrap_or(0.0),
        "drop_path": get("drop_path_rate", 0.0.into()),
        "untie_cls_and_patch_norms": get("untie_cls_and_patch_norms", false.into()),
        "untie_global_and_local_cls_norm": get("untie_global_and_local_cls_norm", false.into()),
        "pos_encoding": rope(options),
    })
}

/// `swiglu64` is SwiGLU with its hidden width rounded up to a multiple of 64; the plain one rounds to 8.
fn ffn(name: &str) -> (&str, usize) {
    match name.strip_prefix("swiglu") {
        Some("") => ("swiglu", 8),
        Some(align) => ("swiglu", align.parse().expect("swiglu<alignment>")),
        None => (name, 8),
    }
}

fn rope(options: &Value) -> Value {
    let get = |key: &str| options.get(format!("pos_embed_rope_{key}")).cloned().unwrap_or(Value::Null);
    let base = options.get("pos_embed_rope_base").cloned().unwrap_or(100.0.into());
    let periods = match base.is_null() {
        true => json!({ "range": [get("min_period"), get("max_period")] }),
        false => json!({ "base": base }),
    };
    let mut table = json!({
        "plugin": "rope_box",
        "periods": periods,
        "normalize": get("normalize_coords").as_str().unwrap_or("separate"),
        "dtype": if get("dtype") == "bf16" { "bf16" } else { "f32" },
    });
    for (key, value) in ["shift", "jitter", "rescale"].map(|key| (key, get(&format!("{key}_coords")))) {
        if !value.is_null() {
            table[key] = value;
        }
    }
    table
}
