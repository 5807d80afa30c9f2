//! What a representation is worth: measured with the weights frozen.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::dataset::Dataset;
use super::{Features, ImageSize};
use crate::{Result, Tensor};

/// What a probe may use.
pub struct ProbeContext<'a> {
    /// Features of the EMA teacher for pixels `[B, channels, h, w]` (normalised as in training), in evaluation. Gives one
    /// [`Features`] for the batch; batches of any size, any image size that is a multiple of the patch.
    pub features: &'a dyn Fn(&Tensor) -> Result<Features>,
    /// Images the model was trained on.
    pub train: &'a dyn Dataset,
    /// Images it was not trained on (the same as `train` when nothing was set aside).
    pub test: &'a dyn Dataset,
    /// The size that images are brought to; an image of another aspect ratio is cropped to the largest central part of this
    /// one. Samples of `train` and `test` may already have it.
    pub image_size: ImageSize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Mean and standard deviation per channel, for normalisation: as many numbers as the images have channels.
    pub normalization: (&'a [f32], &'a [f32]),
    /// The run's seed.
    pub seed: u64,
    /// Tells the user of something that a score does not show, such as a sample that was left out.
    pub warn: &'a dyn Fn(String),
    /// Takes pictures of what a score is made of, where somebody looks at them; nobody does in training.
    pub show: Option<&'a dyn Fn(Picture)>,
}

/// Images that stand side by side and show what a score is made of: an image, its true mask, the predicted one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Picture {
    /// What of: the name of the sample.
    pub caption: String,
    /// The images.
    pub panels: Vec<Panel>,
}

/// One image of a [`Picture`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Panel {
    /// What it shows.
    pub label: String,
    /// Width in pixels.
    pub width: usize,
    /// 8-bit RGB, row-major, interleaved.
    pub rgb: Vec<u8>,
}

/// One number of a probe.
#[derive(Clone, Debug)]
pub struct Score {
    /// The last part of its name in the log: `top1` becomes `probe/<probe>/top1`.
    pub name: Cow<'static, str>,
    /// Its value.
    pub value: f64,
    /// The numbers per image from which the score is computed, if there are any; confidence intervals use them.
    pub parts: Option<Parts>,
    /// One of many, such as the score of a single class: `dinolab eval` reports it, training leaves it out of its curves.
    pub detail: bool,
}

/// A score as a function of what test images add up to: a mean, or an intersection over union of all pixels.
#[derive(Clone)]
pub struct Parts {
    /// The numbers of every test image, as many for each.
    pub images: Arc<[Vec<f64>]>,
    /// The score of the sum of some images' numbers; not finite where there is none.
    pub score: Combine,
}

/// Numbers to a score.
pub type Combine = Arc<dyn Fn(&[f64]) -> f64 + Send + Sync>;

impl Score {
    /// A number by itself.
    pub fn new(name: impl Into<Cow<'static, str>>, value: f64) -> Self {
        Self { name: name.into(), value, parts: None, detail: false }
    }

    /// A number that is put together from images.
    pub fn of(name: impl Into<Cow<'static, str>>, parts: Parts) -> Self {
        Self { value: parts.of_all(), parts: Some(parts), ..Self::new(name, 0.0) }
    }

    /// The mean of one number an image.
    pub fn mean(name: impl Into<Cow<'static, str>>, of_images: impl IntoIterator<Item = f64>) -> Self {
        let images = of_images.into_iter().map(|x| vec![x, 1.0]).collect();
        Self::of(name, Parts { images, score: Arc::new(|sum| sum[0] / sum[1]) })
    }

    /// As one of many.
    pub fn as_detail(self) -> Self {
        Self { detail: true, ..self }
    }
}

impl Parts {
    /// The score of all images together.
    pub fn of_all(&self) -> f64 {
        let mut sum = vec![0.0; self.images.first().map_or(0, Vec::len)];
        self.images.iter().for_each(|image| sum.iter_mut().zip(image).for_each(|(sum, x)| *sum += x));
        (self.score)(&sum)
    }
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "of {} images", self.images.len())
    }
}

/// What a dataset may give beside images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Annotation {
    /// A class an image.
    Labels,
    /// A class a pixel.
    Masks,
    /// A distance a pixel.
    Depth,
}

impl Annotation {
    /// What it is called in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Labels => "image labels",
            Self::Masks => "pixel masks",
            Self::Depth => "depth",
        }
    }

    /// Whether a dataset gives it.
    pub fn is_given_by(self, data: &dyn Dataset) -> bool {
        match self {
            Self::Labels => data.classes() > 0,
            Self::Masks => data.mask_classes() > 0,
            Self::Depth => data.has_depth(),
        }
    }
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
///         let size = context.image_size;
///         let black = Tensor::zeros(&[1, 3, size.height, size.width], dinolab_core::DType::F32);
///         let cls = (context.features)(&black)?.cls.to_f64_vec();
///         Ok(vec![Score::new("norm", cls.iter().map(|x| x * x).sum::<f64>().sqrt())])
///     }
/// }
/// ```
pub trait Probe: fmt::Debug + Send + Sync {
    /// Measures.
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>>;

    /// What the probe asks of the dataset, so that a recipe whose data has none is refused before the run.
    fn needs(&self) -> &'static [Annotation] {
        &[]
    }

    /// Why it cannot be run on images of `channels`, and what helps, so that such a recipe is refused before the run.
    fn unfit_channels(&self, _channels: usize) -> Option<(String, String)> {
        None
    }

    /// Why the probe cannot be run on images with this many patches, and how to fix it, so that such a recipe is refused
    /// before the run.
    fn unfit_patches(&self, _patches: usize) -> Option<(String, String)> {
        None
    }

    /// Size of what the model is shown of images of `size`: another, if the probe has a key `window`.
    fn window(&self, size: ImageSize) -> ImageSize {
        size
    }

    /// A hash of the names and times of files that the probe itself reads, if it reads any: when they change, scores that were
    /// kept are measured anew.
    fn stamp(&self) -> Option<String> {
        None
    }

    /// Images that it computes features of, each time that it runs: most of what it costs.
    fn images(&self) -> usize {
        0
    }
}

impl dyn Probe {
    /// What the probe needs and `data` does not have.
    pub fn lacks(&self, data: &dyn Dataset) -> Vec<Annotation> {
        self.needs().iter().copied().filter(|annotation| !annotation.is_given_by(data)).collect()
    }

    /// Why a model cannot be shown the probe's windows of images of `size`, and the nearest sizes; see
    /// [`ImageSize::unfit`].
    pub fn unfit_window(&self, size: ImageSize, patch: usize, least: usize) -> Option<(String, String)> {
        Some(self.window(size)).filter(|window| *window != size)?.unfit(patch, least)
    }
}
