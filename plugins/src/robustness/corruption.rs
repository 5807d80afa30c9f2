//! Corruptions of images, in five strengths.

use std::io::Cursor;

use dinolab_core::contract::{ImageSize, Pixels, Sample};
use dinolab_core::rng::{Rng, Stream};
use image::codecs::jpeg::JpegEncoder;
use image::imageops::blur;
use image::{DynamicImage, ImageFormat, RgbImage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pixels::{filtered, resized, rgb};

/// How many strengths a corruption has.
pub const STRENGTHS: usize = 5;
/// Shorter side in pixels of the images that lengths are of.
const SIDE: f32 = 224.0;

const NOISE: [f64; STRENGTHS] = [0.08, 0.12, 0.18, 0.26, 0.38];
const BLUR: [f32; STRENGTHS] = [1.0, 2.0, 3.0, 4.0, 6.0];
const CONTRAST: [f64; STRENGTHS] = [0.4, 0.3, 0.2, 0.1, 0.05];
const QUALITY: [u8; STRENGTHS] = [25, 18, 15, 10, 7];
const SCALE: [f64; STRENGTHS] = [0.6, 0.5, 0.4, 0.3, 0.25];

/// What is done to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Corruption {
    /// Gaussian noise on every value.
    Noise,
    /// A Gaussian blur.
    Blur,
    /// Less contrast.
    Contrast,
    /// Strong JPEG compression.
    Jpeg,
    /// Made smaller, and as large again.
    Scale,
}

impl Corruption {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Noise, Self::Blur, Self::Contrast, Self::Jpeg, Self::Scale];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Noise => "noise",
            Self::Blur => "blur",
            Self::Contrast => "contrast",
            Self::Jpeg => "jpeg",
            Self::Scale => "scale",
        }
    }

    /// Whether it is of RGB alone.
    pub fn needs_rgb(self) -> bool {
        self == Self::Jpeg
    }

    /// An image brought to `size` and corrupted, with a strength of 1 to 5. Noise is a function of seed, strength and the
    /// image's number. JPEG is of 8-bit RGB.
    pub fn apply(self, image: Sample, size: ImageSize, strength: usize, seed: u64, index: usize) -> Sample {
        let image = resized(image, size);
        let at = strength - 1;
        match self {
            Self::Noise => {
                let mut rng = Rng::new(seed, Stream::Probe, 2 + strength as u64, index as u64);
                changed(image, |top, _, x| x + top * NOISE[at] * rng.normal())
            }
            Self::Blur => {
                let sigma = BLUR[at] * size.width.min(size.height) as f32 / SIDE;
                filtered(image, |image| blurred(image, sigma))
            }
            Self::Contrast => {
                let n = image.channels();
                let mean = means(&image);
                changed(image, |_, i, x| mean[i % n] + CONTRAST[at] * (x - mean[i % n]))
            }
            Self::Jpeg => {
                let mut bytes = Cursor::new(Vec::new());
                let encoded = JpegEncoder::new_with_quality(&mut bytes, QUALITY[at]).encode_image(&rgb(&image));
                encoded.expect("an image in memory can be encoded");
                let decoded = image::load_from_memory_with_format(bytes.get_ref(), ImageFormat::Jpeg);
                let decoded: RgbImage = decoded.expect("it was just encoded").into_rgb8();
                Sample { pixels: decoded.into_raw().into(), ..image }
            }
            Self::Scale => {
                let small = |side: usize| ((side as f64 * SCALE[at]).round() as usize).max(1);
                resized(resized(image, ImageSize { width: small(size.width), height: small(size.height) }), size)
            }
        }
    }
}

/// A Gaussian blur of this standard deviation in pixels, computed in f32: that of `DynamicImage` is not.
fn blurred(image: DynamicImage, sigma: f32) -> DynamicImage {
    match image {
        DynamicImage::ImageLuma8(image) => blur(&image, sigma).into(),
        DynamicImage::ImageLuma16(image) => blur(&image, sigma).into(),
        DynamicImage::ImageRgb16(image) => blur(&image, sigma).into(),
        image => blur(&image.into_rgb8(), sigma).into(),
    }
}

/// The mean of every channel.
fn means(image: &Sample) -> Vec<f64> {
    let (n, pixels) = (image.channels(), (image.width * image.height) as f64);
    let mut means = vec![0.0; n];
    let mut add = |(i, x): (usize, f64)| means[i % n] += x / pixels;
    match &image.pixels {
        Pixels::U8(values) => values.iter().map(|&x| x.into()).enumerate().for_each(&mut add),
        Pixels::U16(values) => values.iter().map(|&x| x.into()).enumerate().for_each(&mut add),
    }
    means
}

/// `f` of the greatest value, of the place of a value and of the value itself, of all values; rounded.
fn changed(mut image: Sample, mut f: impl FnMut(f64, usize, f64) -> f64) -> Sample {
    let mut value = |top: f64, i: usize, x: f64| f(top, i, x).round().clamp(0.0, top);
    match &mut image.pixels {
        Pixels::U8(values) => {
            values.iter_mut().enumerate().for_each(|(i, x)| *x = value(255.0, i, f64::from(*x)) as u8)
        }
        Pixels::U16(values) => {
            values.iter_mut().enumerate().for_each(|(i, x)| *x = value(65535.0, i, f64::from(*x)) as u16)
        }
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waves that become finer to the right, and a slope: whatever is lost first is there.
    fn picture() -> Sample {
        let wave = |x: u32| (120.0 + 100.0 * (f64::from(x * x) / 300.0).sin()) as u8;
        let image = RgbImage::from_fn(224, 224, |x, y| image::Rgb([wave(x), (y / 2 + 60) as u8, 90]));
        Sample { width: 224, height: 224, pixels: image.into_raw().into(), ..Sample::default() }
    }

    fn distance(a: &Sample, b: &Sample) -> f64 {
        let (a, b) = (a.rgb(), b.rgb());
        a.iter().zip(b.iter()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn every_corruption_is_worse_the_stronger_it_is_and_the_same_every_time() {
        for corruption in Corruption::ALL {
            let made = |strength| corruption.apply(picture(), ImageSize::square(224), strength, 5, 7);
            let distances: Vec<f64> = (1..=STRENGTHS).map(|s| distance(&made(s), &picture())).collect();
            assert!(distances[0] > 0.0 && distances.windows(2).all(|d| d[0] < d[1]), "{corruption:?}: {distances:?}");
            assert_eq!(made(3), made(3));
            assert_eq!(serde_json::to_value(corruption).unwrap(), corruption.name());
        }
    }

    #[test]
    fn noise_has_the_deviation_that_is_said_and_is_another_for_every_image() {
        let grey = Sample { width: 64, height: 64, pixels: vec![128u8; 3 * 64 * 64].into(), ..Sample::default() };
        let noisy = |index| Corruption::Noise.apply(grey.clone(), ImageSize::square(64), 1, 0, index);
        let deviation = distance(&noisy(0), &grey) / (3.0f64 * 64.0 * 64.0).sqrt() / 255.0;
        assert!((deviation - 0.08).abs() < 0.002, "{deviation}");
        assert_ne!(noisy(0), noisy(1));
    }
}
