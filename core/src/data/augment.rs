//! Crops from images by plans: the student's and the teachers'.

use std::cell::RefCell;

use fast_image_resize::Resizer;

use super::blur::gaussian_blur;
use super::color::{distort, solarize};
use super::resize::cut_rgb;
use crate::contract::{ColorPlan, CropPlan, Cut, ImagePlan, Rect, Sample};
use crate::recipe::CropConfig;

/// Where one image's crops go: each a `[3, side, side]` slice of a batch.
#[derive(Debug)]
pub struct Views<'a> {
    /// The two global crops.
    pub globals: Vec<&'a mut [f32]>,
    /// The local crops.
    pub locals: Vec<&'a mut [f32]>,
    /// The teachers' crops: none, or one for each global crop.
    pub teacher: Vec<&'a mut [f32]>,
    /// The crops of every further augmentation.
    pub further: Vec<Vec<&'a mut [f32]>>,
}

impl<'a> Views<'a> {
    /// Two global crops.
    pub fn of_globals(globals: Vec<&'a mut [f32]>) -> Self {
        Self { globals, locals: Vec::new(), teacher: Vec::new(), further: Vec::new() }
    }
}

/// Makes the crops of images by the plans of an augmentation, whichever it is.
///
/// A crop is cut, resized (bicubic, antialiased), mirrored, jittered in colour, made grey, blurred, solarised and
/// normalised, on 8-bit values until the last step. Teachers' own crops are made by the same plans at their
/// size, without the distortion where [`CropConfig::teacher_without_distortion`] says so.
///
/// What the student sees never depends on whether a teacher looks too, so that arms of an ablation that differ in
/// it share their pixels. In this it differs from the reference, which cuts at the larger of both sizes, distorts there
/// and resizes the result to both: its student gets other pixels when another teacher begins to look. (Where
/// local crops are cut from global ones, the reference also takes the windows from the top left corner of the larger crop.)
#[derive(Clone, Debug)]
pub struct CropMaker {
    pub(super) config: CropConfig,
    pub(super) teacher_size: Option<usize>,
    /// Value `x` of channel `c` becomes `scale[c] * x + shift[c]`.
    pub(super) scale: [f32; 3],
    pub(super) shift: [f32; 3],
}

