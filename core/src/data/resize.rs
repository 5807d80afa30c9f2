//! Antialiased bicubic resizing (a = -0.5, Pillow's and torchvision's), by the crate `fast_image_resize`.

use fast_image_resize::images::TypedImage;
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use crate::contract::Rect;

fn bicubic() -> ResizeOptions {
    ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom))
}

/// Cuts `area` out of an interleaved 8-bit image of `width x height` and resizes it to `side x side` into `out`.
///
/// Pixels outside `area` have no influence: as in torchvision, the crop comes before the resize.
pub(super) fn cut_rgb(
    resizer: &mut Resizer,
    rgb: &[u8],
    (width, height): (usize, usize),
    area: Rect,
    side: usize,
    out: &mut Vec<u8>,
) {
    out.resize(3 * side * side, 0);
    assert_eq!(rgb.len(), 3 * width * height, "the pipeline checked that the image has 3 bytes a pixel");
    let rows = rgb.chunks_exact(3 * width).skip(area.y).take(area.height);
    let mut cut = Vec::with_capacity(3 * area.width * area.height);
    rows.for_each(|row| cut.extend_from_slice(&row[3 * area.x..][..3 * area.width]));
    // Source and target are of one type, for which the crate's kernels are compiled once.
    let image = |pixels, width, height| TypedImage::<U8x3>::from_buffer(width as u32, height as u32, pixels);
    let source = image(&mut cut, area.width, area.height).expect("a plan's box lies inside its image");
    let mut target = image(out, side, side).expect("resized above");
    resizer.resize_typed(&source, &mut target, &bicubic()).expect("sizes and types were checked above");
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
    /// fit into 32.
    pub(super) fn precision(&self) -> u32 {
        let most = self.rows.iter().flat_map(|(_, weights)| weights).copied().fold(0.0, f64::max);
        (0..22).find(|bits| (most * f64::from(2 << bits)).round() >= 32768.0).unwrap_or(21)
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
            cut_rgb(&mut Resizer::new(), &rgb, (width, height), area, to, &mut out);
            for c in 0..3 {
                let pixel = |i: usize| f64::from(rgb[3 * ((3 + i / 22) * width + 5 + i % 22) + c]);
                let cut: Vec<f64> = (0..22 * 19).map(pixel).collect();
                for (i, want) in direct_2d(&cut, 22, to).into_iter().enumerate() {
                    let got = f64::from(out[3 * i + c]);
                    // Two passes, each rounded to 8 bits.
                    assert!((got - want).abs() < 2.0, "to {to}, channel {c}: {got}, {want}");
                }
            }
        }
    }
}
