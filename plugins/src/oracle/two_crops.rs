//! BYOL, VICReg, Barlow Twins, InfoNCE and SIGReg: losses between the projections of crops.

use dfdx::prelude::{
    Axes2, Axis, HasShape as _, MeanTo as _, PermuteTo as _, SumTo as _, Trace as _, TryMatMul as _, WithEmptyTape as _,
};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{constant, linear, picking, unit_rows, DfdxLoss, DfdxOutputs, Scalar, Taped};
use dinolab_core::{dfdx, loss_oracle, Result};

use crate::barlow_twins::BarlowTwins;
use crate::byol::Byol;
use crate::info_nce::InfoNce;
use crate::sigreg::{SigReg, END, POINTS};
use crate::vicreg::VicReg;

loss_oracle!("byol", Byol);
loss_oracle!("vicreg", VicReg);
loss_oracle!("barlow_twins", BarlowTwins);
loss_oracle!("info_nce", InfoNce);
loss_oracle!("sigreg", SigReg);

/// `x` less the mean of its rows.
fn centred(x: Taped) -> Taped {
    let n = x.shape().0;
    let mean = constant(n, n, |_, _| 1.0 / n as f64).matmul(x.with_empty_tape());
    x - mean
}

/// A vector `[1, D]` in every one of `n` rows.
fn repeated(row: Taped, n: usize) -> Taped {
    constant(n, 1, |_, _| 1.0).matmul(row)
}

/// Batch norm, without weight and bias.
fn normalised(x: Taped) -> Taped {
    let n = x.shape().0;
    let x = centred(x);
    let variance = constant(1, n, |_, _| 1.0 / n as f64).matmul(x.with_empty_tape().square());
    x / repeated((variance + 1e-5).sqrt(), n)
}

/// The linear layers of `scope`, with batch norm and ReLU between them.
fn mlp(x: Taped, out: &DfdxOutputs<'_>, scope: &str) -> Taped {
    let mut x = linear(x, &out.params, &format!("{scope}.0."));
    for i in 1.. {
        let layer = format!("{scope}.{}.", 2 * i);
        if !out.params.contains_key(&format!("{layer}weight")) {
            break;
        }
        let n = x.shape().0;
        let affine = |name: &str| repeated(out.params[&format!("{scope}.{}.{name}", 2 * i - 1)].leaky_trace(), n);
        x = linear((normalised(x) * affine("weight") + affine("bias")).relu(), &out.params, &layer);
    }
    x
}

/// The projections of one global crop.
fn of_crop(out: &DfdxOutputs<'_>, crop: usize) -> Taped {
    let images = out.step.images;
    let all = mlp(out.student_cls.leaky_trace(), out, "projector");
    let rows: Vec<usize> = (crop * images..(crop + 1) * images).collect();
    picking(&rows, all.shape().0).matmul(all)
}

fn transposed(x: Taped) -> Taped {
    x.permute::<(usize, usize), Axes2<1, 0>>()
}

/// The sum of the squares off the diagonal.
fn off_diagonal(x: Taped) -> Scalar {
    let d = x.shape().0;
    (x * constant(d, d, |i, j| f64::from(u8::from(i != j)))).square().sum::<(), _>()
}

impl DfdxLoss for Byol {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let (b, n) = (out.step.images, out.step.images * out.step.globals);
        let targets = out.targets.as_ref().expect("the loss has targets").leaky_trace();
        let others: Vec<usize> = (0..n).map(|i| (i + b) % n).collect();
        let others = unit_rows(picking(&others, n).matmul(targets));
        let predicted = mlp(mlp(out.student_cls.leaky_trace(), out, "projector"), out, "predictor");
        // |q - t|^2 = 2 - 2 q.t for vectors of length 1.
        let cosines = (unit_rows(predicted) * others).sum::<(), _>();
        Ok((-cosines * 2.0 + 2.0 * n as f64) / b as f64)
    }
}

