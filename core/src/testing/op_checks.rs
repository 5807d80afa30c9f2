//! Every operation on a device, held against the CPU in f64: value and gradients. `dinolab doctor` and the tests go
//! through this table.

use crate::comm::Shards;
use crate::ops::{Linear, NegativeRemoval, Segment, SimilarityOptions};
use crate::rng::{Rng, Stream};
use crate::tensor::Tape;
use crate::{DType, Device, Result, Tensor};

/// An operation, or a few that belong together, as a function of some inputs.
pub struct OpCheck {
    /// The operation.
    pub name: &'static str,
    /// Shapes of the inputs: standard normal numbers.
    inputs: &'static [&'static [usize]],
    run: fn(&[Tensor]) -> Result<Tensor>,
}

/// How far an operation is from the CPU's, as the length of the difference over the length of the CPU's result.
#[derive(Clone, Debug)]
pub struct OpError {
    /// Of the result.
    pub value: f64,
    /// Of the gradient of the worst input, given a random gradient of the result.
    pub gradient: f64,
}

/// The error that is permitted: 1e-5 in f32, 1e-2 in bf16.
pub const fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1e-2,
        _ => 1e-5,
    }
}

impl OpCheck {
    /// Runs the operation in `dtype` on `device` and in f64 on the CPU, on the same inputs (numbers that bf16 holds).
    ///
    /// # Errors
    /// If the operation fails.
    pub fn run(&self, device: Device, dtype: DType) -> Result<OpError> {
        let exact = self.on(Device::Cpu, DType::F64)?;
        let ours = self.on(device, dtype)?;
        // A result or gradient of exact zeros is as long as one number of size 1e-3.
        let far = |(ours, exact): (&Vec<f64>, &Vec<f64>)| {
            let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let difference = length(&mut ours.iter().zip(exact).map(|(a, b)| a - b));
            let far = difference / length(&mut exact.iter().copied()).max(1e-3);
            if ours.len() == exact.len() && !far.is_nan() {
                far
            } else {
                f64::INFINITY
            }
        };
        let mut errors = ours.iter().zip(&exact).map(far);
        let value = errors.next().expect("a result comes first");
        Ok(OpError { value, gradient: errors.fold(0.0, f64::max) })
    }

    /// The result, then the gradient of every input that gets one.
    fn on(&self, device: Device, dtype: DType) -> Result<Vec<Vec<f64>>> {
        device.with(|| {
            let tape = Tape::new();
            let inputs: Vec<Tensor> =
                (0..).zip(self.inputs).map(|(i, shape)| normal(i, shape, dtype)).collect::<Result<_>>()?;
            let leaves: Vec<Tensor> = inputs.iter().map(|x| tape.leaf(x)).collect();
            let out = (self.run)(&leaves)?;
            let mut all = vec![out.to_f64_vec()];
            if out.is_tracked() {
                let loss = out.mul(&normal(99, out.shape(), out.dtype())?)?.sum()?;
                let grads = tape.backward(&loss, 1.0, None)?;
                all.extend(leaves.iter().filter_map(|x| grads.of(x)).map(Tensor::to_f64_vec));
            }
            Ok(all)
        })
    }
}

/// Standard normal numbers, rounded to bf16.
fn normal(index: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let mut rng = Rng::new(0, Stream::Probe, u64::MAX, index);
    let draw = || half::bf16::from_f64(rng.normal()).to_f64();
    let data: Vec<f64> = std::iter::repeat_with(draw).take(shape.iter().product()).collect();
    Tensor::from_f64(&data, shape, dtype)
}

fn list(data: &[u32]) -> Result<Tensor> {
    Tensor::from_slice(data, &[data.len()])
}

/// Numbers beside features `x`: scalars, factors of rows.
fn beside(x: &Tensor, data: &[f64], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_f64(data, shape, x.dtype().wide())
}

