//! Probe `linear_segmentation`: can the class of a pixel be read off the patch features?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Grid, Probe, ProbeContext, Score};
use dinolab_core::tensor::Tape;
use dinolab_core::{plugin, Error, Result, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::lbfgs::minimize;
use crate::probe_data::{class_counts, draw_two, features, Features};

/// Segmentation by a linear head on frozen patch features.
///
/// Multinomial logistic regression from standardised patch features to the shares of classes among a patch's pixels,
/// with an L2 penalty, is fitted to training images by L-BFGS. On test images its logits are resized bilinearly to pixels.
/// Scores: `miou`, intersection over union averaged over the classes that the test masks hold, and `accuracy`, the share
/// of right pixels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LinearSegmentation {
    /// Training images with masks.
    #[schemars(range(max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images with masks.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
    /// Steps of L-BFGS.
    #[schemars(range(min = 1, max = 100_000))]
    pub iterations: usize,
    /// Weight of half the squared norm of the head's weights.
    #[schemars(range(min = 0, max = 1000))]
    pub l2: f64,
}

impl Default for LinearSegmentation {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self { train_samples: number(256), test_samples: number(256), iterations: 40, l2: 1e-4 }
    }
}

impl LinearSegmentation {
    /// Weights `[C, D]` and bias `[C]` of the head that is fitted to `x` `[n, D]` and class shares `[n, C]`.
    fn fit(&self, x: &Tensor, shares: &Tensor) -> Result<(Tensor, Tensor)> {
        let (n, d, c) = (x.dim(0), x.dim(1), shares.dim(1));
        let rows = Tensor::from_slice(&(0..n as u32).collect::<Vec<_>>(), &[n])?;
        let weights = Tensor::full(&[n], x.dtype(), 1.0 / n as f64)?;
        let head = |flat: &[f64]| -> Result<(Tensor, Tensor)> {
            let (weight, bias) = flat.split_at(c * d);
            Ok((Tensor::from_f64(weight, &[c, d], x.dtype())?, Tensor::from_f64(bias, &[c], x.dtype())?))
        };
        let mut flat = vec![0.0; c * (d + 1)];
        minimize(&mut flat, self.iterations, |flat| -> Result<(f64, Vec<f64>)> {
            let tape = Tape::new();
            let (weight, bias) = head(flat)?;
            let (weight, bias) = (tape.leaf(&weight), tape.leaf(&bias));
            let logits = x.linear(&weight, Some(&bias))?;
            let loss = logits.soft_cross_entropy(shares, &rows, &rows, &weights, 1.0)?;
            let grads = tape.backward(&loss, 1.0, None)?;
            let gradient = [&weight, &bias].map(|p| grads.of(p).expect("the loss depends on the head").to_f64_vec());
            let mut gradient = gradient.concat();
            gradient[..c * d].iter_mut().zip(flat).for_each(|(g, w)| *g += self.l2 * w);
            let penalty = 0.5 * self.l2 * flat[..c * d].iter().map(|w| w * w).sum::<f64>();
            Ok((loss.item() + penalty, gradient))
        })?;
        head(&flat)
    }
}

/// Mean and inverse standard deviation of every feature, from the training patches.
struct Standardization {
    mean: Vec<f64>,
    scale: Vec<f64>,
}

impl Standardization {
    fn of(x: &[f32], d: usize) -> Self {
        let n = (x.len() / d) as f64;
        let average = |f: &dyn Fn(usize, f64) -> f64| {
            let mut sums = vec![0.0; d];
            x.chunks(d).for_each(|row| row.iter().enumerate().for_each(|(i, &x)| sums[i] += f(i, f64::from(x))));
            sums.into_iter().map(|s| s / n).collect::<Vec<f64>>()
        };
        let mean = average(&|_, x| x);
        let variance = average(&|i, x| (x - mean[i]).powi(2));
        // A feature that never changes says nothing; it stays near 0.
        Self { scale: variance.into_iter().map(|v| 1.0 / v.sqrt().max(1e-6)).collect(), mean }
    }

    /// Standardised patches `[N * P, D]` of features `[N, P, D]`.
    fn apply(&self, patches: &Tensor) -> Result<Tensor> {
        let d = patches.last_dim();
        let mut out = patches.to_owned().reshape(&[patches.len() / d, d])?;
        out.as_mut_slice::<f32>().par_chunks_mut(d).for_each(|row| {
            row.iter_mut().enumerate().for_each(|(i, x)| *x = ((f64::from(*x) - self.mean[i]) * self.scale[i]) as f32);
        });
        Ok(out)
    }
}

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

