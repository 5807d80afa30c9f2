//! ConvNeXt in the layout of Hugging Face `transformers` (`facebook/dinov3-convnext-*`, class `DINOv3ConvNextModel`):
//! which tensor there is which parameter here, and what its `config.json` says. Shapes are the same.

use dinolab_core::{Error, Result};
use serde_json::{json, Value};

/// The `model_type` of such a configuration.
pub const MODEL_TYPE: &str = "dinov3_convnext";

/// The name there of the parameter `name` (without `backbone.`); `None` if there is no such parameter.
pub fn hf_name(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    Some(match parts[..] {
        ["downsample_layers", stage, layer, kind] => format!("stages.{stage}.downsample_layers.{layer}.{kind}"),
        ["stages", stage, block, "gamma"] => format!("stages.{stage}.layers.{block}.gamma"),
        ["stages", stage, block, layer, kind] => {
            let layer = match layer {
                "dwconv" => "depthwise_conv",
                "norm" => "layer_norm",
                "pwconv1" => "pointwise_conv1",
                "pwconv2" => "pointwise_conv2",
                _ => return None,
            };
            format!("stages.{stage}.layers.{block}.{layer}.{kind}")
        }
        ["norm", kind] => format!("layer_norm.{kind}"),
        _ => return None,
    })
}

/// The backbone table of a recipe that a `config.json` describes.
///
/// # Errors
/// If a number is missing, or the model is one that cannot be expressed.
pub fn backbone(config: &Value) -> Result<Value> {
    let missing = |key: &str| {
        let help = "take the config.json that lies beside the weights";
        Error::user(format!("a {MODEL_TYPE} configuration without `{key}`"), help)
    };
    let get = |key: &str| config.get(key).filter(|v| !v.is_null()).cloned().ok_or_else(|| missing(key));
    let activation = get("hidden_act")?;
    if activation != "gelu" {
        let help = "only the exact GELU of the published models is known";
        return Err(Error::user(format!("a ConvNeXt with hidden_act = {activation}"), help));
    }
    Ok(json!({
        "plugin": "convnext",
        "depths": get("depths")?,
        "dims": get("hidden_sizes")?,
        "layer_scale": get("layer_scale_init_value")?,
        "norm_eps": get("layer_norm_eps")?,
        "drop_path": get("drop_path_rate")?,
    }))
}
