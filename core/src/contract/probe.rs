//! What a representation is worth: measured with the weights frozen.

use std::fmt;

use super::dataset::Dataset;
use super::Features;
use crate::{Result, Tensor};

/// What a probe may use.
pub struct ProbeContext<'a> {
    /// Features of the EMA teacher for pixels `[B, 3, h, w]` (normalised as in training), in evaluation. Gives one
    /// [`Features`] for the batch; batches of any size, any image size that is a multiple of the patch.
    pub features: &'a dyn Fn(&Tensor) -> Result<Features>,
    /// Images the model was trained on.
    pub train: &'a dyn Dataset,
    /// Images it was not trained on (the same as `train` when nothing was set aside).
    pub test: &'a dyn Dataset,
    /// Side in pixels to which images are resized.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Mean and standard deviation per channel, for normalisation.
    pub normalization: ([f32; 3], [f32; 3]),
    /// The run's seed.
    pub seed: u64,
    /// Tells the user of something that a score does not show, such as a sample that was left out.
    pub warn: &'a dyn Fn(String),
}

/// One number of a probe.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The last part of its name in the log: `top1` becomes `probe/<probe>/top1`.
    pub name: &'static str,
    /// Its value.
    pub value: f64,
}

/// What a representation is worth, measured with the weights frozen: at chosen steps and at the end of a run.
///
/// A probe is a pure function of weights, data and seed: the same run gives the same scores.
///
/// ```
/// use dinolab_core::contract::{Probe, ProbeContext, Score};
/// use dinolab_core::{Result, Tensor};
///
/// /// The mean length of the CLS feature of a black image.
/// #[derive(Debug)]
/// struct ClsNorm;
///
/// impl Probe for ClsNorm {
///     fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
///         let black = Tensor::zeros(&[1, 3, context.image_size, context.image_size], dinolab_core::DType::F32);
///         let cls = (context.features)(&black)?.cls.to_f64_vec();
///         Ok(vec![Score { name: "norm", value: cls.iter().map(|x| x * x).sum::<f64>().sqrt() }])
///     }
/// }
/// ```
pub trait Probe: fmt::Debug + Send + Sync {
    /// Measures.
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>>;

    /// What the probe asks of the dataset, as (image labels, pixel masks), so that a recipe whose data has none is
    /// refused before the run.
    fn needs(&self) -> (bool, bool) {
        (false, false)
    }

    /// Images that it computes features of, each time that it runs: most of what it costs.
    fn images(&self) -> usize {
        0
    }
}