/// Buffers that a thread reuses from image to image.
#[derive(Default)]
struct Scratch {
    resizer: Resizer,
    image: Vec<u8>,
    base: Vec<u8>,
    planes: Vec<f32>,
    blur: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl CropMaker {
    /// With crops of `config`, and teachers' own of `teacher_size` pixels if they have any.
    pub fn new(config: &CropConfig, teacher_size: Option<usize>) -> Self {
        let scale = config.std.map(|std| 1.0 / (255.0 * std));
        let shift = std::array::from_fn(|c| -config.mean[c] / config.std[c]);
        Self { config: config.clone(), teacher_size, scale, shift }
    }

    /// Makes the crops of `plan` from `image`, normalised, into `views`: all but those of further augmentations, which have
    /// plans of their own.
    ///
    /// # Panics
    /// If the plan was drawn for another image size, or the slices in `views` have other sizes than the crops.
    pub fn apply(&self, image: &Sample, plan: &ImagePlan, views: &mut Views<'_>) {
        SCRATCH.with_borrow_mut(|scratch| self.apply_with(image, plan, views, scratch));
    }

    fn apply_with(&self, image: &Sample, plan: &ImagePlan, views: &mut Views<'_>, scratch: &mut Scratch) {
        let Scratch { resizer, image: shared, base, planes, blur } = scratch;
        let size = (image.width, image.height);
        let mut rgb = &image.rgb[..];
        if let Some(color) = &plan.shared_color {
            planes.resize(rgb.len(), 0.0);
            to_planes(rgb, image.width, false, planes);
            distort(planes, color);
            from_planes(planes, shared);
            rgb = shared;
        }
        let side = self.config.global_size;
        for (k, crop) in plan.globals.iter().enumerate() {
            let (area, flip) = image_box(crop);
            cut_rgb(resizer, rgb, size, area, side, base);
            self.finish(base, flip, crop, views.globals[k], side, blur);
            if let (Some(teacher), Some(out)) = (self.teacher_size, views.teacher.get_mut(k)) {
                cut_rgb(resizer, rgb, size, area, teacher, base);
                self.finish(base, flip, &self.teacher_plan(crop), out, teacher, blur);
            }
        }
        let local = self.config.local_size;
        for (crop, out) in plan.locals.iter().zip(&mut views.locals) {
            match crop.cut {
                Cut::Image { area, flip } => {
                    cut_rgb(resizer, rgb, size, area, local, base);
                    self.finish(base, flip, crop, out, local, blur);
                }
                Cut::Global { global, x, y } => {
                    let (area, flip) = image_box(&plan.globals[global]);
                    cut_rgb(resizer, rgb, size, area, side, base);
                    planes.resize(3 * side * side, 0.0);
                    self.finish(base, flip, crop, planes, side, blur);
                    for (plane, out) in planes.chunks_exact(side * side).zip(out.chunks_exact_mut(local * local)) {
                        for (row, out) in plane.chunks_exact(side).skip(y).zip(out.chunks_exact_mut(local)) {
                            out.copy_from_slice(&row[x..x + local]);
                        }
                    }
                }
            }
        }
    }

    /// The plan of the teachers' crop beside a global one.
    pub(super) fn teacher_plan(&self, global: &CropPlan) -> CropPlan {
        match self.config.teacher_without_distortion {
            true => CropPlan { color: ColorPlan::default(), blur: None, solarize: None, ..*global },
            false => *global,
        }
    }

    /// Mirrors, distorts, blurs, solarises and normalises an interleaved crop into planes.
    fn finish(&self, rgb: &[u8], flip: bool, plan: &CropPlan, out: &mut [f32], side: usize, scratch: &mut Vec<f32>) {
        to_planes(rgb, side, flip, out);
        distort(out, &plan.color);
        if let Some(sigma) = plan.blur {
            gaussian_blur(out, side, sigma, scratch);
        }
        if let Some(threshold) = plan.solarize {
            solarize(out, threshold);
        }
        self.normalize(out);
    }

    fn normalize(&self, planes: &mut [f32]) {
        let n = planes.len() / 3;
        for (c, plane) in planes.chunks_exact_mut(n).enumerate() {
            let (scale, shift) = (self.scale[c], self.shift[c]);
            crate::simd!(f32, plane.iter_mut().for_each(|x| *x = *x * scale + shift));
        }
    }
}

pub(super) fn image_box(crop: &CropPlan) -> (Rect, bool) {
    match crop.cut {
        Cut::Image { area, flip } => (area, flip),
        Cut::Global { .. } => unreachable!("global crops are cut from the image"),
    }
}

/// Interleaved bytes to planes of whole numbers, mirrored if asked.
fn to_planes(rgb: &[u8], width: usize, flip: bool, planes: &mut [f32]) {
    let n = rgb.len() / 3;
    let (red, rest) = planes.split_at_mut(n);
    let (green, blue) = rest.split_at_mut(n);
    for (y, row) in rgb.chunks_exact(3 * width).enumerate() {
        let range = y * width..(y + 1) * width;
        let (r, g, b) = (&mut red[range.clone()], &mut green[range.clone()], &mut blue[range]);
        for (((pixel, r), g), b) in row.chunks_exact(3).zip(r.iter_mut()).zip(g.iter_mut()).zip(b.iter_mut()) {
            (*r, *g, *b) = (f32::from(pixel[0]), f32::from(pixel[1]), f32::from(pixel[2]));
        }
        if flip {
            r.reverse();
            g.reverse();
            b.reverse();
        }
    }
}

/// Planes of whole numbers to interleaved bytes.
fn from_planes(planes: &[f32], rgb: &mut Vec<u8>) {
    let n = planes.len() / 3;
    rgb.clear();
    rgb.extend((0..3 * n).map(|i| planes[i % 3 * n + i / 3] as u8));
}
