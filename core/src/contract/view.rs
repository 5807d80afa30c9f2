//! Further views of an image that a loss asks for, and what it may draw for an image.

use super::pos_encoding::Grid;
use crate::rng::Rng;

/// A set of crops that a loss makes from the global crops, or from the crops of a further augmentation: squares (tiles) are cut from them
/// at any place, rotated, and put together.
///
/// One tile per crop gives windows and rotated images; several tiles per crop give permuted images. A model sees these
/// crops in addition to the others, without a mask; for the student they are packed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Crops an image.
    pub crops: usize,
    /// Tiles along each side of a crop.
    pub tiles: usize,
    /// Side of a tile in pixels; that of a crop is `tiles` times as long, and a whole number of patches.
    pub tile_size: usize,
    /// Which models see it.
    pub seen_by: SeenBy,
    /// The name of the augmentation whose two crops it is cut from, `[augmentations.<name>]`; `None`: the global crops.
    pub augmentation: Option<String>,
}

/// Which models see a [`View`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeenBy {
    /// The student.
    #[default]
    Student,
    /// The teacher, as what it gives is a target.
    Teacher,
    /// Both.
    Both,
}

impl View {
    /// Crops for the student.
    pub fn new(crops: usize, tiles: usize, tile_size: usize) -> Self {
        Self { crops, tiles, tile_size, seen_by: SeenBy::Student, augmentation: None }
    }

    /// The same for these models.
    pub fn seen_by(self, seen_by: SeenBy) -> Self {
        Self { seen_by, ..self }
    }

    /// The same of crops of another augmentation.
    pub fn of(self, augmentation: impl Into<String>) -> Self {
        Self { augmentation: Some(augmentation.into()), ..self }
    }

    /// Whether the student sees it.
    pub fn for_student(&self) -> bool {
        self.seen_by != SeenBy::Teacher
    }

    /// Whether the teacher sees it.
    pub fn for_teacher(&self) -> bool {
        self.seen_by != SeenBy::Student
    }

    /// Side of a crop in pixels.
    pub fn size(&self) -> usize {
        self.tiles * self.tile_size
    }

    /// Tiles of all crops of an image.
    pub fn tiles_of_image(&self) -> usize {
        self.crops * self.tiles * self.tiles
    }
}

/// A square of a crop, as large as the [`View`]'s tiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tile {
    /// Which of the image's two crops.
    pub crop: usize,
    /// First column.
    pub x: usize,
    /// First row.
    pub y: usize,
    /// Quarter turns, counter-clockwise.
    pub turns: usize,
}

/// Where a crop was cut from its image.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CropBox {
    /// First column, in pixels of the image.
    pub x: f64,
    /// First row.
    pub y: f64,
    /// Columns.
    pub width: f64,
    /// Rows.
    pub height: f64,
    /// Whether the crop is mirrored: its first column is the last one of the box.
    pub flip: bool,
}

/// An image of a batch: which one it is, and where its crops were cut.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchImage {
    /// Its index in the dataset.
    pub index: usize,
    /// Its place in the step's whole batch.
    pub place: usize,
    /// Its global crops.
    pub globals: Vec<CropBox>,
    /// Its local crops.
    pub locals: Vec<CropBox>,
}

/// What a loss draws for an image with.
pub struct ImageContext<'a> {
    /// The image.
    pub image: &'a BatchImage,
    /// Side of a global crop in this step, in pixels.
    pub global_size: usize,
    /// Its patches.
    pub grid: Grid,
    /// A function of seed, step, loss and the image's place in the batch.
    pub rng: &'a mut Rng,
}

/// What a loss draws for an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageDraws {
    /// Numbers for [`Outputs::image_draws`](super::Outputs::image_draws), as many for every image of a run.
    pub numbers: Vec<f64>,
    /// For every [view](super::Loss::views): the tiles of all its crops, crop by crop, row by row.
    pub tiles: Vec<Vec<Tile>>,
}
