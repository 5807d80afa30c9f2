//! Antialiased bicubic resizing (a = -0.5, Pillow's and torchvision's), by the crate `fast_image_resize`.

use fast_image_resize::images::TypedImage;
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};

use super::value::Value;
use crate::contract::Rect;

fn bicubic() -> ResizeOptions {
    ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom))
}

/// Cuts `area` out of an interleaved image of `channels` and `width x height` and resizes it to `side x side` into `out`.
///
/// Pixels outside `area` have no influence: as in torchvision, the crop comes before the resize.
pub(super) fn cut<V: Value>(
    resizer: &mut Resizer,
    pixels: &[V],
    (channels, width, height): (usize, usize, usize),
    area: Rect,
    side: usize,
    out: &mut Vec<V>,
) {
    out.resize(channels * side * side, V::zeroed());
    assert_eq!(pixels.len(), channels * width * height, "the pipeline checked that the image has so many channels");
    let rows = || pixels.chunks_exact(channels * width).skip(area.y).take(area.height);
    let rows = || rows().map(|row| &row[channels * area.x..][..channels * area.width]);
    let mut cut = Vec::with_capacity(channels * area.width * area.height);
    if channels == 3 {
        rows().for_each(|row| cut.extend_from_slice(row));
        return resize::<V::Three, V>(resizer, &mut cut, area, side, out);
    }
    let mut plane = vec![V::zeroed(); side * side];
    for channel in 0..channels {
        cut.clear();
        rows().for_each(|row| cut.extend(row.iter().skip(channel).step_by(channels)));
        resize::<V::One, V>(resizer, &mut cut, area, side, &mut plane);
        out.iter_mut().skip(channel).step_by(channels).zip(&plane).for_each(|(out, value)| *out = *value);
    }
}

/// Resizes what was cut of `area`, in pixels `P`, to `side x side`: columns first. Of values of 16 bits the crate would begin with
/// rows, so they have a call for each axis.
fn resize<P: PixelTrait, V: Value>(resizer: &mut Resizer, cut: &mut [V], area: Rect, side: usize, out: &mut [V]) {
    // Source and target are of one type, for which the crate's kernels are compiled once.
    fn image<P: PixelTrait, V: Value>(pixels: &mut [V], width: usize, height: usize) -> TypedImage<'_, P> {
        let pixels = bytemuck::cast_slice_mut(pixels);
        TypedImage::from_buffer(width as u32, height as u32, pixels).expect("it has so many pixels")
    }
    let mut scale = |from: TypedImage<'_, P>, mut to: TypedImage<'_, P>| {
        resizer.resize_typed(&from, &mut to, &bicubic()).expect("sizes and types were checked above");
    };
    if V::TOP > u8::TOP {
        let mut columns = vec![V::zeroed(); cut.len() / area.height * side];
        scale(image(cut, area.width, area.height), image(&mut columns, area.width, side));
        scale(image(&mut columns, area.width, side), image(out, side, side));
    } else {
        scale(image(cut, area.width, area.height), image(out, side, side));
    }
}

/// The weights of one axis of such a resize, for a device: those that `fast_image_resize` computes.
pub(super) struct Weights {
    /// Most inputs of an output.
    pub(super) window: usize,
    /// Of each output: its first input, and the weights from there.
    rows: Vec<(usize, Vec<f64>)>,
}

impl Weights {
    /// From `from` inputs to `to` outputs.
    pub(super) fn new(from: usize, to: usize) -> Self {
        let cubic = |x: f64| match x.abs() {
            x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
            _ => 0.0,
        };
        let scale = from as f64 / to as f64;
        let widen = scale.max(1.0);
        let radius = 2.0 * widen;
        let row = |i: usize| {
            let centre = (i as f64 + 0.5) * scale;
            let start = (centre - radius).floor().max(0.0) as usize;
            let end = (centre + radius).ceil().min(from as f64) as usize;
            let all: Vec<f64> = (start..end).map(|x| cubic((x as f64 - (centre - 0.5)) * (1.0 / widen))).collect();
            // Weights of zero at either end are no weights.
            let skip = all.iter().take_while(|w| **w == 0.0).count();
            let used = all.len() - all.iter().rev().take_while(|w| **w == 0.0).count();
            let sum: f64 = all.iter().sum();
            (start + skip, all[skip..used].iter().map(|w| w / sum).collect())
        };
        Self { window: 2 * radius.ceil() as usize + 1, rows: (0..to).map(row).collect() }
    }

