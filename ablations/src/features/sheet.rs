//! Contact sheets: one row an image and model, columns as in [`pictures`].

use std::path::{Path, PathBuf};

use dinolab_core::Result;
use dinolab_plugins::pixels::rgb_resized;
use image::imageops::{overlay, FilterType};
use image::RgbImage;

use super::files::{pictures, save_png};
use super::{Maps, Seen};

/// Side of a cell in pixels.
const CELL: u32 = 176;
/// Between cells.
const GAP: u32 = 4;
/// Rows of a sheet.
const ROWS: usize = 24;

/// Contact sheets in the making. A row: the image with the chosen patch marked, three principal components, similarity
/// to that patch, similarity to CLS, foreground.
#[derive(Debug)]
pub struct Sheets {
    folder: PathBuf,
    rows: Vec<Vec<RgbImage>>,
    written: Vec<PathBuf>,
}

impl Sheets {
    /// Sheets that are written into `folder`, as `contact_sheet_<n>.png`.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.into(), rows: Vec::new(), written: Vec::new() }
    }

    /// Adds one image as one model sees it; a full sheet is written.
    ///
    /// # Errors
    /// If a sheet cannot be written.
    pub fn add(&mut self, seen: &Seen, maps: &Maps) -> Result<()> {
        let mut shown = pictures(seen, maps);
        let first = maps.similarity.first().map_or(0, |(patch, _)| *patch);
        mark(&mut shown[0].1, seen, first);
        // Of several similarity maps the first.
        let several = maps.similarity.len().max(1);
        let cells = shown.into_iter().enumerate().filter(|(i, _)| *i <= 2 || *i >= 2 + several);
        self.rows.push(cells.map(|(_, (_, picture))| thumbnail(&picture)).collect());
        if self.rows.len() == ROWS {
            self.write()?;
        }
        Ok(())
    }

    /// Writes what is left; gives all sheets.
    ///
    /// # Errors
    /// If a sheet cannot be written.
    pub fn finish(mut self) -> Result<Vec<PathBuf>> {
        if !self.rows.is_empty() {
            self.write()?;
        }
        Ok(self.written)
    }

    fn write(&mut self) -> Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0) as u32;
        let heights: Vec<u32> = self.rows.iter().map(|r| r.iter().map(RgbImage::height).max().unwrap_or(0)).collect();
        let height = heights.iter().map(|h| h + GAP).sum::<u32>() + GAP;
        let mut sheet = RgbImage::from_pixel(columns * (CELL + GAP) + GAP, height, image::Rgb([255; 3]));
        let mut y = GAP;
        for (row, height) in self.rows.drain(..).zip(heights) {
            for (i, cell) in row.iter().enumerate() {
                let x = GAP + i as u32 * (CELL + GAP) + (CELL - cell.width()) / 2;
                overlay(&mut sheet, cell, i64::from(x), i64::from(y));
            }
            y += height + GAP;
        }
        let path = self.folder.join(format!("contact_sheet_{}.png", self.written.len() + 1));
        save_png(&path, &sheet)?;
        self.written.push(path);
        Ok(())
    }
}

/// A picture that fits a cell, its shape kept.
fn thumbnail(picture: &RgbImage) -> RgbImage {
    let scale = f64::from(CELL) / f64::from(picture.width().max(picture.height()));
    let side = |n: u32| ((f64::from(n) * scale).round() as u32).clamp(1, CELL);
    let filter = if scale < 1.0 { FilterType::Triangle } else { FilterType::Nearest };
    rgb_resized(picture.clone(), side(picture.width()), side(picture.height()), filter)
}

/// Draws a frame around a patch, in white within black so that it shows on anything.
fn mark(picture: &mut RgbImage, seen: &Seen, patch: usize) {
    let view = &seen.view;
    let (w, h) = (picture.width() / view.width as u32, picture.height() / view.height as u32);
    let (left, top) = ((patch % view.width) as u32 * w, (patch / view.width) as u32 * h);
    // Two pixels of the finished thumbnail.
    let thick = (picture.width().max(picture.height()) / CELL).max(1) * 2;
    let (wide, high) = picture.dimensions();
    for y in top.saturating_sub(2 * thick)..(top + h + 2 * thick).min(high) {
        for x in left.saturating_sub(2 * thick)..(left + w + 2 * thick).min(wide) {
            let outside =
                |v: u32, start: u32, len: u32| start.saturating_sub(v).max((v + 1).saturating_sub(start + len));
            match outside(x, left, w).max(outside(y, top, h)) {
                0 => {}
                d if d <= thick => picture.put_pixel(x, y, image::Rgb([255; 3])),
                _ => picture.put_pixel(x, y, image::Rgb([0; 3])),
            }
        }
    }
}
