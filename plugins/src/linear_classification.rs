//! Probe `linear_classification`: can the class of an image be read off its CLS feature?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Annotation, Probe, ProbeContext, Score};
use dinolab_core::{plugin, DType, Error, Result, Tensor};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::linear_head::{Head, Standardization};
use crate::probe_data::{draw_two, Features, Look};

/// Classification by a linear head on frozen CLS features.
///
/// Multinomial logistic regression from standardised CLS features to labels, with an L2 penalty, is fitted by L-BFGS. The
/// penalty is chosen from `penalties`: the one with the best accuracy on a part of the training images that is left out of
/// the fit (of equal ones, the greatest). Then all training images are fitted with it (the protocol of DINOv2,
/// arXiv:2304.07193, section 7.1, for logistic regression). Scores: `top1`, the share of test images whose own class has the
/// greatest logit; with more than five classes `top5`, the share whose own is among the five greatest; and in detail the
/// `penalty` that was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LinearClassification {
    /// Labelled training images, at least two: one part is fitted, the other chooses the penalty.
    #[schemars(range(min = 2, max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images to classify.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
    /// Weights of half the squared norm of the head's weights, of which one is chosen.
    #[schemars(length(min = 1), inner(range(min = 0, max = 1_000_000)))]
    pub penalties: Vec<f64>,
    /// Share of the training images that chooses among them.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub validation: f64,
    /// Most steps of L-BFGS for a penalty.
    #[schemars(range(min = 1, max = 100_000))]
    pub iterations: usize,
}

impl Default for LinearClassification {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self {
            train_samples: number(2048),
            test_samples: number(1024),
            penalties: vec![1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
            validation: 0.2,
            iterations: 500,
        }
    }
}

/// Labelled features.
struct Labelled {
    /// `[n, D]`, f64, standardised.
    x: Tensor,
    labels: Vec<u32>,
    /// Labels as rows of 0 and 1, `[n, C]`.
    shares: Tensor,
}

impl Labelled {
    /// Those of these rows.
    fn of(all: &Tensor, labels: &[u32], classes: usize, rows: std::ops::Range<usize>) -> Result<Self> {
        let labels = labels[rows.clone()].to_vec();
        let mut shares = vec![0.0f64; labels.len() * classes];
        labels.iter().enumerate().for_each(|(i, &label)| shares[i * classes + label as usize] = 1.0);
        let shares = Tensor::from_slice(&shares, &[labels.len(), classes])?;
        Ok(Self { x: all.narrow(rows.start, rows.len())?, labels, shares })
    }
}

/// How many classes have a greater logit than the image's own (or as great a one, and come before it), image by image.
fn ranks(head: &Head, x: &Tensor, labels: &[u32], classes: usize) -> Result<Vec<usize>> {
    let logits = head.logits(x)?;
    let rank = |(row, &label): (&[f64], &u32)| {
        let own = row[label as usize];
        let before = |(class, &logit): (usize, &f64)| logit > own || logit == own && class < label as usize;
        row.iter().enumerate().filter(|(class, logit)| before((*class, logit))).count()
    };
    Ok(logits.as_slice::<f64>().par_chunks(classes).zip(labels).map(rank).collect())
}

/// Labelled features only, and their labels.
fn labelled(features: &Features, standardization: &Standardization) -> Result<(Tensor, Vec<u32>)> {
    let rows: Vec<u32> = (0..).zip(&features.truth).filter(|(_, t)| t.label.is_some()).map(|(i, _)| i).collect();
    let x = standardization.apply(&features.cls, DType::F64)?;
    let x = x.gather_rows(&Tensor::from_slice(&rows, &[rows.len()])?)?;
    Ok((x, features.truth.iter().filter_map(|t| t.label).collect()))
}

impl Probe for LinearClassification {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let (train, test) =
            (Look::cls(context.train, &train).features(context)?, Look::cls(context.test, &test).features(context)?);
        let standardization = Standardization::of(train.cls.as_slice(), train.cls.last_dim());
        let (x, labels) = labelled(&train, &standardization)?;
        let (test_x, test_labels) = labelled(&test, &standardization)?;
        let (classes, n) = (context.train.classes().max(context.test.classes()), labels.len());
        if n < 2 || test_labels.is_empty() {
            let problem = "probe `linear_classification`: there are too few images with a label";
            return Err(Error::user(problem, "use a dataset whose images have labels, or take the probe out"));
        }
        if self.penalties.is_empty() {
            let problem = "probe `linear_classification`: there is no penalty to choose";
            return Err(Error::user(problem, "list one or more in `penalties`"));
        }
        // Samples are drawn in random order, so that the last ones are a random part.
        let kept = n - ((n as f64 * self.validation).round() as usize).clamp(1, n - 1);
        let (fitted, left_out) =
            (Labelled::of(&x, &labels, classes, 0..kept)?, Labelled::of(&x, &labels, classes, kept..n)?);
        let mut penalties = self.penalties.clone();
        penalties.sort_by(|a, b| b.total_cmp(a));
        let mut best: Option<(usize, f64)> = None;
        // From the greatest on: each fit starts where the one before ended.
        let mut head = Head::new(classes, x.dim(1));
        for &penalty in penalties.iter().filter(|_| penalties.len() > 1) {
            head.fit(&fitted.x, &fitted.shares, penalty, self.iterations)?;
            let right = ranks(&head, &left_out.x, &left_out.labels, classes)?.into_iter().filter(|&r| r == 0).count();
            if best.is_none_or(|(most, _)| right > most) {
                best = Some((right, penalty));
            }
        }
        let penalty = best.map_or(penalties[0], |(_, penalty)| penalty);
        let all = Labelled::of(&x, &labels, classes, 0..n)?;
        let mut head = Head::new(classes, x.dim(1));
        head.fit(&all.x, &all.shares, penalty, self.iterations)?;
        let ranks = ranks(&head, &test_x, &test_labels, classes)?;
        let within = |most: usize| ranks.iter().map(move |&rank| f64::from(u8::from(rank < most)));
        let top5 = (classes > 5).then(|| Score::mean("top5", within(5)));
        let chosen = Score::new("penalty", penalty).as_detail();
        Ok([Score::mean("top1", within(1))].into_iter().chain(top5).chain([chosen]).collect())
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Labels]
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

plugin!(Probe, "linear_classification", LinearClassification);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn perfect_features_find_every_class_and_random_ones_none() {
        let data = Halves { len: 300, width: 32, height: 32 };
        assert_eq!(run(&LinearClassification::default(), &data, &data, &perfect)[0].value, 1.0);
        let data = Halves { len: 900, width: 32, height: 32 };
        let top1 = run(&LinearClassification::default(), &data, &data, &random)[0].value;
        // 300 images, chance 1/3: a standard deviation is 0.027.
        assert!((top1 - 1.0 / 3.0).abs() < 0.11, "top-1 {top1}");
    }

    #[test]
    fn the_penalty_is_the_greatest_of_those_that_are_right_most_often() {
        let chosen = |penalties: &[f64]| {
            let data = Halves { len: 400, width: 32, height: 32 };
            let probe = LinearClassification { penalties: penalties.to_vec(), ..LinearClassification::default() };
            run(&probe, &data, &data, &perfect).last().expect("it has scores").value
        };
        assert_eq!(chosen(&[1e-4, 1e-2, 1e-3]), 1e-2);
        // With this one the head answers the commonest class.
        assert_eq!(chosen(&[1e-4, 1e6]), 1e-4);
    }
}
