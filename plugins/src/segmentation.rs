//! Scores of segmentation: classes of patches brought to pixels, and what they have in common with masks.

use std::sync::Arc;

use dinolab_core::contract::{Combine, Dataset, Grid, ImageSize, Parts, Picture, ProbeContext, Score};
use dinolab_core::{Error, Result};

use crate::pictures;

/// How numbers of patches are brought to pixels: bilinear, `align_corners = false`.
pub(crate) struct Upsample {
    rows: Vec<Tap>,
    columns: Vec<Tap>,
    grid: Grid,
}

/// The two patches whose centres are nearest, and the weight of the second.
type Tap = (usize, usize, f32);

impl Upsample {
    /// From the patches of an image to its pixels.
    pub(crate) fn new(size: ImageSize, grid: Grid) -> Self {
        Self { rows: taps(size.height, grid.height), columns: taps(size.width, grid.width), grid }
    }

    /// The patches that pixel `i` (row-major) lies between, and their weights.
    fn corners(&self, i: usize) -> [(usize, f32); 4] {
        let width = self.columns.len();
        let ((y0, y1, v), (x0, x1, u)) = (self.rows[i / width], self.columns[i % width]);
        let at = |y: usize, x: usize| y * self.grid.width + x;
        [
            (at(y0, x0), (1.0 - v) * (1.0 - u)),
            (at(y0, x1), (1.0 - v) * u),
            (at(y1, x0), v * (1.0 - u)),
            (at(y1, x1), v * u),
        ]
    }

    /// A number of patches at pixel `i`.
    pub(crate) fn at(&self, i: usize, of_patch: impl Fn(usize) -> f32) -> f32 {
        self.corners(i).into_iter().map(|(patch, weight)| of_patch(patch) * weight).sum()
    }

    /// Logits `[P, classes]` of patches at pixel `i`, added to `out`.
    pub(crate) fn add(&self, i: usize, logits: &[f32], out: &mut [f32]) {
        let classes = out.len();
        let of_patch = |(patch, weight): (usize, f32)| (&logits[patch * classes..][..classes], weight);
        let [(a, wa), (b, wb), (c, wc), (d, wd)] = self.corners(i).map(of_patch);
        for k in 0..classes {
            out[k] += a[k] * wa + b[k] * wb + c[k] * wc + d[k] * wd;
        }
    }
}

fn taps(size: usize, n: usize) -> Vec<Tap> {
    let tap = |i: usize| {
        let at = ((i as f64 + 0.5) * n as f64 / size as f64 - 0.5).clamp(0.0, (n - 1) as f64);
        let first = at as usize;
        (first, (first + 1).min(n - 1), (at - first as f64) as f32)
    };
    (0..size).map(tap).collect()
}

/// The class of every pixel: logits `[P, classes]` of patches are resized to pixels, and the greatest is the answer.
pub(crate) fn answers(logits: &[f32], size: ImageSize, grid: Grid, classes: usize) -> Vec<u8> {
    let up = Upsample::new(size, grid);
    let mut of_pixel = vec![0.0; classes];
    let answer = |i: usize| {
        of_pixel.fill(0.0);
        up.add(i, logits, &mut of_pixel);
        greatest(&of_pixel)
    };
    (0..size.pixels()).map(answer).collect()
}

/// The class with the greatest logit, the least of equals.
pub(crate) fn greatest(logits: &[f32]) -> u8 {
    let greater = |best: usize, class: usize| if logits[class] > logits[best] { class } else { best };
    (1..logits.len()).fold(0, greater) as u8
}

/// Pixels of one image by class: right ones, those that the mask says, those that were answered; `3 * classes` numbers.
pub(crate) fn overlap(answers: &[u8], mask: &[u8], classes: usize) -> Vec<f64> {
    let mut counts = vec![0.0; 3 * classes];
    for (&answer, &truth) in answers.iter().zip(mask).filter(|(_, &class)| usize::from(class) < classes) {
        let (answer, truth) = (usize::from(answer), usize::from(truth));
        counts[truth] += f64::from(u8::from(truth == answer));
        counts[classes + truth] += 1.0;
        counts[2 * classes + answer] += 1.0;
    }
    counts
}

