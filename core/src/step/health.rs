//! Known sicknesses of self-supervised training, measured on the teacher's features.

use crate::ops::row_entropies;
use crate::{Result, Tensor};

use super::outputs::TeacherOf;
use super::Declared;

/// What a step's features look like: each number names a sickness when it goes the wrong way.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Health {
    /// Mean standard deviation over images of the L2-normalised CLS, times the root of the width: 1 when spread evenly,
    /// 0 when the output is constant.
    pub feature_std: f64,
    /// Effective rank of the centred CLS features over the batch, `(sum l)^2 / sum l^2` of their covariance's
    /// eigenvalues l.
    pub effective_rank: f64,
    /// Mean cosine between a crop's CLS and its patches: it creeps up when dense features are lost.
    pub cls_patch_cosine: f64,
    /// Losses whose targets are distributions over K prototypes: (name, entropy of the mean target / ln K, mean entropy of a target / ln K). First near 1 and
    /// second near 1: uniform collapse; first near 0: one-hot collapse.
    pub targets: Vec<(String, f64, f64)>,
    /// Different samples of the dataset whose CLS coincide: copies, or pictures without content.
    pub coinciding: Vec<(usize, usize)>,
}

/// CLS features this much closer than the average pair (in squared distance) coincide.
const COINCIDE: f64 = 1e-4;

impl Health {
    /// `samples` are the images' indices in the dataset.
    pub(super) fn measure(teacher: &TeacherOf<'_>, model: &Declared, samples: &[usize]) -> Result<Self> {
        let features = teacher.features.expect("a step whose health is measured runs the teacher");
        let (n, d) = (features.cls.dim(0), features.cls.dim(1));
        // In bf16 images that differ a little would coincide.
        let cls = features.cls.detach().cast(features.cls.dtype().wide())?.l2_normalize(1e-12)?;
        let mean = cls.mean_axis(0)?.to_f64_vec();
        let values = cls.to_f64_vec();
        let centred: Vec<f64> = values.iter().enumerate().map(|(i, x)| x - mean[i % d]).collect();
        let trace = centred.iter().map(|x| x * x).sum::<f64>();
        // The non-zero eigenvalues of the covariance are those of the Gram matrix of the rows.
        let rows = Tensor::from_f64(&centred, &[n, d], cls.dtype())?;
        let products = rows.matmul_t(&rows)?;
        let coinciding = coinciding(&products.to_f64_vec(), n, samples, COINCIDE * 2.0 * trace / n as f64);
        let squares = products.square()?.sum()?.item();
        let patches = features.patches.detach().l2_normalize(1e-12)?.mean_axis(1)?.cast(cls.dtype())?;
        let cosine = patches.mul(&cls)?.sum()?.item() / n as f64;
        let mut targets = Vec::new();
        for (declared, t) in model.losses.iter().zip(&teacher.targets) {
            let distribution = declared.needs.targets.is_some_and(|spec| spec.distribution);
            let Some(t) = t.filter(|t| distribution && t.dim(0) > 0) else { continue };
            let (rows, k) = (t.dim(0), t.dim(1));
            let of_mean = row_entropies(&t.detach().mean_axis(0)?.reshape(&[1, k])?)?[0];
            let mean_of = row_entropies(t)?.into_iter().sum::<f64>() / rows as f64;
            let uniform = (k as f64).ln();
            targets.push((declared.name.clone(), of_mean / uniform, mean_of / uniform));
        }
        Ok(Self {
            feature_std: (trace / n as f64).sqrt(),
            effective_rank: if squares > 0.0 { trace * trace / squares } else { 0.0 },
            cls_patch_cosine: cosine,
            targets,
            coinciding,
        })
    }
}

/// Pairs of different samples whose squared distance is below `limit`, given the products `[n, n]` of all rows. Only
/// the first crop of every image is looked at.
fn coinciding(products: &[f64], n: usize, samples: &[usize], limit: f64) -> Vec<(usize, usize)> {
    let at = |i: usize, j: usize| products[i * n + j];
    let pairs = (0..samples.len()).flat_map(|j| (0..j).map(move |i| (i, j)));
    let close = pairs.filter(|&(i, j)| samples[i] != samples[j] && at(i, i) + at(j, j) - 2.0 * at(i, j) < limit);
    close.map(|(i, j)| (samples[i], samples[j])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_different_samples_that_coincide_are_found() {
        // Four unit vectors in the plane: two the same, one of those once more as the same sample.
        let rows = [[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [1.0, 0.0]];
        let products: Vec<f64> =
            rows.iter().flat_map(|a| rows.iter().map(|b| a[0] * b[0] + a[1] * b[1]).collect::<Vec<f64>>()).collect();
        assert_eq!(coinciding(&products, 4, &[7, 8, 9, 7], 1e-6), [(7, 9), (9, 7)]);
    }
}
