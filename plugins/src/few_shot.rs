//! Probe `few_shot`: how far do few labelled images go?

use std::num::NonZeroUsize;
use std::sync::Arc;

use dinolab_core::contract::{Annotation, Parts, Probe, ProbeContext, Score};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, DType, Error, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::linear_head::Head;
use crate::probe_data::{draw_two, Features, Look};

/// Classification from a few labelled images a class.
///
/// For each of `shots` and each of `draws`, that many images of every class are drawn from the labelled training images, and
/// multinomial logistic regression with an L2 penalty is fitted to their CLS features of length one by L-BFGS (the low-shot
/// protocol of MSN, arXiv:2204.07141, section 5, with features frozen). Scores: `top1_<n>`, the mean over draws of the share of
/// right test images, and in detail `top1_<n>_sd`, the standard deviation over draws. A class with fewer images gives those
/// that it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FewShot {
    /// Labelled images of a class.
    #[schemars(length(min = 1), inner(range(max = 1_000_000)))]
    pub shots: Vec<NonZeroUsize>,
    /// How often they are drawn.
    #[schemars(range(max = 1000))]
    pub draws: NonZeroUsize,
    /// Training images to draw from.
    #[schemars(range(max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images to classify.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
    /// Weight of half the squared norm of the head's weights.
    #[schemars(range(min = 0, max = 1000))]
    pub l2: f64,
    /// Most steps of L-BFGS.
    #[schemars(range(min = 1, max = 100_000))]
    pub iterations: usize,
}

impl Default for FewShot {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self {
            shots: vec![number(1), number(5)],
            draws: number(5),
            train_samples: number(1024),
            test_samples: number(512),
            l2: 1e-3,
            iterations: 200,
        }
    }
}

impl FewShot {
    /// Which of these labelled images one draw takes, class by class: the first `shots` of each class in an order that is drawn
    /// with the seed, the same for every number of shots.
    pub fn draw(seed: u64, draw: usize, labels: &[Option<u32>], shots: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..labels.len()).collect();
        Rng::new(seed, Stream::Probe, 8, draw as u64).shuffle(&mut order);
        let mut of_class = std::collections::BTreeMap::<u32, Vec<usize>>::new();
        for i in order {
            of_class.entry(labels[i].unwrap_or(u32::MAX)).or_default().push(i);
        }
        of_class.remove(&u32::MAX);
        of_class.into_values().flat_map(|images| images.into_iter().take(shots)).collect()
    }

    /// Whether each labelled test image is right, after a fit to some training images.
    fn right(
        &self,
        (x, labels): &(Tensor, Vec<Option<u32>>),
        rows: &[usize],
        test: &(Tensor, Vec<Option<u32>>),
        classes: usize,
    ) -> Result<Vec<f64>> {
        let mut shares = vec![0.0f64; rows.len() * classes];
        for (row, &i) in rows.iter().enumerate() {
            shares[row * classes + labels[i].expect("labelled images were drawn") as usize] = 1.0;
        }
        let shares = Tensor::from_slice(&shares, &[rows.len(), classes])?;
        let rows: Vec<u32> = rows.iter().map(|&i| i as u32).collect();
        let mut head = Head::new(classes, x.dim(1));
        head.fit(&x.gather_rows(&Tensor::from_slice(&rows, &[rows.len()])?)?, &shares, self.l2, self.iterations)?;
        let logits = head.logits(&test.0)?;
        let right = |(row, label): (&[f64], &Option<u32>)| {
            let own = row[(*label)? as usize];
            let before = |(class, &logit): (usize, &f64)| logit > own || logit == own && Some(class as u32) < *label;
            Some(f64::from(u8::from(!row.iter().enumerate().any(before))))
        };
        Ok(logits.as_slice::<f64>().chunks(classes).zip(&test.1).filter_map(right).collect())
    }
}

/// CLS features of length one, f64, and labels.
fn rows(features: &Features) -> Result<(Tensor, Vec<Option<u32>>)> {
    let x = features.cls.cast(DType::F64)?.l2_normalize(1e-12)?;
    Ok((x, features.truth.iter().map(|t| t.label).collect()))
}

impl Probe for FewShot {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let train = rows(&Look::cls(context.train, &train).features(context)?)?;
        let test = rows(&Look::cls(context.test, &test).features(context)?)?;
        let classes = context.train.classes().max(context.test.classes());
        if train.1.iter().all(Option::is_none) || test.1.iter().all(Option::is_none) {
            let help = "use a dataset whose images have labels, or take the probe out";
            return Err(Error::user("probe `few_shot`: there are no images with a label", help));
        }
        let mut of_class = vec![0; classes];
        train.1.iter().flatten().for_each(|&label| of_class[label as usize] += 1);
        let least = of_class.into_iter().min().unwrap_or(0);
        let wanted = self.shots.iter().copied().max().map_or(0, NonZeroUsize::get);
        if least < wanted {
            (context.warn)(format!(
                "`few_shot`: of {wanted} images of a class that `shots` asks for, a class has {least} among {} to draw from: \
                 it gives those",
                train.1.len()
            ));
        }
        let mut scores = Vec::new();
        for shots in &self.shots {
            let mut images: Vec<Vec<f64>> = Vec::new();
            for draw in 0..self.draws.get() {
                let drawn = Self::draw(context.seed, draw, &train.1, shots.get());
                let right = self.right(&train, &drawn, &test, classes)?;
                images.resize(right.len(), Vec::new());
                images.iter_mut().zip(right).for_each(|(image, right)| image.push(right));
            }
            let n = self.draws.get() as f64;
            let of_draw = |draw: usize| images.iter().map(|image| image[draw]).sum::<f64>() / images.len() as f64;
            let of_draws: Vec<f64> = (0..self.draws.get()).map(of_draw).collect();
            let mean = of_draws.iter().sum::<f64>() / n;
            let variance = of_draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
            let images: Arc<[Vec<f64>]> =
                images.into_iter().map(|image| vec![image.iter().sum::<f64>() / n, 1.0]).collect();
            scores.push(Score::of(format!("top1_{shots}"), Parts { images, score: Arc::new(|sum| sum[0] / sum[1]) }));
            scores.push(Score::new(format!("top1_{shots}_sd"), variance.sqrt()).as_detail());
        }
        Ok(scores)
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Labels]
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

plugin!(Probe, "few_shot", FewShot);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn one_image_a_class_is_enough_for_perfect_features_and_none_for_random_ones() {
        let data = Halves { len: 300, width: 32, height: 32 };
        let scores = run(&FewShot::default(), &data, &data, &perfect);
        assert_eq!(scores.iter().map(|s| s.value).collect::<Vec<_>>(), [1.0, 0.0, 1.0, 0.0]);
        let chance = run(&FewShot::default(), &data, &data, &random);
        assert!((chance[0].value - 1.0 / 3.0).abs() < 0.12 && chance[1].value > 0.0, "{chance:?}");
    }

    #[test]
    fn more_shots_add_images_and_draws_take_others() {
        let labels: Vec<Option<u32>> = (0..40).map(|i| (i % 5 < 4).then_some(i % 5)).collect();
        let (one, five) = (FewShot::draw(3, 0, &labels, 1), FewShot::draw(3, 0, &labels, 5));
        assert!(one.len() == 4 && five.len() == 20 && one.iter().all(|i| five.contains(i)));
        assert!(five.iter().all(|&i| labels[i].is_some()));
        assert_ne!(one, FewShot::draw(3, 1, &labels, 1));
        // Too few images: all of them.
        assert_eq!(FewShot::draw(3, 0, &labels, 99).len(), 32);
    }
}
