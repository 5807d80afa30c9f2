//! Probe `retrieval`: do images of one class come first in a search by likeness?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Annotation, Probe, ProbeContext, Score};
use dinolab_core::{plugin, Error, Result};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pictures;
use crate::probe_data::{draw_two, Look};

/// Search for images of the same class by the cosine of CLS features.
///
/// Test images are queries, training images the gallery, sorted by their cosine to the query. Scores over queries whose class
/// is in the gallery: `map`, the mean over queries of the average precision (the mean, over the right images, of the share
/// of right ones among those up to it), and `recall_<k>`, the share of queries with a right image among the first k.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retrieval {
    /// Training images to search in.
    #[schemars(range(max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images that are searched for.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
    /// How many of the first images `recall_<k>` looks at.
    #[schemars(inner(range(max = 1_000_000_000)))]
    pub recall: Vec<NonZeroUsize>,
}

impl Default for Retrieval {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self { train_samples: number(2048), test_samples: number(512), recall: vec![number(1), number(5), number(10)] }
    }
}

/// Average precision and place of the first right one (from 0) of a gallery in this order; none if no image is right.
fn search(mut gallery: Vec<(f32, bool)>) -> Option<(f64, usize)> {
    // Equal similarities keep the order of the gallery.
    gallery.sort_by(|a, b| b.0.total_cmp(&a.0));
    let places = gallery.iter().enumerate().filter(|(_, (_, right))| *right).map(|(place, _)| place);
    let precisions: Vec<f64> = places.clone().zip(1..).map(|(place, n)| f64::from(n) / (place + 1) as f64).collect();
    Some((precisions.iter().sum::<f64>() / precisions.len() as f64, places.min()?))
}

impl Probe for Retrieval {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let (train, test) =
            (Look::cls(context.train, &train).features(context)?, Look::cls(context.test, &test).features(context)?);
        let similarities = test.cls.l2_normalize(1e-12)?.matmul_t(&train.cls.l2_normalize(1e-12)?)?;
        pictures::neighbours(context, (&train, &test), similarities.as_slice())?;
        let rows = similarities.as_slice::<f32>().par_chunks(train.truth.len());
        let found = rows.zip(&test.truth).filter_map(|(row, query)| {
            let label = query.label?;
            search(row.iter().zip(&train.truth).map(|(&s, t)| (s, t.label == Some(label))).collect())
        });
        let found: Vec<(f64, usize)> = found.collect();
        if found.is_empty() {
            let help = "use a dataset whose images have labels (class sub-folders), or take the probe out";
            return Err(Error::user("probe `retrieval`: no training image has the class of a test image", help));
        }
        let map = Score::mean("map", found.iter().map(|(precision, _)| *precision));
        let recall = self.recall.iter().map(|k| {
            Score::mean(format!("recall_{k}"), found.iter().map(|(_, first)| f64::from(u8::from(first < &k.get()))))
        });
        Ok([map].into_iter().chain(recall).collect())
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Labels]
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

plugin!(Probe, "retrieval", Retrieval);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn average_precision_is_that_of_the_textbook() {
        // Right ones at places 1 and 3 of 4: (1/1 + 2/3) / 2.
        let gallery = vec![(0.1, false), (0.9, true), (0.5, true), (0.7, false)];
        let (precision, first) = search(gallery).unwrap();
        assert!((precision - 5.0 / 6.0).abs() < 1e-15 && first == 0);
        assert!(search(vec![(0.3, false)]).is_none());
    }

    #[test]
    fn perfect_features_find_all_and_random_ones_as_many_as_there_are() {
        let data = Halves { len: 300, width: 32, height: 32 };
        let values =
            |model| run(&Retrieval::default(), &data, &data, model).iter().map(|s| s.value).collect::<Vec<_>>();
        assert_eq!(values(&perfect), [1.0; 4]);
        let values = values(&random);
        assert!((values[0] - 1.0 / 3.0).abs() < 0.04 && (values[1] - 1.0 / 3.0).abs() < 0.2, "{values:?}");
    }
}
