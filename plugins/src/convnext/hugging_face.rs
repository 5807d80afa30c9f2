//! ConvNeXt in the layout of Hugging Face `transformers` (`facebook/dinov3-convnext-*`, class `DINOv3ConvNextModel`):
//! which tensor there is which parameter here, and what its `config.json` says. Shapes are the same.

use dinolab_core::params::ParamSpec;
use dinolab_core::weights::convert::Rule;
use dinolab_core::weights::{JsonTable, ModelInfo, TensorFiles};
use dinolab_core::{Error, Result};
use serde_json::{json, Value as Json};

use super::{ConvNextConfig, STAGES};
use crate::published::{check_channels, check_eps, check_sizes, pixels, Published, HARMLESS};

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

/// The model that `config.json` describes, with its tensors' places.
///
/// # Errors
/// If the configuration asks for something that dinolab does not do or know, or contradicts the tensors.
pub(crate) fn read(files: &TensorFiles, mut keys: JsonTable, notes: &mut Vec<String>) -> Result<Published> {
    const NO_SUCH: &str = "dinolab has no such model";
    keys.harmless(&HARMLESS);
    let channels = keys.take("num_channels")?.unwrap_or(3);
    check_channels(&keys, channels)?;
    let crops = pixels(files, &mut keys, channels, notes)?;
    let activation: String = keys.need("hidden_act")?;
    if activation != "gelu" {
        let problem = format!("`{activation}` is not known here, only the exact `gelu` of the published models is");
        return Err(keys.wrong("hidden_act", problem, NO_SUCH));
    }
    let (depths, dims): ([usize; STAGES], [usize; STAGES]) = (keys.need("depths")?, keys.need("hidden_sizes")?);
    if depths.iter().any(|&depth| depth > files.names().count()) {
        let problem = format!("{depths:?} blocks, where there are {} tensors", files.names().count());
        return Err(keys.wrong("depths", problem, "take the configuration that belongs to the weights"));
    }
    for (depth, dim) in depths.into_iter().zip(dims) {
        check_sizes(files, keys.file(), &[("depths and hidden_sizes", &[depth, 8, dim, dim])])?;
    }
    let norm_eps: f64 = keys.need("layer_norm_eps")?;
    check_eps(&keys, norm_eps)?;
    let table = json!({
        "plugin": "convnext",
        "depths": depths,
        "dims": dims,
        "layer_scale": keys.need::<f64>("layer_scale_init_value")?,
        "norm_eps": norm_eps,
        "drop_path": keys.need::<f64>("drop_path_rate")?,
    });
    let file = keys.file().to_path_buf();
    keys.finish()?;
    let wrong = |problem: String| Error::content(&file, problem, NO_SUCH);
    let backbone = serde_json::from_value(table).map_err(|e| wrong(format!("not a model that can be built: {e}")))?;
    let model = ModelInfo { backbone, crops };
    let rules = rules(&model).map_err(|e| wrong(e.problem()))?;
    let title = format!("ConvNeXt: widths {dims:?}, blocks {depths:?}, Hugging Face layout");
    Ok(Published { zeros: Vec::new(), title, said_by: "config.json", rules, model, unused: |_| false })
}

/// Where every tensor of a model is.
fn rules(model: &ModelInfo) -> Result<Vec<Rule>> {
    let rule = |spec: &ParamSpec| {
        let name = spec.name.strip_prefix("backbone.").and_then(hf_name);
        let name = name.unwrap_or_else(|| panic!("{} has a place in the layout", spec.name));
        Rule::renamed(&spec.name, &spec.shape, name, &spec.shape)
    };
    Ok(super::specs(model)?.iter().map(rule).collect())
}

/// `config.json` of a ConvNeXt, and where each tensor goes. Its class gives the patches of the map, one every 32 pixels, whatever
/// the patch size here.
///
/// # Errors
/// If the model has no LayerScale.
pub(crate) fn write(model: &ModelInfo) -> Result<(Json, Vec<Rule>)> {
    let config = ConvNextConfig::of(&model.backbone)?;
    if config.layer_scale == 0.0 {
        let problem = "the Hugging Face layout cannot express a model with no LayerScale (backbone.layer_scale = 0)";
        return Err(Error::user(problem, "export it with --format safetensors"));
    }
    let rules = rules(model)?;
    let json = json!({
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": MODEL_TYPE,
        "num_channels": model.crops.channels(),
        "depths": config.depths,
        "hidden_sizes": config.dims,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "layer_scale_init_value": config.layer_scale,
        "drop_path_rate": config.drop_path,
    });
    Ok((json, rules))
}
