//! What is drawn for one image: boxes, flips, colour factors, blur. Plain numbers, no pixels.
//!
//! A plan is a pure function of its generators and the image's size. The CPU applies it in
//! [`Augmentation::apply`](super::Augmentation::apply); a device that holds the image can apply the same plan.

use crate::contract::CropBox;
use crate::recipe::CropConfig;
use crate::rng::Rng;

/// Aspect ratios (width over height) of a crop lie in [3/4, 4/3].
const ASPECT: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// Boxes tried before the central one is taken.
const TRIES: usize = 10;
/// Standard deviation of the blur in pixels.
const SIGMA: [f64; 2] = [0.1, 2.0];

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
    /// Blend with the mean grey.
    Contrast,
    /// Blend with the pixel's grey.
    Saturation,
    /// Turn the colour circle.
    Hue,
}

/// Colour jitter: four operations in a random order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jitter {
    /// First to last.
    pub order: [JitterOp; 4],
    /// Factor in [0.6, 1.4].
    pub brightness: f32,
    /// Factor in [0.6, 1.4].
    pub contrast: f32,
    /// Factor in [0.8, 1.2].
    pub saturation: f32,
    /// Share of a turn in [-0.1, 0.1].
    pub hue: f64,
}

impl Jitter {
    /// What is added to an 8-bit hue: Pillow cuts the shift towards zero.
    pub(super) fn hue_shift(&self) -> f32 {
        (self.hue * 255.0).trunc() as f32
    }
}

/// Distortion of a crop's colours.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ColorPlan {
    /// With probability 0.8.
    pub jitter: Option<Jitter>,
    /// Whether colours are removed (after the jitter), with probability 0.2.
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

/// Everything drawn for one crop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CropPlan {
    /// Where it is cut.
    pub cut: Cut,
    /// Distortion of its colours.
    pub color: ColorPlan,
    /// Standard deviation of the Gaussian blur, in pixels of the crop (of the Gram teacher's larger one too).
    pub blur: Option<f32>,
    /// Whether values of 128 and more are inverted.
    pub solarize: bool,
}

/// Everything drawn for one image.
#[derive(Clone, Debug, PartialEq)]
pub struct ImagePlan {
    /// Distortion of the whole image, where crops share one.
    pub shared_color: Option<ColorPlan>,
    /// The global crops; the Gram teacher's have the same plans.
    pub globals: [CropPlan; 2],
    /// The local crops.
    pub locals: Vec<CropPlan>,
}

impl ImagePlan {
    /// Draws a plan for an image of `width x height` pixels. `rng(k)` is the generator of crop `k` (globals first;
    /// `u64::from(u16::MAX)`: of the whole image), so that one crop's draws never shift another's.
    pub fn draw(
        config: &CropConfig,
        patch_size: usize,
        (width, height): (usize, usize),
        rng: impl Fn(u64) -> Rng,
    ) -> Self {
        let shared_color = config.share_color_jitter.then(|| ColorPlan::draw(&mut rng(u64::from(u16::MAX))));
        let cut = |rng: &mut Rng, scale: [f64; 2]| Cut::Image {
            area: random_box(rng, width, height, scale),
            flip: rng.chance(0.5) && config.horizontal_flip,
        };
        let finish = |rng: &mut Rng, cut: Cut, kind: usize| CropPlan {
            cut,
            color: if config.share_color_jitter { ColorPlan::default() } else { ColorPlan::draw(rng) },
            blur: rng.chance(config.blur[kind]).then(|| rng.uniform(SIGMA[0], SIGMA[1]) as f32),
            solarize: kind == 1 && rng.chance(0.2),
        };
        let globals = [0, 1].map(|k| {
            let rng = &mut rng(k as u64);
            let cut = cut(rng, config.global_scale);
            finish(rng, cut, k)
        });
        let local = |k: usize| {
            let rng = &mut rng(2 + k as u64);
            let cut = if config.local_from_global {
                // As in the reference, the last place along each axis is never taken.
                let places = (config.global_size.saturating_sub(config.local_size) / patch_size).max(1);
                let global = usize::from(k >= config.local_count / 2);
                Cut::Global { global, x: rng.below(places) * patch_size, y: rng.below(places) * patch_size }
            } else {
                cut(rng, config.local_scale)
            };
            finish(rng, cut, 2)
        };
        Self { shared_color, globals, locals: (0..config.local_count).map(local).collect() }
    }

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
}

impl ColorPlan {
    /// Jitter with probability 0.8 (brightness and contrast 0.4, saturation 0.2, hue 0.1), grey with probability 0.2.
    pub fn draw(rng: &mut Rng) -> Self {
        let jitter = rng.chance(0.8).then(|| {
            let mut order = [JitterOp::Brightness, JitterOp::Contrast, JitterOp::Saturation, JitterOp::Hue];
            rng.shuffle(&mut order);
            Jitter {
                order,
                brightness: rng.uniform(0.6, 1.4) as f32,
                contrast: rng.uniform(0.6, 1.4) as f32,
                saturation: rng.uniform(0.8, 1.2) as f32,
                hue: rng.uniform(-0.1, 0.1),
            }
        });
        Self { jitter, grey: rng.chance(0.2) }
    }
}

/// torchvision's `RandomResizedCrop`: a box whose area is a uniform share of the image's in `scale` and whose aspect
/// ratio is log-uniform in [3/4, 4/3]; after ten that stick out, the largest central box of a permitted ratio.
pub fn random_box(rng: &mut Rng, width: usize, height: usize, scale: [f64; 2]) -> Rect {
    let (w, h) = (width as f64, height as f64);
    for _ in 0..TRIES {
        let area = w * h * rng.uniform(scale[0], scale[1]);
        let aspect = rng.log_uniform(ASPECT[0], ASPECT[1]);
        let box_width = (area * aspect).sqrt().round_ties_even() as usize;
        let box_height = (area / aspect).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&box_width) && (1..=height).contains(&box_height) {
            let (y, x) = (rng.below(height - box_height + 1), rng.below(width - box_width + 1));
            return Rect { x, y, width: box_width, height: box_height };
        }
    }
    let (box_width, box_height) = if w / h < ASPECT[0] {
        (width, (w / ASPECT[0]).round_ties_even() as usize)
    } else if w / h > ASPECT[1] {
        ((h * ASPECT[1]).round_ties_even() as usize, height)
    } else {
        (width, height)
    };
    Rect { x: (width - box_width) / 2, y: (height - box_height) / 2, width: box_width, height: box_height }
}
