//! Masks of single patches, drawn uniformly.

use dinolab_core::contract::{Grid, Masking, Unmasked};
use dinolab_core::plugin;
use dinolab_core::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::block::fill;
use crate::mask_sizes::Shares;

plugin!(Masking, "random", Random);

/// Single patches, drawn uniformly: the sampler of MAE (He et al., arXiv:2111.06377, section 3) and SimMIM
/// (arXiv:2111.09886).
///
/// Crops and their numbers of masked patches are those of `block` for the same `probability` and `ratio`, so the two differ
/// in the shape of masks alone. MAE masks 0.75 of every image: `probability = 1.0`, `ratio = [0.75, 0.75]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Random {
    /// Share of the global crops that are masked at all.
    #[schemars(range(min = 0, max = 1))]
    pub probability: f64,
    /// Share of patches masked in those, spread evenly over [least, most].
    #[schemars(inner(range(min = 0, max = 1)), extend("x-ascending" = true))]
    pub ratio: [f64; 2],
}

impl Default for Random {
    fn default() -> Self {
        Self { probability: 0.5, ratio: [0.1, 0.5] }
    }
}

impl Random {
    fn shares(&self) -> Shares {
        Shares { probability: self.probability, ratio: self.ratio }
    }
}

impl Masking for Random {
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
            let mut mask = vec![false; grid.patches()];
            fill(rng, &mut mask, size);
            mask
        })
    }
}
