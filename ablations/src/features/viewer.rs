//! `index.html`: click a patch, see what is similar to it. One file with everything in it; the page computes the
//! cosines itself, from patch features in 8 bits.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use base64::{engine::general_purpose::STANDARD, Engine};
use dinolab_core::files::write_file;
use dinolab_core::Result;
use dinolab_plugins::pixels::rgb_resized;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;
use image::RgbImage;
use serde::Serialize;

use super::{Maps, Seen};
use crate::pictures::{data_uri, map, to_colors, viridis};

const PAGE: &str = include_str!("viewer.html");
/// Longer side of an image in the page.
const SIDE: u32 = 768;
/// Characters of a page: browsers open more, but not at once.
const MOST: usize = 64 << 20;

/// The page in the making.
#[derive(Debug)]
pub struct Viewer {
    path: PathBuf,
    models: Vec<String>,
    /// As JSON.
    images: Vec<String>,
    size: usize,
    left_out: usize,
}

#[derive(Serialize)]
struct Image<'a> {
    name: &'a str,
    source: String,
    models: Vec<Model>,
}

/// One image as one model sees it.
#[derive(Serialize)]
struct Model {
    height: usize,
    width: usize,
    dim: usize,
    /// `[P, D]` signed bytes, every patch on a scale of its own, in base64.
    patches: String,
    /// `[D]` signed bytes.
    cls: String,
    pca: String,
    /// Where the page begins: a patch.
    first: usize,
}

impl Viewer {
    /// A page in `folder` that compares `models`, one or two.
    pub fn new(folder: &Path, models: Vec<String>) -> Self {
        Self { path: folder.join("index.html"), models, images: Vec::new(), size: 0, left_out: 0 }
    }

    /// Adds an image as every model sees it, unless the page would become too large.
    pub fn add(&mut self, name: &str, seen: &[(Seen, Maps)]) {
        let models = seen.iter().map(|(seen, maps)| Model::of(seen, maps)).collect();
        let image = Image { name, source: jpeg(&seen[0].0.view.image), models };
        // Inside a script, `<` could end it.
        let json = serde_json::to_string(&image).expect("plain data").replace('<', "\\u003c");
        if self.size + json.len() > MOST {
            self.left_out += 1;
            return;
        }
        self.size += json.len();
        self.images.push(json);
    }

    /// Writes the page; gives its path and how many images it was too small for.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(self) -> Result<(PathBuf, usize)> {
        let colors: Vec<[u8; 3]> = (0..256).map(|i| viridis(f64::from(i) / 255.0)).collect();
        let rest = serde_json::json!({ "models": self.models, "viridis": colors });
        let rest = rest.to_string().replace('<', "\\u003c");
        let data = format!("{},\"images\":[{}]}}", rest.trim_end_matches('}'), self.images.join(","));
        write_file(&self.path, PAGE.replace("{{DATA}}", &data).as_bytes())?;
        Ok((self.path, self.left_out))
    }
}

impl Model {
    fn of(seen: &Seen, maps: &Maps) -> Self {
        let view = &seen.view;
        let bytes: Vec<u8> = (0..view.patches()).flat_map(|p| quantised(view.patch(p))).collect();
        Self {
            height: view.height,
            width: view.width,
            dim: seen.cls.len(),
            patches: STANDARD.encode(bytes),
            cls: STANDARD.encode(quantised(&seen.cls)),
            pca: data_uri(&map(view.width, to_colors(&maps.scores))),
            first: maps.similarity.first().map_or(0, |(patch, _)| *patch),
        }
    }
}

/// A vector in signed bytes, its largest number at 127: the scale does not matter to a cosine.
fn quantised(x: &[f64]) -> Vec<u8> {
    let largest = x.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
    x.iter().map(|v| (v / largest * 127.0).round() as i8 as u8).collect()
}

fn jpeg(image: &RgbImage) -> String {
    let scale = f64::from(SIDE) / f64::from(image.width().max(image.height()));
    let side = |n: u32| ((f64::from(n) * scale).round() as u32).max(1);
    let small = || rgb_resized(image.clone(), side(image.width()), side(image.height()), FilterType::Triangle);
    let small = (scale < 1.0).then(small);
    let mut bytes = Cursor::new(Vec::new());
    let encoder = JpegEncoder::new_with_quality(&mut bytes, 85);
    small.as_ref().unwrap_or(image).write_with_encoder(encoder).expect("encoding a JPEG into memory cannot fail");
    format!("data:image/jpeg;base64,{}", STANDARD.encode(bytes.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cosine_of_bytes_is_near_that_of_the_features() {
        let at = |k: f64| (0..384).map(move |i| (f64::from(i) * 0.37 * k).sin() + 0.2).collect::<Vec<f64>>();
        let cosine = |a: &[f64], b: &[f64]| {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        let bytes = |x: &[f64]| quantised(x).into_iter().map(|b| f64::from(b as i8)).collect::<Vec<f64>>();
        for k in [1.0, 1.01, 2.0, 7.0] {
            let (a, b) = (at(1.0), at(k));
            assert!((cosine(&a, &b) - cosine(&bytes(&a), &bytes(&b))).abs() < 2e-3, "{k}");
        }
    }
}
