//! Softmax and its logarithm over the last axis.

use crate::cuda::{args, Gpu};
use crate::tensor::blocks::*;
use crate::tensor::parallel::{lane_max, lane_sum, rows_per_task};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, Result, Tensor};

cuda_source! { static SOFTMAX = "softmax" { include_str!("log_sum.cuh"), include_str!("softmax.cu") } }

impl Tensor {
    /// `exp(x) / sum(exp(x))` over the last axis. dx = y (dy - sum(y dy)).
    pub fn softmax(&self) -> Result<Tensor> {
        Softmax { log: false, out: None }.apply(&[self])
    }

    /// `x - ln(sum(exp(x)))` over the last axis. dx = dy - exp(y) sum(dy).
    pub fn log_softmax(&self) -> Result<Tensor> {
        Softmax { log: true, out: None }.apply(&[self])
    }
}

struct Softmax {
    log: bool,
    out: Option<Tensor>,
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        if self.log {
            "log_softmax"
        } else {
            "softmax"
        }
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let x = inputs[0];
        if let Some(gpu) = x.gpu() {
            let out = softmax_on(gpu, x, None, self.log)?;
            if save {
                self.out = Some(out.clone());
            }
            return Ok(out);
        }
        let d = x.last_dim().max(1);
        let block = rows_per_task(d) * d;
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        dispatch_real!(self.name(), x.dtype(), T => {
            let blocks = out.as_mut_slice::<T>().par_chunks_mut(block).zip(x.as_slice::<T>().par_chunks(block));
            blocks.for_each(|(y, x)| simd!(T, {
                for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    let max = lane_max(x);
                    if self.log {
                        let shift = max + lane_sum([x], |[x]| (x - max).exp()).ln();
                        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x - shift);
                    } else {
                        y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - max).exp());
                        let scale = T::ONE / lane_sum([y], |[y]| y);
                        y.iter_mut().for_each(|y| *y *= scale);
                    }
                }
            }));
            Ok(())
        })?;
        if save {
            self.out = Some(out.clone());
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, mut dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let y = self.out.expect("saved by forward");
        let d = y.last_dim().max(1);
        if let Some(gpu) = y.gpu() {
            let mut dx = Tensor::uninit(y.shape(), y.dtype());
            let bytes = (3 * y.len() * y.dtype().size()) as f64;
            let launch = gpu.kernel(&SOFTMAX, "softmax_backward", y.dtype())?.grid(y.len() / d, block_of(d));
            launch.work(0.0, bytes).launch(args![&mut dx, &y, &dy, i32::from(self.log), d as i32])?;
            return grads.add(0, dx);
        }
        let block = rows_per_task(d) * d;
        if !dy.is_unique() {
            dy = dy.to_owned();
        }
        dispatch_real!("softmax", y.dtype(), T => {
            let blocks = dy.as_mut_slice::<T>().par_chunks_mut(block).zip(y.as_slice::<T>().par_chunks(block));
            blocks.for_each(|(dy, y)| simd!(T, {
                for (dy, y) in dy.chunks_exact_mut(d).zip(y.chunks_exact(d)) {
                    if self.log {
                        let sum = lane_sum([dy], |[dy]| dy);
                        dy.iter_mut().zip(y).for_each(|(dy, &y)| *dy -= y.exp() * sum);
                    } else {
                        let sum = lane_sum([dy, y], |[dy, y]| dy * y);
                        dy.iter_mut().zip(y).for_each(|(dy, &y)| *dy = y * (*dy - sum));
                    }
                }
            }));
            Ok(())
        })?;
        grads.add(0, dy)
    }
}

/// Threads of a block that has a row of `d` elements: about a pack of eight elements each.
pub(crate) fn block_of(d: usize) -> u32 {
    (d / 8).next_multiple_of(32).clamp(32, 512) as u32
}

/// `softmax((x - center) / temperature)`, or its logarithm; without the two, `softmax(x)`. They are f32.
pub(crate) fn softmax_on(gpu: &'static Gpu, x: &Tensor, center: Option<[&Tensor; 2]>, log: bool) -> Result<Tensor> {
    let d = x.last_dim().max(1);
    let mut y = Tensor::uninit(x.shape(), x.dtype());
    let (center, temperature) = (center.map(|c| c[0]), center.map(|c| c[1]));
    let bytes = (2 * x.len() * x.dtype().size()) as f64;
    let launch = gpu.kernel(&SOFTMAX, "softmax", x.dtype())?.grid(x.len() / d, block_of(d)).work(0.0, bytes);
    launch.launch(args![&mut y, x, center, temperature, i32::from(log), d as i32])?;
    Ok(y)
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn probabilities_sum_to_one_however_large_the_scores() {
        let x = Tensor::from_slice(&[1000.0f32, 1001.0, -1000.0, 3.0, 3.0, 3.0], &[2, 3]).unwrap();
        let y = x.softmax().unwrap();
        let (y, e) = (y.as_slice::<f32>(), 1f32.exp());
        assert!((y[1] - e / (1.0 + e)).abs() < 1e-6 && (y[0] + y[1] - 1.0).abs() < 1e-6 && y[2] == 0.0, "{y:?}");
        assert!(y[3..].iter().all(|p| (p - 1.0 / 3.0).abs() < 1e-6), "{y:?}");
    }

    #[test]
    fn log_softmax_is_the_logarithm_of_softmax() {
        let x = Tensor::from_slice(&[0.3f64, -2.0, 1.5, 0.0], &[1, 4]).unwrap();
        let (p, lp) = (x.softmax().unwrap(), x.log_softmax().unwrap());
        for (p, lp) in p.as_slice::<f64>().iter().zip(lp.as_slice::<f64>()) {
            assert!((p.ln() - lp).abs() < 1e-14);
        }
    }
}
