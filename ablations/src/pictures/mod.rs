//! Pictures of dense features: similarities to one patch, principal components as colours, what is foreground.
//!
//! A picture has one pixel a patch; whoever shows it scales it up without smoothing, so what is seen is what was
//! computed. Suites' reports and `dinolab features` draw with the same code.

mod colors;
mod components;

use image::RgbImage;

pub use colors::{data_uri, map, png, scaled, viridis};
pub use components::{align_signs, foreground, principal_scores, to_colors};

/// One image as a model sees it.
#[derive(Clone, Debug)]
pub struct PatchView {
    /// The image.
    pub image: RgbImage,
    /// Patch rows.
    pub height: usize,
    /// Patch columns.
    pub width: usize,
    /// Patch features `[P, D]`, row-major.
    pub features: Vec<f64>,
    /// For every patch whether an object is there, where the dataset knows.
    pub foreground: Option<Vec<bool>>,
}

impl PatchView {
    /// Patches: rows times columns.
    pub fn patches(&self) -> usize {
        self.height * self.width
    }

    /// The features of one patch: `[D]`.
    pub fn patch(&self, index: usize) -> &[f64] {
        let dim = self.features.len() / self.patches();
        &self.features[index * dim..(index + 1) * dim]
    }

    /// The patch that others are compared with: the one nearest to the middle that shows an object.
    pub fn reference(&self) -> usize {
        let (cy, cx) = ((self.height as f64 - 1.0) / 2.0, (self.width as f64 - 1.0) / 2.0);
        let distance = |p: usize| {
            let (dy, dx) = ((p / self.width) as f64 - cy, (p % self.width) as f64 - cx);
            dy * dy + dx * dx
        };
        let shown = |p: &usize| self.foreground.as_ref().is_none_or(|f| f[*p] || !f.contains(&true));
        let nearest = (0..self.patches()).filter(shown).min_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        nearest.expect("an image has at least one patch")
    }

    /// Left, top, width and height of a patch in percent of the image.
    pub fn frame(&self, patch: usize) -> [f64; 4] {
        let (w, h) = (100.0 / self.width as f64, 100.0 / self.height as f64);
        [(patch % self.width) as f64 * w, (patch / self.width) as f64 * h, w, h]
    }

    /// Cosine similarity of every patch to a vector `[D]`.
    pub fn cosine_to(&self, anchor: &[f64]) -> Vec<f64> {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let length = |a: &[f64]| dot(a, a).sqrt().max(1e-12);
        (0..self.patches()).map(|p| dot(self.patch(p), anchor) / (length(self.patch(p)) * length(anchor))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A view whose patch `p` has the feature `at(p)`.
    pub(super) fn view(height: usize, width: usize, at: impl Fn(usize) -> Vec<f64>) -> PatchView {
        let features = (0..height * width).flat_map(at).collect();
        PatchView { image: RgbImage::new(8, 8), height, width, features, foreground: None }
    }

    #[test]
    fn similarity_is_the_cosine_whatever_the_length() {
        let v = view(1, 4, |p| [vec![2.0, 0.0], vec![0.0, 3.0], vec![-5.0, 0.0], vec![1.0, 1.0]][p].clone());
        for (s, expected) in v.cosine_to(v.patch(0)).into_iter().zip([1.0, 0.0, -1.0, 0.5f64.sqrt()]) {
            assert!((s - expected).abs() < 1e-12, "{s} {expected}");
        }
    }

    #[test]
    fn the_reference_is_the_object_patch_nearest_to_the_middle() {
        let mut v = view(3, 3, |_| vec![1.0]);
        assert_eq!(v.reference(), 4);
        v.foreground = Some((0..9).map(|p| p == 2 || p == 3).collect());
        assert_eq!(v.reference(), 3);
        v.foreground = Some(vec![false; 9]);
        assert_eq!(v.reference(), 4, "without an object it is the middle");
    }
}
