//! Principal components of patch features: three as a colour, the first as foreground and background.

use dinolab_core::{Error, Result};
use faer::{Mat, Side};

use super::PatchView;

/// Scores of all patches of all views on the first three principal components, one basis for all views.
///
/// From the eigenvectors of the smaller of the two Gram matrices, features by features or patches by patches.
///
/// # Errors
/// If the features are not finite.
pub fn principal_scores(views: &[PatchView]) -> Result<Vec<[f64; 3]>> {
    let rows: Vec<&[f64]> = views.iter().flat_map(|v| (0..v.patches()).map(|p| v.patch(p))).collect();
    let dim = rows.first().map_or(0, |r| r.len());
    let mean: Vec<f64> = (0..dim).map(|d| rows.iter().map(|r| r[d]).sum::<f64>() / rows.len() as f64).collect();
    let centred = Mat::from_fn(rows.len(), dim, |i, d| rows[i][d] - mean[d]);
    if !centred.norm_l2().is_finite() {
        let help = "the run diverged; see its health lines";
        return Err(Error::user("patch features are not finite, so there is no picture of them", help));
    }
    let by_feature = dim <= rows.len();
    let gram = if by_feature { centred.transpose() * &centred } else { &centred * centred.transpose() };
    let eigen = gram.self_adjoint_eigen(Side::Lower).map_err(|e| {
        Error::user(format!("the principal components did not converge: {e:?}"), "the features may be degenerate")
    })?;
    let (values, vectors) = (eigen.S().column_vector(), eigen.U());
    let n = vectors.ncols();
    // Eigenvalues ascend.
    let scores = match by_feature {
        true => &centred * vectors.subcols(n.saturating_sub(3), n.min(3)),
        false => {
            let first = n.saturating_sub(3);
            Mat::from_fn(n, n.min(3), |i, k| vectors[(i, first + k)] * values[first + k].max(0.0).sqrt())
        }
    };
    let columns = scores.ncols();
    let score = |i: usize, k: usize| if k < columns { scores[(i, columns - 1 - k)] } else { 0.0 };
    Ok((0..rows.len()).map(|i| [score(i, 0), score(i, 1), score(i, 2)]).collect())
}

/// Flips components that run against the reference's: the sign of a principal component means nothing.
pub fn align_signs(scores: &mut [[f64; 3]], reference: &[[f64; 3]]) {
    for k in 0..3 {
        if scores.iter().zip(reference).map(|(a, b)| a[k] * b[k]).sum::<f64>() < 0.0 {
            scores.iter_mut().for_each(|s| s[k] = -s[k]);
        }
    }
}

/// Each component stretched from its 2nd to its 98th percentile, so that a few outliers do not take all contrast.
pub fn to_colors(scores: &[[f64; 3]]) -> Vec<[u8; 3]> {
    let range = |k: usize| {
        let mut values: Vec<f64> = scores.iter().map(|s| s[k]).collect();
        values.sort_by(f64::total_cmp);
        let at = |q: f64| values[(q * (values.len() - 1) as f64).round() as usize];
        (at(0.02), at(0.98))
    };
    let ranges = [range(0), range(1), range(2)];
    let channel = |s: &[f64; 3], k: usize| {
        let (low, high) = ranges[k];
        let share = if high > low { (s[k] - low) / (high - low) } else { 0.5 };
        (share.clamp(0.0, 1.0) * 255.0).round() as u8
    };
    scores.iter().map(|s| [channel(s, 0), channel(s, 1), channel(s, 2)]).collect()
}

/// Which patches are foreground by the first component, in a grid `width` patches wide: the scores are cut in two where
/// the variance between the parts is greatest (Otsu, 1979), and the part that covers less of the border is the
/// foreground.
pub fn foreground(scores: &[[f64; 3]], width: usize) -> Vec<bool> {
    let mut sorted: Vec<f64> = scores.iter().map(|s| s[0]).collect();
    sorted.sort_by(f64::total_cmp);
    let (n, total) = (sorted.len(), sorted.iter().sum::<f64>());
    let (mut below, mut best, mut threshold) = (0.0, f64::NEG_INFINITY, f64::INFINITY);
    for i in 1..n {
        below += sorted[i - 1];
        let gap = below / i as f64 - (total - below) / (n - i) as f64;
        let between = (i * (n - i)) as f64 * gap * gap;
        if sorted[i] > sorted[i - 1] && between > best {
            (best, threshold) = (between, sorted[i]);
        }
    }
    let height = n / width;
    let border = |p: usize| {
        let (y, x) = (p / width, p % width);
        y == 0 || x == 0 || y + 1 == height || x + 1 == width
    };
    let high: Vec<bool> = scores.iter().map(|s| s[0] >= threshold).collect();
    let on_border = (0..n).filter(|&p| border(p)).count();
    let high_on_border = (0..n).filter(|&p| border(p) && high[p]).count();
    high.into_iter().map(|h| h == (2 * high_on_border <= on_border)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::view;
    use super::*;

    #[test]
    fn principal_scores_order_directions_by_variance_and_ignore_the_mean() {
        // Independent patterns of sizes 3, 2 and 1 along the axes, far from the origin; with more features than
        // patches, the rest are constant.
        let bit = |p: usize, k: usize| if p >> k & 1 == 1 { 1.0 } else { -1.0 };
        for dim in [3, 20] {
            let v = view(2, 4, |p| {
                let mut x = vec![100.0 + 2.0 * bit(p, 1), -50.0 + 3.0 * bit(p, 0), 7.0 + bit(p, 2)];
                x.resize(dim, 1.0);
                x
            });
            let scores = principal_scores(&[v]).expect("the features are finite");
            for k in 0..3 {
                let size = 3.0 - k as f64;
                assert!(scores.iter().all(|s| (s[k].abs() - size).abs() < 1e-9), "component {k}: {scores:?}");
            }
        }
    }

    #[test]
    fn a_component_that_runs_against_the_first_arm_is_flipped() {
        let reference = [[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]];
        let mut scores = [[-3.0, 1.0, 0.0], [3.0, -1.0, 0.0]];
        align_signs(&mut scores, &reference);
        assert_eq!(scores, [[3.0, 1.0, 0.0], [-3.0, -1.0, 0.0]]);
    }

    #[test]
    fn the_foreground_is_the_part_away_from_the_border_whatever_the_sign() {
        let inside = |p: usize| (1..3).contains(&(p / 5)) && (2..4).contains(&(p % 5));
        let expected: Vec<bool> = (0..20).map(inside).collect();
        for sign in [1.0, -1.0] {
            let score = |p: usize| [sign * if inside(p) { 5.0 } else { -1.0 + 0.01 * p as f64 }, 0.0, 0.0];
            let scores: Vec<[f64; 3]> = (0..20).map(score).collect();
            assert_eq!(foreground(&scores, 5), expected);
        }
    }
}
