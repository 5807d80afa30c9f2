//! An image to whole patches, its shape kept.

use dinolab_core::contract::{ImageSize, Sample};
use dinolab_plugins::pixels::{cropped, resized_by};
use image::imageops::FilterType;

/// How large an image is shown to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As it is: what does not fill a patch is cut off, evenly on both sides.
    Native,
    /// Resized so that its longer side has about this many pixels. Each side becomes the nearest whole number of patches,
    /// which changes the shape by less than half a patch.
    Long(usize),
}

/// The sides that an image of `width` and `height` gets: whole numbers of patches; `None` if it is smaller than a patch.
pub fn sides((width, height): (usize, usize), size: Size, patch: usize) -> Option<(usize, usize)> {
    let sides = match size {
        Size::Native => (width / patch * patch, height / patch * patch),
        Size::Long(long) => {
            let scale = long as f64 / width.max(height) as f64;
            let side = |n: usize| ((n as f64 * scale / patch as f64).round() as usize).max(1).saturating_mul(patch);
            (side(width), side(height))
        }
    };
    (sides.0 > 0 && sides.1 > 0).then_some(sides)
}

/// The image with sides that are whole numbers of patches; `None` if it is smaller than a patch.
pub fn fit(image: &Sample, size: Size, patch: usize) -> Option<Sample> {
    let (width, height) = sides((image.width, image.height), size, patch)?;
    u32::try_from(width.max(height)).ok()?;
    let sides = ImageSize { width, height };
    Some(match size {
        Size::Native => cropped(image, [(image.width - width) / 2, (image.height - height) / 2], sides),
        Size::Long(_) => resized_by(image.clone(), sides, FilterType::CatmullRom),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_native_image_loses_less_than_a_patch_and_no_pixel_changes() {
        let pixels = (0..37 * 21).flat_map(|i| [i % 37, i / 37, 0].map(|x| x as u8)).collect::<Vec<u8>>().into();
        let image = Sample { width: 37, height: 21, pixels, ..Sample::default() };
        let fitted = fit(&image, Size::Native, 8).expect("it is larger than a patch");
        assert_eq!((fitted.width, fitted.height), (32, 16));
        assert_eq!(fitted.rgb()[..3], [2, 2, 0], "the cut is even");
        assert!(fit(&image, Size::Native, 32).is_none());
    }

    #[test]
    fn a_resized_image_keeps_its_shape_to_half_a_patch() {
        for (size, long) in [((640, 427), 512), ((300, 1000), 224), ((97, 89), 640)] {
            let pixels = vec![0u8; 3 * size.0 * size.1].into();
            let image = Sample { width: size.0, height: size.1, pixels, ..Sample::default() };
            let fitted = fit(&image, Size::Long(long), 16).expect("it is resized");
            let (w, h) = (fitted.width as f64, fitted.height as f64);
            let scale = long as f64 / size.0.max(size.1) as f64;
            assert!((w - size.0 as f64 * scale).abs() <= 8.0 && (h - size.1 as f64 * scale).abs() <= 8.0);
            assert!(fitted.width.is_multiple_of(16) && fitted.height.is_multiple_of(16));
        }
    }
}
