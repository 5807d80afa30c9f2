//! Probe `linear_segmentation`: can the class of a pixel be read off the patch features?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Annotation, ImageSize, Probe, ProbeContext, Score};
use dinolab_core::{plugin, DType, Result, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::linear_head::{Head, Standardization};
use crate::pictures;
use crate::probe_data::{class_shares, draw_two, Features, Look};
use crate::segmentation::{answers, greatest, no_masks, overlap, scores, show, Upsample};
use crate::windows::Windows;

/// Segmentation by a linear head on frozen patch features.
///
/// Multinomial logistic regression from standardised patch features to the shares of classes among a patch's pixels,
/// with an L2 penalty, is fitted to training images by L-BFGS. On test images its logits are resized bilinearly to pixels.
/// Scores: `miou`, intersection over union averaged over the classes that the test masks hold, and `accuracy`, the share
/// of right pixels; `dinolab eval` has the `iou` of every class too. Pixels of an ignored class count nowhere.
///
/// With `window`, an image that is larger is shown in windows of that size that slide over it, in fit and test; the logits of a
/// pixel are the mean over the windows that it lies in (sliding-window inference as in MMSegmentation and DINOv2).
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
    /// Size of sliding windows; without, an image is shown whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<ImageSize>,
    /// From one window to the next, as a share of its sides.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    #[serde(skip_serializing_if = "is_usual")]
    pub stride: f64,
}

/// DINOv2's 341 of 512 pixels, as a share.
const STRIDE: f64 = 2.0 / 3.0;

fn is_usual(stride: &f64) -> bool {
    *stride == STRIDE
}

impl Default for LinearSegmentation {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self {
            train_samples: number(256),
            test_samples: number(256),
            iterations: 40,
            l2: 1e-4,
            window: None,
            stride: STRIDE,
        }
    }
}

impl Probe for LinearSegmentation {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let classes = context.test.mask_classes();
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let whole = context.image_size;
        let size = self.window(whole);
        let windows = |data| Windows::new(data, whole, size, self.stride);
        let (train_windows, test_windows) = (windows(context.train), windows(context.test));
        // At the size of a window, whole images are brought there as all probes do.
        let [train, test] = if size == whole {
            [Look::at(context.train, &train).features(context)?, Look::at(context.test, &test).features(context)?]
        } else {
            let context = ProbeContext { image_size: size, ..*context };
            let look =
                |windows: &Windows<'_>, samples: &[usize]| Look::at(windows, &windows.of(samples)).features(&context);
            [look(&train_windows, &train)?, look(&test_windows, &test)?]
        };
        let masked = |f: &Features| f.truth.iter().any(|t| t.mask.is_some());
        if classes == 0 || !masked(&train) || !masked(&test) {
            return Err(no_masks("linear_segmentation"));
        }
        // An image without a mask, or a patch without a known class, has shares of 0 and so no part in the fit.
        let (p, d) = (train.grid.patches(), train.patches.last_dim());
        let shares = Tensor::from_slice(&class_shares(&train, size, classes), &[train.truth.len() * p, classes])?;
        let standardization = Standardization::of(train.patches.as_slice(), d);
        let mut head = Head::new(classes, d);
        head.fit(&standardization.apply(&train.patches, DType::F32)?, &shares, self.l2, self.iterations)?;
        let logits = head.logits(&standardization.apply(&test.patches, DType::F32)?)?;
        let logits: Vec<&[f32]> = logits.as_slice::<f32>().chunks(p * classes).collect();
        let n = test_windows.places().len();
        // The windows of an image come one after another.
        let images: Vec<(usize, Vec<usize>)> = if size == whole {
            (0..logits.len()).map(|i| (test.sources[i].0, vec![i])).collect()
        } else {
            let mut images: Vec<(usize, Vec<usize>)> = Vec::new();
            for (i, source) in test.sources.iter().map(|(source, _)| source / n).enumerate() {
                match images.last_mut().filter(|(last, _)| *last == source) {
                    Some((_, windows)) => windows.push(i),
                    None => images.push((source, vec![i])),
                }
            }
            images
        };
        let answer = |windows: &[usize]| -> Option<(Vec<u8>, Vec<u8>)> {
            if size == whole {
                let mask = test.truth[windows[0]].mask.clone()?;
                return Some((answers(logits[windows[0]], size, test.grid, classes), mask));
            }
            let up = Upsample::new(size, test.grid);
            let (mut sums, mut mask) = (vec![0.0; whole.pixels() * classes], vec![u8::MAX; whole.pixels()]);
            for &i in windows {
                let [left, top] = test_windows.places()[test.sources[i].0 % n];
                let theirs = test.truth[i].mask.as_ref()?;
                for (pixel, &class) in theirs.iter().enumerate() {
                    let at = (top + pixel / size.width) * whole.width + left + pixel % size.width;
                    up.add(pixel, logits[i], &mut sums[at * classes..][..classes]);
                    mask[at] = class;
                }
            }
            // The mean over windows is greatest where their sum is.
            Some((sums.chunks(classes).map(greatest).collect(), mask))
        };
        for (index, windows) in images.iter().take(pictures::MOST).filter(|_| context.show.is_some()) {
            if let Some((answers, mask)) = answer(windows) {
                show(context, *index, &mask, &answers)?;
            }
        }
        let overlaps = images.par_iter().filter_map(|(_, windows)| {
            let (answers, mask) = answer(windows)?;
            Some(overlap(&answers, &mask, classes))
        });
        Ok(scores(overlaps.collect(), context.test))
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Masks]
    }

    /// No larger than the image.
    fn window(&self, size: ImageSize) -> ImageSize {
        let window = self.window.unwrap_or(size);
        ImageSize { width: window.width.min(size.width), height: window.height.min(size.height) }
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

plugin!(Probe, "linear_segmentation", LinearSegmentation);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, run_at, Halves};

    #[test]
    fn perfect_features_segment_perfectly() {
        let data = Halves { len: 90, width: 32, height: 32 };
        let scores = run(&LinearSegmentation::default(), &data, &data, &perfect);
        assert_eq!(scores[..2].iter().map(|s| s.value).collect::<Vec<_>>(), [1.0, 1.0]);
    }

    #[test]
    fn windows_find_what_the_whole_image_does() {
        let data = Halves { len: 60, width: 64, height: 64 };
        let probe = LinearSegmentation { window: Some(ImageSize::square(32)), ..LinearSegmentation::default() };
        let scores = run_at(&probe, &data, &data, &perfect, ImageSize { width: 64, height: 48 });
        // The border between the halves lies in the middle of some windows and between the patches of others.
        assert!(scores[0].value > 0.9 && scores[1].value > 0.9, "{scores:?}");
    }

    #[test]
    fn random_features_give_no_more_than_the_commonest_class() {
        let data = Halves { len: 300, width: 32, height: 32 };
        let scores = run(&LinearSegmentation::default(), &data, &data, &random);
        // Background is half of all pixels, so answering it everywhere has accuracy 1/2 and mIoU 1/8.
        assert!(scores[0].value < 0.2 && (scores[1].value - 0.5).abs() < 0.05, "{scores:?}");
    }
}
