//! Probe `linear_segmentation`: can the class of a pixel be read off the patch features?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Probe, ProbeContext, Score};
use dinolab_core::{plugin, DType, Error, Result, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::linear_head::{Head, Standardization};
use crate::probe_data::{class_shares, draw_two, features, Features};
use crate::segmentation::{overlap, scores};

/// Segmentation by a linear head on frozen patch features.
///
/// Multinomial logistic regression from standardised patch features to the shares of classes among a patch's pixels,
/// with an L2 penalty, is fitted to training images by L-BFGS. On test images its logits are resized bilinearly to pixels.
/// Scores: `miou`, intersection over union averaged over the classes that the test masks hold, and `accuracy`, the share
/// of right pixels; `dinolab eval` has the `iou` of every class too. Pixels of an ignored class count nowhere.
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

impl Probe for LinearSegmentation {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let (size, classes) = (context.image_size, context.test.mask_classes());
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let (train, test) = (features(context, context.train, &train)?, features(context, context.test, &test)?);
        let masked = |f: &Features| f.truth.iter().any(|t| t.mask.is_some());
        if classes == 0 || !masked(&train) || !masked(&test) {
            let help =
                "use a dataset with pixel masks (`scenes`, or `image_folder` with `masks`), or take the probe out";
            return Err(Error::user("probe `linear_segmentation`: images have no masks", help));
        }
        // An image without a mask, or a patch without a known class, has shares of 0 and so no part in the fit.
        let (p, d) = (train.grid.patches(), train.patches.last_dim());
        let shares = Tensor::from_slice(&class_shares(&train, size, classes), &[train.truth.len() * p, classes])?;
        let standardization = Standardization::of(train.patches.as_slice(), d);
        let mut head = Head::new(classes, d);
        head.fit(&standardization.apply(&train.patches, DType::F32)?, &shares, self.l2, self.iterations)?;
        let logits = head.logits(&standardization.apply(&test.patches, DType::F32)?)?;
        let images = logits.as_slice::<f32>().par_chunks(p * classes).zip(&test.truth);
        let images = images
            .filter_map(|(logits, truth)| Some(overlap(logits, truth.mask.as_ref()?, size, test.grid, classes)))
            .collect();
        Ok(scores(images, context.test))
    }

    fn needs(&self) -> (bool, bool) {
        (false, true)
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
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
        assert_eq!(scores[..2].iter().map(|s| s.value).collect::<Vec<_>>(), [1.0, 1.0]);
    }

    #[test]
    fn random_features_give_no_more_than_the_commonest_class() {
        let data = Halves { len: 300, width: 32, height: 32 };
        let scores = run(&LinearSegmentation::default(), &data, &data, &random);
        // Background is half of all pixels, so answering it everywhere has accuracy 1/2 and mIoU 1/8.
        assert!(scores[0].value < 0.2 && (scores[1].value - 0.5).abs() < 0.05, "{scores:?}");
    }
}
