//! Probe `cls_patch_cosine`: do patches still say something of their own?

use std::num::NonZeroUsize;
use std::sync::Arc;

use dinolab_core::contract::{Combine, Parts, Probe, ProbeContext, Score};
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::probe_data::{draw_test, Look};

/// Mean cosine between an image's CLS feature and its patch features: the symptom of lost locality.
///
/// In long training it creeps up while dense tasks get worse (DINOv3, arXiv:2508.10104, section 4.1). Scores: `mean`
/// over all patches of all images, and `std`, the spread over patches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClsPatchCosine {
    /// Test images to measure.
    #[schemars(range(max = 1_000_000_000))]
    pub samples: NonZeroUsize,
}

impl Default for ClsPatchCosine {
    fn default() -> Self {
        Self { samples: NonZeroUsize::new(128).expect("defaults are positive") }
    }
}

impl Probe for ClsPatchCosine {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let test = Look::at(context.test, &draw_test(context, self.samples.get())).features(context)?;
        let (n, dim) = (test.cls.dim(0), test.cls.last_dim());
        let cls = test.cls.l2_normalize(1e-12)?.reshape(&[n, dim, 1])?;
        let cosines = test.patches.l2_normalize(1e-12)?.matmul(&cls)?.to_f64_vec();
        let mean = |x: &mut dyn Iterator<Item = f64>| x.sum::<f64>() / cosines.len() as f64;
        let average = mean(&mut cosines.iter().copied());
        let variance = mean(&mut cosines.iter().map(|c| (c - average).powi(2)));
        // Of every image the sum of its cosines, that of their squares, and how many they are.
        let of_image =
            |cosines: &[f64]| vec![cosines.iter().sum(), cosines.iter().map(|c| c * c).sum(), cosines.len() as f64];
        let images: Arc<[Vec<f64>]> = cosines.chunks(cosines.len() / n).map(of_image).collect();
        let score =
            |name, value, score: Combine| Score { value, ..Score::of(name, Parts { images: images.clone(), score }) };
        Ok(vec![
            score("mean", average, Arc::new(|sum| sum[0] / sum[2])),
            score(
                "std",
                variance.sqrt(),
                Arc::new(|sum| (sum[1] / sum[2] - (sum[0] / sum[2]).powi(2)).max(0.0).sqrt()),
            ),
        ])
    }

    fn images(&self) -> usize {
        self.samples.get()
    }
}

plugin!(Probe, "cls_patch_cosine", ClsPatchCosine);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn patches_like_the_cls_have_cosine_one_and_others_zero() {
        let data = Halves { len: 40, width: 32, height: 32 };
        // Half of the patches are of the object, whose feature the CLS has.
        let scores = run(&ClsPatchCosine::default(), &data, &data, &perfect);
        assert_eq!(scores.iter().map(|s| s.value).collect::<Vec<_>>(), [0.5, 0.5]);
    }

    #[test]
    fn random_features_are_orthogonal_on_average() {
        let data = Halves { len: 200, width: 32, height: 32 };
        let mean = run(&ClsPatchCosine::default(), &data, &data, &random)[0].value;
        assert!(mean.abs() < 0.02, "mean {mean}");
    }
}
