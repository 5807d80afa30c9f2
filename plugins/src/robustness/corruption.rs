//! Corruptions of images, in five strengths.

use std::io::Cursor;

use dinolab_core::contract::ImageSize;
use dinolab_core::rng::{Rng, Stream};
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{blur, resize, FilterType};
use image::{ImageFormat, RgbImage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::probe_data::resized;

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

    /// An image brought to `size` and corrupted, with a strength of 1 to 5. Noise is a function of seed, strength and the
    /// image's number.
    pub fn apply(self, image: RgbImage, size: ImageSize, strength: usize, seed: u64, index: usize) -> RgbImage {
        let mut image = resized(image, size);
        let (width, height) = (size.width as u32, size.height as u32);
        let at = strength - 1;
        match self {
            Self::Noise => {
                let mut rng = Rng::new(seed, Stream::Probe, 2 + strength as u64, index as u64);
                image.iter_mut().for_each(|x| *x = byte(f64::from(*x) + 255.0 * NOISE[at] * rng.normal()));
                image
            }
            Self::Blur => blur(&image, BLUR[at] * size.width.min(size.height) as f32 / SIDE),
            Self::Contrast => {
                let pixels = f64::from(image.width() * image.height());
                let mut mean = [0.0; 3];
                image.pixels().for_each(|p| (0..3).for_each(|c| mean[c] += f64::from(p.0[c]) / pixels));
                for pixel in image.pixels_mut() {
                    (0..3).for_each(|c| pixel.0[c] = byte(mean[c] + CONTRAST[at] * (f64::from(pixel.0[c]) - mean[c])));
                }
                image
            }
            Self::Jpeg => {
                let mut bytes = Cursor::new(Vec::new());
                let encoded = JpegEncoder::new_with_quality(&mut bytes, QUALITY[at]).encode_image(&image);
                encoded.expect("an image in memory can be encoded");
                let decoded = image::load_from_memory_with_format(bytes.get_ref(), ImageFormat::Jpeg);
                decoded.expect("it was just encoded").into_rgb8()
            }
            Self::Scale => {
                let small = |side: u32| ((f64::from(side) * SCALE[at]).round() as u32).max(1);
                let small = resize(&image, small(width), small(height), FilterType::Triangle);
                resize(&small, width, height, FilterType::Triangle)
            }
        }
    }
}

fn byte(x: f64) -> u8 {
    x.round().clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waves that become finer to the right, and a slope: whatever is lost first is there.
    fn picture() -> RgbImage {
        let wave = |x: u32| (120.0 + 100.0 * (f64::from(x * x) / 300.0).sin()) as u8;
        RgbImage::from_fn(224, 224, |x, y| image::Rgb([wave(x), (y / 2 + 60) as u8, 90]))
    }

    fn distance(a: &RgbImage, b: &RgbImage) -> f64 {
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
        let grey = RgbImage::from_pixel(64, 64, image::Rgb([128; 3]));
        let noisy = |index| Corruption::Noise.apply(grey.clone(), ImageSize::square(64), 1, 0, index);
        let deviation = distance(&noisy(0), &grey) / (3.0f64 * 64.0 * 64.0).sqrt() / 255.0;
        assert!((deviation - 0.08).abs() < 0.002, "{deviation}");
        assert_ne!(noisy(0), noisy(1));
    }
}
