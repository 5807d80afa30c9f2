//! Masking `my_plugin`.

use dinolab_core::contract::{Grid, Masking, Unmasked};
use dinolab_core::plugin;
use dinolab_core::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One side of every crop: the left, right, upper or lower part, whichever is drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// Share of the patches of a crop that is masked.
    #[schemars(range(min = 0, max = 1))]
    pub share: f64,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { share: 0.3 }
    }
}

impl MyPlugin {
    fn of_crop(&self, grid: Grid) -> usize {
        (grid.patches() as f64 * self.share) as usize
    }
}

impl Masking for MyPlugin {
    // Whatever is drawn, a batch has as many masked patches as this: a step is recorded for given shapes.
    fn masked(&self, crops: usize, grid: Grid) -> usize {
        crops * self.of_crop(grid)
    }

    fn share(&self, _: Grid) -> f64 {
        self.share
    }

    fn unmasked(&self, _: usize, grid: Grid) -> Option<Unmasked> {
        let patches = grid.patches();
        let reason = format!("{} of the {patches} patches of a crop is less than one patch", self.share);
        let help = format!("use at least {:.4}", 1.01 / patches as f64);
        (self.of_crop(grid) == 0).then_some(Unmasked { key: "share", reason, help })
    }

    fn draw(&self, rng: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>> {
        let mut crop = || {
            // Patches from the side inwards; the first of them are masked.
            let (side, n) = (rng.below(4), grid.patches());
            let (height, width) = (grid.height, grid.width);
            let mut order: Vec<usize> = (0..n).collect();
            match side {
                0 => order.sort_by_key(|i| i % width),
                1 => order.sort_by_key(|i| width - i % width),
                2 => {}
                _ => order.sort_by_key(|i| height - i / width),
            }
            let mut mask = vec![false; n];
            order[..self.of_crop(grid)].iter().for_each(|&i| mask[i] = true);
            mask
        };
        (0..crops).map(|_| crop()).collect()
    }
}

plugin!(Masking, "my_plugin", MyPlugin);
