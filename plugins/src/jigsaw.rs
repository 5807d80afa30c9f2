//! Jigsaw puzzles: which of some permutations the pieces of an image are in.

use dinolab_core::contract::{
    ImageContext, ImageDraws, Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext, View,
};
use dinolab_core::nn::{Activation, Mlp};
use dinolab_core::params::Params;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::classify::{classify, drawn_classes, one_hot};
use crate::thirds::{side_by_side, Thirds, CELLS};

plugin!(Loss, "jigsaw", Jigsaw, JigsawLoss::build);

/// Permutations that the farthest one is chosen from.
const CANDIDATES: usize = 200;

/// Cross-entropy of a classifier that tells from the student's class tokens of the nine pieces of an image, each seen alone,
/// in which permutation they are. There is no teacher, and the student sees no other crops for this loss.
///
/// The pieces are cut from the thirds of the first global crop with gaps of random width between them, and shown in an order
/// drawn from a fixed set of permutations: `loss = -mean_i log softmax(g([f(x_p(1)), .., f(x_p(9))]))_p` with a hidden layer in g
/// (Noroozi and Favaro, "Unsupervised learning of visual representations by solving jigsaw puzzles", arXiv:1603.09246, section
/// 3). Each permutation of the set is the farthest from those before it (by places that differ, algorithm 1 there) among 200
/// drawn ones. The log has the share of puzzles that are solved, `loss/<name>/accuracy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Jigsaw {
    /// Permutations in the set.
    #[schemars(range(min = 2, max = 1000), extend("x-width" = true))]
    pub permutations: usize,
    /// Width of the classifier's hidden layer.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub hidden: usize,
}

impl Default for Jigsaw {
    fn default() -> Self {
        Self { permutations: 64, hidden: 512 }
    }
}

#[derive(Debug)]
struct JigsawLoss {
    patch_size: usize,
    permutations: Vec<[usize; CELLS]>,
    classifier: Mlp,
}

/// `count` different permutations that are far from each other.
fn permutations(count: usize) -> Vec<[usize; CELLS]> {
    let mut rng = Rng::new(0, Stream::Plugin, 0, 0);
    let mut draw = || {
        let mut cells = std::array::from_fn(|i| i);
        rng.shuffle(&mut cells);
        cells
    };
    let mut chosen: Vec<[usize; CELLS]> = vec![draw()];
    while chosen.len() < count {
        let distance = |a: &[usize; CELLS], b: &[usize; CELLS]| a.iter().zip(b).filter(|(a, b)| a != b).count();
        let far = |candidate: &[usize; CELLS]| {
            let distances = || chosen.iter().map(|known| distance(known, candidate));
            (distances().min().unwrap_or(0) > 0, distances().sum::<usize>())
        };
        let farthest = (0..CANDIDATES).map(|_| draw()).max_by_key(far).expect("there are candidates");
        if far(&farthest).0 {
            chosen.push(farthest);
        }
    }
    chosen
}

impl JigsawLoss {
    fn build(config: Jigsaw, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let widths = [CELLS * context.dim, config.hidden, config.permutations];
        let classifier =
            context.params.scope("classifier", |p| Mlp::declare_to_output(p, &widths, Activation::Gelu, true));
        let permutations = permutations(config.permutations);
        Ok(Box::new(Self { patch_size: context.patch_size, permutations, classifier }))
    }
}

impl Loss for JigsawLoss {
    fn needs(&self) -> Needs {
        Needs { globals: false, locals: false, teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn views(&self, global_size: usize) -> Result<Vec<View>> {
        let tile_size = Thirds::of(global_size, self.patch_size)?.tile_size;
        Ok(vec![View::new(CELLS, 1, tile_size)])
    }

    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        let Ok(thirds) = Thirds::of(context.global_size, self.patch_size) else { return ImageDraws::default() };
        let drawn = context.rng.below(self.permutations.len());
        ImageDraws {
            numbers: one_hot(drawn, self.permutations.len()).collect(),
            tiles: vec![self.permutations[drawn].iter().map(|&cell| thirds.square(context.rng, cell)).collect()],
        }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let pieces = side_by_side(&out.views[0].cls, out.images)?;
        let logits = self.classifier.forward(params, &pieces)?.cast(context.dtype)?;
        classify(&logits, &drawn_classes(out, self.permutations.len(), context.dtype)?)
    }

    fn cost(&self, _: &LossRows) -> LossCost {
        let outputs = self.permutations.len() as f64;
        LossCost {
            forward_flops: 2.0 * self.classifier.parameters(),
            activations: self.classifier.activations() + 2.0 * outputs,
            outputs,
            ..LossCost::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_differ_in_most_places() {
        let all = permutations(64);
        let differ = |a: &[usize; CELLS], b: &[usize; CELLS]| a.iter().zip(b).filter(|(a, b)| a != b).count();
        let pairs: Vec<usize> =
            (0..64).flat_map(|j| (0..j).map(move |i| (i, j))).map(|(i, j)| differ(&all[i], &all[j])).collect();
        let mean = pairs.iter().sum::<usize>() as f64 / pairs.len() as f64;
        // Random ones differ in 8 of 9 places.
        assert!(pairs.iter().all(|&d| d > 0) && mean > 8.05, "{mean}");
        assert!(all.iter().all(|p| (0..CELLS).all(|cell| p.contains(&cell))));
    }
}
