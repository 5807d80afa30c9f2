//! The vision transformer under the names of the public PyTorch reference, which are dinolab's own but for the prefix.
//!
//! There is no configuration beside such a file: everything is read off names and shapes. The width of a head is four
//! times the number of rotary periods.

use dinolab_core::contract::Backbone;
use dinolab_core::registry::Chosen;
use dinolab_core::weights::convert::Rule;
use dinolab_core::weights::{ModelInfo, Pixels, RawTensor, TensorFiles};
use dinolab_core::{Error, Result};
use half::bf16;
use serde_json::json;

use super::{Ffn, Norm};
use crate::published::Published;

const PATCH_EMBED: &str = "patch_embed.proj.weight";

/// Names may stand behind this, as in a checkpoint of the reference's training.
const PREFIX: &str = "backbone.";

/// Whether the tensors are named so.
pub(crate) fn fits(files: &TensorFiles) -> bool {
    ["", PREFIX].iter().any(|prefix| files.get(&format!("{prefix}{PATCH_EMBED}")).is_some())
        && files.names().any(|name| name.contains("blocks.0.attn.qkv.weight"))
}

/// Buffers that follow from the configuration.
fn is_buffer(name: &str) -> bool {
    name.ends_with("attn.qkv.bias_mask") || name.ends_with("rope_embed.periods")
}

/// The model that names and shapes show, with its tensors' places.
///
/// # Errors
/// If they are those of no model that dinolab has.
pub(crate) fn read(files: &TensorFiles) -> Result<Published> {
    let wrong = |problem: String| Error::content(files.path(), problem, "dinolab has no such model");
    let prefix = if files.get(PATCH_EMBED).is_some() { "" } else { PREFIX };
    let get = |name: &str| files.get(&format!("{prefix}{name}"));
    let has = |name: &str| get(name).is_some();
    let shape = |name: &str, rank: usize| match get(name).map(|t| t.shape) {
        Some(shape) if shape.len() == rank => Ok(shape),
        other => Err(wrong(format!("{name} is {other:?}, expected {rank} dimensions"))),
    };
    let &[dim, channels, patch_size, _] = shape(PATCH_EMBED, 4)? else { unreachable!("the rank was checked") };
    if channels != 3 {
        return Err(wrong(format!("its images have {channels} channels, dinolab's 3")));
    }
    let depth = (0..).take_while(|i| has(&format!("blocks.{i}.norm1.weight"))).count();
    let ffn = if has("blocks.0.mlp.w1.weight") { Ffn::Swiglu } else { Ffn::Mlp };
    let first = if ffn == Ffn::Swiglu { "w1" } else { "fc1" };
    let hidden = shape(&format!("blocks.0.mlp.{first}.weight"), 2)?[0];
    let (ffn_ratio, ffn_align) = ffn.ratio(hidden, dim);
    let registers = if has("storage_tokens") { shape("storage_tokens", 3)?[1] } else { 0 };
    let (heads, base) = match get("rope_embed.periods") {
        Some(periods) => rotary(&values(periods), dim).ok_or_else(|| {
            wrong("rope_embed.periods are not the powers of one base, or do not divide the width".into())
        })?,
        // Published heads are 64 wide, those of the 7B 128.
        None => (dim / if dim == 4096 { 128 } else { 64 }, 100.0),
    };
    let norm = if has("norm.bias") { Norm::LayerNorm } else { Norm::RmsNorm };
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
        "qkv_bias": has("blocks.0.attn.qkv.bias"),
        "mask_k_bias": has("blocks.0.attn.qkv.bias_mask"),
        "proj_bias": has("blocks.0.attn.proj.bias"),
        "norm": norm,
        // Every published model is of `layernormbf16`.
        "norm_eps": 1e-5,
        "layer_scale": if has("blocks.0.ls1.gamma") { 1e-5 } else { 0.0 },
        "untie_cls_and_patch_norms": has("cls_norm.weight"),
        "untie_global_and_local_cls_norm": has("local_cls_norm.weight"),
        "pos_encoding": { "plugin": "rope_box", "periods": { "base": base }, "rescale": 2.0 },
    });
    let backbone: Chosen<dyn Backbone> = serde_json::from_value(table).map_err(|e| wrong(e.to_string()))?;
    let model = ModelInfo { backbone, crops: Pixels { global_size: 16 * patch_size, ..Pixels::default() } };
    let (title, specs) = super::declared(&model)?;
    let rules = specs.iter().map(|spec| {
        let name = spec.name.strip_prefix("backbone.").expect("a backbone's parameters have this prefix");
        Rule::renamed(&spec.name, &spec.shape, format!("{prefix}{name}"), &spec.shape)
    });
    Ok(Published {
        title: format!("{title}, layout of the reference"),
        rules: rules.collect(),
        model,
        unused: is_buffer,
    })
}

fn values(tensor: RawTensor<'_>) -> Vec<f64> {
    use safetensors::Dtype;
    let bytes = tensor.bytes;
    match tensor.dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        _ => Vec::new(),
    }
}

/// Heads and base of the periods `base^(j / n)`, j from 0 to n - 1, which may be rounded to bf16.
fn rotary(periods: &[f64], dim: usize) -> Option<(usize, f64)> {
    let n = periods.len();
    if n == 0 || !dim.is_multiple_of(4 * n) {
        return None;
    }
    // A single period is 1 for any base.
    let base = if n == 1 { 100.0 } else { periods[n - 1].powf(n as f64 / (n - 1) as f64) };
    // The published base is 100; bf16 has 8 bits.
    let base = if (base / base.round() - 1.0).abs() < 0.01 { base.round() } else { base };
    let fits = |(j, period): (usize, &f64)| (period / base.powf(j as f64 / n as f64) - 1.0).abs() < 0.01;
    periods.iter().enumerate().all(fits).then_some((dim / (4 * n), base))
}
