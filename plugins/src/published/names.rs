//! Whose names the tensors of a file have: what programs put around them is taken off, and layouts that dinolab does not
//! read are named as what they are.

use std::collections::BTreeSet;

use dinolab_core::weights::{TensorFiles, MODEL_FILE};
use dinolab_core::{Error, Result};

/// A layout that dinolab reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `DINOv3ViTModel` of Hugging Face transformers.
    HfVit,
    /// `DINOv3ConvNextModel` of Hugging Face transformers.
    HfConvNext,
    /// The PyTorch reference's ViT.
    ReferenceVit,
}

/// A tensor that every model of a layout has.
const ANCHORS: [(&str, Layout); 3] = [
    ("embeddings.patch_embeddings.weight", Layout::HfVit),
    ("stages.0.downsample_layers.0.weight", Layout::HfConvNext),
    ("patch_embed.proj.weight", Layout::ReferenceVit),
];

/// Parts of names that are of how a model was run, not of the model: torch.compile, DistributedDataParallel, FSDP,
/// activation checkpointing, DeepSpeed.
const WRAPPERS: [&str; 5] =
    ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// Roles in the order in which they are taken, where a file holds several models: what is evaluated first.
const ROLES: [&str; 5] = ["teacher", "teacher_ema", "model_ema", "ema", "student"];

/// What stands beside a backbone without a name around it.
const HEADS: [&str; 9] =
    ["classifier", "head", "heads", "fc", "fc_norm", "dino_head", "ibot_head", "linear_head", "decode_head"];

/// Takes off what stands before and around the names of the model's tensors, and leaves out what is no part of it. Gives
/// the layout, if it is a known one.
///
/// # Errors
/// If two tensors then have one name, or there are several models and no telling which one is meant.
pub(crate) fn unwrap(files: &mut TensorFiles, notes: &mut Vec<String>) -> Result<Option<Layout>> {
    let parts = files.names().flat_map(|name| name.split('.'));
    let wrappers: BTreeSet<String> = parts.filter(|part| WRAPPERS.contains(part)).map(String::from).collect();
    if !wrappers.is_empty() {
        files.rename(|name| {
            let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
            Some(parts.join("."))
        })?;
        let list: Vec<String> = wrappers.iter().map(|w| format!("`{w}.`")).collect();
        notes.push(format!("taken off the names of tensors: {}", list.join(", ")));
    }
    let mut found = Vec::new();
    for name in files.names() {
        let prefix = |anchor: &str| name.strip_suffix(anchor).filter(|p| p.is_empty() || p.ends_with('.'));
        found.extend(ANCHORS.iter().filter_map(|(anchor, layout)| Some((prefix(anchor)?.to_string(), *layout))));
    }
    let Some((prefix, layout)) = choose(files, found)? else { return Ok(None) };
    let part = |name: &str| name.split('.').next().unwrap_or_default().to_string();
    let outside = |name: &str| match prefix.is_empty() {
        true => HEADS.contains(&part(name).as_str()),
        false => !name.starts_with(&prefix),
    };
    let left: Vec<String> = files.names().filter(|name| outside(name)).map(String::from).collect();
    if !prefix.is_empty() {
        notes.push(format!("taken off the names of tensors: `{prefix}`"));
    }
    if !left.is_empty() {
        let of: BTreeSet<String> = left.iter().map(|name| format!("{}.*", part(name))).collect();
        let of = of.into_iter().collect::<Vec<_>>().join(", ");
        notes.push(format!("left out, as no part of the backbone: {} tensors ({of})", left.len()));
    }
    files.rename(|name| (!outside(name)).then(|| name[prefix.len()..].to_string()))?;
    Ok(Some(layout))
}

/// The one model, or the one of several that is evaluated.
fn choose(files: &TensorFiles, found: Vec<(String, Layout)>) -> Result<Option<(String, Layout)>> {
    if found.len() < 2 {
        return Ok(found.into_iter().next());
    }
    let of = |role: &&str| -> Vec<&(String, Layout)> {
        found.iter().filter(|(prefix, _)| prefix.split('.').any(|part| part == *role)).collect()
    };
    match ROLES.iter().map(of).find(|models| !models.is_empty()).as_deref() {
        Some([only]) => Ok(Some((*only).clone())),
        _ => {
            let list: Vec<String> = found.iter().map(|(prefix, _)| format!("`{prefix}*`")).collect();
            let problem = format!("it holds several models: {}", list.join(", "));
            Err(Error::content(files.path(), problem, "save one of them in a file of its own"))
        }
    }
}

/// The error of tensors that are named as in none of dinolab's layouts.
pub(crate) fn foreign(files: &TensorFiles) -> Error {
    let any = |ends: &str| files.names().any(|name| name == ends || name.ends_with(&format!(".{ends}")));
    const FACEBOOK: &str =
        "take the model of the same name that Meta publishes: `facebook/dinov3-...` on Hugging Face, or \
        the original file";
    let (what, help) = if any("reg_token") || any("blocks.0.gamma_1") || any("blocks.0.attn.q_bias") {
        ("these are weights of timm, of a model that dinolab does not read", FACEBOOK)
    } else if any("embeddings.position_embeddings") || any("embeddings.patch_embeddings.projection.weight") {
        ("these are weights of DINOv2 or of another plain ViT, in Hugging Face's layout", DINOV3)
    } else if any("pos_embed") {
        ("these are weights of DINOv2 or of another plain ViT: they have a learned table of positions", DINOV3)
    } else if any("downsample_layers.0.0.weight") {
        let help = "take them from Hugging Face, `facebook/dinov3-convnext-...`, with config.json";
        ("these are weights of ConvNeXt in the layout of the PyTorch reference, which dinolab does not read", help)
    } else {
        let first: Vec<&str> = files.names().take(3).collect();
        let problem = format!("its tensors are named as in no layout that dinolab reads ({}, ...)", first.join(", "));
        let help =
            format!("name a DINOv3 model: a folder with config.json and {MODEL_FILE}, or a file of the reference");
        return Error::content(files.path(), problem, help);
    };
    Error::content(files.path(), what, help)
}

/// What to do about other models.
pub(crate) const DINOV3: &str = "dinolab reads DINOv3's models: ViT and ConvNeXt in Hugging Face's layout, ViT in the \
    reference's";

/// Whether tensors of the reference's names are those of a model that is not DINOv3's.
pub(crate) fn is_foreign(files: &TensorFiles) -> bool {
    ["pos_embed", "reg_token", "blocks.0.gamma_1", "blocks.0.attn.q_bias"].iter().any(|name| files.get(name).is_some())
}
