//! The linear layer `y = x W^T + b`, alone or followed by GELU.

use rayon::prelude::*;

use crate::cuda::{args, Arg, Gpu, Matrix, Product};
use crate::ops::columns::Partial;
use crate::ops::elementwise::{gelu, gelu_and_slope};
use crate::ops::matmul::{product, Mat, Threads};
use crate::ops::parallel::zip_mut;
use crate::ops::same_dtype;
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { static LINEAR = "linear" { include_str!("columns.cuh"), include_str!("linear.cu") } }

impl Tensor {
    /// `x W^T + b` over the last axis: `[.., I]`, `W [O, I]`, `b [O]` to `[.., O]`.
    ///
    /// dx = dy W, dW = dy^T x, db = sum of the rows of dy.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.linear_then(weight, bias, false)
    }

    /// `gelu(x W^T + b)`, keeping only the slope of the GELU for the backward pass.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear_gelu(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.linear_then(weight, bias, true)
    }

    fn linear_then(&self, weight: &Tensor, bias: Option<&Tensor>, gelu: bool) -> Result<Tensor> {
        let inputs: Vec<&Tensor> = [self, weight].into_iter().chain(bias).collect();
        Linear { gelu, saved: None }.apply(&inputs)
    }
}

struct Linear {
    gelu: bool,
    /// x, W, and the slope of the GELU at every element.
    saved: Option<(Tensor, Tensor, Option<Tensor>)>,
}

/// Rows a task handles: the product of a block is still in the cache when bias and GELU pass over it.
const ROWS: usize = 128;

impl Op for Linear {
    fn name(&self) -> &'static str {
        if self.gelu {
            "linear_gelu"
        } else {
            "linear"
        }
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (x, w, bias) = (inputs[0], inputs[1], inputs.get(2));
        same_dtype(self.name(), inputs)?;
        let (i, o) = (x.last_dim(), w.dim(0));
        if w.shape() != [o, i] || bias.is_some_and(|b| b.shape() != [o]) || x.rank() == 0 || i * o == 0 {
            let bias = bias.map(|b| b.shape());
            let problem = format!("x {:?}, weight {:?}, bias {bias:?}", x.shape(), w.shape());
            return Err(Error::shape(self.name(), problem));
        }
        let mut shape = x.shape().to_vec();
        shape[x.rank() - 1] = o;
        if let Some(gpu) = x.gpu() {
            return self.forward_on(gpu, inputs, &shape, save);
        }
        let mut out = Tensor::uninit(&shape, x.dtype());
        // One element stands for "not kept".
        let keep = self.gelu && save;
        let mut slope = Tensor::uninit(if keep { &shape } else { &[] }, x.dtype());
        dispatch_real!(self.name(), x.dtype(), T => {
            let w = Mat::new(w.as_slice::<T>(), o, i).t();
            let bias = bias.map(|b| b.as_slice::<T>());
            let blocks = out.as_mut_slice::<T>().par_chunks_mut(ROWS * o).zip(x.as_slice::<T>().par_chunks(ROWS * i));
            let forward = |y: &mut [T], x: &[T]| {
                product(y, o, false, T::ONE, Mat::new(x, x.len() / i, i), w, Threads::One);
                if let Some(bias) = bias {
                    simd!(y.chunks_exact_mut(o).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, &b)| *y += b)));
                }
            };
            if keep {
                blocks.zip(slope.as_mut_slice::<T>().par_chunks_mut(ROWS * o)).for_each(|((y, x), slope)| {
                    forward(y, x);
                    simd!(for (y, slope) in y.iter_mut().zip(slope) { (*y, *slope) = gelu_and_slope(*y); });
                });
            } else {
                blocks.for_each(|(y, x)| {
                    forward(y, x);
                    if self.gelu {
                        simd!(for y in y.iter_mut() { *y = gelu(*y); });
                    }
                });
            }
            Ok(())
        })?;
        if save {
            self.saved = Some((x.detach(), w.detach(), keep.then_some(slope)));
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, mut dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (x, w, slope) = self.saved.expect("saved by forward");
        let (i, o) = (x.last_dim(), w.dim(0));
        let rows = x.len() / i;
        if let Some(gpu) = dy.gpu() {
            return backward_on(gpu, dy, &x, &w, slope, grads);
        }
        dispatch_real!("linear", dy.dtype(), T => {
            if let Some(slope) = slope {
                if !dy.is_unique() {
                    dy = dy.to_owned();
                }
                zip_mut(dy.as_mut_slice::<T>(), slope.as_slice::<T>(), |dy, slope| *dy *= slope);
            }
            let dy = dy.as_slice::<T>();
            let dy_mat = Mat::new(dy, rows, o);
            grads.accumulate(0, |mut dx| {
                let add = dx.add;
                let w = Mat::new(w.as_slice::<T>(), o, i);
                product(dx.as_mut_slice::<T>(), i, add, T::ONE, dy_mat, w, Threads::All);
                Ok(())
            })?;
            grads.accumulate(1, |mut dw| {
                let add = dw.add;
                let x = Mat::new(x.as_slice::<T>(), rows, i);
                product(dw.as_mut_slice::<T>(), i, add, T::ONE, dy_mat.t(), x, Threads::All);
                Ok(())
            })?;
            if grads.inputs() < 3 {
                return Ok(());
            }
            grads.accumulate(2, |mut db| {
                let add = db.add;
                sum_rows(db.as_mut_slice::<T>(), dy, add);
                Ok(())
            })
        })
    }
}

