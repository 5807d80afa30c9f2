//! Probe `knn_segmentation`: is the class of a patch that of the patches most like it?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Annotation, Probe, ProbeContext, Score};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, Result, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pictures;
use crate::probe_data::{class_shares, draw_two, Look};
use crate::segmentation::{answers, no_masks, overlap, scores, show};

/// Segmentation by nearest neighbours among patches, with nothing trained.
///
/// A memory holds patch features of training images with the shares of classes among their pixels. The k most similar of it
/// to a test patch (cosine s) vote with weight `exp(s / temperature)` for their shares (Balažević et al., arXiv:2306.01667,
/// section 3.2). Votes are resized bilinearly to pixels. Scores as of `linear_segmentation`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KnnSegmentation {
    /// Training images with masks.
    #[schemars(range(max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images with masks.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
    /// Most patches in the memory, drawn from those of the training images.
    #[schemars(range(max = 1_000_000_000))]
    pub memory: NonZeroUsize,
    /// Neighbours that vote.
    #[schemars(range(max = 1_000_000_000))]
    pub k: NonZeroUsize,
    /// Temperature of the votes' weights.
    #[schemars(extend(
        "exclusiveMinimum" = 0,
        "maximum" = 1000,
        "x-help" = "votes are weighted by exp(similarity / temperature): give a positive number"
    ))]
    pub temperature: f64,
}

impl Default for KnnSegmentation {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self {
            train_samples: number(256),
            test_samples: number(128),
            memory: number(20_000),
            k: number(30),
            temperature: 0.02,
        }
    }
}

impl KnnSegmentation {
    /// What the neighbours of a patch vote for, given its similarities to the memory: `[C]`.
    fn vote(&self, similarities: &[f32], shares: &[f32], classes: usize) -> Vec<f32> {
        let mut order: Vec<usize> = (0..similarities.len()).collect();
        let k = self.k.get().min(order.len());
        let nearer = |&a: &usize, &b: &usize| similarities[b].total_cmp(&similarities[a]).then(a.cmp(&b));
        if k < order.len() {
            order.select_nth_unstable_by(k - 1, nearer);
        }
        let mut votes = vec![0.0f64; classes];
        // In a fixed order, so that sums are the same everywhere.
        order.truncate(k);
        order.sort_unstable_by(nearer);
        let nearest = order.first().map_or(0.0, |&at| f64::from(similarities[at]));
        for at in order {
            // The nearest has weight 1 at every temperature.
            let weight = ((f64::from(similarities[at]) - nearest) / self.temperature).exp();
            votes.iter_mut().zip(&shares[at * classes..]).for_each(|(vote, share)| *vote += weight * f64::from(*share));
        }
        let most = votes.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        votes.into_iter().map(|vote| (vote / most) as f32).collect()
    }
}

impl Probe for KnnSegmentation {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let (size, classes) = (context.image_size, context.test.mask_classes());
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let (train, test) =
            (Look::at(context.train, &train).features(context)?, Look::at(context.test, &test).features(context)?);
        let (p, d) = (train.grid.patches(), train.patches.last_dim());
        let shares = class_shares(&train, size, classes);
        // Patches without a known class have no say.
        let mut known: Vec<u32> = (0..)
            .zip(shares.chunks(classes.max(1)))
            .filter(|(_, s)| s.iter().any(|&x| x > 0.0))
            .map(|(i, _)| i)
            .collect();
        if classes == 0 || known.is_empty() || test.truth.iter().all(|t| t.mask.is_none()) {
            return Err(no_masks("knn_segmentation"));
        }
        if known.len() > self.memory.get() {
            Rng::new(context.seed, Stream::Probe, 0, 2).shuffle(&mut known);
            known.truncate(self.memory.get());
            known.sort_unstable();
        }
        let shares: Vec<f32> =
            known.iter().flat_map(|&i| &shares[i as usize * classes..][..classes]).copied().collect();
        let rows = train.patches.reshape(&[train.truth.len() * p, d])?;
        let memory = rows.gather_rows(&Tensor::from_slice(&known, &[known.len()])?)?.l2_normalize(1e-12)?;
        let patches = test.patches.l2_normalize(1e-12)?;
        let mut images = Vec::new();
        for (i, truth) in test.truth.iter().enumerate() {
            let Some(mask) = &truth.mask else { continue };
            let similarities = patches.narrow(i, 1)?.reshape(&[p, d])?.matmul_t(&memory)?;
            let rows = similarities.as_slice::<f32>().par_chunks(known.len());
            let votes: Vec<Vec<f32>> = rows.map(|row| self.vote(row, &shares, classes)).collect();
            let answers = answers(&votes.concat(), size, test.grid, classes);
            if images.len() < pictures::MOST {
                show(context, test.sources[i].0, mask, &answers)?;
            }
            images.push(overlap(&answers, mask, classes));
        }
        Ok(scores(images, context.test))
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Masks]
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

plugin!(Probe, "knn_segmentation", KnnSegmentation);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn perfect_features_segment_perfectly() {
        let data = Halves { len: 90, width: 32, height: 32 };
        let scores = run(&KnnSegmentation::default(), &data, &data, &perfect);
        assert_eq!(scores[..2].iter().map(|s| s.value).collect::<Vec<_>>(), [1.0, 1.0]);
    }

    #[test]
    fn random_features_give_chance() {
        let data = Halves { len: 90, width: 32, height: 32 };
        let scores = run(
            &KnnSegmentation { memory: NonZeroUsize::new(100).unwrap(), ..Default::default() },
            &data,
            &data,
            &random,
        );
        assert!(scores[0].value < 0.3 && (scores[1].value - 0.42).abs() < 0.12, "{scores:?}");
    }
}
