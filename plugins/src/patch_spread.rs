//! Probe `patch_spread`: do the patches of an image still differ from each other?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Probe, ProbeContext, Score};
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::probe_data::{draw_test, Look};

/// Spread of the patches of one image, and its share of the spread of all patches.
///
/// The variance of the L2-normalised patch features x of image b and place p, cut in two by the law of total variance. Scores:
/// `within = mean_b (1 - |mean_p x_bp|^2)`, how much the patches of an image differ from each other; `total = 1 - |mean_bp x_bp|^2`,
/// how much all patches do; `share = within / total`. When all patches of an image take on its global content, `within` and `share`
/// fall, but `total` need not fall. JEM (Meta, 2026) watches a patch spread; its exact form was not found in public, so this is one
/// of this project's own, which needs no label and no constant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PatchSpread {
    /// Test images to measure.
    #[schemars(range(max = 1_000_000_000))]
    pub samples: NonZeroUsize,
}

impl Default for PatchSpread {
    fn default() -> Self {
        Self { samples: NonZeroUsize::new(128).expect("defaults are positive") }
    }
}

impl Probe for PatchSpread {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let test = Look::at(context.test, &draw_test(context, self.samples.get())).features(context)?;
        let means = test.patches.l2_normalize(1e-12)?.mean_axis(1)?;
        let spread = |mean: &[f64]| 1.0 - mean.iter().map(|x| x * x).sum::<f64>();
        let of_images = means.to_f64_vec();
        let images = of_images.chunks(means.last_dim()).map(spread);
        let within = images.sum::<f64>() / means.dim(0) as f64;
        let total = spread(&means.mean_axis(0)?.to_f64_vec());
        let share = if total > 0.0 { within / total } else { 0.0 };
        let score = |name: &'static str, value| Score::new(name, value);
        Ok(vec![score("within", within), score("total", total), score("share", share)])
    }

    fn images(&self) -> usize {
        self.samples.get()
    }
}

plugin!(Probe, "patch_spread", PatchSpread);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn two_halves_differ_by_half_and_three_classes_by_more() {
        let data = Halves { len: 300, width: 32, height: 32 };
        // Half of the patches are background, half of one of three classes, equally often: 1 - 1/4 - 1/4 within an image,
        // about 1 - 1/4 - 3/36 over all.
        let scores: Vec<f64> = run(&PatchSpread::default(), &data, &data, &perfect).iter().map(|s| s.value).collect();
        assert!((scores[0] - 0.5).abs() < 1e-6 && (scores[1] - 2.0 / 3.0).abs() < 0.01, "{scores:?}");
        assert!((scores[2] - scores[0] / scores[1]).abs() < 1e-12);
    }

    #[test]
    fn patches_that_all_say_the_same_have_no_spread() {
        let data = Halves { len: 60, width: 32, height: 32 };
        let same = |_: usize, _: &mut dinolab_core::rng::Rng, feature: &mut [f32]| feature.fill(1.0);
        let scores = run(&PatchSpread::default(), &data, &data, &same);
        assert!(scores[..2].iter().all(|s| s.value.abs() < 1e-6), "{scores:?}");
        // Features that know nothing of an image are spread within it as over all.
        let share = run(&PatchSpread::default(), &data, &data, &random)[2].value;
        assert!((share - 15.0 / 16.0).abs() < 0.01, "share {share}");
    }
}