/// Two images of 7 tokens and one of 4 in 2 heads of 16 channels: a prefix of 1 and 6 and 3 patches.
fn attention(qkv: &Tensor, rotary: bool, bias: Option<&Tensor>) -> Result<Tensor> {
    let segment = |images: usize, patches: usize| -> Result<Segment> {
        let angles: Vec<f64> = (0..patches * 16).map(|i| (i * i) as f64 / 37.0).collect();
        let table = |f: fn(f64) -> f64| {
            let numbers: Vec<f64> = angles.iter().map(|&x| half::bf16::from_f64(f(x)).to_f64()).collect();
            Tensor::from_f64(&numbers, &[patches, 16], qkv.dtype())
        };
        let rotary = rotary.then(|| Ok::<_, crate::Error>((table(f64::sin)?, table(f64::cos)?))).transpose()?;
        Ok(Segment { images, tokens: 1 + patches, rotary, bias: bias.filter(|b| b.dim(1) == patches).cloned() })
    };
    qkv.clone().attention(2, &[segment(2, 6)?, segment(1, 3)?])
}

fn similarity(x: &[Tensor], image_level: bool, remove: NegativeRemoval) -> Result<Tensor> {
    x[0].similarity_distance(&x[1], SimilarityOptions { normalize: true, image_level, remove })
}

macro_rules! checks {
    ($($name:literal, $inputs:expr, |$x:ident| $f:expr;)*) => {
        &[$(OpCheck { name: $name, inputs: &$inputs, run: |$x| $f }),*]
    };
}

