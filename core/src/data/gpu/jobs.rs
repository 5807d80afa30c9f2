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
    pad: i32,
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
    pad: i32,
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

/// Above every value of 8 bits.
const NEVER: i32 = 256;

impl Color {
    fn of(plan: &ColorPlan) -> Self {
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
                JitterOp::Hue if jitter.hue_shift() != 0.0 => put(4, jitter.hue_shift()),
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

/// A square of interleaved pixels in scratch memory.
#[derive(Clone, Copy)]
struct Square {
    at: u64,
    side: usize,
}

impl Jobs {
    /// Adds image `i` of `images`, of `width` pixels a row at `at`.
    pub(super) fn add(
        &mut self,
        a: &CropMaker,
        plan: &ImagePlan,
        at: u64,
        size: (usize, usize),
        i: usize,
        images: usize,
    ) {
        let width = size.0;
        self.repaint(plan, at, size);
        let side = a.config.global_size;
        let place = |crop: usize, side: usize| ((crop * images + i) * 3 * side * side) as u64;
        let mut students = Vec::new();
        for (k, crop) in plan.globals.iter().enumerate() {
            let (area, flip) = image_box(crop);
            let student = self.cut(at, width, area, side);
            students.push((student, flip));
            self.finish(0, student, flip, crop, (0, 0), side, place(k, side));
            if let Some(teacher) = a.teacher_size {
                let larger = self.cut(at, width, area, teacher);
                self.finish(2, larger, flip, &a.teacher_plan(crop), (0, 0), teacher, place(k, teacher));
            }
        }
        let local = a.config.local_size;
        for (k, crop) in plan.locals.iter().enumerate() {
            let (source, flip, window) = match crop.cut {
                Cut::Image { area, flip } => (self.cut(at, width, area, local), flip, (0, 0)),
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
        (at, side): (u64, usize),
        size: (usize, usize),
        (i, images): (usize, usize),
    ) {
        self.repaint(plan, at, size);
        for (crop, plan) in plan.globals.iter().enumerate() {
            let (area, flip) = image_box(plan);
            let cut = self.cut(at, size.0, area, side);
            self.finish(3 + k, cut, flip, plan, (0, 0), side, ((crop * images + i) * 3 * side * side) as u64);
        }
    }

    /// The colours of a whole image, which are changed where it lies.
    fn repaint(&mut self, plan: &ImagePlan, at: u64, (width, height): (usize, usize)) {
        if let Some(color) = &plan.shared_color {
            let pixels = (width * height) as u64;
            self.repaint.push(Paint { source: at, pixels, color: Color::of(color), pad: 0 });
        }
    }

    fn take(&mut self, bytes: usize) -> u64 {
        let at = self.scratch;
        self.scratch += bytes.next_multiple_of(16);
        at as u64
    }

    fn cut(&mut self, at: u64, width: usize, area: Rect, side: usize) -> Square {
        let source = at + 3 * (area.y * width + area.x) as u64;
        let (job, square) = self.resize(source, width, (area.width, area.height), side);
        self.cut.push(job);
        square
    }

    fn resize(&mut self, source: u64, stride: usize, (columns, rows): (usize, usize), side: usize) -> (Resize, Square) {
        let (middle, target) = (self.take(3 * side * columns), self.take(3 * side * side));
        let (vertical, horizontal) = (self.axis(rows, side), self.axis(columns, side));
        let (stride, columns, small) = (stride as i32, columns as i32, side as i32);
        let job = Resize { source, middle, target, stride, columns, side: small, vertical, horizontal, pad: 0 };
        (job, Square { at: target, side })
    }

    fn axis(&mut self, from: usize, to: usize) -> Axis {
        let weights = Weights::new(from, to);
        let precision = weights.precision();
        let (table, width) = (self.tables.len() as i32, weights.window + 2);
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
            paint: Paint { source: from.at, pixels, color: Color::of(&plan.color), pad: 0 },
            target,
            side: from.side as i32,
            flip: i32::from(flip),
            x: x as i32,
            y: y as i32,
            out: out as i32,
            solarize: plan.solarize.map_or(NEVER, i32::from),
            blur: i32::from(plan.blur.is_some()),
            taps: plan.blur.map_or([0.0; 5], blur::taps),
        });
    }
}
