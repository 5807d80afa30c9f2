//! Crops without distortion: what is left of self-supervision without augmentations of colour and scale.

use dinolab_core::contract::{Augmentation, ColorPlan, CropContext, CropPlan, Cut, ImagePlan, Rect};
use dinolab_core::rng::Rng;
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Augmentation, "resized", Resized, Planner::build);

/// The largest central square of the image, resized, as both global crops; local crops are squares at random places. Nothing
/// is mirrored, jittered, blurred or solarised: a control for what augmentations do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resized {
    /// Area of a local crop as a share of the image's: [least, most]. A square is at most as large as the image's shorter
    /// side.
    #[schemars(extend("items" = { "type": "number", "exclusiveMinimum": 0, "maximum": 1 }, "x-ascending" = true))]
    pub local_scale: [f64; 2],
}

impl Default for Resized {
    fn default() -> Self {
        Self { local_scale: [0.05, 0.32] }
    }
}

/// Draws plans with a number of local crops.
#[derive(Debug)]
struct Planner {
    config: Resized,
    local_count: usize,
}

impl Planner {
    fn build(config: Resized, crops: &mut CropContext) -> Result<Box<dyn Augmentation>> {
        Ok(Box::new(Self { config, local_count: crops.local_count }))
    }
}

/// A crop of a box as it is.
fn plain(x: usize, y: usize, side: usize) -> CropPlan {
    let cut = Cut::Image { area: Rect { x, y, width: side, height: side }, flip: false };
    CropPlan { cut, color: ColorPlan::default(), blur: None, solarize: None }
}

impl Augmentation for Planner {
    fn plan(&self, (width, height): (usize, usize), rng: &dyn Fn(u64) -> Rng) -> ImagePlan {
        let shorter = width.min(height);
        let global = plain((width - shorter) / 2, (height - shorter) / 2, shorter);
        let local = |k: usize| {
            let rng = &mut rng(2 + k as u64);
            let [least, most] = self.config.local_scale;
            let area = (width * height) as f64 * rng.uniform(least, most);
            let side = (area.sqrt().round() as usize).clamp(1, shorter);
            plain(rng.below(width - side + 1), rng.below(height - side + 1), side)
        };
        ImagePlan { shared_color: None, globals: [global; 2], locals: (0..self.local_count).map(local).collect() }
    }
}
