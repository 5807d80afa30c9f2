//! Probe `dse`: is there structure in the patch features, read without labels?

use std::num::NonZeroUsize;

use dinolab_core::contract::{Probe, ProbeContext, Score};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, Error, Result};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::probe_data::{draw_test, Look};
use crate::spectrum;

/// Dense representation structure estimator: do patches form groups far apart, and use many dimensions?
///
/// DSE (Dai et al., arXiv:2510.17299) falls with dense scores in long training without reading a label. The authors' released
/// code (EldercatSAM/SSL-Degradation, `estimator.py`) and their equations differ in scale; this is the code, on L2-normalised
/// patch features: `dse = inter - (intra_image + intra_batch) / 2 + dim`. With `m` the mean distance of a patch to the mean of
/// all:
///
/// - `inter`: patches of `batch_images` images are put into `batch_clusters` groups by k-means; mean distance of a patch to the
///   nearest centre of a group that is not its own, over `m`.
/// - `intra_batch`, `intra_image`: mean radius of those groups, and of `image_clusters` groups of the patches of one image: the sum
///   of the singular values of a group's n patches about their mean, over `sqrt(max(n - 1, D))`, over `m`.
/// - `dim`: effective rank of one patch an image, over its greatest possible value, averaged over random choices.
///
/// The weight of `dim` is 1, as in the code. The paper's lambda, the ratio of standard deviations of `inter - intra` and `dim`
/// over the checkpoints of a run, is known only after it: its parts are scores of their own, so that it can be taken then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Dse {
    /// Test images to measure.
    #[schemars(range(max = 1_000_000_000))]
    pub samples: NonZeroUsize,
    /// Groups among the patches of one image.
    #[schemars(range(min = 2, max = 1000))]
    pub image_clusters: usize,
    /// Images whose patches are grouped together.
    #[schemars(range(max = 10_000))]
    pub batch_images: NonZeroUsize,
    /// Groups among the patches of `batch_images` images.
    #[schemars(range(min = 2, max = 10_000))]
    pub batch_clusters: usize,
}

impl Default for Dse {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self { samples: number(64), image_clusters: 3, batch_images: number(8), batch_clusters: 24 }
    }
}

/// Rounds of k-means, and the movement of all centres at which it ends, as in the released code.
const ROUNDS: usize = 20;
const STILL: f64 = 1e-4;

impl Dse {
    /// Why `p` patches an image of `n` images are too few, if they are.
    fn too_few(&self, p: usize, n: usize) -> Option<(String, String)> {
        let images = self.batch_images.get().min(n);
        let (batch, [in_image, in_batch]) = (images.saturating_mul(p), [self.image_clusters, self.batch_clusters]);
        (batch <= in_batch || p <= in_image).then(|| {
            let problem = format!(
                "cannot put {p} patches of an image and {batch} of {images} images into {in_image} and {in_batch} groups"
            );
            (problem, "lower `image_clusters` and `batch_clusters`, or measure more images".into())
        })
    }
}

