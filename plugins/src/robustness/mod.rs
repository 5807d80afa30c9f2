//! Probe `robustness`: what is left of a score when images are corrupted?

mod corruption;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use dinolab_core::contract::{Annotation, Parts, Probe, ProbeContext, Score};
use dinolab_core::{plugin, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use corruption::{Corruption, STRENGTHS};

use crate::knn::Knn;
use crate::probe_data::{draw_two, Features, Look};

/// Nearest-neighbour classification of corrupted images among clean ones.
///
/// Test images are corrupted at the size at which the model sees them, in five strengths each, and classified as by the probe
/// `knn` by training images that are not. The corruptions are those of ImageNet-C (Hendrycks and Dietterich, arXiv:1903.12261)
/// with its numbers, lengths in proportion to the image's shorter side (of 224 pixels there):
///
/// | | strength 1 to 5 |
/// |---|---|
/// | `noise`: Gaussian, standard deviation of values in \[0, 1\] | 0.08, 0.12, 0.18, 0.26, 0.38 |
/// | `blur`: Gaussian, standard deviation in pixels of 224 | 1, 2, 3, 4, 6 |
/// | `contrast`: distances to each channel's mean, times | 0.4, 0.3, 0.2, 0.1, 0.05 |
/// | `jpeg`: quality; RGB only | 25, 18, 15, 10, 7 |
/// | `scale`: made smaller and as large again, to a side of | 0.6, 0.5, 0.4, 0.3, 0.25 |
///
/// Scores: `clean`, the share of right test images as they are; `corrupted`, the mean over corruptions and strengths;
/// `kept`, the second as a share of the first; and in detail `<corruption>/<strength>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Robustness {
    /// Labelled training images to search in.
    #[schemars(range(max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images to corrupt and classify.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
    /// Neighbours that vote.
    #[schemars(range(max = 1_000_000_000))]
    pub k: NonZeroUsize,
    /// What is done to images.
    #[schemars(length(min = 1))]
    pub corruptions: Vec<Corruption>,
}

impl Default for Robustness {
    fn default() -> Self {
        let Knn { k, train_samples, .. } = Knn::default();
        let test_samples = NonZeroUsize::new(128).expect("128 is not 0");
        Self { train_samples, test_samples, k, corruptions: Corruption::ALL.to_vec() }
    }
}

impl Probe for Robustness {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        if self.corruptions.is_empty() {
            let problem = "probe `robustness`: there is no corruption";
            return Err(Error::user(problem, "list one or more in `corruptions`"));
        }
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let known = Look::cls(context.train, &train).features(context)?;
        let knn = Knn { k: self.k, ..Knn::default() };
        // By sample, since one that could be read may be missing from a later pass.
        let right = |features: Features| -> Result<BTreeMap<usize, f64>> {
            let labelled = features.truth.iter().zip(&features.sources).filter(|(truth, _)| truth.label.is_some());
            let right = knn.right(&known, &features)?.into_iter().map(|image| f64::from(u8::from(image[0])));
            Ok(labelled.map(|(_, (sample, _))| *sample).zip(right).collect())
        };
        let clean = right(Look::cls(context.test, &test).features(context)?)?;
        if clean.is_empty() {
            let help = "use a dataset whose images have labels (class sub-folders), or take the probe out";
            return Err(Error::user("probe `robustness`: no test image has a label", help));
        }
        let (size, seed) = (context.image_size, context.seed);
        let mut sums: BTreeMap<usize, [f64; 2]> =
            clean.into_iter().map(|(sample, right)| (sample, [right, 0.0])).collect();
        let mut details = Vec::new();
        for &corruption in &self.corruptions {
            for strength in 1..=STRENGTHS {
                let change = |index: usize, image| corruption.apply(image, size, strength, seed, index);
                let right = right(Look::cls(context.test, &test).changed(&change).features(context)?)?;
                sums.retain(|sample, _| right.contains_key(sample));
                sums.iter_mut().for_each(|(sample, sum)| sum[1] += right[sample]);
                let name = format!("{}/{strength}", corruption.name());
                details.push(Score::mean(name, right.into_values()).as_detail());
            }
        }
        let passes = details.len() as f64;
        let images: Arc<[Vec<f64>]> =
            sums.into_values().map(|[clean, corrupted]| vec![clean, corrupted / passes, 1.0]).collect();
        let score = |name: &'static str, of: fn(&[f64]) -> f64| {
            Score::of(name, Parts { images: images.clone(), score: Arc::new(of) })
        };
        let whole = [
            score("clean", |sum| sum[0] / sum[2]),
            score("corrupted", |sum| sum[1] / sum[2]),
            score("kept", |sum| sum[1] / sum[0]),
        ];
        Ok(whole.into_iter().chain(details).collect())
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Labels]
    }

    fn unfit_channels(&self, channels: usize) -> Option<(String, String)> {
        let name = self.corruptions.iter().find(|c| c.needs_rgb() && channels != 3)?.name();
        let problem = format!("the corruption `{name}` is of RGB images, and these have {channels} channels");
        Some((problem, format!("list the other corruptions in `corruptions`, without `{name}`")))
    }

    fn images(&self) -> usize {
        let tested = 1 + 5 * self.corruptions.len();
        self.train_samples.get().saturating_add(self.test_samples.get().saturating_mul(tested))
    }
}

plugin!(Probe, "robustness", Robustness);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use dinolab_core::contract::{Dataset, Sample};

    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn a_model_that_reads_colours_is_broken_by_noise_and_not_by_blur() {
        let data = Halves { len: 300, width: 32, height: 32 };
        let scores = run(&Robustness::default(), &data, &data, &perfect);
        let value = |name: &str| scores.iter().find(|s| s.name == name).map(|s| s.value).unwrap();
        assert_eq!(value("clean"), 1.0);
        assert!(value("blur/1") > 0.95 && value("noise/5") < 0.8, "{scores:?}");
        assert!((value("kept") - value("corrupted")).abs() < 1e-12 && value("kept") < 1.0);
    }

    /// Images of which one can be read once.
    #[derive(Debug)]
    struct Fails {
        all: Halves,
        read: AtomicUsize,
    }

    impl Dataset for Fails {
        fn len(&self) -> usize {
            self.all.len()
        }
        fn get(&self, index: usize) -> Result<Sample> {
            match index == 4 && self.read.fetch_add(1, Ordering::Relaxed) > 0 {
                true => Err(Error::user("it is gone", "put it back")),
                false => self.all.get(index),
            }
        }
        fn classes(&self) -> usize {
            self.all.classes()
        }
    }

    #[test]
    fn an_image_that_is_missing_from_one_pass_counts_in_none() {
        let [train, test] = [30, 10].map(|len| Halves { len, width: 32, height: 32 });
        let test = Fails { all: test, read: AtomicUsize::new(0) };
        let scores = run(&Robustness::default(), &train, &test, &perfect);
        let images = |i: usize| scores[i].parts.as_ref().map(|parts| parts.images.len());
        assert_eq!([images(0), images(1), images(2), images(3)], [Some(9); 4], "{scores:?}");
    }

    #[test]
    fn random_features_have_nothing_to_lose() {
        let data = Halves { len: 600, width: 32, height: 32 };
        let scores = run(
            &Robustness { test_samples: NonZeroUsize::new(256).unwrap(), ..Robustness::default() },
            &data,
            &data,
            &random,
        );
        assert!((scores[1].value - 1.0 / 3.0).abs() < 0.05, "{scores:?}");
    }
}
