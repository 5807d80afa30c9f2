//! Images of any number of channels, of 8 or 16 bits: cut, brought to a size, normalised, shown.

use dinolab_core::contract::{ImageSize, Pixels, Sample};
use image::imageops::FilterType;
use image::{DynamicImage, ImageBuffer, Luma, Pixel, Rgb, RgbImage, RgbaImage};

/// The part of an image of this size whose left and top are given: its pixels alone.
pub fn cropped(image: &Sample, [left, top]: [usize; 2], size: ImageSize) -> Sample {
    fn rows<T: Copy>(values: &[T], row: usize, [left, width]: [usize; 2], [top, height]: [usize; 2]) -> Vec<T> {
        let mut part = Vec::with_capacity(width * height);
        for row in values.chunks_exact(row).skip(top).take(height) {
            part.extend_from_slice(&row[left..left + width]);
        }
        part
    }
    let n = image.channels();
    let (across, down) = ([n * left, n * size.width], [top, size.height]);
    let pixels = match &image.pixels {
        Pixels::U8(values) => rows(values, n * image.width, across, down).into(),
        Pixels::U16(values) => rows(values, n * image.width, across, down).into(),
    };
    Sample { width: size.width, height: size.height, pixels, ..Sample::default() }
}

/// Pixels `[channels, height, width]` with mean and standard deviation taken out.
pub fn normalized(image: &Sample, (mean, std): (&[f32], &[f32])) -> Vec<f32> {
    fn planes<T: Copy>(values: &[T], n: usize, value: impl Fn(usize, T) -> f32) -> Vec<f32> {
        let mut planes = Vec::with_capacity(values.len());
        for c in 0..n {
            planes.extend(values.chunks_exact(n).map(|pixel| value(c, pixel[c])));
        }
        planes
    }
    let n = image.channels();
    match &image.pixels {
        Pixels::U8(values) => {
            let of_channel = |c: usize| (0..=255u8).map(|x| (f32::from(x) / 255.0 - mean[c]) / std[c]).collect();
            let known: Vec<Vec<f32>> = (0..n).map(of_channel).collect();
            planes(values, n, |c, x| known[c][usize::from(x)])
        }
        Pixels::U16(values) => planes(values, n, |c, x| (f32::from(x) / 65535.0 - mean[c]) / std[c]),
    }
}

/// A filter of a whole image: of RGB at once, else of one channel after the other.
///
/// Filters of `DynamicImage` are compiled with its crate, those of `imageops` where they are used.
pub fn filtered(image: Sample, filter: impl Fn(DynamicImage) -> DynamicImage) -> Sample {
    fn buffer<P: Pixel>(values: Vec<P::Subpixel>, image: (u32, u32)) -> ImageBuffer<P, Vec<P::Subpixel>> {
        ImageBuffer::from_raw(image.0, image.1, values).expect("a sample has as many values a pixel as channels")
    }
    fn by_channel<T: Copy, S>(values: &[T], n: usize, filter: impl Fn(Vec<T>) -> (S, Vec<T>)) -> (S, Vec<T>) {
        let plane = |c: usize| values.iter().skip(c).step_by(n).copied().collect();
        let (mut sizes, planes): (Vec<S>, Vec<Vec<T>>) = (0..n).map(|c| filter(plane(c))).unzip();
        (sizes.swap_remove(0), (0..n * planes[0].len()).map(|i| planes[i % n][i / n]).collect())
    }
    let (n, size) = (image.channels(), (image.width as u32, image.height as u32));
    let ((width, height), pixels): (_, Pixels) = match image.pixels {
        Pixels::U8(values) if n == 3 => {
            let made = filter(buffer::<Rgb<u8>>(values, size).into()).into_rgb8();
            (made.dimensions(), made.into_raw().into())
        }
        Pixels::U16(values) if n == 3 => {
            let made = filter(buffer::<Rgb<u16>>(values, size).into()).into_rgb16();
            (made.dimensions(), made.into_raw().into())
        }
        Pixels::U8(values) => {
            let (size, values) = by_channel(&values, n, |plane| {
                let made = filter(buffer::<Luma<u8>>(plane, size).into()).into_luma8();
                (made.dimensions(), made.into_raw())
            });
            (size, values.into())
        }
        Pixels::U16(values) => {
            let (size, values) = by_channel(&values, n, |plane| {
                let made = filter(buffer::<Luma<u16>>(plane, size).into()).into_luma16();
                (made.dimensions(), made.into_raw())
            });
            (size, values.into())
        }
    };
    Sample { width: width as usize, height: height as usize, pixels, ..Sample::default() }
}

