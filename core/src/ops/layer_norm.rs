//! Normalisation of the last axis: LayerNorm (Ba et al., arXiv:1607.06450) and RMSNorm (Zhang and Sennrich,
//! arXiv:1910.07467).
//!
//! With `h = (x - mean) rstd`, or `h = x rstd` for RMSNorm, and `g = weight dy`:
//! y = weight h + bias, dx = rstd (g - mean(g) - h mean(g h)), without `mean(g)` for RMSNorm;
//! dweight = sum of dy h and dbias = sum of dy over all rows.

use rayon::prelude::*;

use crate::cuda::{args, Arg, Gpu};
use crate::ops::columns::Partial;
use crate::ops::linear::sum_rows;
use crate::ops::parallel::lane_sum;
use crate::ops::{same_dtype, with_grad};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static NORM = "layer_norm" { include_str!("columns.cuh"), include_str!("layer_norm.cu") } }

impl Tensor {
    /// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis, with the biased variance:
    /// `[.., D]`, `weight [D]`, `bias [D]` to `[.., D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        Norm { centred: true, eps, saved: None }.apply(&[self, weight, bias])
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis: `[.., D]`, `weight [D]` to `[.., D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn rms_norm(&self, weight: &Tensor, eps: f64) -> Result<Tensor> {
        Norm { centred: false, eps, saved: None }.apply(&[self, weight])
    }
}

struct Norm {
    /// LayerNorm if true, RMSNorm if not.
    centred: bool,
    eps: f64,
    saved: Option<Saved>,
}

struct Saved {
    x: Tensor,
    weight: Tensor,
    /// `[rows, 2]`: mean (0 for RMSNorm) and reciprocal standard deviation.
    stats: Tensor,
}

/// Rows a task handles.
const ROWS: usize = 64;

impl Op for Norm {
    fn name(&self) -> &'static str {
        if self.centred {
            "layer_norm"
        } else {
            "rms_norm"
        }
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (x, weight, bias) = (inputs[0], inputs[1], inputs.get(2));
        same_dtype(self.name(), inputs)?;
        let d = x.last_dim();
        if x.rank() == 0 || d == 0 || inputs[1..].iter().any(|w| w.shape() != [d]) {
            let params: Vec<_> = inputs[1..].iter().map(|w| w.shape()).collect();
            return Err(Error::shape(self.name(), format!("x {:?}, weight and bias {params:?}", x.shape())));
        }
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        let rows = x.len() / d;
        if let Some(gpu) = x.gpu() {
            let mut stats = save.then(|| Tensor::uninit(&[rows, 2], DType::F32));
            let at = stats.as_mut().map_or(Arg::from(0u64), Arg::from);
            let bytes = (2 * x.len() * x.dtype().size()) as f64;
            let (eps, centred) = (self.eps as f32, i32::from(self.centred));
            let launch = gpu.kernel(&NORM, "norm", x.dtype())?.rows(rows).work(0.0, bytes);
            let bias = bias.map(|b| &**b);
            launch.launch(args![&mut out, &at, x, weight, bias, eps, centred, rows as i32, d as i32])?;
            self.saved = stats.map(|stats| Saved { x: x.detach(), weight: weight.detach(), stats });
            return Ok(out);
        }
        let mut stats = Tensor::uninit(&[rows, 2], x.dtype());
        dispatch_real!(self.name(), x.dtype(), T => {
            let (eps, n) = (T::of(self.eps), T::of(d as f64));
            let (weight, bias) = (weight.as_slice::<T>(), bias.map(|b| b.as_slice::<T>()));
            let blocks = out.as_mut_slice::<T>().par_chunks_mut(ROWS * d).zip(x.as_slice::<T>().par_chunks(ROWS * d));
            blocks.zip(stats.as_mut_slice::<T>().par_chunks_mut(ROWS * 2)).for_each(|((y, x), stats)| simd!({
                for ((y, x), stats) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(stats.chunks_exact_mut(2)) {
                    let mean = if self.centred { lane_sum([x], |[x]| x) / n } else { T::ZERO };
                    let variance = lane_sum([x], |[x]| (x - mean) * (x - mean)) / n;
                    let rstd = T::ONE / (variance + eps).sqrt();
                    stats.copy_from_slice(&[mean, rstd]);
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                        *y = (x - mean) * rstd * w;
                    }
                    if let Some(bias) = bias {
                        y.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
                    }
                }
            }));
            Ok(())
        })?;
        if save {
            self.saved = Some(Saved { x: x.detach(), weight: weight.detach(), stats });
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let saved = self.saved.as_ref().expect("saved by forward");
        let d = saved.x.last_dim();
        if let Some(gpu) = dy.gpu() {
            return self.backward_on(gpu, saved, &dy, grads);
        }
        let blocks = saved.stats.dim(0).div_ceil(ROWS);
        dispatch_real!(self.name(), dy.dtype(), T => {
            // The parameters' gradients are summed in blocks of rows of fixed size, and the blocks in order.
            let mut partial = Tensor::uninit(&[2, blocks, d], dy.dtype());
            let (dweight, dbias) = partial.as_mut_slice::<T>().split_at_mut(blocks * d);
            with_grad::<T>(grads, 0, dy.len(), |dx, add| {
                self.rows(saved, dy.as_slice::<T>(), dx, add, dweight, dbias);
            })?;
            grads.accumulate(1, |mut dw| {
                let add = dw.add;
                sum_rows(dw.as_mut_slice::<T>(), dweight, add);
                Ok(())
            })?;
            if grads.inputs() < 3 {
                return Ok(());
            }
            grads.accumulate(2, |mut db| {
                let add = db.add;
                sum_rows(db.as_mut_slice::<T>(), dbias, add);
                Ok(())
            })
        })
    }
}

impl Norm {
    fn backward_on(&self, gpu: &'static Gpu, saved: &Saved, dy: &Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (rows, d) = (saved.stats.dim(0), saved.x.last_dim());
        let mut sums = Partial::new(rows, 2, d);
        let launch = sums.launch(gpu.kernel(&NORM, "norm_backward", dy.dtype())?, dy.dtype());
        let launch = launch.work(0.0, (3 * dy.len() * dy.dtype().size()) as f64);
        let centred = i32::from(self.centred);
        let mut run = |dx: Arg| {
            let Saved { x, weight, stats } = saved;
            launch.launch(args![&dx, sums.buffer(), x, weight, stats, dy, centred, rows as i32, d as i32])
        };
        match grads.needs(0) {
            true => grads.accumulate(0, |mut dx| run(Arg::from(&mut dx)))?,
            false => run(Arg::no_gradient())?,
        }
        for i in 1..grads.inputs() {
            grads.accumulate(i, |mut dw| sums.finish(gpu, &NORM, i - 1, Arg::from(&mut dw)))?;
        }
        Ok(())
    }

    /// dx of every row, and for every block of rows its part of dweight and dbias (`[blocks, D]` each).
    fn rows<T: Real>(&self, saved: &Saved, dy: &[T], dx: &mut [T], add: bool, dweight: &mut [T], dbias: &mut [T]) {
        let weight = saved.weight.as_slice::<T>();
        let d = weight.len();
        let n = T::of(d as f64);
        let (x, stats) = (saved.x.as_slice::<T>(), saved.stats.as_slice::<T>());
        let blocks = dx.par_chunks_mut(ROWS * d).zip(x.par_chunks(ROWS * d)).zip(dy.par_chunks(ROWS * d));
        let partial = dweight.par_chunks_mut(d).zip(dbias.par_chunks_mut(d)).zip(stats.par_chunks(ROWS * 2));
        blocks.zip(partial).for_each(|(((dx, x), dy), ((dweight, dbias), stats))| {
            simd!({
                dweight.fill(T::ZERO);
                dbias.fill(T::ZERO);
                let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d));
                for (((dx, x), dy), stats) in rows.zip(stats.chunks_exact(2)) {
                    let (mean, rstd) = (stats[0], stats[1]);
                    let g = if self.centred { lane_sum([dy, weight], |[dy, w]| dy * w) / n } else { T::ZERO };
                    let gh = lane_sum([dy, weight, x], |[dy, w, x]| dy * w * (x - mean)) * rstd / n;
                    let sums = dweight.iter_mut().zip(dbias.iter_mut());
                    for ((((dx, &x), &dy), &w), (dweight, dbias)) in dx.iter_mut().zip(x).zip(dy).zip(weight).zip(sums)
                    {
                        let h = (x - mean) * rstd;
                        *dx = (dy * w - g - h * gh) * rstd + if add { *dx } else { T::ZERO };
                        *dweight += dy * h;
                        *dbias += dy;
                    }
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn layer_norm_rows_have_mean_zero_and_variance_one() {
        let x: Vec<f64> = (0..40).map(|i| ((i * i) as f64 * 0.37).sin() + 3.0).collect();
        let (one, zero) =
            (Tensor::from_slice(&[1.0; 20], &[20]).unwrap(), Tensor::from_slice(&[0.0; 20], &[20]).unwrap());
        let y = Tensor::from_slice(&x, &[2, 20]).unwrap().layer_norm(&one, &zero, 0.0).unwrap();
        for row in y.as_slice::<f64>().chunks(20) {
            assert!(row.iter().sum::<f64>().abs() < 1e-12);
            assert!((row.iter().map(|y| y * y).sum::<f64>() / 20.0 - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn rms_norm_keeps_the_mean_and_sets_the_root_mean_square() {
        let x = Tensor::from_slice(&[3.0f64, 4.0], &[1, 2]).unwrap();
        let y = x.rms_norm(&Tensor::from_slice(&[1.0f64, 2.0], &[2]).unwrap(), 0.0).unwrap();
        let rms = 12.5f64.sqrt();
        let want = [3.0 / rms, 8.0 / rms];
        assert!(y.as_slice::<f64>().iter().zip(want).all(|(y, w)| (y - w).abs() < 1e-15), "{y:?}");
    }

    #[test]
    fn a_weight_of_another_width_is_an_error_that_shows_the_shapes() {
        let x = Tensor::zeros(&[2, 3], crate::DType::F32);
        let w = Tensor::zeros(&[4], crate::DType::F32);
        let message = x.rms_norm(&w, 1e-5).unwrap_err().to_string();
        assert!(message.contains("rms_norm") && message.contains("[2, 3]") && message.contains("[4]"), "{message}");
    }
}
