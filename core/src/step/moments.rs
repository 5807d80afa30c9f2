//! Where the optimizer's moments of each parameter are kept.

use crate::ops::{EightBit, Place};
use crate::params::{Layout, ParamRole, ParamSpec, ALIGN};
use crate::recipe::MomentStorage;
use crate::{DType, Tensor};

/// The least numbers of a parameter whose moments take eight bits each: with fewer there is nothing to gain (Dettmers et al.,
/// arXiv:2110.02861, whose implementation has the same).
const LEAST: usize = 4096;

/// The places of all moments, in the order of the layout.
pub(crate) struct Storage {
    pub(super) places: Vec<Place>,
    /// Elements of a buffer of moments as wide as the weights.
    whole: usize,
    /// Blocks of moments in eight bits.
    pub(super) blocks: usize,
}

impl Storage {
    /// Those of a layout. As wide as the weights, moments lie where their weights do.
    pub(crate) fn new(layout: &Layout, storage: MomentStorage) -> Self {
        if storage == MomentStorage::F32 {
            let places = layout.specs().iter().map(|spec| Place::Whole(spec.offset)).collect();
            return Self { places, whole: layout.len(), blocks: 0 };
        }
        let (mut whole, mut blocks) = (0usize, 0usize);
        let place = |spec: &ParamSpec| {
            let len = spec.range().len();
            // As in the paper, what is looked up by rare rows keeps its precision: here the prototypes.
            let eight = spec.shape.len() > 1 && len >= LEAST && spec.role != Some(ParamRole::LastLayer);
            if eight {
                let first = blocks;
                blocks = blocks.saturating_add(EightBit::blocks(len));
                return Place::Eight(first);
            }
            let start = whole;
            whole = whole.saturating_add(len.div_ceil(ALIGN).saturating_mul(ALIGN));
            Place::Whole(start)
        };
        let places = layout.specs().iter().map(place).collect();
        Self { places, whole, blocks }
    }

    /// One moment of those that are as wide as the weights, zero.
    pub(super) fn whole(&self, weights: DType) -> Tensor {
        Tensor::zeros(&[self.whole], weights)
    }

    /// What one moment takes beside weights of this type.
    pub(crate) fn bytes(&self, weights: DType) -> f64 {
        self.whole as f64 * weights.size() as f64 + self.blocks as f64 * EightBit::BYTES as f64
    }
}
