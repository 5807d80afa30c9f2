//! A linear classifier on frozen features: multinomial logistic regression with an L2 penalty, by L-BFGS.

use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Result, Tensor};
use rayon::prelude::*;

use crate::lbfgs::minimize;

/// Weights `[C, D]`, row after row, and the bias `[C]` behind them.
pub(crate) struct Head {
    flat: Vec<f64>,
    classes: usize,
}

impl Head {
    /// All zero: every class is as likely as another.
    pub(crate) fn new(classes: usize, dim: usize) -> Self {
        Self { flat: vec![0.0; classes * (dim + 1)], classes }
    }

    /// Goes on from here to the least of mean cross-entropy plus half of `l2` times the squared weights (bias left out), for
    /// features `x` `[n, D]` and shares of classes `[n, C]`, in at most `iterations` steps. A row of zeros counts with no loss.
    pub(crate) fn fit(&mut self, x: &Tensor, shares: &Tensor, l2: f64, iterations: usize) -> Result<()> {
        let (n, weights_end) = (x.dim(0), self.classes * x.dim(1));
        let rows = Tensor::from_slice(&(0..n as u32).collect::<Vec<_>>(), &[n])?;
        let weights = Tensor::full(&[n], x.dtype(), 1.0 / n as f64)?;
        let classes = self.classes;
        minimize(&mut self.flat, iterations, |flat| -> Result<(f64, Vec<f64>)> {
            let tape = Tape::new();
            let (weight, bias) = tensors(flat, classes, x.dtype())?;
            let (weight, bias) = (tape.leaf(&weight), tape.leaf(&bias));
            let logits = x.linear(&weight, Some(&bias))?;
            let loss = logits.soft_cross_entropy(shares, &rows, &rows, &weights, 1.0)?;
            let grads = tape.backward(&loss, 1.0, None)?;
            let gradient = [&weight, &bias].map(|p| grads.of(p).expect("the loss depends on the head").to_f64_vec());
            let mut gradient = gradient.concat();
            gradient[..weights_end].iter_mut().zip(flat).for_each(|(g, w)| *g += l2 * w);
            let penalty = 0.5 * l2 * flat[..weights_end].iter().map(|w| w * w).sum::<f64>();
            Ok((loss.item() + penalty, gradient))
        })
        .map(drop)
    }

    /// Logits `[n, C]` of features `[n, D]`.
    pub(crate) fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = tensors(&self.flat, self.classes, x.dtype())?;
        x.linear(&weight, Some(&bias))
    }
}

fn tensors(flat: &[f64], classes: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
    let (weight, bias) = flat.split_at(flat.len() - classes);
    Ok((
        Tensor::from_f64(weight, &[classes, weight.len() / classes], dtype)?,
        Tensor::from_f64(bias, &[classes], dtype)?,
    ))
}

/// Mean and inverse standard deviation of every feature, from training features.
pub(crate) struct Standardization {
    mean: Vec<f64>,
    scale: Vec<f64>,
}

impl Standardization {
    /// Of rows of `d` features.
    pub(crate) fn of(x: &[f32], d: usize) -> Self {
        let n = (x.len() / d) as f64;
        let average = |f: &dyn Fn(usize, f64) -> f64| {
            let mut sums = vec![0.0; d];
            x.chunks(d).for_each(|row| row.iter().enumerate().for_each(|(i, &x)| sums[i] += f(i, f64::from(x))));
            sums.into_iter().map(|s| s / n).collect::<Vec<f64>>()
        };
        let mean = average(&|_, x| x);
        let variance = average(&|i, x| (x - mean[i]).powi(2));
        // A feature that never changes says nothing; it stays near 0.
        Self { scale: variance.into_iter().map(|v| 1.0 / v.sqrt().max(1e-6)).collect(), mean }
    }

    /// Standardised rows `[n, D]` of features `[.., D]` in f32, in this type.
    pub(crate) fn apply(&self, features: &Tensor, dtype: DType) -> Result<Tensor> {
        let d = features.last_dim();
        let shape = [features.len() / d, d];
        let standard = |i: usize, x: f32| (f64::from(x) - self.mean[i]) * self.scale[i];
        if dtype == DType::F64 {
            let x = features.as_slice::<f32>().iter().enumerate().map(|(i, &x)| standard(i % d, x));
            return Tensor::from_slice(&x.collect::<Vec<f64>>(), &shape);
        }
        let mut out = features.to_owned().reshape(&shape)?;
        out.as_mut_slice::<f32>().par_chunks_mut(d).for_each(|row| {
            row.iter_mut().enumerate().for_each(|(i, x)| *x = standard(i, *x) as f32);
        });
        Ok(out)
    }
}
