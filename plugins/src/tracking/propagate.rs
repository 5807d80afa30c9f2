//! Labels carried from patch to patch.

use dinolab_core::contract::{Grid, ImageSize};
use dinolab_core::{Result, Tensor};
use rayon::prelude::*;

use super::Tracking;
use crate::segmentation::Upsample;

/// Shares of the labels of every patch, `[P, labels]`, for every frame: of the first by the pixel under the middle of a patch. Patch
/// features are `[T, P, D]`, of length one.
pub(super) fn propagate(
    probe: &Tracking,
    patches: &Tensor,
    first: &[u8],
    size: ImageSize,
    grid: Grid,
    labels: usize,
) -> Result<Vec<Vec<f32>>> {
    let (frames, p, d) = (patches.dim(0), patches.dim(1), patches.dim(2));
    let of_frame = |t: usize| patches.narrow(t, 1)?.reshape(&[p, d]);
    let middle = |patch: usize| {
        let along = |i: usize, n: usize, side: usize| (2 * i + 1) * side / (2 * n);
        let row = along(patch / grid.width, grid.height, size.height);
        row * size.width + along(patch % grid.width, grid.width, size.width)
    };
    let mut begin = vec![0.0f32; p * labels];
    for patch in 0..p {
        // What counts nowhere is taken for background.
        let label = usize::from(first[middle(patch)]);
        begin[patch * labels + if label < labels { label } else { 0 }] = 1.0;
    }
    let mut carried = vec![begin];
    for t in 1..frames {
        let before = t.saturating_sub(probe.last_frames).max(1)..t;
        let sources: Vec<usize> = [0].into_iter().chain(before).collect();
        let own = of_frame(t)?;
        let similar = sources.iter().map(|&s| own.matmul_t(&of_frame(s)?)).collect::<Result<Vec<_>>>()?;
        let similar: Vec<&[f32]> = similar.iter().map(Tensor::as_slice::<f32>).collect();
        let of_patch = |patch: usize| {
            let near = |at: usize, n: usize| at.saturating_sub(probe.radius)..(at + probe.radius + 1).min(n);
            let (row, column) = (patch / grid.width, patch % grid.width);
            let mut found: Vec<(f32, usize, usize)> = Vec::new();
            for (source, similar) in similar.iter().enumerate() {
                for other in near(row, grid.height) {
                    let others = near(column, grid.width).map(|x| other * grid.width + x);
                    found.extend(others.map(|other| (similar[patch * p + other], source, other)));
                }
            }
            let nearer = |a: &(f32, usize, usize), b: &(f32, usize, usize)| {
                b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2)))
            };
            let k = probe.top_k.get().min(found.len());
            found.select_nth_unstable_by(k - 1, nearer);
            found.truncate(k);
            // In a fixed order, so that sums are the same everywhere.
            found.sort_unstable_by(nearer);
            let mut shares = vec![0.0f64; labels];
            let (mut total, nearest) = (0.0, f64::from(found[0].0));
            for (s, source, other) in found {
                // The nearest has weight 1 at every temperature.
                let weight = ((f64::from(s) - nearest) / probe.temperature).exp();
                total += weight;
                let theirs = &carried[sources[source]][other * labels..][..labels];
                shares.iter_mut().zip(theirs).for_each(|(share, x)| *share += weight * f64::from(*x));
            }
            shares.into_iter().map(|share| (share / total) as f32).collect::<Vec<f32>>()
        };
        let all: Vec<Vec<f32>> = (0..p).into_par_iter().map(of_patch).collect();
        carried.push(all.concat());
    }
    Ok(carried)
}

/// The label of every pixel: shares are brought there, each label's stretched to between 0 and 1, and the greatest is taken.
pub(super) fn answers(shares: &[f32], size: ImageSize, grid: Grid, labels: usize) -> Vec<u8> {
    let up = Upsample::new(size, grid);
    let stretched = |label: usize| -> Vec<f32> {
        let mut all: Vec<f32> = (0..size.pixels()).map(|i| up.at(i, |patch| shares[patch * labels + label])).collect();
        let most = all.iter().copied().fold(f32::MIN, f32::max);
        if most > 0.0 {
            let least = all.iter().copied().fold(f32::MAX, f32::min);
            let range = most - least;
            all.iter_mut().for_each(|x| *x = (*x - least) / if range > 0.0 { range } else { 1.0 });
        }
        all
    };
    let all: Vec<Vec<f32>> = (0..labels).into_par_iter().map(stretched).collect();
    let best = |i: usize| (1..labels).fold(0, |best, label| if all[label][i] > all[best][i] { label } else { best });
    (0..size.pixels()).map(|i| best(i) as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_follows_its_feature_and_not_farther_than_it_may() {
        // Four patches in a row; the object's feature moves one to the right each frame.
        let (grid, size) = (Grid { height: 1, width: 4 }, ImageSize { width: 8, height: 2 });
        let frame = |at: usize| (0..4).flat_map(move |p| if p == at { [1.0f32, 0.0] } else { [0.0, 1.0] });
        let values: Vec<f32> = (0..3).flat_map(frame).collect();
        let patches = Tensor::from_slice(&values, &[3, 4, 2]).unwrap();
        let first: Vec<u8> = (0..16).map(|i| u8::from(i % 8 < 2)).collect();
        let carried = |radius: usize| {
            let probe = Tracking { radius, top_k: std::num::NonZeroUsize::MIN, ..Tracking::default() };
            propagate(&probe, &patches, &first, size, grid, 2).unwrap()
        };
        let far = carried(3);
        assert_eq!(far[2], [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
        let object = |i: usize| u8::from((4..6).contains(&(i % 8)));
        let found = answers(&far[2], size, grid, 2);
        assert_eq!(found, (0..16).map(object).collect::<Vec<_>>());
        // Standing still, it is lost.
        assert!(carried(0)[2].chunks(2).all(|shares| shares[0] + shares[1] == 1.0) && carried(0)[1][3] == 0.0);
    }
}
