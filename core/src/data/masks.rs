//! Which patches are hidden from the student, as the step reads it.
//!
//! The number of masked patches of a batch is fixed before training begins, so every step has the same shapes.

use crate::contract::{Grid, Masking};
use crate::rng::Rng;
use crate::{DType, Error, Result, Tensor};

/// A mask for each of `crops` crops, held to what the plugin `name` promises.
///
/// # Errors
/// If it draws another number of masks, of cells or of masked patches.
pub(super) fn draw_masks(
    masking: &dyn Masking,
    name: &str,
    rng: &mut Rng,
    crops: usize,
    grid: Grid,
) -> Result<Vec<Vec<bool>>> {
    let rows = masking.draw(rng, crops, grid);
    let (masked, expected) = (rows.iter().flatten().filter(|&&m| m).count(), masking.masked(crops, grid));
    if rows.len() != crops || rows.iter().any(|row| row.len() != grid.patches()) {
        let problem =
            format!("the masking plugin `{name}` does not draw {} cells for each of {crops} crops", grid.patches());
        return Err(Error::user(problem, "correct the plugin's `draw`"));
    }
    if masked != expected {
        let problem = format!("the masking plugin `{name}` masks {masked} patches of a batch and promises {expected}");
        return Err(Error::user(problem, "correct the plugin: `draw` has to mask as many patches as `masked` says"));
    }
    Ok(rows)
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
    /// The masked patches of the whole batch, on all ranks, over the number of its parts: what `M` is on average.
    pub share: f64,
}

impl Masks {
    /// From one mask a crop, of a batch of one part.
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
            share: indices.len() as f64,
        })
    }
}
