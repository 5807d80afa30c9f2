//! A trained backbone read back for evaluation, features and pictures.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint;
use crate::contract::{Backbone, Crops, Features, Mode};
use crate::params::{load_named, Layout, ParamBuilder, Params};
use crate::recipe::Resolved;
use crate::registry::BackboneContext;
use crate::step::CHANNELS;
use crate::{Error, Result, Tensor};

/// The backbone of a run as it is evaluated: the EMA of the student. Heads and optimizer are left behind.
pub struct Trained {
    /// The backbone.
    pub backbone: Box<dyn Backbone>,
    /// Mean and standard deviation of pixels per channel, for normalisation.
    pub normalization: ([f32; 3], [f32; 3]),
    /// Side in pixels of the global crops that it was trained on.
    pub global_size: usize,
    layout: Arc<Layout>,
    flat: Tensor,
}

impl Trained {
    /// Reads a run folder (its newest checkpoint) or one checkpoint folder inside a run.
    ///
    /// # Errors
    /// If there is no run or no whole checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        let recipe = Resolved::of_run(path)?.recipe;
        let source = checkpoint::read_weights(path)?;
        let mut params = ParamBuilder::new();
        let global_size = recipe.crops.global_size;
        let backbone = params.scope("backbone", |params| {
            recipe.backbone.build(&mut BackboneContext { params, global_size, channels: CHANNELS })
        })?;
        let layout = params.finish();
        let mut flat = Tensor::zeros(&[layout.len()], recipe.dtype());
        load_named(&layout, &mut flat, |name| source.get(&format!("teacher.{name}")).cloned(), path)?;
        let normalization = (recipe.crops.mean, recipe.crops.std);
        Ok(Self { backbone, normalization, global_size, layout, flat })
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
