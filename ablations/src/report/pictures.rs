//! Pictures of dense features: how similar one patch is to all others, and the three main directions as colours.
//!
//! Both are small PNGs with one pixel a patch; the page scales them up without smoothing, so what is seen is what was
//! computed. All arms look at the same held-out images.

use std::io::Cursor;

use base64::Engine;
use dinolab_core::{Error, Result};
use faer::Mat;
use image::{ImageFormat, RgbImage};
use serde::Serialize;

/// Ten colours along viridis (Smith & van der Walt 2015): even in brightness and readable with any colour vision.
const VIRIDIS: [[u8; 3]; 10] = [
    [0x44, 0x01, 0x54],
    [0x48, 0x28, 0x78],
    [0x3e, 0x49, 0x89],
    [0x31, 0x68, 0x8e],
    [0x26, 0x82, 0x8e],
    [0x1f, 0x9e, 0x89],
    [0x35, 0xb7, 0x79],
    [0x6e, 0xce, 0x58],
    [0xb5, 0xde, 0x2b],
    [0xfd, 0xe7, 0x25],
];

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
    fn patches(&self) -> usize {
        self.height * self.width
    }

    fn patch(&self, index: usize) -> &[f64] {
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
}

/// One image in the report, for every arm.
#[derive(Clone, Debug, Serialize)]
pub struct PictureRow {
    /// The image, as a data URI.
    pub image: String,
    /// Left, top, width and height of the reference patch in percent of the image.
    pub reference: [f64; 4],
    /// One an arm, in order.
    pub arms: Vec<PictureCell>,
}

/// What one arm makes of an image.
#[derive(Clone, Debug, Serialize)]
pub struct PictureCell {
    /// Cosine similarity to the reference patch, 0 dark to 1 bright, as a data URI.
    pub similarity: String,
    /// The first three principal components as red, green and blue, as a data URI.
    pub pca: String,
    /// Mean similarity over all patches: high means that locality is lost.
    pub mean_similarity: f64,
}

/// Rows of pictures from what each arm sees of the same images. Signs of components follow the first arm's, so that
/// colours can be compared.
///
/// # Errors
/// If the decomposition does not converge, which means that features are not finite.
pub fn rows(arms: &[Vec<PatchView>]) -> Result<Vec<PictureRow>> {
    let Some(first) = arms.first() else { return Ok(Vec::new()) };
    let mut scores: Vec<Vec<[f64; 3]>> = Vec::new();
    for views in arms {
        let mut mine = principal_scores(views)?;
        if let Some(reference) = scores.first() {
            align_signs(&mut mine, reference);
        }
        scores.push(mine);
    }
    let colors: Vec<Vec<[u8; 3]>> = scores.iter().map(|s| to_colors(s)).collect();
    let mut start = 0;
    let mut rows = Vec::new();
    for (i, view) in first.iter().enumerate() {
        let reference = view.reference();
        let cell = |(views, colors): (&Vec<PatchView>, &Vec<[u8; 3]>)| {
            let seen = &views[i];
            let similarity = cosine_to(seen, reference);
            let picture: Vec<[u8; 3]> = similarity.iter().map(|&s| viridis(s)).collect();
            PictureCell {
                similarity: png(seen.width, &picture),
                pca: png(seen.width, &colors[start..start + seen.patches()]),
                mean_similarity: similarity.iter().sum::<f64>() / similarity.len() as f64,
            }
        };
        let (w, h) = (100.0 / view.width as f64, 100.0 / view.height as f64);
        let (x, y) = ((reference % view.width) as f64 * w, (reference / view.width) as f64 * h);
        let cells = arms.iter().zip(&colors).map(cell).collect();
        rows.push(PictureRow { image: data_uri(&view.image), reference: [x, y, w, h], arms: cells });
        start += view.patches();
    }
    Ok(rows)
}

/// Cosine similarity of every patch to patch `reference`.
pub fn cosine_to(view: &PatchView, reference: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let length = |a: &[f64]| dot(a, a).sqrt().max(1e-12);
    let anchor = view.patch(reference);
    (0..view.patches()).map(|p| dot(view.patch(p), anchor) / (length(view.patch(p)) * length(anchor))).collect()
}

