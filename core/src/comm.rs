//! What a loss needs of other devices: sums and gathers over the batch.
//!
//! Everything inside a loss that looks across the batch (Sinkhorn-Knopp, nearest neighbours, centring) goes through
//! [`Comm`], so that the same plugin runs on one device and on many.

use crate::{Result, Tensor};

/// Collective operations over the ranks of a run.
pub trait Comm: Send + Sync {
    /// How many ranks there are.
    fn world(&self) -> usize;
    /// This rank, 0-based.
    fn rank(&self) -> usize;
    /// The sum of every rank's `x`.
    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor>;
    /// The element-wise maximum of every rank's `x`.
    fn all_reduce_max(&self, x: &Tensor) -> Result<Tensor>;
    /// Every rank's rows, in order of rank: `[n, ..]` to `[world * n, ..]`. Gradients flow back to the owners.
    fn all_gather(&self, x: &Tensor) -> Result<Tensor>;
}

/// One device: the identity.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Comm for Single {
    fn world(&self) -> usize {
        1
    }
    fn rank(&self) -> usize {
        0
    }
    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }
    fn all_reduce_max(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }
    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }
}