impl Probe for Dse {
    fn unfit_patches(&self, patches: usize) -> Option<(String, String)> {
        self.too_few(patches, self.samples.get())
    }

    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let test = Look::at(context.test, &draw_test(context, self.samples.get())).features(context)?;
        let (n, p, d) = (test.patches.dim(0), test.patches.dim(1), test.patches.last_dim());
        let values = test.patches.l2_normalize(1e-12)?.to_f64_vec();
        let rows = spectrum::rows(&values, d);
        let (batch, images) = (self.batch_images.get().min(n) * p, self.image_clusters);
        if let Some((problem, help)) = self.too_few(p, n) {
            return Err(Error::user(format!("probe `dse` {problem}"), help));
        }
        let center = mean(&rows);
        let scale = rows.iter().map(|row| distance(row, &center)).sum::<f64>() / rows.len() as f64;
        if scale == 0.0 {
            let help = "the run has collapsed; see its health lines";
            return Err(Error::user("probe `dse`: all patches have the same feature, so there is no structure", help));
        }
        let seed = context.seed;
        let draw = |purpose: u64, index: usize| Rng::new(seed, Stream::Probe, purpose, index as u64);
        let of_image = |(i, rows): (usize, &[&[f64]])| -> Result<Option<f64>> {
            let clusters = k_means(rows, images, &mut draw(2, i));
            Ok(average(&radii(rows, &clusters)?))
        };
        let of_batch = |(i, rows): (usize, &[&[f64]])| -> Result<(f64, Vec<f64>)> {
            let clusters = k_means(rows, self.batch_clusters, &mut draw(3, i));
            Ok((clusters.nearest_other(rows), radii(rows, &clusters)?))
        };
        let in_images: Vec<Option<f64>> = rows.par_chunks(p).enumerate().map(of_image).collect::<Result<_>>()?;
        // A last batch with too few patches for as many groups is left out.
        let batches = rows.par_chunks(batch).enumerate().filter(|(_, rows)| rows.len() > self.batch_clusters);
        let in_batches: Vec<(f64, Vec<f64>)> = batches.map(of_batch).collect::<Result<_>>()?;
        // A radius of 1, as in the released code, where no group has two patches.
        let in_images: Vec<f64> = in_images.into_iter().map(|radius| radius.unwrap_or(1.0)).collect();
        let intra_image = average(&in_images).unwrap_or(1.0) / scale;
        let all: Vec<f64> = in_batches.iter().flat_map(|(_, radii)| radii.iter().copied()).collect();
        let intra_batch = average(&all).unwrap_or(1.0) / scale;
        let apart: Vec<f64> = in_batches.iter().map(|(distance, _)| *distance).collect();
        let inter = average(&apart).unwrap_or(0.0) / scale;
        let orders: Vec<Vec<u32>> = (0..n).map(|i| draw(4, i).permutation(p)).collect();
        let rank = |place: usize| -> Result<f64> {
            let independent: Vec<&[f64]> =
                orders.iter().enumerate().map(|(i, order)| rows[i * p + order[place] as usize]).collect();
            Ok(spectrum::effective_rank(&spectrum::singular_values(&independent)?, 1e-12) / n.min(d) as f64)
        };
        let ranks: Vec<f64> = (0..p).into_par_iter().map(rank).collect::<Result<_>>()?;
        let dim = average(&ranks).unwrap_or(0.0);
        let score = |name: &'static str, value| Score::new(name, value);
        Ok(vec![
            score("dse", inter - 0.5 * (intra_image + intra_batch) + dim),
            score("inter", inter),
            score("intra_image", intra_image),
            score("intra_batch", intra_batch),
            score("dim", dim),
        ])
    }

    fn images(&self) -> usize {
        self.samples.get()
    }
}

plugin!(Probe, "dse", Dse);

fn average(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

fn mean(rows: &[&[f64]]) -> Vec<f64> {
    let mut sum = vec![0.0; rows[0].len()];
    rows.iter().for_each(|row| sum.iter_mut().zip(*row).for_each(|(sum, x)| *sum += x));
    sum.into_iter().map(|x| x / rows.len() as f64).collect()
}

/// Rows in groups.
struct Clusters {
    /// The group of every row.
    of: Vec<usize>,
    /// The centre of every group.
    centers: Vec<Vec<f64>>,
}

impl Clusters {
    fn members<'a>(&self, rows: &[&'a [f64]], group: usize) -> Vec<&'a [f64]> {
        rows.iter().zip(&self.of).filter(|(_, of)| **of == group).map(|(row, _)| *row).collect()
    }

    /// Mean distance of a row to the nearest centre of another group.
    fn nearest_other(&self, rows: &[&[f64]]) -> f64 {
        let other = |(row, of): (&&[f64], &usize)| {
            let others = self.centers.iter().enumerate().filter(|(group, _)| group != of);
            others.map(|(_, center)| distance(row, center)).fold(f64::INFINITY, f64::min)
        };
        rows.iter().zip(&self.of).map(other).sum::<f64>() / rows.len() as f64
    }
}

