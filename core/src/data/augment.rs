//! Crops from images by plans: the student's and the teachers'.

use std::cell::RefCell;

use fast_image_resize::Resizer;

use super::blur::gaussian_blur;
use super::color::{distort, solarize};
use super::resize::cut;
use super::value::Value;
use crate::contract::{ColorPlan, CropPlan, Cut, ImagePlan, Pixels, Rect, Sample};
use crate::recipe::CropConfig;

/// Where one image's crops go: each a `[channels, side, side]` slice of a batch.
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
/// normalised, on whole numbers of the image's 8 or 16 bits until the last step. Teachers' own crops are made by the same
/// plans at their size, without the distortion where [`CropConfig::teacher_without_distortion`] says so.
///
/// What the student sees never depends on whether a teacher looks too, so that arms of an ablation that differ in
/// it share their pixels. In this it differs from the reference, which cuts at the larger of both sizes, distorts there
/// and resizes the result to both: its student gets other pixels when another teacher begins to look. (Where
/// local crops are cut from global ones, the reference also takes the windows from the top left corner of the larger crop.)
#[derive(Clone, Debug)]
pub struct CropMaker {
    pub(super) config: CropConfig,
    pub(super) teacher_size: Option<usize>,
    /// Value `x` of channel `c` becomes `scale[c] * x + shift[c]`: the scales of values of 8 bits, and of 16.
    pub(super) scales: [Vec<f32>; 2],
    pub(super) shift: Vec<f32>,
}

/// Buffers that a thread reuses from image to image.
#[derive(Default)]
struct Scratch {
    resizer: Resizer,
    bytes: Interleaved<u8>,
    words: Interleaved<u16>,
    planes: Vec<f32>,
    blur: Vec<f32>,
}

/// Interleaved pixels: a whole image and a crop.
#[derive(Default)]
struct Interleaved<V> {
    image: Vec<V>,
    base: Vec<V>,
}

/// The buffers of an image.
struct Buffers<'a, V> {
    resizer: &'a mut Resizer,
    own: &'a mut Interleaved<V>,
    planes: &'a mut Vec<f32>,
    blur: &'a mut Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl CropMaker {
    /// With crops of `config`, and teachers' own of `teacher_size` pixels if they have any.
    pub fn new(config: &CropConfig, teacher_size: Option<usize>) -> Self {
        let scales = [u8::TOP, u16::TOP].map(|top| config.std.iter().map(|std| 1.0 / (top * std)).collect());
        let shift = config.mean.iter().zip(&config.std).map(|(mean, std)| -mean / std).collect();
        Self { config: config.clone(), teacher_size, scales, shift }
    }

    /// Makes the crops of `plan` from `image`, normalised, into `views`: all but those of further augmentations, which have
    /// plans of their own.
    ///
    /// # Panics
    /// If the plan was drawn for another image size, or the slices in `views` have other sizes than the crops.
    pub fn apply(&self, image: &Sample, plan: &ImagePlan, views: &mut Views<'_>) {
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { resizer, bytes, words, planes, blur } = scratch;
            let size = (image.width, image.height);
            match &image.pixels {
                Pixels::U8(values) => {
                    self.apply_to(values, size, plan, views, Buffers { resizer, own: bytes, planes, blur })
                }
                Pixels::U16(values) => {
                    self.apply_to(values, size, plan, views, Buffers { resizer, own: words, planes, blur })
                }
            }
        });
    }

    fn apply_to<'a, V: Value>(
        &self,
        mut pixels: &'a [V],
        (width, height): (usize, usize),
        plan: &ImagePlan,
        views: &mut Views<'_>,
        buffers: Buffers<'a, V>,
    ) {
        let Buffers { resizer, own: Interleaved { image, base }, planes, blur } = buffers;
        let channels = self.shift.len();
        let size = (channels, width, height);
        if let Some(color) = &plan.shared_color {
            planes.resize(pixels.len(), 0.0);
            to_planes(pixels, channels, width, false, planes);
            distort::<V>(planes, channels, color);
            from_planes(planes, channels, image);
            pixels = image;
        }
        let side = self.config.global_size;
        for (k, crop) in plan.globals.iter().enumerate() {
            let (area, flip) = image_box(crop);
            cut(resizer, pixels, size, area, side, base);
            self.finish(base, flip, crop, views.globals[k], side, blur);
            if let (Some(teacher), Some(out)) = (self.teacher_size, views.teacher.get_mut(k)) {
                cut(resizer, pixels, size, area, teacher, base);
                self.finish(base, flip, &self.teacher_plan(crop), out, teacher, blur);
            }
        }
        let local = self.config.local_size;
        for (crop, out) in plan.locals.iter().zip(&mut views.locals) {
            match crop.cut {
                Cut::Image { area, flip } => {
                    cut(resizer, pixels, size, area, local, base);
                    self.finish(base, flip, crop, out, local, blur);
                }
                Cut::Global { global, x, y } => {
                    let (area, flip) = image_box(&plan.globals[global]);
                    cut(resizer, pixels, size, area, side, base);
                    planes.resize(channels * side * side, 0.0);
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
    fn finish<V: Value>(
        &self,
        pixels: &[V],
        flip: bool,
        plan: &CropPlan,
        out: &mut [f32],
        side: usize,
        scratch: &mut Vec<f32>,
    ) {
        let channels = self.shift.len();
        to_planes(pixels, channels, side, flip, out);
        distort::<V>(out, channels, &plan.color);
        if let Some(sigma) = plan.blur {
            gaussian_blur(out, side, sigma, scratch);
        }
        if let Some(threshold) = plan.solarize {
            solarize::<V>(out, threshold);
        }
        self.normalize::<V>(out);
    }

    fn normalize<V: Value>(&self, planes: &mut [f32]) {
        let n = planes.len() / self.shift.len();
        let scales = &self.scales[usize::from(V::TOP > u8::TOP)];
        for (c, plane) in planes.chunks_exact_mut(n).enumerate() {
            let (scale, shift) = (scales[c], self.shift[c]);
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

/// Interleaved values to planes of whole numbers, mirrored if asked.
fn to_planes<V: Value>(pixels: &[V], channels: usize, width: usize, flip: bool, planes: &mut [f32]) {
    let n = pixels.len() / channels;
    if channels != 3 {
        for (c, plane) in planes.chunks_exact_mut(n).enumerate() {
            let values = pixels.iter().skip(c).step_by(channels);
            plane.iter_mut().zip(values).for_each(|(x, value)| *x = value.to_f32());
            if flip {
                plane.chunks_exact_mut(width).for_each(<[f32]>::reverse);
            }
        }
        return;
    }
    let (red, rest) = planes.split_at_mut(n);
    let (green, blue) = rest.split_at_mut(n);
    for (y, row) in pixels.chunks_exact(3 * width).enumerate() {
        let range = y * width..(y + 1) * width;
        let (r, g, b) = (&mut red[range.clone()], &mut green[range.clone()], &mut blue[range]);
        for (x, pixel) in row.as_chunks::<3>().0.iter().enumerate() {
            (r[x], g[x], b[x]) = (pixel[0].to_f32(), pixel[1].to_f32(), pixel[2].to_f32());
        }
        if flip {
            r.reverse();
            g.reverse();
            b.reverse();
        }
    }
}

/// Planes of whole numbers to interleaved values.
fn from_planes<V: Value>(planes: &[f32], channels: usize, pixels: &mut Vec<V>) {
    let n = planes.len() / channels;
    pixels.clear();
    pixels.extend((0..planes.len()).map(|i| V::of_f32(planes[i % channels * n + i / channels])));
}
