//! A trained model read back for evaluation and pictures.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint;
use crate::contract::{Dataset, Features};
use crate::recipe::{Overrides, Recipe, Resolved};
use crate::step::Learner;
use crate::{Error, Result, Tensor};

use super::datasets;

/// The EMA teacher of a run's newest checkpoint.
pub struct Trained {
    /// The run's recipe.
    pub recipe: Recipe,
    /// Steps that it was trained for.
    pub step: u64,
    learner: Learner,
}

impl Trained {
    /// Reads the newest checkpoint of the run in `run`.
    ///
    /// # Errors
    /// If there is no run or no whole checkpoint.
    pub fn load(run: &Path) -> Result<Self> {
        let recipe = Resolved::load(run.join("recipe.toml"), &Overrides::default())?.recipe;
        let help = "train it first, or name another run folder";
        let (newest, _) =
            checkpoint::load_newest(run)?.ok_or_else(|| Error::content(run, "no checkpoint in this run", help))?;
        let learner = Learner::from_checkpoint(&recipe, &newest)?;
        Ok(Self { recipe, step: newest.step, learner })
    }

    /// Features of normalised pixels `[B, 3, h, w]`, in evaluation.
    pub fn features(&self, pixels: &Tensor) -> Result<Features> {
        self.learner.teacher_features(pixels)
    }

    /// Side of a patch in pixels.
    pub fn patch_size(&self) -> usize {
        self.learner.model().backbone.patch_size()
    }

    /// The images that the run did not train on (the training images if none were set aside).
    pub fn held_out(&self) -> Result<Arc<dyn Dataset>> {
        Ok(datasets(&self.recipe)?.1)
    }
}
