//! Images of any number of channels, of 8 or 16 bits: cut, brought to a size, normalised, shown.

use dinolab_core::contract::{ImageSize, Pixels, Sample};
use image::imageops::{resize, FilterType};
use image::{ImageBuffer, Luma, Pixel, Primitive, Rgb, RgbImage};

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
    let value = |c: usize, i: usize| (image.pixels.get(i * n + c) - mean[c]) / std[c];
    (0..n).flat_map(|c| (0..image.width * image.height).map(move |i| value(c, i))).collect()
}

/// What is done to an image of any kind of pixel.
pub trait Filter {
    /// Of pixels of one channel or of three.
    fn apply<P: Pixel<Subpixel: 'static> + 'static>(
        &self,
        image: &ImageBuffer<P, Vec<P::Subpixel>>,
    ) -> ImageBuffer<P, Vec<P::Subpixel>>;
}

/// A filter of a whole image: of RGB at once, else of one channel after the other.
pub fn filtered(image: Sample, filter: &impl Filter) -> Sample {
    fn values<T: Primitive + 'static>(
        values: Vec<T>,
        channels: usize,
        (width, height): (u32, u32),
        filter: &impl Filter,
    ) -> (Vec<T>, (u32, u32))
    where
        Rgb<T>: Pixel<Subpixel = T>,
        Luma<T>: Pixel<Subpixel = T>,
    {
        const WHOLE: &str = "a sample has as many values a pixel as channels";
        if channels == 3 {
            let made = filter.apply(&ImageBuffer::<Rgb<T>, _>::from_raw(width, height, values).expect(WHOLE));
            let size = made.dimensions();
            return (made.into_raw(), size);
        }
        let of_channel = |c: usize| {
            let plane: Vec<T> = values.iter().skip(c).step_by(channels).copied().collect();
            filter.apply(&ImageBuffer::<Luma<T>, _>::from_raw(width, height, plane).expect(WHOLE))
        };
        let planes: Vec<ImageBuffer<Luma<T>, Vec<T>>> = (0..channels).map(of_channel).collect();
        let size = planes[0].dimensions();
        let count = (size.0 * size.1) as usize;
        ((0..count * channels).map(|i| planes[i % channels].as_raw()[i / channels]).collect(), size)
    }
    let (n, size) = (image.channels(), (image.width as u32, image.height as u32));
    let (pixels, (width, height)): (Pixels, _) = match image.pixels {
        Pixels::U8(of) => {
            let (made, size) = values(of, n, size, filter);
            (made.into(), size)
        }
        Pixels::U16(of) => {
            let (made, size) = values(of, n, size, filter);
            (made.into(), size)
        }
    };
    Sample { width: width as usize, height: height as usize, pixels, ..Sample::default() }
}

/// Brings an image to a size.
struct Resize(ImageSize, FilterType);

impl Filter for Resize {
    fn apply<P: Pixel<Subpixel: 'static> + 'static>(
        &self,
        image: &ImageBuffer<P, Vec<P::Subpixel>>,
    ) -> ImageBuffer<P, Vec<P::Subpixel>> {
        resize(image, self.0.width as u32, self.0.height as u32, self.1)
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
        false => filtered(image, &Resize(size, filter)),
    }
}

/// An image of any channels, to be looked at: see [`Sample::rgb`].
pub fn rgb(image: &Sample) -> RgbImage {
    let (width, height) = (image.width as u32, image.height as u32);
    RgbImage::from_raw(width, height, image.rgb().into_owned()).expect("it has three bytes a pixel")
}