/// All operations.
pub static OP_CHECKS: &[OpCheck] = checks! {
    "exp", [&[5, 33]], |x| x[0].exp();
    "ln", [&[5, 33]], |x| x[0].square()?.shift(0.5)?.ln();
    "sqrt", [&[5, 33]], |x| x[0].square()?.shift(0.5)?.sqrt();
    "recip", [&[5, 33]], |x| x[0].square()?.shift(0.5)?.recip();
    "relu", [&[5, 33]], |x| x[0].relu();
    "abs", [&[5, 33]], |x| x[0].abs();
    "gelu", [&[5, 33]], |x| x[0].gelu();
    "sigmoid", [&[5, 33]], |x| x[0].sigmoid();
    "sin", [&[5, 33]], |x| x[0].sin();
    "cos", [&[5, 33]], |x| x[0].cos();
    "tanh", [&[5, 33]], |x| x[0].tanh();
    "add", [&[6, 40], &[6, 40]], |x| x[0].add(&x[1]);
    "sub", [&[6, 40], &[6, 40]], |x| x[0].sub(&x[1]);
    "mul", [&[6, 40], &[6, 40]], |x| x[0].mul(&x[1]);
    "scalar product", [&[6, 40], &[1]], |x| x[0].mul(&x[1]);
    "add_row", [&[37, 24], &[24]], |x| x[0].add_row(&x[1]);
    "mul_row", [&[37, 24], &[24]], |x| x[0].mul_row(&x[1]);
    "scale_rows", [&[5, 24]], |x| x[0].scale_rows(&beside(&x[0], &[1.0, -2.0, 0.5, 3.0, 0.25], &[5])?);
    "sum", [&[7, 300]], |x| x[0].sum();
    "sum_axis", [&[3, 20, 8]], |x| x[0].sum_axis(1);
    "mean_axis", [&[3, 20, 8]], |x| x[0].mean_axis(0);
    "matmul", [&[2, 17, 24], &[2, 24, 33]], |x| x[0].matmul(&x[1]);
    "matmul_t", [&[2, 17, 24], &[2, 33, 24]], |x| x[0].matmul_t(&x[1]);
    "transpose", [&[2, 17, 24]], |x| x[0].transpose();
    "linear", [&[37, 24], &[40, 24], &[40]], |x| x[0].linear(&x[1], Some(&x[2]));
    "linear after layer_norm", [&[37, 24], &[40, 24], &[40], &[24], &[24]], |x| {
        Linear::new(&x[1], Some(&x[2])).after_layer_norm(&x[3], &x[4], 1e-5).of(&x[0])
    };
    "linear after rms_norm", [&[37, 24], &[40, 24], &[24]], |x| {
        Linear::new(&x[1], None).after_rms_norm(&x[2], 1e-5).of(&x[0])
    };
    "linear after gelu", [&[37, 24], &[40, 24], &[40]], |x| Linear::new(&x[1], Some(&x[2])).after_gelu().of(&x[0]);
    "linear after swiglu", [&[37, 24], &[37, 24], &[40, 24], &[40]], |x| {
        Linear::new(&x[2], Some(&x[3])).after_swiglu(&x[1]).of(&x[0])
    };
    "linear after layer_norm, wide", [&[3, 4200], &[8, 4200], &[4200], &[4200]], |x| {
        Linear::new(&x[1], None).after_layer_norm(&x[2], &x[3], 1e-5).of(&x[0])
    };
    "linear after gelu, wide", [&[3, 4200], &[8, 4200]], |x| Linear::new(&x[1], None).after_gelu().of(&x[0]);
    "linear onto tokens", [&[37, 24], &[40, 24], &[37, 40]], |x| Linear::new(&x[1], None).onto(&x[2]).of(&x[0]);
    "linear with scale onto tokens", [&[37, 24], &[40, 24], &[40], &[40], &[37, 40]], |x| {
        Linear::new(&x[1], Some(&x[2])).after_gelu().scale(&x[3]).onto(&x[4]).of(&x[0])
    };
    "mlp branch of a block", [&[37, 24], &[24], &[24], &[40, 24], &[40], &[24, 40], &[24], &[24]], |x| {
        // Sums of gradients' rows pass from layer to layer.
        let h = Linear::new(&x[3], Some(&x[4])).after_layer_norm(&x[1], &x[2], 1e-5).of(&x[0])?;
        Linear::new(&x[5], Some(&x[6])).after_gelu().scale(&x[7]).onto(&x[0]).of(&h)
    };
    "swiglu", [&[9, 40], &[9, 40]], |x| x[0].swiglu(&x[1]);
    "layer_norm", [&[9, 72], &[72], &[72]], |x| x[0].layer_norm(&x[1], &x[2], 1e-6);
    "layer_norm, many wide rows", [&[1000, 2040], &[2040], &[2040]], |x| {
        // Added to a gradient that is there.
        x[0].layer_norm(&x[1], &x[2], 1e-6)?.add(&x[0])
    };
    "rms_norm", [&[9, 72], &[72]], |x| x[0].rms_norm(&x[1], 1e-5);
    "rms_norm, wide", [&[40, 1000], &[1000]], |x| x[0].rms_norm(&x[1], 1e-5);
    "index_add", [&[9, 24], &[3, 24]], |x| {
        x[0].index_add(&list(&[7, 0, 4])?, &x[1], &beside(&x[0], &[1.5, 1.5, 2.0], &[3])?)
    };
    "patchify", [&[2, 3, 12, 8]], |x| x[0].patchify(4);
    "patchify, wide", [&[2, 3, 19, 24]], |x| x[0].patchify(8);
    "tiles", [&[3, 3, 12, 19]], |x| {
        let plan = [[2, 3, 1, 0], [0, 0, 0, 1], [1, 11, 4, 2], [2, 9, 3, 3], [0, 5, 2, 1], [1, 0, 0, 0], [1, 2, 2, 2], [0, 1, 1, 3]];
        x[0].tiles(&Tensor::from_slice(&plan.concat(), &[8, 4])?, 2, 8)
    };
    "assemble_tokens", [&[12, 24], &[3, 24], &[24]], |x| {
        x[0].assemble_tokens(&x[1], 2, Some((&x[2], &list(&[0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1])?)))
    };
    "split_tokens", [&[14, 24]], |x| {
        let (prefix, patches) = x[0].split_tokens(2, 3)?;
        Tensor::cat(&[&prefix.reshape(&[6, 24])?, &patches.reshape(&[8, 24])?])
    };
    "cat", [&[9, 24], &[4, 24]], |x| Tensor::cat(&[&x[0], &x[1]]);
    "depthwise_conv", [&[2, 30, 24], &[24, 1, 3, 3], &[24]], |x| x[0].depthwise_conv((6, 5), &x[1], &x[2]);
    "narrow_axis", [&[9, 6, 8]], |x| x[0].narrow_axis(1, 2, 3);
    "resize_bilinear", [&[2, 64, 24]], |x| x[0].resize_bilinear((8, 8), (3, 4));
    "narrow", [&[9, 24]], |x| x[0].narrow(2, 5);
    "gather_rows", [&[9, 24]], |x| x[0].gather_rows(&list(&[8, 1, 1, 5])?);
    "resize_bicubic", [&[2, 64, 24]], |x| x[0].resize_bicubic((8, 8), (4, 5), false);
    "resize_bicubic, antialiased", [&[2, 64, 24]], |x| x[0].resize_bicubic((8, 8), (3, 4), true);
    "attention", [&[18, 96]], |x| attention(&x[0], false, None);
    "attention, rotary", [&[18, 96]], |x| attention(&x[0], true, None);
    "attention, biased", [&[18, 96], &[2, 6, 6]], |x| attention(&x[0], false, Some(&x[1]));
    "softmax", [&[5, 300]], |x| x[0].softmax();
    "log_softmax", [&[5, 300]], |x| x[0].log_softmax();
    "l2_normalize", [&[5, 72]], |x| x[0].l2_normalize(1e-12);
    "soft_cross_entropy", [&[6, 520], &[4, 520]], |x| {
        let (rows, targets) = (list(&[0, 0, 2, 3, 5])?, list(&[1, 3, 0, 2, 2])?);
        let weights = beside(&x[0], &[0.5, 1.0, 2.0, 0.25, 1.5], &[5])?;
        x[0].soft_cross_entropy(&x[1].detach().softmax()?, &rows, &targets, &weights, 0.25)
    };
    "sinkhorn_knopp", [&[20, 65]], |x| x[0].detach().sinkhorn_knopp(&beside(&x[0], &[2.0], &[])?, 3, &Shards::one());
    "sinkhorn_knopp, many samples", [&[1026, 72]], |x| x[0].detach().sinkhorn_knopp(&beside(&x[0], &[2.0], &[])?, 3, &Shards::one());
    "centered_softmax", [&[9, 65]], |x| {
        let centre: Vec<f64> = (0..65).map(|i| f64::from(i % 7) / 4.0).collect();
        x[0].detach().centered_softmax(&beside(&x[0], &centre, &[65])?, &beside(&x[0], &[0.5], &[])?)
    };
    "mean_row", [&[9, 65]], |x| x[0].detach().mean_row(&Shards::one());
    "neighbour_distance", [&[12, 40]], |x| x[0].neighbour_distance(1, None);
    "neighbour_distance in groups", [&[12, 40]], |x| x[0].neighbour_distance(2, Some(6));
    "similarity_distance", [&[2, 20, 24], &[2, 20, 24]], |x| similarity(x, true, NegativeRemoval::None);
    "similarity_distance, batch level", [&[2, 20, 24], &[2, 20, 24]], |x| similarity(x, false, NegativeRemoval::Teacher);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_itself() {
        for check in OP_CHECKS {
            let error = check.run(Device::Cpu, DType::F32).unwrap();
            let limit = tolerance(DType::F32);
            assert!(error.value < limit && error.gradient < limit, "{}: {error:?}", check.name);
        }
    }
}
