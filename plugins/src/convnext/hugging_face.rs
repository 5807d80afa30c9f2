//! ConvNeXt in the layout of Hugging Face `transformers` (`facebook/dinov3-convnext-*`, class `DINOv3ConvNextModel`).
//! Every parameter is there under another name, in the same shape. Its patches are those of the last stage's map, whatever
//! `patch_size` says here.

use dinolab_core::contract::Backbone;
use dinolab_core::params::{ParamBuilder, ParamSpec};
use dinolab_core::registry::Chosen;
use dinolab_core::weights::convert::Rule;
use dinolab_core::weights::{ModelInfo, Normalization, TensorFiles};
use dinolab_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value as Json};

use super::{ConvNextConfig, STAGES, STRIDE};
use crate::published::Published;

/// What `config.json` calls it.
pub const MODEL_TYPE: &str = "dinov3_convnext";

/// `config.json`, as far as it changes the model; what is not written has the library's default.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Config {
    hidden_sizes: Vec<usize>,
    depths: Vec<usize>,
    num_channels: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    layer_scale_init_value: f64,
    drop_path_rate: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hidden_sizes: vec![96, 192, 384, 768],
            depths: vec![3, 3, 9, 3],
            num_channels: 3,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-6,
            layer_scale_init_value: 1e-6,
            drop_path_rate: 0.0,
        }
    }
}

/// The model that a `config.json` describes.
///
/// # Errors
/// If it is one that dinolab does not have.
pub(crate) fn read(files: &TensorFiles, config: &Json, crops: Normalization) -> Result<Published> {
    let wrong = |problem: String| {
        let help = "import a published ConvNeXt, or correct config.json if it is not that of the weights";
        Error::content(files.path().with_file_name("config.json"), problem, help)
    };
    let c: Config = serde_json::from_value(config.clone()).map_err(|e| wrong(e.to_string()))?;
    if c.hidden_act != "gelu" || c.num_channels != 3 || c.depths.len() != STAGES || c.hidden_sizes.len() != STAGES {
        return Err(wrong("expected gelu, 3 channels and four stages".into()));
    }
    let table = json!({
        "plugin": "convnext",
        "depths": c.depths,
        "dims": c.hidden_sizes,
        // The layer is there in any case; 0 would mean none here.
        "layer_scale": if c.layer_scale_init_value == 0.0 { 1.0 } else { c.layer_scale_init_value },
        "norm_eps": c.layer_norm_eps,
        "drop_path": c.drop_path_rate,
    });
    let backbone: Chosen<dyn Backbone> = serde_json::from_value(table).map_err(|e| wrong(e.to_string()))?;
    let model = ModelInfo { backbone, crops };
    let rules = rules(&model)?;
    let title = format!("ConvNeXt of depths {:?} and widths {:?}, Hugging Face layout", c.depths, c.hidden_sizes);
    Ok(Published { title, model, rules, unused: |_| false })
}

/// The files of a backbone: `config.json`, and where each tensor goes.
///
/// # Errors
/// If the layout cannot express the backbone.
pub(crate) fn write(backbone: &Chosen<dyn Backbone>) -> Result<(Json, Vec<Rule>)> {
    let config: ConvNextConfig = serde_json::from_value(backbone.config().clone()).expect("it was checked when read");
    if config.layer_scale == 0.0 {
        let problem = "the Hugging Face layout cannot express a model with no LayerScale (backbone.layer_scale = 0)";
        return Err(Error::user(problem, "export it with --format safetensors"));
    }
    let c = Config {
        hidden_sizes: config.dims.to_vec(),
        depths: config.depths.to_vec(),
        layer_norm_eps: config.norm_eps,
        layer_scale_init_value: config.layer_scale,
        drop_path_rate: config.drop_path,
        ..Config::default()
    };
    let rules = rules(&ModelInfo { backbone: backbone.clone(), crops: Normalization::default() })?;
    let mut json = serde_json::to_value(&c).expect("plain data");
    json["architectures"] = json!(["DINOv3ConvNextModel"]);
    json["model_type"] = MODEL_TYPE.into();
    Ok((json, rules))
}

/// Where each parameter is in the layout.
fn rules(model: &ModelInfo) -> Result<Vec<Rule>> {
    let mut params = ParamBuilder::new();
    model.build(&mut params, 2 * STRIDE)?;
    Ok(params
        .finish()
        .specs()
        .iter()
        .map(|spec| rule(spec).expect("every parameter of a ConvNeXt has a place"))
        .collect())
}

fn rule(spec: &ParamSpec) -> Option<Rule> {
    let parts: Vec<&str> = spec.name.strip_prefix("backbone.")?.split('.').collect();
    let theirs = match parts[..] {
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
    };
    Some(Rule::renamed(&spec.name, &spec.shape, theirs, &spec.shape))
}
