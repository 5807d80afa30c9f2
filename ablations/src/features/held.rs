//! The same few held-out images of a run, as its models see them: what reports and filmstrips show.

use std::path::Path;

use dinolab_core::contract::Sample;
use dinolab_core::train::{datasets, Trained};
use dinolab_core::weights::Source;
use dinolab_core::{Device, Error, Result};
use image::imageops::{crop_imm, resize, FilterType};
use image::RgbImage;

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
        let (_, held_out) = datasets(&Source::at(run)?.recipe()?.recipe)?;
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
    let (width, height) = (sample.width as u32, sample.height as u32);
    let whole = RgbImage::from_raw(width, height, sample.rgb.clone())
        .ok_or_else(|| Error::user("a held-out image has another size than it says", "correct the dataset plugin"))?;
    let square = width.min(height);
    let (left, top) = ((width - square) / 2, (height - square) / 2);
    let image = crop_imm(&whole, left, top, square, square).to_image();
    let side = (patches * trained.backbone.patch_size()) as u32;
    let seen = see(trained, resize(&image, side, side, FilterType::CatmullRom), patches)?;
    // An object is where the pixel under the middle of a patch is not background, class 0.
    let foreground = sample.mask.as_ref().map(|mask| {
        let at = |i: usize, start: u32| start as usize + (2 * i + 1) * square as usize / (2 * patches);
        let object = |p: usize| mask[at(p / patches, top) * sample.width + at(p % patches, left)] != 0;
        (0..patches * patches).map(object).collect()
    });
    Ok(Seen { view: PatchView { foreground, ..seen.view }, ..seen })
}
