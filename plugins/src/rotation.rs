//! Rotation prediction: by how many quarter turns an image was turned.

use dinolab_core::contract::{
    ImageContext, ImageDraws, Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext, Tile, View,
};
use dinolab_core::nn::Linear;
use dinolab_core::params::{ParamRole, Params};
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::classify::{classify, drawn_classes, one_hot};

plugin!(Loss, "rotation", Rotation, RotationLoss::build);

/// Quarter turns of an image, none included.
const TURNS: usize = 4;

/// Cross-entropy of a linear classifier that tells from the student's class token by how many quarter turns the first global
/// crop was turned. There is no teacher, and the student sees no other crops for this loss.
///
/// With the crop x_i turned y times, `loss = -1 / (N turns) sum_i sum_y log softmax(W f(turn(x_i, y)) + b)_y` (Gidaris et al.,
/// "Unsupervised representation learning by predicting image rotations", arXiv:1803.07728, equations 2 and 3). The log has the
/// share of turns that are told, `loss/<name>/accuracy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rotation {
    /// How many of the four turns of an image are shown in a step; fewer than four are drawn.
    #[schemars(range(min = 1, max = 4))]
    pub turns: usize,
}

impl Default for Rotation {
    fn default() -> Self {
        Self { turns: TURNS }
    }
}

#[derive(Debug)]
struct RotationLoss {
    turns: usize,
    classifier: Linear,
}

impl RotationLoss {
    fn build(config: Rotation, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let dim = context.dim;
        let classifier =
            context.params.role(ParamRole::Output, |p| p.scope("classifier", |p| Linear::declare(p, dim, TURNS, true)));
        Ok(Box::new(Self { turns: config.turns, classifier }))
    }
}

impl Loss for RotationLoss {
    fn needs(&self) -> Needs {
        Needs { globals: false, locals: false, teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn views(&self, global_size: usize) -> Result<Vec<View>> {
        Ok(vec![View::new(self.turns, 1, global_size)])
    }

    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        let mut turns: Vec<usize> = (0..TURNS).collect();
        if self.turns < TURNS {
            context.rng.shuffle(&mut turns);
            turns.truncate(self.turns);
        }
        ImageDraws {
            numbers: turns.iter().flat_map(|&turn| one_hot(turn, TURNS)).collect(),
            tiles: vec![turns.iter().map(|&turns| Tile { turns, ..Tile::default() }).collect()],
        }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let logits = self.classifier.forward(params, &out.views[0].cls)?.cast(context.dtype)?;
        classify(&logits, &drawn_classes(out, TURNS, context.dtype)?)
    }

    fn cost(&self, _: &LossRows) -> LossCost {
        let (rows, outputs) = (self.turns as f64, (self.turns * TURNS) as f64);
        let forward_flops = 2.0 * rows * self.classifier.parameters();
        LossCost { forward_flops, activations: 3.0 * outputs, outputs, ..LossCost::default() }
    }
}
