//! An update that goes with the backward pass: each layer of a model on a GPU as soon as its gradients are known, so that only those
//! of a layer are held at a time.
//!
//! Whether a step is taken is decided by its losses, before. A gradient that is not finite holds its own layer still, and what
//! was updated before it cannot be taken back: then the run ends.

use std::ops::Range;

use crate::tensor::ParamGrads;
use crate::{DType, Result, Tensor};

use super::layers::{Layers, Open};
use super::update::DeviceUpdate;
use super::Weights;

/// Where the gradients of a backward pass become updates.
pub(super) struct Fused<'a> {
    open: Open<'a>,
    layers: &'a Layers,
    /// Without, gradients are thrown away.
    updates: Option<ByLayer<'a>>,
}

/// What an update needs beside gradients.
pub(super) struct ByLayer<'a> {
    pub(super) update: &'a DeviceUpdate,
    pub(super) weights: &'a Weights,
    /// Whether the teacher follows.
    pub(super) follows: bool,
    /// 0 if the step is not taken.
    pub(super) taken: Tensor,
    /// Sums of squares of gradients, by block.
    pub(super) squares: Tensor,
    /// By layer: 0 if it was not updated.
    pub(super) flags: Tensor,
}

/// What an update that went with the backward pass leaves.
pub(super) struct Updated {
    /// L2 norm of every sub-model's gradient.
    pub(super) norms: Tensor,
    /// 0 if the step was not taken.
    pub(super) taken: Tensor,
    /// By layer: 0 if it was not updated.
    pub(super) flags: Tensor,
}

impl<'a> Fused<'a> {
    /// So many tapes add to the gradient of each parameter.
    pub(super) fn new(layers: &'a Layers, uses: &[usize], weights: &Weights, updates: Option<ByLayer<'a>>) -> Self {
        Self { open: Open::new(layers, uses, weights.device(), DType::F32), layers, updates }
    }

    /// Updates the layers from which nothing was learned as well.
    pub(super) fn finish(mut self) -> Result<Option<Updated>> {
        (0..self.layers.ranges().len()).try_for_each(|layer| self.close(layer))?;
        let Some(ByLayer { update, taken, squares, flags, .. }) = self.updates else { return Ok(None) };
        Ok(Some(Updated { norms: update.norms_of(&squares)?, taken, flags }))
    }

    fn close(&mut self, layer: usize) -> Result<()> {
        match (self.open.close(layer), &self.updates) {
            (Some(grads), Some(updates)) => {
                updates.update.apply_to(layer, &self.layers.ranges()[layer], &grads, updates)
            }
            _ => Ok(()),
        }
    }
}

impl ParamGrads for Fused<'_> {
    fn buffer(&mut self, range: &Range<usize>) -> Result<(&mut Tensor, usize)> {
        self.open.buffer(range)
    }

    fn done(&mut self, range: &Range<usize>) -> Result<()> {
        self.open.done(range).map_or(Ok(()), |layer| self.close(layer))
    }
}
