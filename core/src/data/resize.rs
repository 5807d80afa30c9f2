//! Antialiased bicubic resizing (a = -0.5, Pillow's and torchvision's), by the crate `fast_image_resize`.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8x3, F32};
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use super::plan::Rect;

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
    let source = TypedImageRef::<U8x3>::from_buffer(width as u32, height as u32, rgb)
        .expect("the pipeline checked that the image has 3 bytes a pixel");
    let [x, y, w, h] = [area.x, area.y, area.width, area.height].map(|v| v as u32);
    let source = TypedCroppedImage::new(source, x, y, w, h).expect("a plan's box lies inside its image");
    let mut target = TypedImage::<U8x3>::from_buffer(side as u32, side as u32, out).expect("resized above");
    resizer.resize_typed(&source, &mut target, &bicubic()).expect("sizes and types were checked above");
}

/// Resizes one `from x from` plane into a `to x to` plane.
pub(super) fn resize_plane(resizer: &mut Resizer, plane: &[f32], from: usize, out: &mut [f32], to: usize) {
    let (from, to) = (from as u32, to as u32);
    let source = TypedImageRef::<F32>::from_buffer(from, from, bytemuck::cast_slice(plane)).expect("a square plane");
    let bytes = bytemuck::cast_slice_mut(out);
    let mut target = TypedImage::<F32>::from_buffer(to, to, bytes).expect("a square plane");
    resizer.resize_typed(&source, &mut target, &bicubic()).expect("sizes and types were checked above");
}