impl DfdxLoss for VicReg {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let invariance = (of_crop(out, 0) - of_crop(out, 1)).square().mean::<(), _>();
        let mut loss = invariance * self.invariance_weight;
        for crop in 0..2 {
            // dfdx does not multiply a tensor with itself, so the factors are made one by one.
            let z = || centred(of_crop(out, crop));
            let (n, d) = *z().shape();
            let covariance = transposed(z()).matmul(z()) / (n - 1) as f64;
            let variances = constant(1, n, |_, _| 1.0 / (n - 1) as f64).matmul(z().square());
            let hinge = (-(variances + 1e-4).sqrt() + 1.0).relu().mean::<(), _>();
            loss = loss + hinge * (self.variance_weight / 2.0);
            loss = loss + off_diagonal(covariance) * (self.covariance_weight / d as f64);
        }
        Ok(loss)
    }
}

impl DfdxLoss for BarlowTwins {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let correlation = || {
            let (one, two) = (normalised(of_crop(out, 0)), normalised(of_crop(out, 1)));
            transposed(one).matmul(two) / out.step.images as f64
        };
        let d = correlation().shape().0;
        let ones = constant(d, d, |i, j| f64::from(u8::from(i == j)));
        let on = ((-correlation() + 1.0) * ones).square().sum::<(), _>();
        Ok(on + off_diagonal(correlation()) * self.off_diagonal_weight)
    }
}

impl DfdxLoss for InfoNce {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let z = || unit_rows(mlp(out.student_cls.leaky_trace(), out, "projector"));
        let n = z().shape().0;
        let itself = constant(n, n, |i, j| if i == j { -1e6 } else { 0.0 });
        let log_probs = ((z().matmul(transposed(z())) + itself) / self.temperature).log_softmax::<Axis<1>>();
        let partner = constant(n, n, |i, j| f64::from(u8::from(j == (i + out.step.images) % n)));
        Ok(-(log_probs * partner).sum::<(), _>() / n as f64)
    }
}

impl DfdxLoss for SigReg {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let (b, globals, crops) = (out.step.images, out.step.globals, out.step.globals + out.step.locals);
        let z = {
            let from = |first: usize| move |i: usize, j: usize| f64::from(u8::from(i == first + j));
            let mut rows = constant(crops * b, globals * b, from(0)).matmul(out.student_cls.leaky_trace());
            if let Some(local) = &out.student_local_cls {
                let n = local.shape().0;
                rows = rows + constant(crops * b, n, from(globals * b)).matmul(local.leaky_trace());
            }
            mlp(rows, out, "projector")
        };
        let (n, width) = *z.shape();
        let centre = constant(n, n, |i, j| f64::from(u8::from(i % b == j % b && j < globals * b)) / globals as f64);
        let drawn = out.step.draws.expect("the loss draws directions").to_f64_vec();
        let directions = || constant(width, self.directions, |i, j| drawn[j * width + i]);
        let step = 2.0 * END / (POINTS - 1) as f64;
        let mut sigreg: Option<Scalar> = None;
        for point in 0..POINTS {
            let t = -END + step * point as f64;
            let normal = (-t * t / 2.0).exp();
            // Over the images of every crop.
            let mean = || constant(crops, n, |crop, j| f64::from(u8::from(j / b == crop)) / b as f64);
            let angles = || z.with_empty_tape().matmul(directions()) * t;
            let real = mean().matmul(angles().cos()) + (-normal);
            let imaginary = mean().matmul(angles().sin());
            let error = real.square().mean::<(), _>() + imaginary.square().mean::<(), _>();
            let end = if point == 0 || point == POINTS - 1 { 0.5 } else { 1.0 };
            let term = error * (end * step * normal * b as f64);
            sigreg = Some(match sigreg {
                Some(sum) => sum + term,
                None => term,
            });
        }
        let means = centre.matmul(z.with_empty_tape());
        let agreement = (z - means).square().mean::<(), _>() * (1.0 - self.regularization);
        Ok(agreement + sigreg.expect("there are points") * self.regularization)
    }
}
