//! What the kernels of `augment.cu` are told: an image's plan as plain numbers. Structs mirror those of the kernels.

use bytemuck::{Pod, Zeroable};

use crate::contract::{ColorPlan, CropPlan, Cut, ImagePlan, JitterOp, Rect};
use crate::data::augment::{image_box, CropMaker};
use crate::data::blur;
use crate::data::resize::Weights;

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Axis {
    table: i32,
    width: i32,
    precision: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Resize {
    source: u64,
    middle: u64,
    target: u64,
    stride: i32,
    pub(super) columns: i32,
    pub(super) side: i32,
    vertical: Axis,
    horizontal: Axis,
    /// Whether values have 16 bits.
    wide: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct Color {
    count: i32,
    op: [i32; 5],
    factor: [f32; 5],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Paint {
    source: u64,
    pub(super) pixels: u64,
    color: Color,
    /// Whether values have 16 bits.
    wide: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Finish {
    paint: Paint,
    target: u64,
    side: i32,
    flip: i32,
    x: i32,
    y: i32,
    pub(super) out: i32,
    /// The least value that is inverted: [`NEVER`] is above all.
    solarize: i32,
    blur: i32,
    taps: [f32; 5],
}

/// Above every value.
const NEVER: i32 = 1 << 16;

/// What 1 of 255 is of 65535.
const WIDE_UNIT: i32 = 257;

impl Color {
    fn of(plan: &ColorPlan, wide: bool) -> Self {
        let unit = if wide { WIDE_UNIT as f32 } else { 1.0 };
        let mut color = Self::default();
        let mut put = |op: i32, factor: f32| {
            color.op[color.count as usize] = op;
            color.factor[color.count as usize] = factor;
            color.count += 1;
        };
        for (jitter, op) in plan.jitter.iter().flat_map(|j| j.order.map(|op| (j, op))) {
            match op {
                JitterOp::Brightness => put(1, jitter.brightness),
                JitterOp::Contrast => put(2, jitter.contrast),
                JitterOp::Saturation => put(3, jitter.saturation),
                JitterOp::Hue if jitter.hue_shift() != 0.0 => put(4, jitter.hue_shift() * unit),
                JitterOp::Hue => {}
            }
        }
        if plan.grey {
            put(5, 0.0);
        }
        color
    }
}

/// All that is done to the images of one micro-batch. Offsets are into the uploaded images, or into scratch memory.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// Colours of whole images, before anything is cut.
    pub(super) repaint: Vec<Paint>,
    /// From the images.
    pub(super) cut: Vec<Resize>,
    /// Into global, local and the teachers' crops, and into those of each further augmentation.
    pub(super) finish: Vec<Vec<Finish>>,
    /// Weights of resizes.
    pub(super) tables: Vec<i16>,
    /// Bytes of scratch memory.
    pub(super) scratch: usize,
}

/// An image on the device.
#[derive(Clone, Copy)]
pub(super) struct Image {
    /// Where it begins.
    pub(super) at: u64,
    /// Width and height in pixels.
    pub(super) size: (usize, usize),
    /// Values of a pixel.
    pub(super) channels: usize,
    /// Whether they have 16 bits.
    pub(super) wide: bool,
}

impl Image {
    /// Bytes of so many pixels.
    fn bytes(&self, pixels: usize) -> usize {
        pixels * self.channels * if self.wide { 2 } else { 1 }
    }
}

/// A square of interleaved pixels in scratch memory.
#[derive(Clone, Copy)]
struct Square {
    at: u64,
    side: usize,
    wide: bool,
}

impl Jobs {
    /// Adds image `i` of `images`.
    pub(super) fn add(&mut self, a: &CropMaker, plan: &ImagePlan, image: Image, i: usize, images: usize) {
        self.repaint(plan, image);
        let side = a.config.global_size;
        let place = |crop: usize, side: usize| ((crop * images + i) * image.channels * side * side) as u64;
        let mut students = Vec::new();
        for (k, crop) in plan.globals.iter().enumerate() {
            let (area, flip) = image_box(crop);
            let student = self.cut(image, area, side);
            students.push((student, flip));
            self.finish(0, student, flip, crop, (0, 0), side, place(k, side));
            if let Some(teacher) = a.teacher_size {
                let larger = self.cut(image, area, teacher);
                self.finish(2, larger, flip, &a.teacher_plan(crop), (0, 0), teacher, place(k, teacher));
            }
        }
        let local = a.config.local_size;
        for (k, crop) in plan.locals.iter().enumerate() {
            let (source, flip, window) = match crop.cut {
                Cut::Image { area, flip } => (self.cut(image, area, local), flip, (0, 0)),
                Cut::Global { global, x, y } => (students[global].0, students[global].1, (x, y)),
            };
            self.finish(1, source, flip, crop, window, local, place(k, local));
        }
    }

    /// Adds the crops of a plan of further augmentation `k`; as [`add`](Self::add).
    pub(super) fn add_further(
        &mut self,
        k: usize,
        plan: &ImagePlan,
        image: Image,
        side: usize,
        (i, images): (usize, usize),
    ) {
        self.repaint(plan, image);
        for (crop, plan) in plan.globals.iter().enumerate() {
            let (area, flip) = image_box(plan);
            let cut = self.cut(image, area, side);
            let place = ((crop * images + i) * image.channels * side * side) as u64;
            self.finish(3 + k, cut, flip, plan, (0, 0), side, place);
        }
    }

    /// The colours of a whole image, which are changed where it lies.
    fn repaint(&mut self, plan: &ImagePlan, Image { at, size: (width, height), wide, .. }: Image) {
        if let Some(color) = &plan.shared_color {
            let pixels = (width * height) as u64;
            self.repaint.push(Paint { source: at, pixels, color: Color::of(color, wide), wide: wide.into() });
        }
    }

    fn take(&mut self, bytes: usize) -> u64 {
        let at = self.scratch;
        self.scratch += bytes.next_multiple_of(16);
        at as u64
    }

    fn cut(&mut self, image: Image, area: Rect, side: usize) -> Square {
        let (stride, wide) = (image.size.0, image.wide);
        let source = image.at + image.bytes(area.y * stride + area.x) as u64;
        let (middle, target) = (self.take(image.bytes(side * area.width)), self.take(image.bytes(side * side)));
        let (vertical, horizontal) = (self.axis(area.height, side, wide), self.axis(area.width, side, wide));
        let (stride, columns, small) = (stride as i32, area.width as i32, side as i32);
        let wide_job = i32::from(wide);
        self.cut.push(Resize {
            source,
            middle,
            target,
            stride,
            columns,
            side: small,
            vertical,
            horizontal,
            wide: wide_job,
        });
        Square { at: target, side, wide }
    }

    fn axis(&mut self, from: usize, to: usize, wide: bool) -> Axis {
        let weights = Weights::new(from, to);
        let precision = weights.precision(wide);
        let (table, width) = (self.tables.len() as i32, weights.window + 2);
        if wide {
            // Rows of numbers of 32 bits, each in the place of two.
            self.tables.resize(self.tables.len().next_multiple_of(2), 0);
            let table = self.tables.len() as i32;
            for (first, values) in weights.rows() {
                let one = (1u64 << precision) as f64;
                let mut row = vec![first as i32, values.len() as i32];
                row.extend(values.iter().map(|w| (w * one).round() as i32));
                row.resize(width, 0);
                self.tables.extend_from_slice(bytemuck::cast_slice(&row));
            }
            return Axis { table, width: width as i32, precision: precision as i32 };
        }
        for (first, values) in weights.rows() {
            let start = self.tables.len();
            self.tables.resize(start + width, 0);
            let row = &mut self.tables[start..];
            // An image has at most 65535 rows or columns; the kernel reads the number without a sign.
            row[0] = first as u16 as i16;
            row[1] = values.len() as i16;
            row.iter_mut()
                .skip(2)
                .zip(values)
                .for_each(|(out, w)| *out = (w * f64::from(1 << precision)).round() as i16);
        }
        Axis { table, width: width as i32, precision: precision as i32 }
    }

    #[allow(clippy::too_many_arguments)]
    fn finish(
        &mut self,
        kind: usize,
        from: Square,
        flip: bool,
        plan: &CropPlan,
        (x, y): (usize, usize),
        out: usize,
        target: u64,
    ) {
        let pixels = (from.side * from.side) as u64;
        self.finish[kind].push(Finish {
            paint: Paint { source: from.at, pixels, color: Color::of(&plan.color, from.wide), wide: from.wide.into() },
            target,
            side: from.side as i32,
            flip: i32::from(flip),
            x: x as i32,
            y: y as i32,
            out: out as i32,
            solarize: plan.solarize.map_or(NEVER, |least| i32::from(least) * if from.wide { WIDE_UNIT } else { 1 }),
            blur: i32::from(plan.blur.is_some()),
            taps: plan.blur.map_or([0.0; 5], blur::taps),
        });
    }
}
