//! Where the optimizer's moments of each parameter are kept.

use std::ops::Range;

use crate::ops::{EightBit, Place};
use crate::params::{Layout, ParamRole, ParamSpec, ALIGN};
use crate::recipe::MomentStorage;
use crate::{DType, Device, Result, Tensor};

use super::parts::within;

/// The least numbers of a parameter whose moments take eight bits each: with fewer there is nothing to gain (Dettmers et al.,
/// arXiv:2110.02861, whose implementation has the same).
const LEAST: usize = 4096;

/// The places of the moments of a part of the layout.
pub(crate) struct Storage {
    /// Of every parameter, in the order of the layout.
    pub(super) places: Vec<Placed>,
    /// Elements of a buffer of moments as wide as the weights.
    whole: usize,
    /// Blocks of moments in eight bits.
    pub(super) blocks: usize,
}

/// What of a parameter is in the part, and where its moments are.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    /// In the flat memory of the layout; empty if nothing of it is in the part.
    pub(super) range: Range<usize>,
    pub(super) place: Place,
}

impl Storage {
    /// Those of the part `own` of a layout. As wide as the weights, moments lie as their weights do.
    pub(crate) fn new(layout: &Layout, storage: MomentStorage, own: &Range<usize>) -> Self {
        let (mut whole, mut blocks) = (0usize, 0usize);
        let place = |spec: &ParamSpec| {
            let range = within(&spec.range(), own);
            if storage == MomentStorage::F32 {
                let place = Place::Whole(range.start.saturating_sub(own.start));
                return Placed { range, place };
            }
            // As in the paper, what is looked up by rare rows keeps its precision: here the prototypes.
            let eight = spec.shape.len() > 1 && spec.range().len() >= LEAST && spec.role != Some(ParamRole::LastLayer);
            let place = if eight {
                let first = blocks;
                blocks = blocks.saturating_add(EightBit::blocks(range.len()));
                Place::Eight(first)
            } else {
                let start = whole;
                whole = whole.saturating_add(range.len().div_ceil(ALIGN).saturating_mul(ALIGN));
                Place::Whole(start)
            };
            Placed { range, place }
        };
        let places = layout.specs().iter().map(place).collect();
        if storage == MomentStorage::F32 {
            whole = own.len();
        }
        Self { places, whole, blocks }
    }

    /// One moment of those that are as wide as the weights, zero; of those on a GPU, in host memory if `offload` says so.
    ///
    /// # Errors
    /// If there is not that much host memory.
    pub(super) fn whole(&self, weights: DType, offload: bool) -> Result<Tensor> {
        match Device::current().gpu().filter(|_| offload) {
            Some(gpu) => Tensor::zeros_beside(gpu, &[self.whole], weights),
            None => Ok(Tensor::zeros(&[self.whole], weights)),
        }
    }

    /// What one moment takes beside weights of this type, where those as wide as they are elsewhere if `offload` says so.
    pub(crate) fn bytes(&self, weights: DType, offload: bool) -> f64 {
        let whole = if offload { 0.0 } else { self.whole as f64 * weights.size() as f64 };
        whole + self.blocks as f64 * EightBit::BYTES as f64
    }
}