/// An image brought to a size: its pixels alone. Means of what falls into a pixel, as probes are shown it.
pub fn resized(image: Sample, size: ImageSize) -> Sample {
    resized_by(image, size, FilterType::Triangle)
}

/// An image brought to a size by any filter: its pixels alone.
pub fn resized_by(image: Sample, size: ImageSize, filter: FilterType) -> Sample {
    match (image.width, image.height) == (size.width, size.height) {
        true => image,
        false => filtered(image, |image| image.resize_exact(size.width as u32, size.height as u32, filter)),
    }
}

/// A picture brought to a size.
pub fn rgb_resized(image: RgbImage, width: u32, height: u32, filter: FilterType) -> RgbImage {
    DynamicImage::from(image).resize_exact(width, height, filter).into_rgb8()
}

/// The same of a picture with opacity.
pub fn rgba_resized(image: RgbaImage, width: u32, height: u32, filter: FilterType) -> RgbaImage {
    DynamicImage::from(image).resize_exact(width, height, filter).into_rgba8()
}

/// An image of any channels, to be looked at: see [`Sample::rgb`].
pub fn rgb(image: &Sample) -> RgbImage {
    let (width, height) = (image.width as u32, image.height as u32);
    RgbImage::from_raw(width, height, image.rgb().into_owned()).expect("it has three bytes a pixel")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Channels that are those of an RGB image, and a fourth, are filtered as it is.
    #[test]
    fn every_number_of_channels_and_bits_is_filtered_alike() {
        let (width, height) = (12, 9);
        let value = |pixel: usize, c: usize| ((pixel * 7919 + c * 131) % 256) as u8;
        let all = |n: usize| (0..width * height).flat_map(move |i| (0..n).map(move |c| value(i, c)));
        let sample = |pixels: Pixels| Sample { width, height, pixels, ..Sample::default() };
        let wide = |n: usize| sample(all(n).map(|x| u16::from(x) * 257).collect());
        let size = ImageSize { width: 5, height: 6 };
        let rgb = resized(sample(all(3).collect()), size);
        assert_eq!((rgb.width, rgb.height, rgb.channels()), (5, 6, 3));
        for n in [1, 2, 4] {
            let made = resized(sample(all(n).collect()), size);
            assert_eq!((made.width, made.height, made.channels()), (5, 6, n));
            let close = |made: &Sample, n: usize, tolerance: f32| {
                for i in 0..30 {
                    for c in 0..n.min(3) {
                        let (a, b) = (made.pixels.get(i * n + c), rgb.pixels.get(i * 3 + c));
                        assert!((a - b).abs() <= tolerance, "{n} channels, channel {c} of pixel {i}: {a}, {b}");
                    }
                }
            };
            close(&made, n, 0.0);
            // Of 16 bits there is less to round.
            close(&resized(wide(n), size), n, 0.5 / 255.0 + 1e-4);
        }
    }

    #[test]
    fn normalised_values_are_shares_less_the_mean_in_deviations() {
        let (mean, std) = ([0.5, 0.25], [0.5, 0.125]);
        let of = |pixels: Pixels| Sample { width: 1, height: 2, pixels, ..Sample::default() };
        let made = normalized(&of(vec![0u8, 255, 51, 102].into()), (&mean, &std));
        assert_eq!(made, [-1.0, (51.0 / 255.0 - 0.5) / 0.5, 6.0, (102.0 / 255.0 - 0.25) / 0.125]);
        let made = normalized(&of(vec![0u16, 65535, 13107, 26214].into()), (&mean, &std));
        assert_eq!(made, [-1.0, (13107.0 / 65535.0 - 0.5) / 0.5, 6.0, (26214.0 / 65535.0 - 0.25) / 0.125]);
    }
}
