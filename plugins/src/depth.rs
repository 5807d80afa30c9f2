//! Probe `depth`: can the distance of a pixel be read off the patch features?

use std::num::NonZeroUsize;
use std::sync::Arc;

use dinolab_core::contract::{Annotation, ImageSize, Parts, Picture, Probe, ProbeContext, Score};
use dinolab_core::{plugin, DType, Error, Result, Tensor};
use faer::prelude::Solve;
use faer::{Mat, Side};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::linear_head::Standardization;
use crate::pictures;
use crate::probe_data::{draw_two, patch_of, Features, Look};
use crate::segmentation::Upsample;

/// Depth by a linear map of frozen patch features.
///
/// Ridge regression from standardised patch features to the mean depth of a patch's known pixels: the least mean of squared
/// errors plus `l2` times the squared weights (bias left out), in closed form. On test images its numbers, kept within those of
/// the training patches, are resized bilinearly to pixels. This is the linear read-out of DINOv2 (arXiv:2304.07193, section
/// 7.4) in its simplest form: the last layer, no CLS beside it, least squares in metres in place of bins. Scores over all known
/// pixels together (Eigen et al., arXiv:1406.2283, section 4), d being the depth and d' the predicted one: `rmse`, the root of
/// the mean of (d - d')², in metres; `abs_rel`, the mean of |d - d'| / d; `delta1`, the share with
/// max(d / d', d' / d) < 1.25. Pixels whose depth is 0 or not a number count nowhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Depth {
    /// Training images with depth.
    #[schemars(range(max = 1_000_000_000))]
    pub train_samples: NonZeroUsize,
    /// Test images with depth.
    #[schemars(range(max = 1_000_000_000))]
    pub test_samples: NonZeroUsize,
    /// Weight of the squared norm of the map's weights.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1_000_000))]
    pub l2: f64,
}

impl Default for Depth {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self { train_samples: number(256), test_samples: number(128), l2: 1e-3 }
    }
}

/// Mean depth of every patch over its known pixels; none where there are none.
fn of_patches(depth: &[f32], size: ImageSize, features: &Features) -> Vec<Option<f64>> {
    let mut sums = vec![(0.0, 0u32); features.grid.patches()];
    for (i, &d) in depth.iter().enumerate().filter(|(_, d)| known(**d)) {
        let sum = &mut sums[patch_of(i, size, features.grid)];
        *sum = (sum.0 + f64::from(d), sum.1 + 1);
    }
    sums.into_iter().map(|(sum, n)| (n > 0).then(|| sum / f64::from(n))).collect()
}

fn known(depth: f32) -> bool {
    depth > 0.0 && depth.is_finite()
}

/// A linear map to one number.
struct Map {
    weights: Vec<f64>,
    bias: f64,
    /// The least and the greatest number that it was fitted to.
    range: [f64; 2],
}

impl Map {
    /// The least mean of squared errors and `l2` times the squared weights; `pairs` gives the rows of an image, `[P, D]`, and
    /// their numbers.
    fn fit(
        d: usize,
        images: usize,
        l2: f64,
        pairs: &dyn Fn(usize) -> Result<(Tensor, Vec<Option<f64>>)>,
    ) -> Result<Self> {
        // The last column is the number, and behind it a one: all sums in one product.
        let mut products = Mat::<f64>::zeros(d + 2, d + 2);
        let mut range = [f64::INFINITY, f64::NEG_INFINITY];
        for image in 0..images {
            let (x, y) = pairs(image)?;
            let x = x.as_slice::<f64>();
            let rows: Vec<(usize, f64)> = y.iter().enumerate().filter_map(|(i, y)| Some((i, (*y)?))).collect();
            range = rows.iter().fold(range, |[low, high], (_, y)| [low.min(*y), high.max(*y)]);
            let at = |i: usize, k: usize| match k {
                k if k < d => x[rows[i].0 * d + k],
                k if k == d => rows[i].1,
                _ => 1.0,
            };
            let rows = Mat::from_fn(rows.len(), d + 2, at);
            products += rows.transpose() * &rows;
        }
        let n = products[(d + 1, d + 1)];
        let mean = |k: usize| products[(d + 1, k)] / n;
        let centred = |a: usize, b: usize| products[(a, b)] / n - mean(a) * mean(b);
        let normal = Mat::from_fn(d, d, |a, b| centred(a, b) + if a == b { l2 } else { 0.0 });
        let right = Mat::from_fn(d, 1, |a, _| centred(a, d));
        let degenerate = |_| Error::user("probe `depth`: the features are not finite", "see the run's health lines");
        let solved = normal.llt(Side::Lower).map_err(degenerate)?.solve(&right);
        let weights: Vec<f64> = (0..d).map(|k| solved[(k, 0)]).collect();
        let bias = mean(d) - weights.iter().enumerate().map(|(k, w)| w * mean(k)).sum::<f64>();
        Ok(Self { weights, bias, range })
    }

