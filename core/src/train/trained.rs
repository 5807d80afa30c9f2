//! A trained backbone read back for evaluation, features and pictures.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::{self, NamedTensors};
use crate::contract::{Backbone, Crops, Features, Mode};
use crate::params::{load_named, Layout, ParamBuilder, Params};
use crate::recipe::{Overrides, Recipe, Resolved};
use crate::registry::BackboneContext;
use crate::step::CHANNELS;
use crate::{Error, Result, Tensor};

/// The backbone of a run as it is evaluated: the EMA of the student. Heads and optimizer are left behind.
pub struct Trained {
    /// What it was trained by.
    pub recipe: Recipe,
    /// The backbone.
    pub backbone: Box<dyn Backbone>,
    layout: Arc<Layout>,
    flat: Tensor,
}

impl Trained {
    /// Reads a run folder (its newest checkpoint) or one checkpoint folder inside a run.
    ///
    /// # Errors
    /// If there is no run or no whole checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        let recipe = recipe_of(path)?;
        let source = checkpoint::read_weights(path)?;
        Self::build(recipe, &source, path)
    }

    /// The backbone of `recipe` with the weights `teacher.backbone.*` of `source`, which was read from `path`.
    fn build(recipe: Recipe, source: &NamedTensors, path: &Path) -> Result<Self> {
        let mut params = ParamBuilder::new();
        let global_size = recipe.crops.global_size;
        let backbone = params.scope("backbone", |params| {
            recipe.backbone.build(&mut BackboneContext { params, global_size, channels: CHANNELS })
        })?;
        let layout = params.finish();
        let mut flat = Tensor::zeros(&[layout.len()], recipe.dtype());
        load_named(&layout, &mut flat, |name| source.get(&format!("teacher.{name}")).cloned(), path)?;
        Ok(Self { recipe, backbone, layout, flat })
    }

    /// Features of normalised pixels `[B, 3, h, w]`, in evaluation.
    ///
    /// # Errors
    /// If the image is smaller than a patch.
    pub fn features(&self, pixels: &Tensor) -> Result<Features> {
        let params = Params::frozen(&self.layout, &self.flat);
        let mut features = self.backbone.forward(&params, &[Crops::global(pixels.clone())], Mode::Eval)?;
        features.pop().ok_or_else(|| Error::shape("backbone", "no features"))
    }
}

/// The resolved recipe of the run that `path` is, or is a checkpoint of.
///
/// # Errors
/// If there is none.
pub fn recipe_of(path: &Path) -> Result<Recipe> {
    let help = "name a run folder, or a checkpoint folder (step-...) inside one";
    if !path.exists() {
        return Err(Error::content(path, "does not exist", help));
    }
    let run: PathBuf = match path.join("state.json").exists() {
        // <run>/checkpoints/step-00000300
        true => path.join("../.."),
        false => path.into(),
    };
    let file = run.join("recipe.toml");
    if !file.exists() {
        return Err(Error::content(path, "there is no run here: no recipe.toml", help));
    }
    Ok(Resolved::load(file, &Overrides::default())?.recipe)
}
