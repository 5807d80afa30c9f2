//! Augmentation `my_plugin`.

use dinolab_core::contract::{Augmentation, ColorPlan, CropContext, CropPlan, Cut, ImagePlan, Rect};
use dinolab_core::rng::Rng;
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Squares of the image at random places, mirrored half of the time and grey now and then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// Side of a global crop's square as a share of the image's shorter side, at least; at most it is all of it. A local
    /// crop's is half as long.
    #[schemars(range(min = 0.01, max = 1))]
    pub least: f64,
    /// Probability that a crop is made grey.
    #[schemars(range(min = 0, max = 1))]
    pub grey: f64,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { least: 0.6, grey: 0.2 }
    }
}

/// Plans with a number of local crops.
#[derive(Debug)]
struct Planner {
    config: MyPlugin,
    local_count: usize,
}

impl MyPlugin {
    /// For crops of the recipe's sizes.
    pub fn build(self, crops: &mut CropContext) -> Result<Box<dyn Augmentation>> {
        Ok(Box::new(Planner { config: self, local_count: crops.local_count }))
    }
}

impl Augmentation for Planner {
    fn plan(&self, (width, height): (usize, usize), rng: &dyn Fn(u64) -> Rng) -> ImagePlan {
        // Every crop has a generator of its own, so that a further crop changes no other.
        let crop = |k: usize, part: f64| {
            let rng = &mut rng(k as u64);
            let side = width.min(height) as f64 * rng.uniform(self.config.least, 1.0) * part;
            let side = (side.round() as usize).max(1);
            let area =
                Rect { x: rng.below(width - side + 1), y: rng.below(height - side + 1), width: side, height: side };
            CropPlan {
                cut: Cut::Image { area, flip: rng.chance(0.5) },
                color: ColorPlan { jitter: None, grey: rng.chance(self.config.grey) },
                blur: None,
                solarize: None,
            }
        };
        ImagePlan {
            shared_color: None,
            globals: [0, 1].map(|k| crop(k, 1.0)),
            locals: (0..self.local_count).map(|k| crop(2 + k, 0.5)).collect(),
        }
    }
}

plugin!(Augmentation, "my_plugin", MyPlugin, MyPlugin::build);