/// `k` groups of rows: centres are drawn with a probability that grows with a row's distance to those there are, then moved to
/// the mean of the rows that are nearest to them. A group that loses all rows keeps its centre.
fn k_means(rows: &[&[f64]], k: usize, rng: &mut Rng) -> Clusters {
    let mut centers = vec![rows[rng.below(rows.len())].to_vec()];
    let mut nearest = vec![f64::INFINITY; rows.len()];
    while centers.len() < k {
        let newest = &centers[centers.len() - 1];
        nearest.iter_mut().zip(rows).for_each(|(nearest, row)| *nearest = nearest.min(distance(row, newest)));
        let mut left = rng.unit() * nearest.iter().sum::<f64>();
        let drawn = nearest.iter().position(|distance| {
            left -= distance;
            left < 0.0
        });
        centers.push(rows[drawn.unwrap_or(rows.len() - 1)].to_vec());
    }
    let mut of = vec![0; rows.len()];
    for _ in 0..ROUNDS {
        for (of, row) in of.iter_mut().zip(rows) {
            let by_distance =
                |a: &usize, b: &usize| distance(row, &centers[*a]).total_cmp(&distance(row, &centers[*b]));
            *of = (0..k).min_by(by_distance).expect("there are groups");
        }
        let grouped = Clusters { of, centers };
        let moved = |group: usize| match grouped.members(rows, group) {
            none if none.is_empty() => grouped.centers[group].clone(),
            members => mean(&members),
        };
        let next: Vec<Vec<f64>> = (0..k).map(moved).collect();
        let shift = next.iter().zip(&grouped.centers).map(|(a, b)| distance(a, b).powi(2)).sum::<f64>().sqrt();
        (of, centers) = (grouped.of, next);
        if shift < STILL {
            break;
        }
    }
    Clusters { of, centers }
}

/// The radius of every group of two rows or more.
fn radii(rows: &[&[f64]], clusters: &Clusters) -> Result<Vec<f64>> {
    let members = (0..clusters.centers.len()).map(|group| clusters.members(rows, group));
    let radius = |members: Vec<&[f64]>| -> Result<f64> {
        let (center, n) = (mean(&members), members.len());
        let centred: Vec<Vec<f64>> =
            members.iter().map(|row| row.iter().zip(&center).map(|(x, c)| x - c).collect()).collect();
        let centred: Vec<&[f64]> = centred.iter().map(Vec::as_slice).collect();
        Ok(spectrum::singular_values(&centred)?.iter().sum::<f64>() / ((n - 1).max(center.len()) as f64).sqrt())
    };
    members.filter(|members| members.len() > 1).map(radius).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn structured_features_score_higher_than_noise() {
        let data = Halves { len: 64, width: 32, height: 32 };
        let probe = Dse { batch_clusters: 4, image_clusters: 2, ..Dse::default() };
        let noisy = |class: usize, rng: &mut Rng, feature: &mut [f32]| {
            perfect(class, rng, feature);
            feature.iter_mut().for_each(|x| *x += 0.02 * rng.normal() as f32);
        };
        let (structured, noise) = (run(&probe, &data, &data, &noisy), run(&probe, &data, &data, &random));
        assert!(structured[0].value > noise[0].value + 0.5, "{structured:?} {noise:?}");
        // Groups far apart and narrow; of noise they are wide.
        assert!(structured[1].value > noise[1].value && structured[3].value < noise[3].value);
    }

    #[test]
    fn k_means_finds_groups_that_are_far_apart() {
        let center = |i: usize| [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]][i % 3];
        let values: Vec<f64> = (0..30).flat_map(|i| center(i).map(|x| x + 0.01 * (i / 3) as f64)).collect();
        let rows = spectrum::rows(&values, 2);
        let clusters = k_means(&rows, 3, &mut Rng::new(0, Stream::Probe, 0, 0));
        assert!((0..30).all(|i| clusters.of[i] == clusters.of[i % 3]));
        assert!((clusters.nearest_other(&rows) - 10.0).abs() < 0.1);
    }
}
