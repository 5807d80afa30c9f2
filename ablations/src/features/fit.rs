//! An image to whole patches, its shape kept.

use image::imageops::{crop_imm, resize, FilterType};
use image::RgbImage;

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
pub fn sides((width, height): (u32, u32), size: Size, patch: usize) -> Option<(usize, usize)> {
    let (width, height) = (width as usize, height as usize);
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
pub fn fit(image: &RgbImage, size: Size, patch: usize) -> Option<RgbImage> {
    let (w, h) = sides(image.dimensions(), size, patch)?;
    let (w, h) = (u32::try_from(w).ok()?, u32::try_from(h).ok()?);
    Some(match size {
        Size::Native => {
            let (left, top) = ((image.width() - w) / 2, (image.height() - h) / 2);
            crop_imm(image, left, top, w, h).to_image()
        }
        Size::Long(_) if (w, h) == image.dimensions() => image.clone(),
        Size::Long(_) => resize(image, w, h, FilterType::CatmullRom),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_native_image_loses_less_than_a_patch_and_no_pixel_changes() {
        let image = RgbImage::from_fn(37, 21, |x, y| image::Rgb([x as u8, y as u8, 0]));
        let fitted = fit(&image, Size::Native, 8).expect("it is larger than a patch");
        assert_eq!(fitted.dimensions(), (32, 16));
        assert_eq!(fitted.get_pixel(0, 0).0, [2, 2, 0], "the cut is even");
        assert!(fit(&image, Size::Native, 32).is_none());
    }

    #[test]
    fn a_resized_image_keeps_its_shape_to_half_a_patch() {
        for (size, long) in [((640, 427), 512), ((300, 1000), 224), ((97, 89), 640)] {
            let image = RgbImage::new(size.0, size.1);
            let fitted = fit(&image, Size::Long(long), 16).expect("it is resized");
            let (w, h) = (f64::from(fitted.width()), f64::from(fitted.height()));
            let scale = long as f64 / f64::from(size.0.max(size.1));
            assert!((w - f64::from(size.0) * scale).abs() <= 8.0 && (h - f64::from(size.1) * scale).abs() <= 8.0);
            assert!(fitted.width().is_multiple_of(16) && fitted.height().is_multiple_of(16));
        }
    }
}
