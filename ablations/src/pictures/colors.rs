//! Values to colours, colours to images, images to pages.

use base64::Engine;
use dinolab_plugins::pixels::rgb_resized;
use image::codecs::png::PngEncoder;
use image::imageops::FilterType;
use image::RgbImage;

/// Ten colours along viridis (Smith & van der Walt 2015): even in brightness and readable with any colour vision.
const VIRIDIS: [[u8; 3]; 10] = [
    [0x44, 0x01, 0x54],
    [0x48, 0x28, 0x78],
    [0x3e, 0x49, 0x89],
    [0x31, 0x68, 0x8e],
    [0x26, 0x82, 0x8e],
    [0x1f, 0x9e, 0x89],
    [0x35, 0xb7, 0x79],
    [0x6e, 0xce, 0x58],
    [0xb5, 0xde, 0x2b],
    [0xfd, 0xe7, 0x25],
];

/// The colour of a value in [0, 1]; values outside are drawn as the end they are beyond.
pub fn viridis(value: f64) -> [u8; 3] {
    let at = value.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let low = (at as usize).min(VIRIDIS.len() - 2);
    let mix = |c: usize| {
        let (a, b) = (f64::from(VIRIDIS[low][c]), f64::from(VIRIDIS[low + 1][c]));
        (a + (b - a) * (at - low as f64)).round() as u8
    };
    [mix(0), mix(1), mix(2)]
}

/// A picture with one pixel a patch, `width` patches a row.
pub fn map(width: usize, colors: impl IntoIterator<Item = [u8; 3]>) -> RgbImage {
    let bytes: Vec<u8> = colors.into_iter().flatten().collect();
    let height = bytes.len() / (3 * width);
    RgbImage::from_raw(width as u32, height as u32, bytes).expect("one pixel a patch")
}

/// A map at the size of the image that it belongs to, every patch a square of one colour.
pub fn scaled(map: &RgbImage, (width, height): (u32, u32)) -> RgbImage {
    rgb_resized(map.clone(), width, height, FilterType::Nearest)
}

/// A PNG file's content.
pub fn png(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    image.write_with_encoder(PngEncoder::new(&mut bytes)).expect("encoding a PNG into memory cannot fail");
    bytes
}

/// A PNG inside a page.
pub fn data_uri(image: &RgbImage) -> String {
    format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(png(image)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn viridis_ends_where_the_published_map_ends() {
        assert_eq!((viridis(-1.0), viridis(0.0)), ([0x44, 0x01, 0x54], [0x44, 0x01, 0x54]));
        assert_eq!((viridis(1.0), viridis(2.0)), ([0xfd, 0xe7, 0x25], [0xfd, 0xe7, 0x25]));
    }

    #[test]
    fn a_scaled_map_has_no_colour_that_was_not_computed() {
        let colors = [[10, 20, 30], [200, 100, 0]];
        let picture = scaled(&map(2, colors), (32, 16));
        assert!(picture.enumerate_pixels().all(|(x, _, p)| p.0 == colors[(x / 16) as usize]));
    }
}