/// Scores of all patches of all views on the first three principal components, one basis for all views.
pub fn principal_scores(views: &[PatchView]) -> Result<Vec<[f64; 3]>> {
    let rows: Vec<&[f64]> = views.iter().flat_map(|v| (0..v.patches()).map(|p| v.patch(p))).collect();
    let dim = rows.first().map_or(0, |r| r.len());
    let mean: Vec<f64> = (0..dim).map(|d| rows.iter().map(|r| r[d]).sum::<f64>() / rows.len() as f64).collect();
    let centred = Mat::from_fn(rows.len(), dim, |i, d| rows[i][d] - mean[d]);
    if !centred.norm_l2().is_finite() {
        let help = "the run diverged; see its health lines";
        return Err(Error::user("patch features are not finite, so there is no picture of them", help));
    }
    let svd = centred.thin_svd().map_err(|e| {
        Error::user(format!("the principal components did not converge: {e:?}"), "the features may be degenerate")
    })?;
    let (u, s) = (svd.U(), svd.S().column_vector());
    let score = |i: usize, k: usize| if k < u.ncols() { u[(i, k)] * s[k] } else { 0.0 };
    Ok((0..rows.len()).map(|i| [score(i, 0), score(i, 1), score(i, 2)]).collect())
}

/// Flips components that run against the reference's: the sign of a principal component means nothing.
fn align_signs(scores: &mut [[f64; 3]], reference: &[[f64; 3]]) {
    for k in 0..3 {
        if scores.iter().zip(reference).map(|(a, b)| a[k] * b[k]).sum::<f64>() < 0.0 {
            scores.iter_mut().for_each(|s| s[k] = -s[k]);
        }
    }
}

/// Each component stretched from its 2nd to its 98th percentile, so that a few outliers do not take all contrast.
fn to_colors(scores: &[[f64; 3]]) -> Vec<[u8; 3]> {
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

/// The colour of a value in [0, 1]; values outside are drawn as the end they are beyond.
pub fn viridis(value: f64) -> [u8; 3] {
    let at = value.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let low = (at as usize).min(VIRIDIS.len() - 2);
    let mix = |c: usize| {
        let (a, b) = (f64::from(VIRIDIS[low][c]), f64::from(VIRIDIS[low + 1][c]));
        (a + (b - a) * (at - low as f64)).round() as u8
    };
    [mix(0), mix(1), mix(2)]
}

fn png(width: usize, pixels: &[[u8; 3]]) -> String {
    let height = pixels.len() / width;
    let bytes = pixels.iter().flatten().copied().collect();
    let image = RgbImage::from_raw(width as u32, height as u32, bytes).expect("one pixel a patch");
    data_uri(&image)
}

fn data_uri(image: &RgbImage) -> String {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).expect("encoding a PNG into memory cannot fail");
    format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A view whose patch `p` has the feature `at(p)`.
    fn view(height: usize, width: usize, at: impl Fn(usize) -> Vec<f64>) -> PatchView {
        let features = (0..height * width).flat_map(at).collect();
        PatchView { image: RgbImage::new(8, 8), height, width, features, foreground: None }
    }

    #[test]
    fn similarity_is_the_cosine_whatever_the_length() {
        let v = view(1, 4, |p| [vec![2.0, 0.0], vec![0.0, 3.0], vec![-5.0, 0.0], vec![1.0, 1.0]][p].clone());
        for (s, expected) in cosine_to(&v, 0).into_iter().zip([1.0, 0.0, -1.0, 0.5f64.sqrt()]) {
            assert!((s - expected).abs() < 1e-12, "{s} {expected}");
        }
    }

    #[test]
    fn principal_scores_order_directions_by_variance_and_ignore_the_mean() {
        // Independent patterns of sizes 3, 2 and 1 along the axes, far from the origin.
        let bit = |p: usize, k: usize| if p >> k & 1 == 1 { 1.0 } else { -1.0 };
        let v = view(2, 4, |p| vec![100.0 + 2.0 * bit(p, 1), -50.0 + 3.0 * bit(p, 0), 7.0 + bit(p, 2)]);
        let scores = principal_scores(&[v]).expect("the features are finite");
        for k in 0..3 {
            let size = 3.0 - k as f64;
            assert!(scores.iter().all(|s| (s[k].abs() - size).abs() < 1e-9), "component {k}: {scores:?}");
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
    fn the_reference_is_the_object_patch_nearest_to_the_middle() {
        let mut v = view(3, 3, |_| vec![1.0]);
        assert_eq!(v.reference(), 4);
        v.foreground = Some((0..9).map(|p| p == 2 || p == 3).collect());
        assert_eq!(v.reference(), 3);
        v.foreground = Some(vec![false; 9]);
        assert_eq!(v.reference(), 4, "without an object it is the middle");
    }

    #[test]
    fn viridis_ends_where_the_published_map_ends() {
        assert_eq!((viridis(-1.0), viridis(0.0)), ([0x44, 0x01, 0x54], [0x44, 0x01, 0x54]));
        assert_eq!((viridis(1.0), viridis(2.0)), ([0xfd, 0xe7, 0x25], [0xfd, 0xe7, 0x25]));
    }
}
