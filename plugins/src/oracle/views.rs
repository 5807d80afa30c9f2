//! The losses about views of an image: what was done to it, and where its crops were cut.

use dfdx::prelude::{Axes2, Axis, PermuteTo as _, SumTo as _, Trace as _, TryMatMul as _};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{constant, gelu, linear, picking, DfdxLoss, DfdxOutputs, Matrix, Scalar, Taped};
use dinolab_core::{dfdx, loss_oracle, Result};

use crate::cka::Cka;
use crate::jigsaw::Jigsaw;
use crate::relative_location::RelativeLocation;
use crate::rotation::Rotation;

loss_oracle!("rotation", Rotation);
loss_oracle!("jigsaw", Jigsaw);
loss_oracle!("relative_location", RelativeLocation);
loss_oracle!("cka", Cka);

/// What was drawn for an image.
fn drawn(out: &DfdxOutputs<'_>, image: usize) -> Vec<f64> {
    let all = out.step.image_draws.expect("the loss draws numbers").to_f64_vec();
    let count = all.len() / out.step.images;
    all[image * count..(image + 1) * count].to_vec()
}

/// The sum of the cross-entropies of rows of logits and one-hot rows.
fn cross_entropies(logits: Taped, own: impl Fn(usize, usize) -> f64) -> Scalar {
    use dfdx::prelude::HasShape as _;
    let (n, classes) = *logits.shape();
    -(logits.log_softmax::<Axis<1>>() * constant(n, classes, own)).sum::<(), _>()
}

/// The classifier with a hidden layer, on the crops `crops` of an image side by side.
fn classified(out: &DfdxOutputs<'_>, image: usize, crops: &[usize]) -> Taped {
    use dfdx::prelude::HasShape as _;
    let cls = &out.more["view_0_cls"];
    let (n, d) = *cls.shape();
    // Features of crop k land in columns k d to (k + 1) d.
    let width = crops.len() * d;
    let mut all = constant(1, width, |_, _| 0.0);
    for (k, crop) in crops.iter().enumerate() {
        let place = constant(d, width, |i, j| f64::from(u8::from(j == k * d + i)));
        all = all + picking(&[crop * out.step.images + image], n).matmul(cls.leaky_trace()).matmul(place);
    }
    linear(gelu(linear(all, &out.params, "classifier.0.")), &out.params, "classifier.2.")
}

impl DfdxLoss for Rotation {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let b = out.step.images;
        let logits = linear(out.more["view_0_cls"].leaky_trace(), &out.params, "classifier.");
        let drawn: Vec<Vec<f64>> = (0..b).map(|image| drawn(out, image)).collect();
        Ok(cross_entropies(logits, |row, k| drawn[row % b][row / b * 4 + k]) / (b * self.turns) as f64)
    }
}

impl DfdxLoss for Jigsaw {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let of_image = |image: usize| {
            let own = drawn(out, image);
            cross_entropies(classified(out, image, &[0, 1, 2, 3, 4, 5, 6, 7, 8]), |_, k| own[k])
        };
        let all = (0..out.step.images).map(of_image).reduce(|a, b| a + b).expect("there are images");
        Ok(all / out.step.images as f64)
    }
}

impl DfdxLoss for RelativeLocation {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let of_pair = |(image, k): (usize, usize)| {
            let own = drawn(out, image);
            cross_entropies(classified(out, image, &[0, 1 + k]), |_, side| own[k * 8 + side])
        };
        let pairs = (0..out.step.images).flat_map(|image| (0..self.neighbours).map(move |k| (image, k)));
        let all = pairs.map(of_pair).reduce(|a, b| a + b).expect("there are images");
        Ok(all / (out.step.images * self.neighbours) as f64)
    }
}

impl Cka {
    /// The centred inner products of a crop's patches at the points.
    fn kernel(&self, out: &DfdxOutputs<'_>, patches: &Matrix, image: usize, crop: usize) -> Taped {
        use dfdx::prelude::HasShape as _;
        let (grid, n) = (out.step.grid, self.points);
        let count = n * (grid.height + n * grid.width);
        let numbers = drawn(out, image)[crop * count..(crop + 1) * count].to_vec();
        let rows = patches.shape().0;
        // Tokens of inner layers have others before the patches.
        let of_crop = rows / (out.step.globals * out.step.images);
        let first = (crop * out.step.images + image) * of_crop + of_crop - grid.patches();
        let points = || {
            let weights = constant(n * n, rows, |point, row| {
                if !(first..first + grid.patches()).contains(&row) {
                    return 0.0;
                }
                let (y, x) = ((row - first) / grid.width, (row - first) % grid.width);
                numbers[point / n * grid.height + y] * numbers[n * grid.height + point % n * grid.width + x]
            });
            let centre = |i: usize, j: usize| f64::from(u8::from(i == j)) - 1.0 / (n * n) as f64;
            constant(n * n, n * n, centre).matmul(weights.matmul(patches.leaky_trace()))
        };
        points().matmul(points().permute::<(usize, usize), Axes2<1, 0>>())
    }
}

impl DfdxLoss for Cka {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let (student, teacher) = match self.layer {
            Some(_) => (&out.more["student_layer_0"], &out.more["teacher_layer_0"]),
            None => (&out.student_patches, &out.teacher_patches),
        };
        let mut all = constant(1, 1, |_, _| 0.0).sum::<(), _>();
        for image in (0..out.step.images).filter(|&image| drawn(out, image).last() == Some(&1.0)) {
            for (ours, theirs) in [(0, 1), (1, 0)] {
                let ours = || self.kernel(out, student, image, ours);
                let theirs = || self.kernel(out, teacher, image, theirs);
                let length = |k: Taped| (k.square().sum::<(), _>() + 1e-12).sqrt();
                all = all + (-((ours() * theirs()).sum::<(), _>() / (length(ours()) * length(theirs()))) + 1.0);
            }
        }
        Ok(all / (2 * out.step.images) as f64)
    }
}
