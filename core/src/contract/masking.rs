//! Which patches are hidden from the student.

use std::fmt;

use super::pos_encoding::Grid;
use crate::rng::Rng;

/// Why no patch is masked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmasked {
    /// The key of `[masking]` that keeps every patch in sight.
    pub key: &'static str,
    /// What it does: "0.1 of the 8 global crops of a batch is less than one crop".
    pub reason: String,
    /// What to do: "use at least 0.125".
    pub help: String,
}

/// Which patches of the global crops are hidden from the student: a mask for each crop of a batch.
///
/// A step is recorded for given shapes, so the number of masked patches of a batch is fixed before training begins. Masks
/// are drawn for the whole batch and distributed, with their images, to its micro-batches. Even if crops have different
/// numbers of masked patches, each micro-batch has (nearly always) the same share of them in every step.
///
/// ```
/// use dinolab_core::contract::{Grid, Masking, Unmasked};
/// use dinolab_core::rng::{Rng, Stream};
///
/// /// Hides one column of every crop.
/// #[derive(Debug)]
/// struct Column;
///
/// impl Masking for Column {
///     fn masked(&self, crops: usize, grid: Grid) -> usize {
///         crops * grid.height
///     }
///     fn share(&self, grid: Grid) -> f64 {
///         1.0 / grid.width as f64
///     }
///     fn unmasked(&self, _: usize, _: Grid) -> Option<Unmasked> {
///         None
///     }
///     fn draw(&self, rng: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>> {
///         let mut mask = || {
///             let column = rng.below(grid.width);
///             (0..grid.patches()).map(|patch| patch % grid.width == column).collect()
///         };
///         (0..crops).map(|_| mask()).collect()
///     }
/// }
///
/// let grid = Grid { height: 4, width: 3 };
/// let masks = Column.draw(&mut Rng::new(0, Stream::Mask, 0, 0), 2, grid);
/// let hidden = masks.iter().flatten().filter(|&&hidden| hidden).count();
/// assert_eq!(hidden, Column.masked(2, grid));
/// ```
pub trait Masking: fmt::Debug + Send + Sync {
    /// `M`, the number of patches that are masked in `crops` crops together (all global crops of a batch): what
    /// [`draw`](Self::draw) masks, whatever it draws.
    fn masked(&self, crops: usize, grid: Grid) -> usize;

    /// The share of the patches that is masked on average, by formula, in \[0, 1\]: for the cost of a run.
    fn share(&self, grid: Grid) -> f64;

    /// Why [`masked`](Self::masked) is 0; `None` if it is not. A recipe whose losses are computed on masked patches is
    /// refused with this. It does not list the crops: a batch may be too large to be made.
    fn unmasked(&self, crops: usize, grid: Grid) -> Option<Unmasked>;

    /// A mask for each of `crops` crops, row-major over `grid`: true where a patch is hidden. It is a pure function of its
    /// generator.
    fn draw(&self, rng: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>>;
}
