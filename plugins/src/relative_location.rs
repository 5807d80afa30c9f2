//! Relative patch location: where a neighbour lies, seen from the middle.

use dinolab_core::contract::{
    ImageContext, ImageDraws, Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext, View,
};
use dinolab_core::nn::{Activation, Mlp};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::classify::{classify, drawn_classes, one_hot};
use crate::thirds::{Thirds, CELLS};

plugin!(Loss, "relative_location", RelativeLocation, RelativeLocationLoss::build);

/// Places around the middle.
const NEIGHBOURS: usize = CELLS - 1;

/// Cross-entropy of a classifier that tells from the student's class tokens of two squares of an image, each seen alone, on
/// which of the eight sides of the first the second one lies. There is no teacher, and the student sees no other crops for
/// this loss.
///
/// The squares are cut from the middle third of the first global crop and from those around it, with gaps of random width
/// between them: `loss = -mean log softmax(g([f(middle), f(neighbour)]))_side` with a hidden layer in g (Doersch et al.,
/// "Unsupervised visual representation learning by context prediction", arXiv:1505.05192, section 3). The log has the share of
/// neighbours whose side is told, `loss/<name>/accuracy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RelativeLocation {
    /// How many of the eight neighbours of an image are shown in a step; fewer than eight are drawn.
    #[schemars(range(min = 1, max = 8))]
    pub neighbours: usize,
    /// Width of the classifier's hidden layer.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub hidden: usize,
}

impl Default for RelativeLocation {
    fn default() -> Self {
        Self { neighbours: NEIGHBOURS, hidden: 512 }
    }
}

#[derive(Debug)]
struct RelativeLocationLoss {
    neighbours: usize,
    patch_size: usize,
    classifier: Mlp,
}

impl RelativeLocationLoss {
    fn build(config: RelativeLocation, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let widths = [2 * context.dim, config.hidden, NEIGHBOURS];
        let classifier =
            context.params.scope("classifier", |p| Mlp::declare_to_output(p, &widths, Activation::Gelu, true));
        Ok(Box::new(Self { neighbours: config.neighbours, patch_size: context.patch_size, classifier }))
    }
}

impl Loss for RelativeLocationLoss {
    fn needs(&self) -> Needs {
        Needs { globals: false, locals: false, teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn views(&self, global_size: usize) -> Result<Vec<View>> {
        let tile_size = Thirds::of(global_size, self.patch_size)?.tile_size;
        Ok(vec![View::new(1 + self.neighbours, 1, tile_size)])
    }

    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        let Ok(thirds) = Thirds::of(context.global_size, self.patch_size) else { return ImageDraws::default() };
        let middle = CELLS / 2;
        let mut sides: Vec<usize> = (0..NEIGHBOURS).collect();
        if self.neighbours < NEIGHBOURS {
            context.rng.shuffle(&mut sides);
            sides.truncate(self.neighbours);
        }
        let around = sides.iter().map(|&side| if side < middle { side } else { side + 1 });
        ImageDraws {
            numbers: sides.iter().flat_map(|&side| one_hot(side, NEIGHBOURS)).collect(),
            tiles: vec![[middle].into_iter().chain(around).map(|cell| thirds.square(context.rng, cell)).collect()],
        }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let (images, cls) = (out.images, &out.views[0].cls);
        // Row by row: the middle of the same image, then the neighbour.
        let rows: Vec<u32> =
            (0..images * self.neighbours).flat_map(|i| [i % images, i + images]).map(|i| i as u32).collect();
        let pairs = cls.gather_rows(&Tensor::from_slice(&rows, &[rows.len()])?)?;
        let pairs = pairs.reshape(&[images * self.neighbours, 2 * cls.dim(1)])?;
        let logits = self.classifier.forward(params, &pairs)?.cast(context.dtype)?;
        classify(&logits, &drawn_classes(out, NEIGHBOURS, context.dtype)?)
    }

    fn cost(&self, _: &LossRows) -> LossCost {
        let (rows, outputs) = (self.neighbours as f64, (self.neighbours * NEIGHBOURS) as f64);
        LossCost {
            forward_flops: 2.0 * rows * self.classifier.parameters(),
            activations: rows * self.classifier.activations() + 2.0 * outputs,
            outputs,
            ..LossCost::default()
        }
    }
}