/// What two probes say of data without masks.
pub(crate) fn no_masks(probe: &str) -> Error {
    let help = "use a dataset with pixel masks (`scenes`, or `image_folder` with `masks`), or take the probe out";
    Error::user(format!("probe `{probe}`: images have no masks"), help)
}

/// Shows test images with their masks and the answers.
///
/// # Errors
/// If an image cannot be read again.
pub(crate) fn show(context: &ProbeContext<'_>, index: usize, mask: &[u8], answers: &[u8]) -> Result<()> {
    let Some(show) = context.show else { return Ok(()) };
    let width = context.image_size.width;
    show(Picture {
        caption: context.test.describe(index),
        panels: vec![
            pictures::panel("image", pictures::image(context.test, index, context.image_size)?),
            pictures::classes("mask", mask, width),
            pictures::classes("predicted", answers, width),
        ],
    });
    Ok(())
}

/// Intersection over union of a class; `None` if no mask has it.
fn iou(counts: &[f64], class: usize) -> Option<f64> {
    let classes = counts.len() / 3;
    let [right, truth, given] = [0, 1, 2].map(|part| counts[part * classes + class]);
    (truth > 0.0).then(|| right / (truth + given - right))
}

/// `miou`, the mean over the classes that masks have; `accuracy`, the share of right pixels; and in detail the `iou` of every
/// class. `images` are those of [`overlap`].
pub(crate) fn scores(images: Vec<Vec<f64>>, data: &dyn Dataset) -> Vec<Score> {
    let images: Arc<[Vec<f64>]> = images.into();
    let of = |score: Combine| Parts { images: images.clone(), score };
    let miou = |counts: &[f64]| {
        let all: Vec<f64> = (0..counts.len() / 3).filter_map(|class| iou(counts, class)).collect();
        all.iter().sum::<f64>() / all.len() as f64
    };
    let accuracy = |counts: &[f64]| {
        let sum = |part: usize| counts[part * counts.len() / 3..][..counts.len() / 3].iter().sum::<f64>();
        sum(0) / sum(1)
    };
    let names = data.mask_class_names();
    let detail = |class: usize| {
        let name = names.get(class).cloned().unwrap_or_else(|| class.to_string());
        let iou = of(Arc::new(move |counts| iou(counts, class).unwrap_or(f64::NAN)));
        Score::of(format!("iou/{name}"), iou).as_detail()
    };
    let whole = [Score::of("miou", of(Arc::new(miou))), Score::of("accuracy", of(Arc::new(accuracy)))];
    let classes = (0..data.mask_classes()).map(detail).filter(|score| score.value.is_finite());
    whole.into_iter().chain(classes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::Halves;

    #[test]
    fn iou_counts_only_classes_that_occur() {
        // Class 0: 3 right, 1 answered as class 1. Class 1: 4 right. Classes 2 and 3 never occur.
        let image = vec![3.0, 4.0, 0.0, 0.0, 4.0, 4.0, 0.0, 0.0, 3.0, 5.0, 0.0, 0.0];
        let scores = scores(vec![image], &Halves { len: 1, width: 2, height: 2 });
        let value = |name: &str| scores.iter().find(|s| s.name == name).map(|s| s.value);
        assert!((value("miou").unwrap() - (3.0 / 4.0 + 4.0 / 5.0) / 2.0).abs() < 1e-15);
        assert!((value("accuracy").unwrap() - 7.0 / 8.0).abs() < 1e-15);
        assert_eq!((value("iou/1"), value("iou/2")), (Some(0.8), None));
    }

    #[test]
    fn pixels_between_two_centres_weigh_both() {
        assert_eq!(taps(4, 2), [(0, 1, 0.0), (0, 1, 0.25), (0, 1, 0.75), (1, 1, 0.0)]);
    }
}
