//! What a trained model sees in photographs of any size: features to files, pictures, a contact sheet and a viewer.
//!
//! An image keeps its shape. It is cut (or, with a size given, resized) to whole patches and goes through the model as
//! it is; one that is larger than a window is seen window by window: see [`windows`].

mod files;
mod fit;
mod held;
mod inputs;
mod record;
mod sheet;
mod viewer;
pub mod windows;

use dinolab_core::contract::{ImageSize, Sample};
use dinolab_core::train::Trained;
use dinolab_core::{Result, Tensor};
use dinolab_plugins::pixels::{cropped, normalized, rgb};

use crate::pictures::{foreground, principal_scores, PatchView};

pub use files::{read_back, write_features, write_pictures, Format};
pub use fit::{fit, sides, Size};
pub use held::Held;
pub use inputs::{images, name, Found, Input};
pub use record::Record;
pub use sheet::Sheets;
pub use viewer::Viewer;

/// An image as a model sees it, whole.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The image and its patch features.
    pub view: PatchView,
    /// CLS: `[D]`, the mean over windows.
    pub cls: Vec<f64>,
}

/// What pictures of one image show.
#[derive(Clone, Debug, Default)]
pub struct Maps {
    /// Scores of every patch on the first three principal components of this image.
    pub scores: Vec<[f64; 3]>,
    /// Cosine similarity to each chosen patch.
    pub similarity: Vec<(usize, Vec<f64>)>,
    /// Cosine similarity of every patch to CLS.
    pub cls: Vec<f64>,
    /// Foreground by the first component.
    pub foreground: Vec<bool>,
}

impl Seen {
    /// Everything that pictures show; `patches` are those whose similarity is wanted.
    ///
    /// # Errors
    /// If features are not finite.
    pub fn maps(&self, patches: &[usize]) -> Result<Maps> {
        let scores = principal_scores(std::slice::from_ref(&self.view))?;
        let foreground = foreground(&scores, self.view.width);
        let similarity = patches.iter().map(|&p| (p, self.view.cosine_to(self.view.patch(p)))).collect();
        Ok(Maps { scores, similarity, cls: self.view.cosine_to(&self.cls), foreground })
    }
}

/// The features of an image whose sides are whole numbers of patches; `window` is the most patches a side that the
/// model sees at once.
///
/// # Errors
/// If the model cannot be run.
pub fn see(trained: &Trained, image: Sample, window: usize) -> Result<Seen> {
    let patch = trained.backbone.patch_size();
    let (height, width) = (image.height / patch, image.width / patch);
    let mut sum = windows::Blend::new(height, width, trained.backbone.dim());
    for window in windows::cover(height, width, window) {
        let [left, top, width, height] = [window.left, window.top, window.width, window.height].map(|n| n * patch);
        let pixels = normalised(trained, &cropped(&image, [left, top], ImageSize { width, height }))?;
        let features = trained.features(&pixels)?;
        sum.add(&window, &features.patches.to_f64_vec(), &features.cls.to_f64_vec());
    }
    let (features, cls) = sum.finish();
    Ok(Seen { view: PatchView { image: rgb(&image), height, width, features, foreground: None }, cls })
}

/// Pixels as the model was trained on: `[1, channels, h, w]`.
fn normalised(trained: &Trained, image: &Sample) -> Result<Tensor> {
    let (mean, std) = &trained.normalization;
    Tensor::from_slice(&normalized(image, (mean, std)), &[1, mean.len(), image.height, image.width])
}
