//! Images of any number of channels, of 8 or 16 bits: cut, brought to a size, normalised, shown.

use dinolab_core::contract::{ImageSize, Pixels, Sample};
use image::imageops::FilterType;
use image::{DynamicImage, ImageBuffer, RgbImage, RgbaImage};

/// The part of an image of this size whose left and top are given: its pixels alone.
pub fn cropped(image: &Sample, [left, top]: [usize; 2], size: ImageSize) -> Sample {
    fn rows<T: Copy>(values: &[T], row: usize, [left, width]: [usize; 2], [top, height]: [usize; 2]) -> Vec<T> {
        let rows = values.chunks_exact(row).skip(top).take(height);
        rows.flat_map(|row| &row[left..left + width]).copied().collect()
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
    let n = image.channels();
    let mut planes = Vec::with_capacity(image.pixels.len());
    for c in 0..n {
        let value = |i: usize| (image.pixels.get(i * n + c) - mean[c]) / std[c];
        planes.extend((0..image.width * image.height).map(value));
    }
    planes
}

/// A filter of a whole image: of RGB at once, else of one channel after the other.
pub fn filtered(image: Sample, filter: impl Fn(DynamicImage) -> DynamicImage) -> Sample {
    let (n, size) = (image.channels(), [image.width as u32, image.height as u32]);
    let apply = |pixels: Pixels, channels: usize| {
        let made = filter(dynamic(pixels, channels, size));
        ((made.width() as usize, made.height() as usize), raw(made))
    };
    if n == 3 {
        let ((width, height), pixels) = apply(image.pixels, n);
        return Sample { width, height, pixels, ..Sample::default() };
    }
    let of_channel = |c: usize| match &image.pixels {
        Pixels::U8(values) => values.iter().skip(c).step_by(n).copied().collect(),
        Pixels::U16(values) => values.iter().skip(c).step_by(n).copied().collect(),
    };
    let (sizes, planes): (Vec<_>, Vec<Pixels>) = (0..n).map(|c| apply(of_channel(c), 1)).unzip();
    let (width, height) = sizes[0];
    let all = 0..n * width * height;
    let pixels = match image.pixels {
        Pixels::U8(_) => all.map(|i| planes[i % n].get(i / n) as u8).collect(),
        Pixels::U16(_) => all.map(|i| planes[i % n].get(i / n) as u16).collect(),
    };
    Sample { width, height, pixels, ..Sample::default() }
}

/// Grey or RGB as the image crate has it. The filters of its `DynamicImage` are compiled with it, those of `imageops` where they
/// are used.
fn dynamic(pixels: Pixels, channels: usize, [width, height]: [u32; 2]) -> DynamicImage {
    let image = match (pixels, channels) {
        (Pixels::U8(values), 3) => ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageRgb8),
        (Pixels::U8(values), _) => ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageLuma8),
        (Pixels::U16(values), 3) => ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageRgb16),
        (Pixels::U16(values), _) => ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageLuma16),
    };
    image.expect("a sample has as many values a pixel as channels")
}

/// The values of what [`dynamic`] made.
fn raw(image: DynamicImage) -> Pixels {
    match image {
        DynamicImage::ImageLuma8(image) => image.into_raw().into(),
        DynamicImage::ImageLuma16(image) => image.into_raw().into(),
        DynamicImage::ImageRgb16(image) => image.into_raw().into(),
        image => image.into_rgb8().into_raw().into(),
    }
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
