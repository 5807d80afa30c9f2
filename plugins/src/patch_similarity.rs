//! Probe `patch_similarity`: how local is the similarity of patches?

use std::num::NonZeroUsize;
use std::sync::Arc;

use dinolab_core::contract::{Annotation, Combine, Parts, Probe, ProbeContext, Score};
use dinolab_core::{plugin, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::probe_data::{class_counts, draw_test, majority, Look};

/// Mean cosine of a patch inside an object to the other patches of its mask region, and to those outside.
///
/// It is what the similarity maps of DINOv3 (arXiv:2508.10104, figures 3 and 10) show as pictures. A region is the set of
/// patches of one image in which one class has the most pixels; reference patches are those of all classes but 0, the
/// background. Scores, averaged over reference patches: `inside`, `outside`, and `gap`, their difference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PatchSimilarity {
    /// Test images to measure.
    #[schemars(range(max = 1_000_000_000))]
    pub samples: NonZeroUsize,
}

impl Default for PatchSimilarity {
    fn default() -> Self {
        Self { samples: NonZeroUsize::new(128).expect("defaults are positive") }
    }
}

impl Probe for PatchSimilarity {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let test = Look::at(context.test, &draw_test(context, self.samples.get())).features(context)?;
        let (p, classes) = (test.grid.patches(), context.test.mask_classes());
        let patches = test.patches.l2_normalize(1e-12)?;
        let (mut inside, mut outside, mut references) = (0.0, 0.0, 0u64);
        // The same of each image.
        let mut images = Vec::new();
        for (i, truth) in test.truth.iter().enumerate() {
            let Some(mask) = truth.mask.as_ref().filter(|_| classes > 0) else { continue };
            let region = majority(&class_counts(mask, context.image_size, test.grid, classes), classes);
            let patches = patches.narrow(i, 1)?;
            let gram = patches.matmul_t(&patches)?;
            let mut of_image = vec![0.0; 3];
            for (from, row) in gram.as_slice::<f32>().chunks(p).enumerate().filter(|(from, _)| region[*from] > Some(0))
            {
                // (sum, count) of the patches of the same region, and of the others.
                let mut sides = [(0.0, 0u32); 2];
                for (to, &similarity) in row.iter().enumerate().filter(|(to, _)| *to != from) {
                    let side = &mut sides[usize::from(region[to] != region[from])];
                    *side = (side.0 + f64::from(similarity), side.1 + 1);
                }
                if let [(same, 1..), (other, 1..)] = sides {
                    let of_patch = [same / f64::from(sides[0].1), other / f64::from(sides[1].1), 1.0];
                    inside += of_patch[0];
                    outside += of_patch[1];
                    references += 1;
                    of_image.iter_mut().zip(of_patch).for_each(|(sum, x)| *sum += x);
                }
            }
            images.push(of_image);
        }
        if references == 0 {
            let help = "use a dataset with pixel masks in which objects cover several patches, or take the probe out";
            return Err(Error::user("probe `patch_similarity`: no patch lies in an object of a mask", help));
        }
        let (inside, outside) = (inside / references as f64, outside / references as f64);
        let images: Arc<[Vec<f64>]> = images.into();
        let score =
            |name, value, score: Combine| Score { value, ..Score::of(name, Parts { images: images.clone(), score }) };
        Ok(vec![
            score("inside", inside, Arc::new(|sum| sum[0] / sum[2])),
            score("outside", outside, Arc::new(|sum| sum[1] / sum[2])),
            score("gap", inside - outside, Arc::new(|sum| (sum[0] - sum[1]) / sum[2])),
        ])
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Masks]
    }

    fn images(&self) -> usize {
        self.samples.get()
    }
}

plugin!(Probe, "patch_similarity", PatchSimilarity);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    fn scores(model: &dyn Fn(usize, &mut dinolab_core::rng::Rng, &mut [f32])) -> Vec<f64> {
        let data = Halves { len: 60, width: 32, height: 32 };
        run(&PatchSimilarity::default(), &data, &data, model).iter().map(|s| s.value).collect()
    }

    #[test]
    fn perfect_features_are_alike_inside_and_orthogonal_outside() {
        assert_eq!(scores(&perfect), [1.0, 0.0, 1.0]);
    }

    #[test]
    fn random_features_know_no_region() {
        let gap = scores(&random)[2];
        assert!(gap.abs() < 0.03, "gap {gap}");
    }
}