impl Linear {
    fn forward_on(&mut self, gpu: &'static Gpu, inputs: &[&Tensor], shape: &[usize], save: bool) -> Result<Tensor> {
        let (x, w, bias) = (inputs[0], inputs[1], inputs.get(2));
        let (i, o) = (x.last_dim(), w.dim(0));
        let rows = x.len() / i;
        let mut h = Tensor::uninit(shape, x.dtype());
        let (a, b) = (Matrix::of(x, rows, i), Matrix::of(w, o, i).t());
        let bias = bias.map(|b| b.device_address());
        gpu.matmul(&Product { bias, ..Product::new(a, b, Matrix::of(&h, rows, o)) })?;
        let n = h.len();
        let threads = (n * h.dtype().size()).div_ceil(16);
        let bytes = (n * h.dtype().size()) as f64;
        let mut slope = None;
        if self.gelu && save {
            let mut y = Tensor::uninit(shape, x.dtype());
            let kernel = gpu.kernel(&LINEAR, "gelu_and_slope", x.dtype())?.over(threads);
            kernel.work(0.0, 3.0 * bytes).launch(args![&mut y, &mut h, n])?;
            slope = Some(std::mem::replace(&mut h, y));
        } else if self.gelu {
            let kernel = gpu.kernel(&LINEAR, "gelu_in_place", x.dtype())?.over(threads);
            kernel.work(0.0, 2.0 * bytes).launch(args![&mut h, n])?;
        }
        if save {
            self.saved = Some((x.detach(), w.detach(), slope));
        }
        Ok(h)
    }
}

fn backward_on(
    gpu: &'static Gpu,
    mut dy: Tensor,
    x: &Tensor,
    w: &Tensor,
    slope: Option<Tensor>,
    grads: &mut Grads<'_>,
) -> Result<()> {
    let (i, o) = (x.last_dim(), w.dim(0));
    let (rows, dtype) = (x.len() / i, dy.dtype());
    let has_bias = grads.inputs() > 2 && grads.needs(2);
    let mut sums = Partial::new(rows, 1, o);
    let bytes = (dy.len() * dtype.size()) as f64;
    if let Some(slope) = slope {
        if !dy.is_unique() {
            dy = dy.to_owned();
        }
        let launch = sums.launch(gpu.kernel(&LINEAR, "gelu_backward", dtype)?, dtype).work(0.0, 3.0 * bytes);
        launch.launch(args![sums.buffer(), &mut dy, &slope, rows as i32, o as i32])?;
    } else if has_bias {
        let launch = sums.launch(gpu.kernel(&LINEAR, "sum_rows", dtype)?, dtype).work(0.0, bytes);
        launch.launch(args![sums.buffer(), &dy, rows as i32, o as i32])?;
    }
    let g = Matrix::of(&dy, rows, o);
    grads.accumulate(0, |dx| {
        let (at, dtype) = dx.device_place();
        let out = Matrix::at(at, dtype, rows, i);
        gpu.matmul(&Product { add: dx.add, ..Product::new(g, Matrix::of(w, o, i), out) })
    })?;
    grads.accumulate(1, |dw| {
        let (at, dtype) = dw.device_place();
        let out = Matrix::at(at, dtype, o, i);
        gpu.matmul(&Product { add: dw.add, ..Product::new(g.t(), Matrix::of(x, rows, i), out) })
    })?;
    if has_bias {
        grads.accumulate(2, |mut db| sums.finish(gpu, &LINEAR, 0, Arg::from(&mut db)))?;
    }
    Ok(())
}

/// The sums of the rows of `x` `[rows, d]` on a GPU.
pub(crate) fn sum_rows_on(gpu: &'static Gpu, x: &Tensor, rows: usize, d: usize, out: Arg) -> Result<()> {
    let mut sums = Partial::new(rows, 1, d);
    let launch = sums.launch(gpu.kernel(&LINEAR, "sum_rows", x.dtype())?, x.dtype());
    launch.work(0.0, (x.len() * x.dtype().size()) as f64).launch(args![sums.buffer(), x, rows as i32, d as i32])?;
    sums.finish(gpu, &LINEAR, 0, out)
}

/// `out (+)= sum of the rows of x`, in blocks of rows of fixed size, combined in order.
pub(crate) fn sum_rows<T: Real>(out: &mut [T], x: &[T], add: bool) {
    let width = out.len();
    let partial: Vec<Vec<T>> = x
        .par_chunks(256 * width)
        .map(|block| {
            let mut sum = vec![T::ZERO; width];
            simd!({
                for row in block.chunks_exact(width) {
                    for (s, &x) in sum.iter_mut().zip(row) {
                        *s += x;
                    }
                }
            });
            sum
        })
        .collect();
    if !add {
        out.fill(T::ZERO);
    }
    for sum in partial {
        out.iter_mut().zip(sum).for_each(|(o, s)| *o += s);
    }
}
