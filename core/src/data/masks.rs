//! Which patches are hidden from the student: the reference's block-wise sampler and its collation.
//!
//! The number of masked patches of a batch is fixed before training begins, so every step has the same shapes.

use crate::contract::Grid;
use crate::recipe::MaskConfig;
use crate::rng::Rng;
use crate::{DType, Result, Tensor};

/// Smallest area of a block, in patches.
const MIN_BLOCK: f64 = 4.0;
/// Aspect ratio (height over width) of a block lies in [0.3, 1 / 0.3].
const MIN_ASPECT: f64 = 0.3;
/// Places tried for a block before blocks are given up.
const TRIES: usize = 10;

/// The ratios between which sizes are spread: `n + 1` numbers from `ratio[0]` to `ratio[1]` in f32, as
/// `torch.linspace` computes them (from both ends towards the middle). The first is not used.
pub fn mask_ratios(n: usize, ratio: [f64; 2]) -> Vec<f32> {
    let (low, high) = (ratio[0] as f32, ratio[1] as f32);
    let step = (high - low) / n.max(1) as f32;
    let from = |i: usize| if i < n.div_ceil(2) { low + step * i as f32 } else { high - step * (n - i) as f32 };
    (0..=n).map(from).collect()
}

/// How many patches of each of `crops` crops (all global crops of a batch) are masked, before they are shuffled:
/// `int(crops * probability)` crops get `int(patches * ratio)` with ratios spread evenly, the rest get none.
///
/// The sum is the number `M` of masked patches of every batch.
pub fn mask_sizes(crops: usize, patches: usize, config: &MaskConfig) -> Vec<usize> {
    let masked = (crops as f64 * config.probability) as usize;
    mask_sizes_at(crops, patches, &mask_ratios(masked, config.ratio))
}

/// Whether [`mask_sizes`] masks any patch, without listing the sizes of a batch that may be too large to be made.
pub fn any_masked(crops: usize, patches: usize, config: &MaskConfig) -> bool {
    let masked = (crops as f64 * config.probability) as usize;
    // Ratios rise, so the last masked crop has the most.
    masked > 0 && mask_sizes_at(1, patches, &[0.0, config.ratio[1] as f32]) != [0]
}

/// [`mask_sizes`] with the ratios given: crop `i` gets `int(patches * ratios[i + 1])` in f32.
pub fn mask_sizes_at(crops: usize, patches: usize, ratios: &[f32]) -> Vec<usize> {
    let mut sizes: Vec<usize> = ratios[1..].iter().map(|&r| (patches as f32 * r) as usize).collect();
    sizes.resize(crops, 0);
    sizes
}

/// Draws masks made of rectangular blocks (BEiT, arXiv:2106.08254, algorithm 1, as the reference has it).
#[derive(Clone, Copy, Debug)]
pub struct BlockMask {
    grid: Grid,
    /// Most cells that one block adds.
    max_block: usize,
}

impl BlockMask {
    /// Masks over `grid`; a block covers at most half of it (half the rows, rounded down, times the columns).
    pub fn new(grid: Grid) -> Self {
        Self { grid, max_block: grid.height / 2 * grid.width }
    }

    /// A mask of exactly `count` cells, row-major.
    ///
    /// Blocks are placed until the count is reached or one finds no place; single cells, drawn uniformly, fill the
    /// rest.
    ///
    /// # Panics
    /// If `count` is more than the grid has: [`mask_sizes`] gives shares of it.
    pub fn draw(&self, rng: &mut Rng, count: usize) -> Vec<bool> {
        let patches = self.grid.patches();
        assert!(count <= patches, "{count} of {patches} patches cannot be masked");
        let mut mask = vec![false; patches];
        let mut left = count;
        while left > 0 {
            let added = self.place(rng, &mut mask, left.min(self.max_block));
            if added == 0 {
                break;
            }
            left -= added;
        }
        let mut free: Vec<usize> = (0..patches).filter(|&i| !mask[i]).collect();
        for k in 0..left {
            let pick = k + rng.below(free.len() - k);
            free.swap(k, pick);
            mask[free[k]] = true;
        }
        mask
    }

