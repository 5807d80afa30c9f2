//! Random inputs for property tests with crate `proptest`: features as they are in health and in sickness, masks, crops.

use std::ops::Range;

use proptest::prelude::*;

use super::case::normal;
use crate::contract::Grid;
use crate::rng::{Rng, Stream};
use crate::Tensor;

/// How the rows of a feature batch lie to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Features {
    /// Independent standard normal numbers.
    Healthy,
    /// All rows are one row: what a collapsed model gives.
    Collapsed,
    /// Rows of length 1, each orthogonal to the `D - 1` rows before it.
    Orthogonal,
    /// Every row occurs twice: two views that a model cannot tell apart.
    Duplicated,
    /// About 1e6.
    Huge,
    /// About 1e-6.
    Tiny,
    /// One number is NaN.
    NonFinite,
}

impl Features {
    /// All that a loss should survive: finite features, however sick.
    pub const FINITE: [Self; 6] =
        [Self::Healthy, Self::Collapsed, Self::Orthogonal, Self::Duplicated, Self::Huge, Self::Tiny];

    /// Such a batch: `[rows, d]`, f64.
    pub fn batch(self, seed: u64, rows: usize, d: usize) -> Tensor {
        let drawn = normal(seed, 0, &[rows, d]).to_f64_vec();
        let at = |row: usize, column: usize| drawn[row * d + column];
        let of = |row: usize, column: usize| match self {
            Self::Healthy => at(row, column),
            Self::Collapsed => at(0, column),
            Self::Orthogonal => f64::from(u8::from(row % d == column)),
            Self::Duplicated => at(row / 2, column),
            Self::Huge => 1e6 * at(row, column),
            Self::Tiny => 1e-6 * at(row, column),
            Self::NonFinite if (row, column) == (seed as usize % rows, 0) => f64::NAN,
            Self::NonFinite => at(row, column),
        };
        let values: Vec<f64> = (0..rows * d).map(|i| of(i / d, i % d)).collect();
        Tensor::from_slice(&values, &[rows, d]).expect("a number for every place")
    }
}

/// Healthy feature batches `[rows, d]`.
pub fn features(rows: Range<usize>, d: Range<usize>) -> impl Strategy<Value = Tensor> {
    (rows, d, any::<u64>()).prop_map(|(rows, d, seed)| Features::Healthy.batch(seed, rows, d))
}

/// Feature batches of every finite kind, with the kind.
pub fn finite_features(rows: Range<usize>, d: Range<usize>) -> impl Strategy<Value = (Features, Tensor)> {
    let kind = proptest::sample::select(Features::FINITE.to_vec());
    (kind, rows, d, any::<u64>()).prop_map(|(kind, rows, d, seed)| (kind, kind.batch(seed, rows, d)))
}

/// Patch grids, square or not.
pub fn grids(side: Range<usize>) -> impl Strategy<Value = Grid> {
    (side.clone(), side).prop_map(|(height, width)| Grid { height, width })
}

/// Masks with their grid: a share of the patches hidden, drawn uniformly, row-major.
pub fn masks(side: Range<usize>) -> impl Strategy<Value = (Grid, Vec<bool>)> {
    (grids(side), 0.0..1.0, any::<u64>()).prop_map(|(grid, share, seed)| {
        let mut rng = Rng::new(seed, Stream::Plugin, 0, 0);
        let hidden = (grid.patches() as f64 * share) as usize;
        let mut mask: Vec<bool> = (0..grid.patches()).map(|patch| patch < hidden).collect();
        rng.shuffle(&mut mask);
        (grid, mask)
    })
}

/// Normalised crops `[B, 3, h, w]` (f64) whose sides are multiples of `patch`.
pub fn crops(images: Range<usize>, patch: usize, side: Range<usize>) -> impl Strategy<Value = Tensor> {
    (images, grids(side), any::<u64>())
        .prop_map(move |(b, grid, seed)| normal(seed, 1, &[b, 3, patch * grid.height, patch * grid.width]))
}
