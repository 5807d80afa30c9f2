//! Squares of the nine thirds of a crop, for pretext tasks about their places.

use dinolab_core::contract::Tile;
use dinolab_core::rng::Rng;
use dinolab_core::{Error, Result, Tensor};

/// Cells along a side of the crop.
const SIDE: usize = 3;
/// Cells of a crop, row by row.
pub(crate) const CELLS: usize = SIDE * SIDE;

/// How squares are cut from the cells of a global crop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thirds {
    cell: usize,
    /// Side of a square in pixels.
    pub(crate) tile_size: usize,
}

impl Thirds {
    /// Of crops of `global_size` pixels: a square has the greatest whole number of patches that is less than a third of the
    /// crop, so that there always is a gap of random width between two of them. Without one, edges that go on would tell
    /// their places.
    ///
    /// # Errors
    /// If a third of a crop is not larger than a patch.
    pub(crate) fn of(global_size: usize, patch_size: usize) -> Result<Self> {
        let cell = global_size / SIDE;
        let tile_size = cell.saturating_sub(1) / patch_size * patch_size;
        if tile_size == 0 {
            let problem =
                format!("a third of a global crop of {global_size} pixels is not larger than a patch of {patch_size}");
            return Err(Error::user(problem, format!("set crops.global_size to {} or more", SIDE * (patch_size + 1))));
        }
        Ok(Self { cell, tile_size })
    }

    /// A square of a cell of the first global crop, its place in the cell drawn.
    pub(crate) fn square(&self, rng: &mut Rng, cell: usize) -> Tile {
        let places = self.cell - self.tile_size + 1;
        let (x, y) = (cell % SIDE * self.cell + rng.below(places), cell / SIDE * self.cell + rng.below(places));
        Tile { crop: 0, x, y, turns: 0 }
    }
}

/// Features of the crops of a view, side by side for every image: `[crops * B, D]` crop-major to `[B, crops * D]`.
pub(crate) fn side_by_side(features: &Tensor, images: usize) -> Result<Tensor> {
    let crops = features.dim(0) / images;
    let rows: Vec<u32> = (0..images * crops).map(|i| (i % crops * images + i / crops) as u32).collect();
    let rows = Tensor::from_slice(&rows, &[rows.len()])?;
    features.gather_rows(&rows)?.reshape(&[images, crops * features.dim(1)])
}
