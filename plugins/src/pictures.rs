//! Pictures that probes show of what their scores are made of.

use dinolab_core::contract::{Dataset, ImageSize, Panel, Picture, ProbeContext};
use dinolab_core::Result;
use image::RgbImage;

use crate::pixels::{resized, rgb};
use crate::probe_data::{middle, Features};

/// Pictures of a probe at a size.
pub(crate) const MOST: usize = 6;

/// A sample as the model was shown it.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn image(dataset: &dyn Dataset, index: usize, size: ImageSize) -> Result<RgbImage> {
    Ok(rgb(&resized(middle(dataset.get_image(index)?, size), size)))
}

/// Training images beside a test image.
const NEIGHBOURS: usize = 5;

/// Shows test images beside the training images that are most similar to them: `similarities` are `[test, train]`.
///
/// # Errors
/// If an image cannot be read again.
pub(crate) fn neighbours(
    context: &ProbeContext<'_>,
    (train, test): (&Features, &Features),
    similarities: &[f32],
) -> Result<()> {
    let Some(show) = context.show else { return Ok(()) };
    let names = context.test.class_names();
    let name = |label: Option<u32>| match label {
        Some(label) => names.get(label as usize).cloned().unwrap_or_else(|| format!("class {label}")),
        None => "no label".into(),
    };
    let size = context.image_size;
    for (row, i) in similarities.chunks(train.truth.len()).zip(0..test.truth.len()).take(MOST) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let (index, label) = (test.sources[i].0, test.truth[i].label);
        let mut panels = vec![panel(format!("test: {}", name(label)), image(context.test, index, size)?)];
        for &other in order.iter().take(NEIGHBOURS) {
            let text = format!("{:.3}: {}", row[other], name(train.truth[other].label));
            panels.push(panel(text, image(context.train, train.sources[other].0, size)?));
        }
        show(Picture { caption: context.test.describe(index), panels });
    }
    Ok(())
}

/// A panel of an image.
pub(crate) fn panel(label: impl Into<String>, image: RgbImage) -> Panel {
    Panel { label: label.into(), width: image.width() as usize, rgb: image.into_raw() }
}

/// A colour that is its own for every class: hues by the golden angle, background black, and what counts nowhere white.
fn color(class: u8) -> [u8; 3] {
    match class {
        0 => [0; 3],
        255 => [255; 3],
        class => hue(f64::from(class) * 0.618_034),
    }
}

fn hue(hue: f64) -> [u8; 3] {
    [5.0, 3.0, 1.0].map(|offset| {
        let k: f64 = (offset + hue.rem_euclid(1.0) * 6.0) % 6.0;
        (255.0 * (0.95 - 0.75 * k.min(4.0 - k).clamp(0.0, 1.0))) as u8
    })
}

/// Classes of pixels as colours.
pub(crate) fn classes(label: &str, classes: &[u8], width: usize) -> Panel {
    Panel { label: label.into(), width, rgb: classes.iter().flat_map(|&class| color(class)).collect() }
}

/// Depth as brightness, near ones bright, over a range; black where it is not known.
pub(crate) fn depth(label: &str, depth: &[f32], width: usize, [near, far]: [f32; 2]) -> Panel {
    let grey = |&d: &f32| {
        let share = (d - near) / (far - near).max(f32::MIN_POSITIVE);
        if d > 0.0 {
            (255.0 - 215.0 * share.clamp(0.0, 1.0)) as u8
        } else {
            0
        }
    };
    Panel { label: label.into(), width, rgb: depth.iter().flat_map(|d| [grey(d); 3]).collect() }
}

/// Points as small squares, each of a colour of its own.
pub(crate) fn points(mut image: RgbImage, places: &[(f64, f64)]) -> RgbImage {
    let (width, height) = image.dimensions();
    let reach = i64::from((width.min(height) / 48).max(1));
    for (i, (x, y)) in places.iter().enumerate() {
        let (x, y) = ((x * f64::from(width)) as i64, (y * f64::from(height)) as i64);
        for (dx, dy) in (-reach..=reach).flat_map(|dy| (-reach..=reach).map(move |dx| (dx, dy))) {
            let (x, y) = (x + dx, y + dy);
            if (0..i64::from(width)).contains(&x) && (0..i64::from(height)).contains(&y) {
                image.put_pixel(x as u32, y as u32, image::Rgb(hue(i as f64 * 0.618_034)));
            }
        }
    }
    image
}
