//! J and F of DAVIS (Perazzi et al., CVPR 2016), by the rules of its toolkit.

use dinolab_core::contract::ImageSize;

/// How far a point of a contour may lie from the other, in diagonals of the image.
const WITHIN: f64 = 0.008;

/// Intersection over union; of nothing and nothing it is 1.
pub(super) fn overlap(truth: &[bool], given: &[bool]) -> f64 {
    let pairs = || truth.iter().zip(given);
    let union = pairs().filter(|(t, g)| **t || **g).count();
    let common = pairs().filter(|(t, g)| **t && **g).count();
    if union == 0 {
        1.0
    } else {
        common as f64 / union as f64
    }
}

/// The F-measure of the contours: the harmonic mean of the shares of each that lie near the other.
pub(super) fn contour(truth: &[bool], given: &[bool], size: ImageSize) -> f64 {
    let reach = (WITHIN * (size.width as f64).hypot(size.height as f64)).ceil() as i64;
    let (truth, given) = (edge(truth, size), edge(given, size));
    let near = |points: &[bool], others: &[bool]| {
        let wide = grown(others, size, reach);
        let all = points.iter().filter(|p| **p).count();
        (all, points.iter().zip(&wide).filter(|(p, w)| **p && **w).count() as f64 / all.max(1) as f64)
    };
    let ((given_points, precision), (true_points, recall)) = (near(&given, &truth), near(&truth, &given));
    match (given_points, true_points) {
        (0, 0) => 1.0,
        (0, _) | (_, 0) => 0.0,
        _ if precision + recall == 0.0 => 0.0,
        _ => 2.0 * precision * recall / (precision + recall),
    }
}

/// The pixels whose right, lower or lower right neighbour is on the other side.
fn edge(mask: &[bool], size: ImageSize) -> Vec<bool> {
    let at = |x: usize, y: usize| mask[y.min(size.height - 1) * size.width + x.min(size.width - 1)];
    let of = |i: usize| {
        let (x, y) = (i % size.width, i / size.width);
        [(x + 1, y), (x, y + 1), (x + 1, y + 1)].into_iter().any(|(right, below)| at(x, y) != at(right, below))
    };
    (0..mask.len()).map(of).collect()
}

/// Everything within `reach` pixels of a point.
fn grown(points: &[bool], size: ImageSize, reach: i64) -> Vec<bool> {
    let (width, height) = (size.width as i64, size.height as i64);
    let disc: Vec<(i64, i64)> = (-reach..=reach)
        .flat_map(|dy| (-reach..=reach).map(move |dx| (dx, dy)))
        .filter(|(dx, dy)| dx * dx + dy * dy <= reach * reach)
        .collect();
    let mut out = vec![false; points.len()];
    for i in points.iter().enumerate().filter(|(_, p)| **p).map(|(i, _)| i as i64) {
        for (x, y) in disc.iter().map(|(dx, dy)| (i % width + dx, i / width + dy)) {
            if (0..width).contains(&x) && (0..height).contains(&y) {
                out[(y * width + x) as usize] = true;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shifted_square_overlaps_in_part_and_its_contour_is_near() {
        let size = ImageSize::square(100);
        let square = |left: usize| -> Vec<bool> {
            let inside = |i: usize| (left..left + 40).contains(&(i % 100)) && (30..70).contains(&(i / 100));
            (0..10_000).map(inside).collect()
        };
        assert_eq!((overlap(&square(10), &square(10)), contour(&square(10), &square(10), size)), (1.0, 1.0));
        // 38 of 42 columns in common; two pixels are within the two that are allowed.
        assert!((overlap(&square(10), &square(12)) - 38.0 / 42.0).abs() < 1e-12);
        assert_eq!(contour(&square(10), &square(12), size), 1.0);
        let far = contour(&square(10), &square(40), size);
        assert!(far > 0.1 && far < 0.6, "{far}");
        let none = vec![false; 10_000];
        assert_eq!(
            (overlap(&none, &none), contour(&none, &none, size), contour(&square(10), &none, size)),
            (1.0, 1.0, 0.0)
        );
    }
}
