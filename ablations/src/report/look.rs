//! What a trained run sees in held-out images: the features behind a report's pictures.

use std::path::Path;

use dinolab_core::contract::Sample;
use dinolab_core::train::Trained;
use dinolab_core::{Error, Result, Tensor};
use image::imageops::{crop_imm, resize, FilterType};
use image::RgbImage;

use super::pictures::PatchView;

/// Images shown.
const IMAGES: usize = 4;
/// How much larger than a global crop of the training they are shown: a finer patch grid shows more.
const ENLARGE: usize = 2;

/// The patch features that the EMA teacher of the run in `run` gives for the same few held-out images every time.
///
/// # Errors
/// If the run has no checkpoint, or an image cannot be read.
pub fn look(run: &Path) -> Result<Vec<PatchView>> {
    let trained = Trained::load(run)?;
    let held_out = trained.held_out()?;
    let patch = trained.patch_size();
    let side = (ENLARGE * trained.recipe.crops.global_size / patch).max(1) * patch;
    let shown = IMAGES.min(held_out.len());
    (0..shown).map(|i| view(&trained, &held_out.get(i * held_out.len() / shown)?, side)).collect()
}

fn view(trained: &Trained, sample: &Sample, side: usize) -> Result<PatchView> {
    let (width, height) = (sample.width as u32, sample.height as u32);
    let whole = RgbImage::from_raw(width, height, sample.rgb.clone())
        .ok_or_else(|| Error::user("a held-out image has another size than it says", "correct the dataset plugin"))?;
    let square = width.min(height);
    let (left, top) = ((width - square) / 2, (height - square) / 2);
    let image = crop_imm(&whole, left, top, square, square).to_image();
    let image = resize(&image, side as u32, side as u32, FilterType::CatmullRom);
    let (mean, std) = (trained.recipe.crops.mean, trained.recipe.crops.std);
    let channel = |c: usize| image.pixels().map(move |p| (f32::from(p.0[c]) / 255.0 - mean[c]) / std[c]);
    let pixels: Vec<f32> = (0..3).flat_map(channel).collect();
    let features = trained.features(&Tensor::from_slice(&pixels, &[1, 3, side, side])?)?;
    let grid = features.grid;
    // An object is where the pixel under the middle of a patch is not background, class 0.
    let foreground = sample.mask.as_ref().map(|mask| {
        let at = |i: usize, n: usize, start: u32| start as usize + (2 * i + 1) * square as usize / (2 * n);
        let object = |p: usize| {
            let (y, x) = (at(p / grid.width, grid.height, top), at(p % grid.width, grid.width, left));
            mask[y * sample.width + x] != 0
        };
        (0..grid.height * grid.width).map(object).collect()
    });
    let features = features.patches.to_f64_vec();
    Ok(PatchView { image, height: grid.height, width: grid.width, features, foreground })
}
