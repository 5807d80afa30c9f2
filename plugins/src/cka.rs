//! Patch-level kernel alignment: patches of two views of one image are to be alike in the same pairs.

use dinolab_core::contract::{
    BatchImage, CropBox, Grid, ImageContext, ImageDraws, Loss, LossContext, LossCost, LossRows, LossValue,
    ModelOutputs, Needs, Outputs, StepContext,
};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Loss, "cka", Cka, CkaLoss::build);

/// One minus the centred kernel alignment of the student's patches in one global crop and the teacher's in the other, at the
/// same points of the image, averaged over both ways and all images.
///
/// The patches of both crops are interpolated (bilinearly) at `points x points` places spread over the part of the image that
/// both crops show. With the features' inner products K and L at these places, centred (H K H),
///
/// ```text
/// loss = mean [1 - <HKH, HLH> / (|HKH| |HLH|)]
/// ```
///
/// (linear CKA: Kornblith et al., arXiv:1905.00414, equation 3; between patches of two views as in PaKA, arXiv:2509.05606). Only
/// relations between patches are compared, so student and teacher may differ by a rotation and in width. An image whose crops
/// do not overlap counts with zero; 1e-12 is added to squared lengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cka {
    /// Points along a side of the common part.
    #[schemars(range(min = 2, max = 64))]
    pub points: usize,
    /// Compare tokens after so many blocks of the backbone, before any norm; by default those of the last, after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
}

impl Default for Cka {
    fn default() -> Self {
        Self { points: 7, layer: None }
    }
}

#[derive(Debug)]
struct CkaLoss {
    points: usize,
    layer: Option<usize>,
}

/// Added to squared lengths before their root.
const EPS: f64 = 1e-12;

/// Bilinear weights of `n` patches along an axis at these places, measured in shares of the crop: `[points, n]`.
fn weights(places: &[f64], n: usize) -> Vec<f64> {
    let row = |&at: &f64| {
        // The centre of patch j is at j; outside, the border goes on.
        let at = (at * n as f64 - 0.5).clamp(0.0, (n - 1) as f64);
        (0..n).map(move |j| (1.0 - (at - j as f64).abs()).max(0.0))
    };
    places.iter().flat_map(row).collect()
}

/// What two crops have in common: left, right, top and bottom.
fn common(a: &CropBox, b: &CropBox) -> Option<[f64; 4]> {
    let [left, top] = [a.x.max(b.x), a.y.max(b.y)];
    let [right, bottom] = [(a.x + a.width).min(b.x + b.width), (a.y + a.height).min(b.y + b.height)];
    (left < right && top < bottom).then_some([left, right, top, bottom])
}

impl CkaLoss {
    fn build(config: Cka, _: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        Ok(Box::new(Self { points: config.points, layer: config.layer }))
    }

    /// Weights of the patch rows of a crop at the points, then those of its columns (once for every row of points).
    fn weights(&self, crop: &CropBox, [left, right, top, bottom]: [f64; 4], grid: Grid) -> Vec<f64> {
        let along = |from: f64, to: f64| {
            let step = (to - from) / self.points as f64;
            (0..self.points).map(move |i| from + (i as f64 + 0.5) * step)
        };
        let rows: Vec<f64> = along(top, bottom).map(|y| (y - crop.y) / crop.height).collect();
        let across = along(left, right).map(|x| (x - crop.x) / crop.width);
        let columns: Vec<f64> = across.map(|x| if crop.flip { 1.0 - x } else { x }).collect();
        let columns = weights(&columns, grid.width);
        [weights(&rows, grid.height), columns.repeat(self.points)].concat()
    }

    /// A crop's patches at the points: `[B, P, D]` to `[B, points * points, D]`, given `[B, rows' and columns' weights]`.
    fn at_points(&self, patches: &Tensor, weights: &Tensor, grid: Grid) -> Result<Tensor> {
        let (b, n, d) = (patches.dim(0), self.points, patches.dim(2));
        let Grid { height, width } = grid;
        let rows = weights.narrow_axis(1, 0, n * height)?.reshape(&[b, n, height])?;
        let columns = weights.narrow_axis(1, n * height, n * n * width)?.reshape(&[b * n, n, width])?;
        let down = rows.matmul(&patches.reshape(&[b, height, width * d])?)?.reshape(&[b * n, width, d])?;
        columns.matmul(&down)?.reshape(&[b, n * n, d])
    }

    /// The patches that are compared: `[G*B, P, D]`.
    fn patches(&self, model: &ModelOutputs<'_>, grid: Grid) -> Result<Tensor> {
        match model.layers {
            [tokens, ..] => tokens.narrow_axis(1, tokens.dim(1) - grid.patches(), grid.patches()),
            [] => Ok(model.patches.clone()),
        }
    }

    /// Numbers of a crop's [`weights`](Self::weights).
    fn count(&self, grid: Grid) -> usize {
        self.points * (grid.height + self.points * grid.width)
    }