    /// Of each output: its first input, and the weights from there.
    pub(super) fn rows(&self) -> impl Iterator<Item = (usize, &[f64])> {
        self.rows.iter().map(|(first, weights)| (*first, weights.as_slice()))
    }

    /// Fractional bits with which all weights fit into 16 bits; at most 21, so that sums of products with 8-bit values
    /// fit into 32. For values of 16 bits (`wide`) both are twice as wide, and the bits at most 45.
    pub(super) fn precision(&self, wide: bool) -> u32 {
        let (bits, last) = if wide { (31, 45) } else { (15, 21) };
        let most = self.rows.iter().flat_map(|(_, weights)| weights).copied().fold(0.0, f64::max);
        (0..last).find(|p| (most * (2u64 << p) as f64).round() >= f64::from(1u32 << bits)).unwrap_or(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One axis of an antialiased bicubic resize, from its definition.
    fn direct(line: &[f64], to: usize) -> Vec<f64> {
        let cubic = |x: f64| match x.abs() {
            x if x < 1.0 => 1.5 * x * x * x - 2.5 * x * x + 1.0,
            x if x < 2.0 => -0.5 * x * x * x + 2.5 * x * x - 4.0 * x + 2.0,
            _ => 0.0,
        };
        let scale = line.len() as f64 / to as f64;
        let widen = scale.max(1.0);
        let value = |i: usize| {
            let centre = (i as f64 + 0.5) * scale - 0.5;
            let weights: Vec<f64> = (0..line.len()).map(|j| cubic((j as f64 - centre) / widen)).collect();
            weights.iter().zip(line).map(|(w, x)| w * x).sum::<f64>() / weights.iter().sum::<f64>()
        };
        (0..to).map(value).collect()
    }

    fn direct_2d(image: &[f64], width: usize, to: usize) -> Vec<f64> {
        let rows: Vec<Vec<f64>> = image.chunks(width).map(|row| direct(row, to)).collect();
        let columns = (0..to).map(|x| direct(&rows.iter().map(|row| row[x]).collect::<Vec<_>>(), to));
        let columns: Vec<Vec<f64>> = columns.collect();
        (0..to * to).map(|i| columns[i % to][i / to]).collect()
    }

    #[test]
    fn crops_are_resized_to_within_rounding_and_ignore_what_is_outside() {
        let (width, height) = (40, 30);
        let area = Rect { x: 5, y: 3, width: 22, height: 19 };
        // Outside the box all is white; inside, no overshoot is cut off.
        let inside = |x: usize, y: usize| (5..27).contains(&x) && (3..22).contains(&y);
        let value = |i: usize| if inside(i / 3 % width, i / 3 / width) { (70 + i * 7919 % 100) as u8 } else { 255 };
        let rgb: Vec<u8> = (0..3 * width * height).map(value).collect();
        for to in [8, 16, 32] {
            let mut out = Vec::new();
            cut(&mut Resizer::new(), &rgb, (3, width, height), area, to, &mut out);
            for c in 0..3 {
                let pixel = |i: usize| f64::from(rgb[3 * ((3 + i / 22) * width + 5 + i % 22) + c]);
                let inside: Vec<f64> = (0..22 * 19).map(pixel).collect();
                for (i, want) in direct_2d(&inside, 22, to).into_iter().enumerate() {
                    let got = f64::from(out[3 * i + c]);
                    // Two passes, each rounded to 8 bits.
                    assert!((got - want).abs() < 2.0, "to {to}, channel {c}: {got}, {want}");
                }
            }
        }
    }
}
