//! Scores of segmentation: classes of patches brought to pixels, and what they have in common with masks.

use std::sync::Arc;

use dinolab_core::contract::{Combine, Dataset, Grid, Parts, Score};

/// For each of `size` pixels: the two patches out of `n` whose centres are nearest, and the weight of the second
/// (bilinear, `align_corners = false`).
fn taps(size: usize, n: usize) -> Vec<(usize, usize, f32)> {
    let tap = |i: usize| {
        let at = ((i as f64 + 0.5) * n as f64 / size as f64 - 0.5).clamp(0.0, (n - 1) as f64);
        let first = at as usize;
        (first, (first + 1).min(n - 1), (at - first as f64) as f32)
    };
    (0..size).map(tap).collect()
}

/// Pixels of one image by class: right ones, those that the mask says, those that were answered; `3 * classes` numbers.
/// Logits `[P, classes]` of patches are resized bilinearly to the pixels of `mask`, and the greatest is the answer.
pub(crate) fn overlap(logits: &[f32], mask: &[u8], size: usize, grid: Grid, classes: usize) -> Vec<f64> {
    let (rows, columns) = (taps(size, grid.height), taps(size, grid.width));
    let mut counts = vec![0.0; 3 * classes];
    let at = |y: usize, x: usize| &logits[(y * grid.width + x) * classes..][..classes];
    for (i, &truth) in mask.iter().enumerate().filter(|(_, &class)| usize::from(class) < classes) {
        let ((y0, y1, v), (x0, x1, u)) = (rows[i / size], columns[i % size]);
        let corners = [
            (at(y0, x0), (1.0 - v) * (1.0 - u)),
            (at(y0, x1), (1.0 - v) * u),
            (at(y1, x0), v * (1.0 - u)),
            (at(y1, x1), v * u),
        ];
        let logit = |class: usize| corners.iter().map(|(l, weight)| l[class] * weight).sum::<f32>();
        let mut best = (0, logit(0));
        for class in 1..classes {
            let value = logit(class);
            if value > best.1 {
                best = (class, value);
            }
        }
        let truth = usize::from(truth);
        counts[truth] += f64::from(u8::from(truth == best.0));
        counts[classes + truth] += 1.0;
        counts[2 * classes + best.0] += 1.0;
    }
    counts
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
