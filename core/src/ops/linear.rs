//! The linear layer `y = x W^T + b`, alone or followed by GELU.

use rayon::prelude::*;

use crate::ops::elementwise::{gelu, gelu_derivative};
use crate::ops::matmul::{product, Mat, Threads};
use crate::ops::parallel::simd;
use crate::ops::same_dtype;
use crate::tensor::{Grads, Op, Real};
use crate::{dispatch_real, Error, Result, Tensor};

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

    /// `gelu(x W^T + b)`, keeping only the value before the GELU for the backward pass.
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
    /// x, W, and the value before the GELU.
    saved: Option<(Tensor, Tensor, Option<Tensor>)>,
}

/// Rows a task handles in the passes around the product.
const ROWS: usize = 64;

impl Op for Linear {
    fn name(&self) -> &'static str {
        if self.gelu {
            "linear_gelu"
        } else {
            "linear"
        }
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (x, w, bias) = (inputs[0], inputs[1], inputs.get(2));
        same_dtype(self.name(), inputs)?;
        let (i, o) = (x.last_dim(), w.dim(0));
        if w.shape() != [o, i] || bias.is_some_and(|b| b.shape() != [o]) || x.rank() == 0 {
            let bias = bias.map(|b| b.shape());
            let problem = format!("x {:?}, weight {:?}, bias {bias:?}", x.shape(), w.shape());
            return Err(Error::shape(self.name(), problem));
        }
        let rows = x.len() / i;
        let mut shape = x.shape().to_vec();
        shape[x.rank() - 1] = o;
        let mut out = Tensor::uninit(&shape, x.dtype());
        let mut before = (self.gelu && save).then(|| Tensor::uninit(&shape, x.dtype()));
        dispatch_real!(self.name(), x.dtype(), T => {
            let y = out.as_mut_slice::<T>();
            let bias = bias.map(|b| b.as_slice::<T>());
            // The bias is laid down first and the product added to it.
            if let Some(bias) = bias {
                y.par_chunks_mut(ROWS * o).for_each(|y| y.chunks_exact_mut(o).for_each(|y| y.copy_from_slice(bias)));
            }
            let (x, w) = (Mat::new(x.as_slice::<T>(), rows, i), Mat::new(w.as_slice::<T>(), o, i));
            product(y, o, bias.is_some(), T::ONE, x, w.t(), Threads::All);
            if self.gelu {
                match &mut before {
                    Some(before) => {
                        let before = before.as_mut_slice::<T>();
                        y.par_chunks_mut(ROWS * o).zip(before.par_chunks_mut(ROWS * o)).for_each(|(y, z)| {
                            z.copy_from_slice(y);
                            simd(|| y.iter_mut().for_each(|y| *y = gelu(*y)));
                        });
                    }
                    None => y.par_chunks_mut(ROWS * o).for_each(|y| simd(|| y.iter_mut().for_each(|y| *y = gelu(*y)))),
                }
            }
            Ok(())
        })?;
        if save {
            self.saved = Some((x.detach(), w.detach(), before));
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, mut dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (x, w, before) = self.saved.expect("saved by forward");
        let (i, o) = (x.last_dim(), w.dim(0));
        let rows = x.len() / i;
        dispatch_real!("linear", dy.dtype(), T => {
            if let Some(z) = before {
                let z = z.as_slice::<T>();
                if !dy.is_unique() {
                    dy = dy.to_owned();
                }
                dy.as_mut_slice::<T>().par_chunks_mut(ROWS * o).zip(z.par_chunks(ROWS * o)).for_each(|(dy, z)| {
                    simd(|| dy.iter_mut().zip(z).for_each(|(d, &z)| *d *= gelu_derivative(z)));
                });
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

/// `out (+)= sum of the rows of x`, in blocks of rows of fixed size, combined in order.
pub(crate) fn sum_rows<T: Real>(out: &mut [T], x: &[T], add: bool) {
    let width = out.len();
    let partial: Vec<Vec<T>> = x
        .par_chunks(4 * ROWS * width)
        .map(|block| {
            let mut sum = vec![T::ZERO; width];
            simd(|| {
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
