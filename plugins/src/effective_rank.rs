//! Probe `effective_rank`: how many directions do the features use?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Probe, ProbeContext, Score};
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::probe_data::{draw_test, Look};
use crate::spectrum;

/// Effective rank of the features: how many directions they use, counted softly.
///
/// RankMe (Garrido et al., arXiv:2210.02885, equation 1): `exp(-sum_k p_k ln p_k)` with `p_k = s_k / sum_j s_j + 1e-7`, where
/// `s` are the singular values of the features as rows, not centred. It falls when features collapse onto few dimensions. It is
/// never more than the number of rows or the width of the features, so runs are compared at the same `samples`. Scores: `cls`,
/// of the CLS features `[samples, D]`, and `patches`, of all patch features `[samples * P, D]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EffectiveRank {
    /// Test images to measure.
    #[schemars(range(max = 1_000_000_000))]
    pub samples: NonZeroUsize,
}

impl Default for EffectiveRank {
    fn default() -> Self {
        Self { samples: NonZeroUsize::new(128).expect("defaults are positive") }
    }
}

impl Probe for EffectiveRank {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let test = Look::at(context.test, &draw_test(context, self.samples.get())).features(context)?;
        let rank = |features: &Tensor| -> Result<f64> {
            let values = features.to_f64_vec();
            let singular = spectrum::singular_values(&spectrum::rows(&values, features.last_dim()))?;
            Ok(spectrum::effective_rank(&singular, 1e-7))
        };
        Ok(vec![Score::new("cls", rank(&test.cls)?), Score::new("patches", rank(&test.patches)?)])
    }

    fn images(&self) -> usize {
        self.samples.get()
    }
}

plugin!(Probe, "effective_rank", EffectiveRank);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn features_of_few_classes_have_few_dimensions_and_random_ones_all() {
        let data = Halves { len: 300, width: 32, height: 32 };
        // The CLS features are of three classes, equally often; the patches of those and the background.
        let few = run(&EffectiveRank::default(), &data, &data, &perfect);
        assert!((2.9..3.01).contains(&few[0].value) && (3.5..4.01).contains(&few[1].value), "{few:?}");
        let all = run(&EffectiveRank::default(), &data, &data, &random);
        assert!(all[0].value > 15.0 && all[1].value > 15.9, "{all:?}");
    }
}