    /// Inner products of centred features, of length 1: `[B, N, D]` to `[B, N * N]`.
    fn kernel(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let mean = x.mean_axis(1)?.reshape(&[b, 1, d])?;
        let centred = x.sub(&Tensor::full(&[b, n, 1], x.dtype(), 1.0)?.matmul(&mean)?)?;
        let kernel = centred.matmul_t(&centred)?.reshape(&[b, n * n])?;
        let length = kernel.square()?.sum_axis(1)?.shift(EPS)?.sqrt()?;
        kernel.scale_rows(&length.recip()?)
    }
}

impl Loss for CkaLoss {
    fn needs(&self) -> Needs {
        Needs { locals: false, layers: self.layer.into_iter().collect(), min_batch: 1, ..Needs::default() }
    }

    /// For each global crop its [`weights`](CkaLoss::weights), then whether the crops overlap.
    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        let BatchImage { globals, .. } = context.image;
        let common = common(&globals[0], &globals[1]);
        let of_crop = |crop: &CropBox| match common {
            Some(common) => self.weights(crop, common, context.grid),
            None => vec![0.0; self.count(context.grid)],
        };
        let mut numbers: Vec<f64> = globals[..2].iter().flat_map(of_crop).collect();
        numbers.push(f64::from(u8::from(common.is_some())));
        ImageDraws { numbers, tiles: Vec::new() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let (b, dtype, count) = (out.images, context.dtype, self.count(out.grid));
        let drawn = out.image_draws.expect("the loss draws weights").cast(dtype)?;
        let overlaps = drawn.narrow_axis(1, 2 * count, 1)?.reshape(&[b])?;
        let at_points = |patches: &Tensor, crop: usize| {
            let patches = patches.narrow(crop * b, b)?.cast(dtype)?;
            self.kernel(&self.at_points(&patches, &drawn.narrow_axis(1, crop * count, count)?, out.grid)?)
        };
        let [student, teacher] = [&out.student, &out.teacher].map(|model| self.patches(model, out.grid));
        let (student, teacher) = (student?, teacher?);
        let mut aligned = Vec::new();
        for (ours, theirs) in [(0, 1), (1, 0)] {
            let (ours, theirs) = (at_points(&student, ours)?, at_points(&teacher, theirs)?);
            aligned.push(ours.mul(&theirs)?.sum_axis(1)?.mul(&overlaps)?);
        }
        let both = aligned[0].add(&aligned[1])?.scale(0.5)?;
        overlaps.sub(&both)?.mean().map(LossValue::of)
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let points = (self.points * self.points) as f64;
        let activations = rows.patches + rows.globals * (4.0 * points * points + 2.0 * self.points as f64 * points);
        LossCost { activations, ..LossCost::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_interpolate_between_centres_and_stay_at_the_border() {
        let close = |a: Vec<f64>, b: &[f64]| assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12), "{a:?}");
        close(
            weights(&[0.0, 0.125, 0.25, 0.5, 1.0], 4),
            &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0],
        );
    }

    #[test]
    fn a_crop_and_its_mirror_image_give_the_same_points() {
        let loss = CkaLoss { points: 3, layer: None };
        let crop = CropBox { x: 10.0, y: 20.0, width: 40.0, height: 60.0, flip: false };
        let (part, grid) = ([15.0, 40.0, 30.0, 70.0], Grid { height: 4, width: 4 });
        let ramp = |mirrored: bool| {
            let at = |x: usize| if mirrored { 3 - x } else { x } as f64;
            let values: Vec<f64> = (0..16).map(|i| 10.0 * (i / 4) as f64 + at(i % 4)).collect();
            Tensor::from_slice(&values, &[1, 16, 1]).unwrap()
        };
        let at = |flip: bool| {
            let weights = loss.weights(&CropBox { flip, ..crop }, part, grid);
            let weights = Tensor::from_slice(&weights, &[1, weights.len()]).unwrap();
            loss.at_points(&ramp(flip), &weights, grid).unwrap().to_f64_vec()
        };
        let (plain, mirrored) = (at(false), at(true));
        assert!(plain.iter().zip(&mirrored).all(|(a, b)| (a - b).abs() < 1e-12), "{plain:?} {mirrored:?}");
        // Points lie at 1/6, 1/2 and 5/6 of the common part.
        let x = (15.0 + 25.0 / 6.0 - 10.0) / 40.0 * 4.0 - 0.5;
        let y = (30.0 + 40.0 / 6.0 - 20.0) / 60.0 * 4.0 - 0.5;
        assert!((plain[0] - (10.0 * y + x)).abs() < 1e-9, "{plain:?}");
    }

    #[test]
    fn crops_that_only_touch_have_nothing_in_common() {
        let crop = |x| CropBox { x, y: 0.0, width: 10.0, height: 10.0, flip: false };
        assert_eq!(common(&crop(0.0), &crop(10.0)), None);
        assert_eq!(common(&crop(0.0), &crop(4.0)), Some([4.0, 10.0, 0.0, 10.0]));
    }
}