/// How often a pixel of class `t` was given class `p`: entry `t * C + p`.
fn confusion(logits: &[f32], mask: &[u8], size: usize, grid: Grid, classes: usize) -> Vec<u64> {
    let (rows, columns) = (taps(size, grid.height), taps(size, grid.width));
    let mut counts = vec![0; classes * classes];
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
        counts[usize::from(truth) * classes + best.0] += 1;
    }
    counts
}

impl Probe for LinearSegmentation {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let (size, classes) = (context.image_size, context.test.mask_classes());
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let (train, test) = (features(context, context.train, &train)?, features(context, context.test, &test)?);
        let masked = |f: &Features| f.truth.iter().any(|t| t.mask.is_some());
        if classes == 0 || !masked(&train) || !masked(&test) {
            let help = "use a dataset with pixel masks (`scenes`), or take the probe out";
            return Err(Error::user("probe `linear_segmentation`: images have no masks", help));
        }
        // An image without a mask, or a patch without a known class, has shares of 0 and so no part in the fit.
        let (p, d) = (train.grid.patches(), train.patches.last_dim());
        let shares: Vec<Vec<f32>> = train
            .truth
            .par_iter()
            .map(|truth| {
                let Some(mask) = &truth.mask else { return vec![0.0; p * classes] };
                let counts = class_counts(mask, size, train.grid, classes);
                let shares = counts.chunks(classes).flat_map(|patch| {
                    let total = patch.iter().sum::<u32>().max(1) as f32;
                    patch.iter().map(move |&n| n as f32 / total)
                });
                shares.collect()
            })
            .collect();
        let shares = Tensor::from_slice(&shares.concat(), &[train.truth.len() * p, classes])?;
        let standardization = Standardization::of(train.patches.as_slice(), d);
        let (weight, bias) = self.fit(&standardization.apply(&train.patches)?, &shares)?;
        let logits = standardization.apply(&test.patches)?.linear(&weight, Some(&bias))?;
        let images = logits.as_slice::<f32>().par_chunks(p * classes).zip(&test.truth);
        let counts = images
            .filter_map(|(logits, truth)| Some(confusion(logits, truth.mask.as_ref()?, size, test.grid, classes)))
            .reduce(|| vec![0; classes * classes], |a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect());
        Ok(scores(&counts, classes))
    }

    fn needs(&self) -> (bool, bool) {
        (false, true)
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

/// Mean intersection over union of the classes that occur, and the share of right pixels.
fn scores(counts: &[u64], classes: usize) -> Vec<Score> {
    let right = |class: usize| counts[class * classes + class];
    let truth = |class: usize| counts[class * classes..][..classes].iter().sum::<u64>();
    let given = |class: usize| counts.iter().skip(class).step_by(classes).sum::<u64>();
    let present: Vec<usize> = (0..classes).filter(|&c| truth(c) > 0).collect();
    let iou = |&c: &usize| right(c) as f64 / (truth(c) + given(c) - right(c)) as f64;
    let miou = present.iter().map(iou).sum::<f64>() / present.len().max(1) as f64;
    let accuracy = (0..classes).map(right).sum::<u64>() as f64 / counts.iter().sum::<u64>().max(1) as f64;
    vec![Score { name: "miou", value: miou }, Score { name: "accuracy", value: accuracy }]
}

plugin!(Probe, "linear_segmentation", LinearSegmentation);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn perfect_features_segment_perfectly() {
        let data = Halves { len: 90, width: 32, height: 32 };
        let scores = run(&LinearSegmentation::default(), &data, &data, &perfect);
        assert_eq!(scores.iter().map(|s| s.value).collect::<Vec<_>>(), [1.0, 1.0]);
    }

    #[test]
    fn random_features_give_no_more_than_the_commonest_class() {
        let data = Halves { len: 300, width: 32, height: 32 };
        let scores = run(&LinearSegmentation::default(), &data, &data, &random);
        // Background is half of all pixels, so answering it everywhere has accuracy 1/2 and mIoU 1/8.
        assert!(scores[0].value < 0.2 && (scores[1].value - 0.5).abs() < 0.05, "{scores:?}");
    }

    #[test]
    fn iou_counts_only_classes_that_occur() {
        // Class 0: 3 right, 1 given to class 1. Class 1: 4 right. Class 2 never occurs.
        let scores = scores(&[3, 1, 0, 0, 4, 0, 0, 0, 0], 3);
        assert!((scores[0].value - (3.0 / 4.0 + 4.0 / 5.0) / 2.0).abs() < 1e-15);
        assert!((scores[1].value - 7.0 / 8.0).abs() < 1e-15);
    }

    #[test]
    fn pixels_between_two_centres_weigh_both() {
        assert_eq!(taps(4, 2), [(0, 1, 0.0), (0, 1, 0.25), (0, 1, 0.75), (1, 1, 0.0)]);
    }
}