    /// Tries to place one block that adds 1 to `most` cells; returns how many it added.
    fn place(&self, rng: &mut Rng, mask: &mut [bool], most: usize) -> usize {
        let Grid { height, width } = self.grid;
        for _ in 0..TRIES {
            // Near the end `most` is below the lower bound and the range runs backwards, as in the reference.
            let area = rng.uniform(MIN_BLOCK, most as f64);
            let aspect = rng.log_uniform(MIN_ASPECT, 1.0 / MIN_ASPECT);
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

    /// `mask` shifted around the torus by a random amount along each axis.
    pub fn circular_shift(&self, rng: &mut Rng, mask: &[bool]) -> Vec<bool> {
        let Grid { height, width } = self.grid;
        let (down, right) = (rng.below(height), rng.below(width));
        let source = |y: usize, x: usize| (y + height - down) % height * width + (x + width - right) % width;
        (0..height * width).map(|i| mask[source(i / width, i % width)]).collect()
    }
}

/// A mask for each of `crops` crops, row-major; a random choice of which get which size.
pub fn draw_masks(rng: &mut Rng, crops: usize, grid: Grid, config: &MaskConfig) -> Vec<Vec<bool>> {
    let generator = BlockMask::new(grid);
    let draw = |size: usize, rng: &mut Rng| {
        let mask = generator.draw(rng, size);
        if config.random_circular_shift && size > 0 {
            generator.circular_shift(rng, &mask)
        } else {
            mask
        }
    };
    let sizes = mask_sizes(crops, grid.patches(), config);
    let mut rows: Vec<Vec<bool>> = sizes.into_iter().map(|size| draw(size, rng)).collect();
    rng.shuffle(&mut rows);
    rows
}

/// The masks of one batch's global crops, `C = 2B` of them, crop-major.
#[derive(Clone, Debug)]
pub struct Masks {
    /// 1 where a patch is hidden: `[C * P]`, u32.
    pub masks: Tensor,
    /// Where the ones are: `[M]`, u32, ascending.
    pub indices: Tensor,
    /// Where the zeros are: `[C * P - M]`, u32, ascending.
    pub unmasked: Tensor,
    /// 1 / (masked patches of that crop) for every masked patch: `[M]`.
    pub weights: Tensor,
}

impl Masks {
    /// Draws a mask for each of `crops` crops, a random choice of which get which size.
    ///
    /// # Errors
    /// If `dtype` is not a real type.
    pub fn draw(rng: &mut Rng, crops: usize, grid: Grid, config: &MaskConfig, dtype: DType) -> Result<Self> {
        Self::from_rows(&draw_masks(rng, crops, grid, config), dtype)
    }

    /// From one mask a crop.
    ///
    /// # Errors
    /// If `dtype` is not a real type.
    pub fn from_rows<R: AsRef<[bool]>>(rows: &[R], dtype: DType) -> Result<Self> {
        let rows: Vec<&[bool]> = rows.iter().map(AsRef::as_ref).collect();
        let flat: Vec<u32> = rows.iter().flat_map(|row| row.iter()).map(|&m| u32::from(m)).collect();
        let (indices, unmasked): (Vec<u32>, Vec<u32>) = (0..flat.len() as u32).partition(|&i| flat[i as usize] == 1);
        let ones = |row: &[bool]| row.iter().filter(|&&m| m).count();
        let weights: Vec<f64> = rows.iter().flat_map(|&row| vec![1.0 / ones(row).max(1) as f64; ones(row)]).collect();
        Ok(Self {
            masks: Tensor::from_slice(&flat, &[flat.len()])?,
            indices: Tensor::from_slice(&indices, &[indices.len()])?,
            unmasked: Tensor::from_slice(&unmasked, &[unmasked.len()])?,
            weights: Tensor::from_f64(&weights, &[weights.len()], dtype)?,
        })
    }
}
