//! The vision transformer under the names of the public PyTorch reference, which are dinolab's own but for the prefix.
//!
//! There is no configuration beside such a file: everything is read off names and shapes. The width of a head is four
//! times the number of rotary periods.

use dinolab_core::contract::Backbone;
use dinolab_core::registry::Chosen;
use dinolab_core::weights::convert::Rule;
use dinolab_core::weights::{ModelInfo, TensorFiles};
use dinolab_core::{Error, Result};
use serde_json::json;

use super::{Ffn, Norm};
use crate::published::{check_sizes, pixels_of_size, Published};

const PATCH_EMBED: &str = "patch_embed.proj.weight";

/// Buffers that follow from the configuration.
fn is_buffer(name: &str) -> bool {
    name.ends_with("attn.qkv.bias_mask") || name.ends_with("rope_embed.periods")
}

/// The model that names and shapes show, with its tensors' places.
///
/// # Errors
/// If they are those of no model that dinolab has.
pub(crate) fn read(files: &TensorFiles, notes: &mut Vec<String>) -> Result<Published> {
    let wrong = |problem: String| Error::content(files.path(), problem, "dinolab has no such model");
    let has = |name: &str| files.get(name).is_some();
    let shape = |name: &str, rank: usize| match files.get(name).map(|t| t.shape) {
        Some(shape) if shape.len() == rank => Ok(shape),
        other => Err(wrong(format!("{name} is {other:?}, expected {rank} dimensions"))),
    };
    let &[dim, channels, patch_size, _] = shape(PATCH_EMBED, 4)? else { unreachable!("the rank was checked") };
    let depth = (0..).take_while(|i| has(&format!("blocks.{i}.norm1.weight"))).count();
    let ffn = if has("blocks.0.mlp.w1.weight") { Ffn::Swiglu } else { Ffn::Mlp };
    let first = if ffn == Ffn::Swiglu { "w1" } else { "fc1" };
    let hidden = shape(&format!("blocks.0.mlp.{first}.weight"), 2)?[0];
    let registers = if has("storage_tokens") { shape("storage_tokens", 3)?[1] } else { 0 };
    let sizes: [(&str, &[usize]); 4] = [
        (PATCH_EMBED, &[dim, channels, patch_size, patch_size]),
        ("blocks.0.mlp", &[dim, hidden]),
        ("storage_tokens", &[registers.max(1), dim]),
        ("blocks", &[depth, 3, dim, dim]),
    ];
    check_sizes(files, files.path(), &sizes)?;
    let (ffn_ratio, ffn_align) = ffn.ratio(hidden, dim);
    let (heads, base) = match files.get("rope_embed.periods") {
        Some(periods) => {
            let values = periods.values().map(Iterator::collect::<Vec<f64>>);
            let values = values.ok_or_else(|| wrong(format!("rope_embed.periods are of type {:?}", periods.dtype)))?;
            rotary(&values, dim).ok_or_else(|| {
                wrong("rope_embed.periods are not the powers of one base, or do not divide the width".into())
            })?
        }
        None => {
            // Published heads are 64 wide, those of the 7B 128.
            let width = if dim == 4096 { 128 } else { 64 };
            notes.push(format!(
                "there are no rope_embed.periods: heads {width} wide and periods of base 100 are assumed"
            ));
            (dim / width, 100.0)
        }
    };
    notes.push("such a file cannot say `norm_eps`: 1e-5 is assumed, that of every published model".into());
    let norm = if has("norm.bias") { Norm::LayerNorm } else { Norm::RmsNorm };
    let local_norm = has("local_cls_norm.weight");
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
        "mask_k_bias": masks_keys(files, depth, dim)?,
        "proj_bias": has("blocks.0.attn.proj.bias"),
        "norm": norm,
        "norm_eps": 1e-5,
        "layer_scale": if has("blocks.0.ls1.gamma") { 1e-5 } else { 0.0 },
        "untie_cls_and_patch_norms": has("cls_norm.weight"),
        "untie_global_and_local_cls_norm": local_norm,
        "pos_encoding": { "plugin": "rope_box", "periods": { "base": base }, "rescale": 2.0 },
    });
    let backbone: Chosen<dyn Backbone> = serde_json::from_value(table).map_err(|e| wrong(e.to_string()))?;
    // The 7B has a norm of local crops too.
    let crops = pixels_of_size(files, 16 * patch_size, channels, local_norm && dim != 4096, notes)?;
    let model = ModelInfo { backbone, crops };
    let (title, specs) = super::declared(&model).map_err(|e| wrong(e.problem()))?;
    let rules = specs.iter().map(|spec| {
        let name = spec.name.strip_prefix("backbone.").expect("a backbone's parameters have this prefix");
        Rule::renamed(&spec.name, &spec.shape, name, &spec.shape)
    });
    Ok(Published {
        zeros: Vec::new(),
        title: format!("{title}, layout of the reference"),
        said_by: "its own first block",
        rules: rules.collect(),
        model,
        unused: is_buffer,
    })
}

/// Whether the keys' bias is kept at zero, as the buffers beside the biases say: 1 for queries and values, 0 for keys.
fn masks_keys(files: &TensorFiles, depth: usize, dim: usize) -> Result<bool> {
    let mut masks = false;
    for block in 0..depth {
        let name = format!("blocks.{block}.attn.qkv.bias_mask");
        let Some(mask) = files.get(&name) else { continue };
        let mut values = mask.values().into_iter().flatten().enumerate();
        if mask.shape != [3 * dim] || !values.all(|(i, x)| x == if i / dim == 1 { 0.0 } else { 1.0 }) {
            let problem = format!("{name} is not 1 for queries and values and 0 for keys");
            return Err(Error::content(files.path(), problem, "dinolab knows no other mask of these biases"));
        }
        masks = true;
    }
    Ok(masks)
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
