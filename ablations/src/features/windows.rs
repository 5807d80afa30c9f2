//! Large images, window by window.
//!
//! A model trained on small crops says little about an image shrunk to a square: small things vanish, shapes change.
//! Nor is it used to grids far larger than its crops, and attention costs the square of the patches. So a large image
//! is covered by overlapping windows at full resolution. The position encoding's box [-1, 1] slides along: every window
//! is a whole image to the model. Where windows overlap, features are averaged with weights that fall to the window's
//! border, so that no seam is seen and patches with much context count most.

/// A window in patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First column.
    pub left: usize,
    /// First row.
    pub top: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// Windows of at most `side` patches a side that cover a grid, overlapping by at least a quarter of a window.
pub fn cover(height: usize, width: usize, side: usize) -> Vec<Window> {
    let (rows, columns) = (starts(height, side), starts(width, side));
    let (h, w) = (height.min(side), width.min(side));
    rows.into_iter()
        .flat_map(|top| columns.iter().map(move |&left| Window { left, top, width: w, height: h }))
        .collect()
}

/// Where windows of `side` begin on an axis of `n`, evenly spread.
fn starts(n: usize, side: usize) -> Vec<usize> {
    let Some(rest) = n.checked_sub(side).filter(|&rest| rest > 0) else { return vec![0] };
    let step = (side - side / 4).max(1);
    let gaps = rest.div_ceil(step);
    (0..=gaps).map(|i| (i * rest + gaps / 2) / gaps).collect()
}

/// The weighted mean of windows' features.
#[derive(Debug)]
pub struct Blend {
    width: usize,
    dim: usize,
    /// `[P, D]`.
    features: Vec<f64>,
    /// `[P]`.
    weights: Vec<f64>,
    /// `[D]`.
    cls: Vec<f64>,
    windows: f64,
}

impl Blend {
    /// Of a grid, nothing added yet.
    pub fn new(height: usize, width: usize, dim: usize) -> Self {
        let patches = height * width;
        let (features, weights) = (vec![0.0; patches * dim], vec![0.0; patches]);
        Self { width, dim, features, weights, cls: vec![0.0; dim], windows: 0.0 }
    }

    /// Adds a window's patches `[P, D]` and CLS `[D]`.
    pub fn add(&mut self, window: &Window, patches: &[f64], cls: &[f64]) {
        // The distance to the nearer border, in patches.
        let taper = |i: usize, n: usize| (i + 1).min(n - i) as f64;
        for (i, patch) in patches.chunks_exact(self.dim).enumerate() {
            let (y, x) = (i / window.width, i % window.width);
            let weight = taper(y, window.height) * taper(x, window.width);
            let at = (window.top + y) * self.width + window.left + x;
            self.weights[at] += weight;
            self.features[at * self.dim..][..self.dim].iter_mut().zip(patch).for_each(|(s, x)| *s += weight * x);
        }
        self.cls.iter_mut().zip(cls).for_each(|(s, x)| *s += x);
        self.windows += 1.0;
    }

    /// Patches `[P, D]` and CLS `[D]`.
    pub fn finish(mut self) -> (Vec<f64>, Vec<f64>) {
        for (patch, weight) in self.features.chunks_exact_mut(self.dim).zip(&self.weights) {
            patch.iter_mut().for_each(|x| *x /= weight);
        }
        self.cls.iter_mut().for_each(|x| *x /= self.windows);
        (self.features, self.cls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_patch_and_overlap() {
        for (n, side) in [(5, 8), (8, 8), (9, 8), (100, 16), (33, 32), (7, 1), (10, 3)] {
            let starts = starts(n, side);
            assert_eq!((starts[0], starts[starts.len() - 1] + side.min(n)), (0, n), "{n} by {side}: {starts:?}");
            let near = starts.windows(2).all(|w| w[0] < w[1] && w[1] - w[0] <= side - side / 4);
            assert!(near, "{n} by {side}: {starts:?}");
        }
        assert_eq!(cover(20, 5, 8).len(), 3);
    }

    #[test]
    fn a_blend_of_what_all_windows_agree_on_is_that() {
        let (height, width, dim) = (13, 21, 2);
        let value = |y: usize, x: usize| [(y * width + x) as f64, 1.0 / (1 + x) as f64];
        let mut blend = Blend::new(height, width, dim);
        for w in cover(height, width, 6) {
            let at = |i: usize| value(w.top + i / w.width, w.left + i % w.width);
            blend.add(&w, &(0..w.width * w.height).flat_map(at).collect::<Vec<_>>(), &[3.0, 4.0]);
        }
        let (features, cls) = blend.finish();
        let expected = (0..height * width).flat_map(|p| value(p / width, p % width));
        assert!(features.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12 * b.max(1.0)));
        assert_eq!(cls, [3.0, 4.0]);
    }

    #[test]
    fn an_image_of_one_window_is_unchanged_to_the_bit() {
        let patches = [0.1, 0.7, 1.0 / 3.0, 2.0];
        let mut blend = Blend::new(1, 4, 1);
        blend.add(&cover(1, 4, 4)[0], &patches, &[1.0 / 3.0]);
        let (features, cls) = blend.finish();
        assert!(features.iter().zip(patches).all(|(a, b)| (*a as f32) == b as f32));
        assert_eq!(cls, [1.0 / 3.0]);
    }
}
