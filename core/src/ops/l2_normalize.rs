//! `y = x / max(|x|, eps)` over the last axis.

use crate::cuda::args;
use crate::tensor::blocks::*;
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static L2_NORMALIZE = "l2_normalize" { include_str!("l2_normalize.cu") } }

impl Tensor {
    /// Rows of the last axis divided by their length: `x / max(|x|, eps)`, as `torch.nn.functional.normalize`.
    ///
    /// dx = (dy - y (y . dy)) / |x|; where |x| < eps the map is linear and dx = dy / eps.
    pub fn l2_normalize(&self, eps: f64) -> Result<Tensor> {
        L2Normalize { eps, saved: None }.apply(&[self])
    }
}

struct L2Normalize {
    eps: f64,
    /// y, and 1 / max(|x|, eps) (negative where |x| < eps).
    saved: Option<(Tensor, Tensor)>,
}

/// Rows a task handles.
const ROWS: usize = 64;

impl Op for L2Normalize {
    fn name(&self) -> &'static str {
        "l2_normalize"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let x = inputs[0];
        let d = x.last_dim();
        if d == 0 {
            return Err(Error::shape("l2_normalize", format!("rows of {:?} have no element", x.shape())));
        }
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        let rows = x.len() / d;
        if let Some(gpu) = x.gpu() {
            let mut scale = Tensor::uninit(&[rows], DType::F32);
            let bytes = (2 * x.len() * x.dtype().size()) as f64;
            let launch = gpu.kernel(&L2_NORMALIZE, "l2_normalize", x.dtype())?.rows(rows).work(0.0, bytes);
            launch.launch(args![&mut out, &mut scale, x, self.eps as f32, rows as i32, d as i32])?;
            if save {
                self.saved = Some((out.clone(), scale));
            }
            return Ok(out);
        }
        let mut scale = Tensor::uninit(&[rows], x.dtype());
        dispatch_real!("l2_normalize", x.dtype(), T => {
            let eps = T::of(self.eps);
            let rows = out.as_mut_slice::<T>().par_chunks_mut(ROWS * d).zip(scale.as_mut_slice::<T>().par_chunks_mut(ROWS));
            rows.zip(x.as_slice::<T>().par_chunks(ROWS * d)).for_each(|((y, scale), x)| simd!(T, {
                for ((y, scale), x) in y.chunks_exact_mut(d).zip(scale).zip(x.chunks_exact(d)) {
                    let norm = dot(x, x).sqrt();
                    let s = T::ONE / norm.max(eps);
                    y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * s);
                    *scale = if norm < eps { -s } else { s };
                }
            }));
            Ok(())
        })?;
        if save {
            self.saved = Some((out.clone(), scale));
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (y, scale) = self.saved.expect("saved by forward");
        let d = y.last_dim();
        let mut dx = Tensor::uninit(y.shape(), y.dtype());
        if let Some(gpu) = y.gpu() {
            let (rows, bytes) = (scale.len(), (3 * y.len() * y.dtype().size()) as f64);
            let launch = gpu.kernel(&L2_NORMALIZE, "l2_normalize_backward", y.dtype())?.rows(rows).work(0.0, bytes);
            launch.launch(args![&mut dx, &y, &dy, &scale, rows as i32, d as i32])?;
            return grads.add(0, dx);
        }
        dispatch_real!("l2_normalize", y.dtype(), T => {
            let (y, dy, scale) = (y.as_slice::<T>(), dy.as_slice::<T>(), scale.as_slice::<T>());
            dx.as_mut_slice::<T>().par_chunks_mut(ROWS * d).enumerate().for_each(|(block, dx)| simd!(T, {
                for (r, dx) in dx.chunks_exact_mut(d).enumerate() {
                    let row = block * ROWS + r;
                    let (y, dy) = (&y[row * d..][..d], &dy[row * d..][..d]);
                    let s = scale[row];
                    let along = if s > T::ZERO { dot(y, dy) } else { T::ZERO };
                    let s = s.abs();
                    dx.iter_mut().zip(y).zip(dy).for_each(|((dx, &y), &dy)| *dx = (dy - y * along) * s);
                }
            }));
            Ok(())
        })?;
        grads.add(0, dx)
    }
}

/// Dot product in 16 lanes of fixed order, so that it vectorises and is the same everywhere.
#[inline(always)]
pub(crate) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::ZERO; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: T = a16.remainder().iter().zip(b16.remainder()).map(|(&a, &b)| a * b).sum();
    for (a, b) in a16.zip(b16) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.into_iter().sum::<T>() + rest
}
