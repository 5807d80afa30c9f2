//! The same few held-out images of a run, as its models see them: what reports and filmstrips show.

use std::path::Path;

use dinolab_core::contract::{ImageSize, Sample};
use dinolab_core::resolved::Resolved;
use dinolab_core::train::{datasets, Trained};
use dinolab_core::weights::Source;
use dinolab_core::{Device, Error, Result};
use dinolab_plugins::pixels::{cropped, resized_by};
use image::imageops::FilterType;

use super::{see, Seen};
use crate::pictures::PatchView;

/// Images shown.
const IMAGES: usize = 4;
/// How much larger than a global crop of the training they are shown: a finer patch grid shows more.
const ENLARGE: usize = 2;

/// Some of the images that a run holds out.
pub struct Held(Vec<Sample>);

impl Held {
    /// Those of the run in `run`.
    ///
    /// # Errors
    /// If its recipe or an image cannot be read.
    pub fn of(run: &Path) -> Result<Self> {
        let (_, held_out) = datasets(&Resolved::of_source(&Source::at(run)?)?.recipe)?;
        let shown = IMAGES.min(held_out.len());
        (0..shown).map(|i| held_out.get(i * held_out.len() / shown)).collect::<Result<_>>().map(Self)
    }

    /// What the EMA teacher of a run, or of a checkpoint, makes of them: on a device, or else on a GPU when there is one.
    ///
    /// # Errors
    /// If there is no checkpoint, or it cannot be read.
    pub fn see_with(&self, weights: &Path, device: Option<Device>) -> Result<Vec<Seen>> {
        let trained = Trained::open_on(weights, device)?;
        let patches = (ENLARGE * trained.global_size / trained.backbone.patch_size()).max(1);
        self.0.iter().map(|sample| see_sample(&trained, sample, patches)).collect()
    }
}

fn see_sample(trained: &Trained, sample: &Sample, patches: usize) -> Result<Seen> {
    let (width, height) = (sample.width, sample.height);
    if sample.pixels.len() != width * height * trained.normalization.0.len() {
        let problem = "a held-out image has another size than it says, or another number of channels than the model";
        return Err(Error::user(problem, "correct the dataset plugin"));
    }
    let square = width.min(height);
    let (left, top) = ((width - square) / 2, (height - square) / 2);
    let image = cropped(sample, [left, top], ImageSize::square(square));
    let side = ImageSize::square(patches * trained.backbone.patch_size());
    let seen = see(trained, resized_by(image, side, FilterType::CatmullRom), patches)?;
    // An object is where the pixel under the middle of a patch is not background, class 0.
    let foreground = sample.mask.as_ref().map(|mask| {
        let at = |i: usize, start: usize| start + (2 * i + 1) * square / (2 * patches);
        let object = |p: usize| mask[at(p / patches, top) * sample.width + at(p % patches, left)] != 0;
        (0..patches * patches).map(object).collect()
    });
    Ok(Seen { view: PatchView { foreground, ..seen.view }, ..seen })
}
