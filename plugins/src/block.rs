//! Masks made of rectangular blocks: BEiT's, as DINOv2 and DINOv3 draw them.

use dinolab_core::contract::{Grid, Masking, Unmasked};
use dinolab_core::plugin;
use dinolab_core::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mask_sizes::Shares;

plugin!(default Masking, "block", Block);

/// Rectangular blocks, until a share of the patches is masked: BEiT's sampler (Bao et al., arXiv:2106.08254, algorithm 1)
/// as DINOv2 and DINOv3 have it. It is the default masking of a recipe.
///
/// `int(crops * probability)` of the global crops of a batch are masked, chosen at random; their ratios of masked patches
/// are spread evenly over `ratio`, so every batch has the same number of masked patches. In each crop, blocks of random
/// area, aspect and position are added until its number of masked patches is reached or no position is found for a block;
/// the rest is filled with single patches, drawn uniformly. A block adds at most half of the rows, rounded down, times the
/// columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Block {
    /// Share of the global crops that are masked at all.
    #[schemars(range(min = 0, max = 1))]
    pub probability: f64,
    /// Share of patches masked in those, spread evenly over [least, most].
    #[schemars(inner(range(min = 0, max = 1)), extend("x-ascending" = true))]
    pub ratio: [f64; 2],
    /// Shift every mask around the torus by a random amount.
    pub random_circular_shift: bool,
    /// Smallest area of a block, in patches. The last block of a crop may be smaller.
    #[schemars(range(min = 1, max = 10_000))]
    pub min_area: f64,
    /// Aspect ratio of a block, height over width, log-uniform in [least, most].
    #[schemars(inner(range(min = 0.01, max = 100)), extend("x-ascending" = true))]
    pub aspect: [f64; 2],
    /// Positions tried for a block before the sampler stops adding blocks.
    #[schemars(range(min = 1, max = 1000))]
    pub tries: usize,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            probability: 0.5,
            ratio: [0.1, 0.5],
            random_circular_shift: false,
            min_area: 4.0,
            aspect: [0.3, 1.0 / 0.3],
            tries: 10,
        }
    }
}

impl Block {
    fn shares(&self) -> Shares {
        Shares { probability: self.probability, ratio: self.ratio }
    }

    /// A mask of exactly `count` cells, row-major.
    ///
    /// # Panics
    /// If `count` is more than the grid has: sizes are shares of it.
    pub fn draw_one(&self, rng: &mut Rng, grid: Grid, count: usize) -> Vec<bool> {
        let patches = grid.patches();
        assert!(count <= patches, "{count} of {patches} patches cannot be masked");
        let max_block = grid.height / 2 * grid.width;
        let mut mask = vec![false; patches];
        let mut left = count;
        while left > 0 {
            let added = self.place(rng, grid, &mut mask, left.min(max_block));
            if added == 0 {
                break;
            }
            left -= added;
        }
        fill(rng, &mut mask, left);
        mask
    }

    /// Tries to place one block that adds 1 to `most` cells; returns how many it added.
    fn place(&self, rng: &mut Rng, grid: Grid, mask: &mut [bool], most: usize) -> usize {
        let Grid { height, width } = grid;
        for _ in 0..self.tries {
            // Near the end `most` is below the lower bound and the range runs backwards, as in the reference.
            let area = rng.uniform(self.min_area, most as f64);
            let aspect = rng.log_uniform(self.aspect[0], self.aspect[1]);
            let h = (area * aspect).sqrt().round_ties_even() as usize;
            let w = (area / aspect).sqrt().round_ties_even() as usize;
            if h >= height || w >= width {
                continue;
            }
            let (top, left) = (rng.below(height - h + 1), rng.below(width - w + 1));
            let rows = || (top..top + h).map(|y| y * width + left..y * width + left + w);
            let new: usize = rows().map(|row| mask[row].iter().filter(|&&m| !m).count()).sum();
            if (1..=most).contains(&new) {
                rows().for_each(|row| mask[row].fill(true));
                return new;
            }
        }
        0
    }
}

/// Masks `count` more cells, drawn uniformly from those that are not masked.
pub(crate) fn fill(rng: &mut Rng, mask: &mut [bool], count: usize) {
    let mut free: Vec<usize> = (0..mask.len()).filter(|&i| !mask[i]).collect();
    for k in 0..count {
        let pick = k + rng.below(free.len() - k);
        free.swap(k, pick);
        mask[free[k]] = true;
    }
}

/// `mask` shifted around the torus by a random amount along each axis.
pub fn circular_shift(rng: &mut Rng, grid: Grid, mask: &[bool]) -> Vec<bool> {
    let Grid { height, width } = grid;
    let (down, right) = (rng.below(height), rng.below(width));
    let source = |y: usize, x: usize| (y + height - down) % height * width + (x + width - right) % width;
    (0..height * width).map(|i| mask[source(i / width, i % width)]).collect()
}

impl Masking for Block {
    fn masked(&self, crops: usize, grid: Grid) -> usize {
        self.shares().masked(crops, grid)
    }

    fn share(&self, _: Grid) -> f64 {
        self.shares().share()
    }

    fn unmasked(&self, crops: usize, grid: Grid) -> Option<Unmasked> {
        self.shares().unmasked(crops, grid)
    }

    fn draw(&self, rng: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>> {
        self.shares().draw(rng, crops, grid, |rng, size| {
            let mask = self.draw_one(rng, grid, size);
            match self.random_circular_shift && size > 0 {
                true => circular_shift(rng, grid, &mask),
                false => mask,
            }
        })
    }
}
