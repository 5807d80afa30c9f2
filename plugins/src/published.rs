//! Published weights: which layouts there are, and which backbone reads and writes them.

use std::path::Path;

use dinolab_core::checkpoint::{write_file, write_pieces};
use dinolab_core::contract::Backbone;
use dinolab_core::params::ParamBuilder;
use dinolab_core::registry::Chosen;
use dinolab_core::weights::convert::{from_published, Rule};
use dinolab_core::weights::{write_folder, ModelInfo, Pixels, TensorFiles, MODEL_FILE, WEIGHTS_FILE};
use dinolab_core::{Error, Result};
use safetensors::tensor::{Dtype, View};
use serde::Deserialize;
use serde_json::Value as Json;

use crate::{convnext, vit};

/// A model in a published layout.
pub(crate) struct Published {
    /// What it is called, in words.
    pub title: String,
    /// What it is in a recipe.
    pub model: ModelInfo,
    /// Where each of its tensors is.
    pub rules: Vec<Rule>,
    /// Tensors of the files that a model does not need: buffers that follow from its configuration.
    pub unused: fn(&str) -> bool,
}

/// What was imported.
#[derive(Clone, Debug)]
pub struct Imported {
    /// What the model is called, in words.
    pub title: String,
    /// Tensors written.
    pub tensors: usize,
    /// Numbers in them.
    pub numbers: usize,
    /// The type of the first: files have one type throughout, or keep norms wider.
    pub dtype: Dtype,
}

/// Makes the weights folder `out` of published files (see [`TensorFiles::open`]), a tensor at a time.
///
/// # Errors
/// If the model is not known, the files do not hold exactly its tensors, or `out` cannot be written.
pub fn import(from: &Path, out: &Path) -> Result<Imported> {
    let files = TensorFiles::open(from)?;
    let published = recognise(&files)?;
    let pieces = from_published(&files, &published.rules, published.unused)?;
    let imported = Imported {
        title: published.title,
        tensors: pieces.len(),
        numbers: pieces.iter().map(|(_, piece)| piece.shape().iter().product::<usize>()).sum(),
        dtype: pieces.first().expect("a model has tensors").1.dtype(),
    };
    write_folder(out, |folder| {
        write_pieces(&folder.join(MODEL_FILE), pieces, &[])?;
        let by = format!("Imported by dinolab {} from {}", env!("CARGO_PKG_VERSION"), from.display());
        let text = format!("# {}\n# {by}\n{}", imported.title, published.model.to_toml());
        write_file(&folder.join(WEIGHTS_FILE), text.as_bytes())
    })?;
    Ok(imported)
}

/// Recognises a model by the `config.json` beside the files, or else by the names and shapes of its tensors.
///
/// # Errors
/// If it is no model that dinolab has, or its configuration asks for something that dinolab does not do.
fn recognise(files: &TensorFiles) -> Result<Published> {
    let config = files.path().with_file_name("config.json");
    if config.exists() {
        let config: Json = read_json(&config)?;
        return match config["model_type"].as_str() {
            Some(vit::hf::MODEL_TYPE) => vit::hf::read(files, &config, pixels(files.path(), &config)?),
            Some(convnext::hugging_face::MODEL_TYPE) => convnext(&config, pixels(files.path(), &config)?),
            other => {
                let problem = format!("config.json is of a model of type {}", other.unwrap_or("none"));
                let known = format!("known: {}, {}", vit::hf::MODEL_TYPE, convnext::hugging_face::MODEL_TYPE);
                Err(Error::content(files.path(), problem, known))
            }
        };
    }
    if vit::original::fits(files) {
        return vit::original::read(files);
    }
    let problem = "there is no config.json beside it, and its tensors are not named as in the PyTorch reference";
    let help = "download config.json (and preprocessor_config.json) into the same folder";
    Err(Error::content(files.path(), problem, help))
}

/// The files of a backbone in the Hugging Face layout: `config.json`, and where each tensor goes.
///
/// # Errors
/// If that layout cannot express the backbone.
pub fn hugging_face(backbone: &Chosen<dyn Backbone>) -> Result<(Json, Vec<Rule>)> {
    match backbone.name() {
        "vit" => vit::hf::write(backbone),
        other => {
            let problem = format!("the Hugging Face layout has no place for the backbone `{other}`");
            Err(Error::user(problem, "export it with --format safetensors"))
        }
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    serde_json::from_str(&text).map_err(|e| Error::content(path, e.to_string(), "download it again"))
}

/// The pixels that a model was trained on: size from its configuration, normalisation from the image processor beside
/// the files, ImageNet's if there is none.
fn pixels(files: &Path, config: &Json) -> Result<Pixels> {
    #[derive(Deserialize)]
    struct Processor {
        image_mean: [f32; 3],
        image_std: [f32; 3],
    }
    let size = config["image_size"].as_u64().map(|side| side as usize);
    let pixels = Pixels { global_size: size.unwrap_or(224), ..Pixels::default() };
    let path = files.with_file_name("preprocessor_config.json");
    if !path.exists() {
        return Ok(pixels);
    }
    let Processor { image_mean: mean, image_std: std } = read_json(&path)?;
    Ok(Pixels { mean, std, ..pixels })
}

/// The ConvNeXt that `config.json` describes, with its tensors' places.
fn convnext(config: &Json, crops: Pixels) -> Result<Published> {
    let backbone = serde_json::from_value(convnext::hugging_face::backbone(config)?);
    let help = "dinolab has no such model";
    let backbone = backbone.map_err(|e| Error::user(format!("config.json: {e}"), help))?;
    let model = ModelInfo { backbone, crops };
    let mut params = ParamBuilder::new();
    model.build(&mut params)?;
    let layout = params.finish();
    let rules = layout.specs().iter().map(|spec| {
        let name = spec.name.strip_prefix("backbone.").and_then(convnext::hugging_face::hf_name);
        let name = name.unwrap_or_else(|| panic!("{} has a place in the layout", spec.name));
        Rule::renamed(&spec.name, &spec.shape, name, &spec.shape)
    });
    let title =
        format!("ConvNeXt: widths {}, blocks {}, Hugging Face layout", config["hidden_sizes"], config["depths"]);
    Ok(Published { title, rules: rules.collect(), model, unused: |_| false })
}