    /// The number of every row of `[n, D]`.
    fn of(&self, x: &Tensor) -> Vec<f32> {
        let number = |row: &[f64]| {
            let sum = row.iter().zip(&self.weights).map(|(x, w)| x * w).sum::<f64>() + self.bias;
            sum.clamp(self.range[0], self.range[1]) as f32
        };
        x.as_slice::<f64>().chunks(self.weights.len()).map(number).collect()
    }
}

/// Squared error, relative error, whether it is within a quarter, and one, summed over the known pixels of an image.
fn errors(truth: &[f32], predicted: &[f32]) -> Vec<f64> {
    let mut sums = vec![0.0; 4];
    for (d, p) in truth.iter().zip(predicted).filter(|(d, _)| known(**d)) {
        let (d, p) = (f64::from(*d), f64::from(*p));
        let of = [(d - p).powi(2), (d - p).abs() / d, f64::from(u8::from((d / p).max(p / d) < 1.25)), 1.0];
        sums.iter_mut().zip(of).for_each(|(sum, x)| *sum += x);
    }
    sums
}

impl Probe for Depth {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let size = context.image_size;
        let [train, test] = draw_two(context, self.train_samples.get(), self.test_samples.get());
        let train = Look::at(context.train, &train).features(context)?;
        let test = Look::at(context.test, &test).features(context)?;
        let deep = |f: &Features| f.truth.iter().any(|t| t.depth.iter().flatten().any(|d| known(*d)));
        if !deep(&train) || !deep(&test) {
            let help = "use a dataset with depth (`scenes`, or `image_folder` with `depth`), or take the probe out";
            return Err(Error::user("probe `depth`: no image has a pixel of known depth", help));
        }
        let d = train.patches.last_dim();
        let standardization = Standardization::of(train.patches.as_slice(), d);
        let rows =
            |features: &Features, image: usize| standardization.apply(&features.patches.narrow(image, 1)?, DType::F64);
        let pairs = |image: usize| -> Result<(Tensor, Vec<Option<f64>>)> {
            let targets = match &train.truth[image].depth {
                Some(depth) => of_patches(depth, size, &train),
                None => Vec::new(),
            };
            Ok((rows(&train, image)?, targets))
        };
        let map = Map::fit(d, train.truth.len(), self.l2, &pairs)?;
        let up = Upsample::new(size, test.grid);
        let predicted = |image: usize| -> Result<Vec<f32>> {
            let patches = map.of(&rows(&test, image)?);
            Ok((0..size.pixels()).map(|i| up.at(i, |patch| patches[patch])).collect())
        };
        let of_image = |image: usize| -> Result<Option<Vec<f64>>> {
            let Some(truth) = &test.truth[image].depth else { return Ok(None) };
            Ok(Some(errors(truth, &predicted(image)?)))
        };
        let images: Vec<Option<Vec<f64>>> =
            (0..test.truth.len()).into_par_iter().map(of_image).collect::<Result<_>>()?;
        if let Some(show) = context.show {
            for (image, truth) in test.truth.iter().enumerate().take(pictures::MOST) {
                let Some(truth) = &truth.depth else { continue };
                let range = truth.iter().filter(|d| known(**d));
                let range = range.fold([f32::INFINITY, 0.0f32], |[near, far], &d| [near.min(d), far.max(d)]);
                let index = test.sources[image].0;
                show(Picture {
                    caption: context.test.describe(index),
                    panels: vec![
                        pictures::panel("image", pictures::image(context.test, index, context.image_size)?),
                        pictures::depth("depth", truth, size.width, range),
                        pictures::depth("predicted", &predicted(image)?, size.width, range),
                    ],
                });
            }
        }
        let images: Arc<[Vec<f64>]> = images.into_iter().flatten().collect();
        let score = |name: &'static str, of: fn(&[f64]) -> f64| {
            Score::of(name, Parts { images: images.clone(), score: Arc::new(of) })
        };
        Ok(vec![
            score("rmse", |sum| (sum[0] / sum[3]).sqrt()),
            score("abs_rel", |sum| sum[1] / sum[3]),
            score("delta1", |sum| sum[2] / sum[3]),
        ])
    }

    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Depth]
    }

    fn images(&self) -> usize {
        self.train_samples.get().saturating_add(self.test_samples.get())
    }
}

plugin!(Probe, "depth", Depth);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn depth_is_read_off_features_that_know_it() {
        // An object stands at 2 metres, the background at 4, some of it unknown.
        let data = Halves { len: 90, width: 32, height: 32 };
        let values = |model| run(&Depth { l2: 1e-6, ..Depth::default() }, &data, &data, model);
        let known = values(&perfect);
        assert!(known[2].value > 0.9 && known[0].value < 0.6, "{known:?}");
        // Nothing known: the mean, 3 metres or so, which is off by one.
        let unknown = values(&random);
        assert!((unknown[0].value - 1.0).abs() < 0.1 && unknown[2].value < 0.1, "{unknown:?}");
    }
}
