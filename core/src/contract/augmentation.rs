//! Which crops of an image are seen, and how their colours are changed.

use std::fmt;

use super::plan::ImagePlan;
use crate::rng::Rng;

/// What an augmentation is built with: the crops that its plans are for.
#[derive(Clone, Copy, Debug)]
pub struct CropContext {
    /// Side in pixels of a global crop.
    pub global_size: usize,
    /// Side in pixels of a local crop.
    pub local_size: usize,
    /// Local crops an image.
    pub local_count: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Channels of the images; with another number than 3 saturation, hue and grey mean nothing.
    pub channels: usize,
}

/// Which crops of an image are seen and how they are distorted, as a plan: boxes, flips, colour factors, blur, in plain
/// numbers. Other code makes the crops from the image and the plan, in the same way for every augmentation, on the CPU or
/// on the GPU.
///
/// An augmentation is built for crops of given sizes ([`CropContext`]); a recipe with several resolutions has one for
/// each.
///
/// ```
/// use dinolab_core::contract::{Augmentation, ColorPlan, CropPlan, Cut, ImagePlan, Rect};
/// use dinolab_core::rng::{Rng, Stream};
///
/// /// The image as it is, mirrored half of the time; there are no local crops.
/// #[derive(Debug)]
/// struct Mirror;
///
/// impl Augmentation for Mirror {
///     fn plan(&self, (width, height): (usize, usize), rng: &dyn Fn(u64) -> Rng) -> ImagePlan {
///         let crop = |k: u64| CropPlan {
///             cut: Cut::Image { area: Rect { x: 0, y: 0, width, height }, flip: rng(k).chance(0.5) },
///             color: ColorPlan::default(),
///             blur: None,
///             solarize: None,
///         };
///         ImagePlan { shared_color: None, globals: [0, 1].map(crop), locals: Vec::new() }
///     }
/// }
///
/// let rng = |crop: u64| Rng::new(0, Stream::Augment, 0, crop);
/// assert_eq!(Mirror.plan((64, 48), &rng), Mirror.plan((64, 48), &rng));
/// ```
pub trait Augmentation: fmt::Debug + Send + Sync {
    /// The plan for an image of `(width, height)` pixels, a pure function of the size and its generators. `rng(k)` is the
    /// generator of crop `k` (global crops come first); `rng` of [`WHOLE_IMAGE`] is for what crops share. So the draws of
    /// one crop never change those of another.
    fn plan(&self, size: (usize, usize), rng: &dyn Fn(u64) -> Rng) -> ImagePlan;
}

/// The generator of what is drawn for a whole image; no crop has so high a number.
pub const WHOLE_IMAGE: u64 = u16::MAX as u64;
