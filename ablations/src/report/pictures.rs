//! What every arm sees of the same held-out images, side by side.

use dinolab_core::Result;
use serde::Serialize;

use crate::pictures::{align_signs, data_uri, map, principal_scores, to_colors, viridis, PatchView};

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
/// If features are not finite.
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
            let similarity = seen.cosine_to(seen.patch(reference));
            PictureCell {
                similarity: data_uri(&map(seen.width, similarity.iter().map(|&s| viridis(s)))),
                pca: data_uri(&map(seen.width, colors[start..start + seen.patches()].iter().copied())),
                mean_similarity: similarity.iter().sum::<f64>() / similarity.len() as f64,
            }
        };
        let cells = arms.iter().zip(&colors).map(cell).collect();
        rows.push(PictureRow { image: data_uri(&view.image), reference: view.frame(reference), arms: cells });
        start += view.patches();
    }
    Ok(rows)
}
