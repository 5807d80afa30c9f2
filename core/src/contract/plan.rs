//! What is drawn for one image: boxes, flips, colour factors, blur. Plain numbers, no pixels.
//!
//! The CPU and a device that holds the image apply the same plan, so crops are the same wherever they are made.

use super::augmentation::CropContext;
use super::view::CropBox;

/// A box of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// First column.
    pub x: usize,
    /// First row.
    pub y: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// One step of the colour jitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JitterOp {
    /// Blend with black.
    Brightness,
    /// Blend with the mean grey; of images that are not RGB, with the mean of all values.
    Contrast,
    /// Blend with the pixel's grey. RGB only.
    Saturation,
    /// Turn the colour circle. RGB only.
    Hue,
}

/// Colour jitter: four operations in a random order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jitter {
    /// First to last.
    pub order: [JitterOp; 4],
    /// Factor in [0, 2]: 0 is black, 1 changes nothing.
    pub brightness: f32,
    /// Factor in [0, 2]: 0 is the mean grey, 1 changes nothing.
    pub contrast: f32,
    /// Factor in [0, 2]: 0 is grey, 1 changes nothing.
    pub saturation: f32,
    /// Share of a turn in [-0.5, 0.5].
    pub hue: f64,
}

impl Jitter {
    /// What is added to an 8-bit hue: Pillow cuts the shift towards zero.
    pub(crate) fn hue_shift(&self) -> f32 {
        (self.hue * 255.0).trunc() as f32
    }
}

/// Distortion of a crop's colours.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ColorPlan {
    /// Random changes of brightness, contrast, saturation and hue.
    pub jitter: Option<Jitter>,
    /// Whether colours are removed (after the jitter). RGB only.
    pub grey: bool,
}

/// Where a crop's pixels come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// A box of the image, resized to the crop.
    Image {
        /// The box.
        area: Rect,
        /// Whether it is mirrored.
        flip: bool,
    },
    /// A window of global crop `global`, at its own scale.
    Global {
        /// Which one.
        global: usize,
        /// First column.
        x: usize,
        /// First row.
        y: usize,
    },
}

/// Everything drawn for one crop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CropPlan {
    /// Where it is cut.
    pub cut: Cut,
    /// Distortion of its colours.
    pub color: ColorPlan,
    /// Standard deviation of the Gaussian blur, in pixels of the crop (of a teacher's larger one too).
    pub blur: Option<f32>,
    /// Values of at least this many, of 255, are inverted: `x` becomes `255 - x`. Of 16 bits, `x` becomes `65535 - x` from 257
    /// times this on.
    pub solarize: Option<u8>,
}

/// Everything drawn for one image.
#[derive(Clone, Debug, PartialEq)]
pub struct ImagePlan {
    /// Distortion of the whole image, where crops share one.
    pub shared_color: Option<ColorPlan>,
    /// The global crops, cut from the image; teachers' larger ones have the same plans.
    pub globals: [CropPlan; 2],
    /// The local crops.
    pub locals: Vec<CropPlan>,
}

impl Rect {
    fn cropped(self, flip: bool) -> CropBox {
        let [x, y, width, height] = [self.x, self.y, self.width, self.height].map(|n| n as f64);
        CropBox { x, y, width, height, flip }
    }
}

impl Cut {
    /// The box of a crop that is cut from the image.
    fn image_box(&self) -> Option<CropBox> {
        match *self {
            Self::Image { area, flip } => Some(area.cropped(flip)),
            Self::Global { .. } => None,
        }
    }
}

impl ImagePlan {
    /// Where the global and the local crops are cut from the image, given their sides in pixels.
    pub fn boxes(&self, global_size: usize, local_size: usize) -> [Vec<CropBox>; 2] {
        let of = |plan: &CropPlan| match plan.cut {
            Cut::Image { area, flip } => area.cropped(flip),
            Cut::Global { global, x, y } => {
                let whole = self.globals[global].cut.image_box().expect("global crops are cut from the image");
                let (across, down) = (whole.width / global_size as f64, whole.height / global_size as f64);
                let x = if whole.flip { global_size - local_size - x } else { x };
                CropBox {
                    x: whole.x + x as f64 * across,
                    y: whole.y + y as f64 * down,
                    width: local_size as f64 * across,
                    height: local_size as f64 * down,
                    flip: whole.flip,
                }
            }
        };
        [self.globals.iter().map(of).collect(), self.locals.iter().map(of).collect()]
    }

    /// Why a plan for an image of `width x height` pixels cannot be applied; `None` if it can.
    pub fn fault(&self, (width, height): (usize, usize), crops: &CropContext) -> Option<String> {
        if self.locals.len() != crops.local_count {
            return Some(format!("has {} local crops in place of {}", self.locals.len(), crops.local_count));
        }
        let color = |color: &ColorPlan| {
            let in_range = color.jitter.is_none_or(|j| {
                let factors = [j.brightness, j.contrast, j.saturation].iter().all(|x| (0.0..=2.0).contains(x));
                factors && (-0.5..=0.5).contains(&j.hue)
            });
            let colours = color.grey || color.jitter.is_some_and(|j| j.saturation != 1.0 || j.hue_shift() != 0.0);
            match (in_range, colours && crops.channels != 3) {
                (true, false) => None,
                (false, _) => Some("has a colour factor outside of [0, 2], or more than half a turn of hue".into()),
                (_, true) => Some(format!(
                    "changes saturation or hue or is made grey, which is for images of 3 channels, not {}",
                    crops.channels
                )),
            }
        };
        if let Some(wrong) = self.shared_color.iter().find_map(color) {
            return Some(wrong);
        }
        let names = ["global", "local"].into_iter().zip([&self.globals[..], &self.locals[..]]);
        names.flat_map(|(name, crops)| crops.iter().map(move |crop| (name, crop))).find_map(|(name, crop)| {
            let cut = match crop.cut {
                Cut::Image { area: Rect { x, y, width: w, height: h }, .. } => {
                    w > 0 && h > 0 && x.saturating_add(w) <= width && y.saturating_add(h) <= height
                }
                Cut::Global { global, x, y } => {
                    let inside = |at: usize| at.saturating_add(crops.local_size) <= crops.global_size;
                    name == "local" && global < self.globals.len() && inside(x) && inside(y)
                }
            };
            let wrong = if !cut {
                format!("cuts {:?}", crop.cut)
            } else if let Some(wrong) = color(&crop.color) {
                wrong
            } else if crop.blur.is_some_and(|sigma| !(sigma.is_finite() && sigma > 0.0)) {
                format!("is blurred by {:?} pixels", crop.blur)
            } else {
                return None;
            };
            Some(format!("has a {name} crop that {wrong}"))
        })
    }
}
