//! Probe `knn`: is the class of an image that of its neighbours?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Annotation, Probe, ProbeContext, Score};
use dinolab_core::{plugin, Error, Result, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pictures;
use crate::probe_data::{draw_two, Features, Look};

/// Weighted nearest-neighbour classification of CLS features.
///
/// The k training images most similar to a test image (cosine s) vote for their labels with weight `exp(s / temperature)`
/// (Wu et al., arXiv:1805.01978, section 3.4; Caron et al., arXiv:2104.14294). Score `top1`: share of test images whose
/// label wins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Knn {
    /// Neighbours that vote.
    #[schemars(range(max = 1_000_000_000))]
    pub k: NonZeroUsize,
    /// Further numbers of neighbours, whose scores are `top1_k<number>`: in one pass over the same features.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(inner(range(max = 1_000_000_000)))]
    pub more_k: Vec<NonZeroUsize>,
    /// Temperature of the votes' weights.
    #[schemars(extend(
        "exclusiveMinimum" = 0,
        "maximum" = 1000,
        "x-help" = "votes are weighted by exp(similarity / temperature): give a positive number"
    ))]
    pub temperature: f64,
    /// Labelled training images to search in.
    #[schemars(range(max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images to classify.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
}

impl Default for Knn {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self {
            k: number(20),
            more_k: Vec::new(),
            temperature: 0.07,
            train_samples: number(512),
            test_samples: number(256),
        }
    }
}

/// Cosines of the CLS features of test and training images, `[test, train]`.
fn similarities(train: &Features, test: &Features) -> Result<Tensor> {
    test.cls.l2_normalize(1e-12)?.matmul_t(&train.cls.l2_normalize(1e-12)?)
}

impl Knn {
    /// The labels that win among neighbours `(similarity, label)`, by each of the numbers of neighbours; the least of
    /// equals.
    fn vote(&self, mut neighbours: Vec<(f32, u32)>) -> Vec<Option<u32>> {
        let most = self.counts().map(NonZeroUsize::get).max().unwrap_or(1).min(neighbours.len());
        // Equal similarities keep the order of the training images, so that the vote is the same everywhere.
        neighbours.sort_by(|a, b| b.0.total_cmp(&a.0));
        neighbours.truncate(most);
        let nearest = neighbours.first().map_or(0.0, |(similarity, _)| f64::from(*similarity));
        let winner = |k: NonZeroUsize| {
            let mut votes = std::collections::BTreeMap::new();
            for &(similarity, label) in neighbours.iter().take(k.get()) {
                // The nearest has weight 1 at every temperature.
                *votes.entry(label).or_insert(0.0) += ((f64::from(similarity) - nearest) / self.temperature).exp();
            }
            votes.into_iter().rev().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(label, _)| label)
        };
        self.counts().map(winner).collect()
    }

    /// Whether each labelled test image is right, by each of the numbers of neighbours.
    pub(crate) fn right(&self, train: &Features, test: &Features) -> Result<Vec<Vec<bool>>> {
        let known: Vec<Option<u32>> = train.truth.iter().map(|t| t.label).collect();
        let similarities = similarities(train, test)?;
        let rows = similarities.as_slice::<f32>().par_chunks(known.len());
        let right = rows.zip(&test.truth).filter_map(|(row, image)| {
            let labelled = row.iter().zip(&known).filter_map(|(&s, label)| label.map(|label| (s, label)));
            let votes = image.label.map(|_| self.vote(labelled.collect()))?;
            Some(votes.into_iter().map(|vote| vote == image.label).collect())
        });
        Ok(right.collect())
    }

    /// `k`, and the further ones.
    fn counts(&self) -> impl Iterator<Item = NonZeroUsize> + '_ {
        [self.k].into_iter().chain(self.more_k.iter().copied())
    }
}

impl Probe for Knn {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let (train, test) =
            (Look::cls(context.train, &train).features(context)?, Look::cls(context.test, &test).features(context)?);
        let right = self.right(&train, &test)?;
        if right.is_empty() {
            let help = "use a dataset whose images have labels (class sub-folders), or take the probe out";
            return Err(Error::user("probe `knn`: no test image has a label", help));
        }
        if context.show.is_some() {
            pictures::neighbours(context, (&train, &test), similarities(&train, &test)?.as_slice())?;
        }
        let score = |(i, k): (usize, NonZeroUsize)| {
            let name = if i == 0 { "top1".into() } else { format!("top1_k{k}") };
            Score::mean(name, right.iter().map(|image| f64::from(u8::from(image[i]))))
        };
        Ok(self.counts().enumerate().map(score).collect())
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Labels]
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

plugin!(Probe, "knn", Knn);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn perfect_features_find_every_class() {
        let data = Halves { len: 300, width: 32, height: 32 };
        let scores = run(&Knn::default(), &data, &data, &perfect);
        assert_eq!(scores.iter().map(|s| s.value).collect::<Vec<_>>(), [1.0]);
    }

    #[test]
    fn random_features_are_right_by_chance() {
        let data = Halves { len: 900, width: 32, height: 32 };
        let top1 = run(&Knn::default(), &data, &data, &random)[0].value;
        // 256 images, chance 1/3: a standard deviation is 0.03.
        assert!((top1 - 1.0 / 3.0).abs() < 0.12, "top-1 {top1}");
    }

    #[test]
    fn nearer_neighbours_outvote_many_far_ones() {
        let knn = Knn::default();
        assert_eq!(knn.vote(vec![(0.1, 0), (0.1, 0), (0.1, 0), (0.9, 1)]), [Some(1)]);
        let cold = Knn { temperature: 5e-4, ..knn.clone() };
        assert_eq!(cold.vote(vec![(0.3, 0), (0.6, 2), (0.5, 1), (0.5, 1)]), [Some(2)], "in the limit the nearest wins");
        let knn = Knn { k: NonZeroUsize::MIN, more_k: vec![knn.k], ..knn };
        assert_eq!(knn.vote(vec![(0.5, 2), (0.5, 1), (0.4, 1)]), [Some(2), Some(1)]);
    }
}
