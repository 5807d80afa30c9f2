//! Sums and means: over everything, or over one axis.

use crate::ops::parallel;
use crate::tensor::{Grads, Op};
use crate::{dispatch_real, Error, Result, Tensor};

impl Tensor {
    /// The sum of all elements, rank 0.
    pub fn sum(&self) -> Result<Tensor> {
        Sum { shape: self.shape().to_vec() }.apply(&[self])
    }

    /// The mean of all elements, rank 0.
    pub fn mean(&self) -> Result<Tensor> {
        self.sum()?.scale(1.0 / self.len() as f64)
    }

    /// The sum over one axis, which disappears.
    pub fn sum_axis(&self, axis: usize) -> Result<Tensor> {
        if axis >= self.rank() {
            return Err(Error::shape("sum_axis", format!("axis {axis} of {:?}", self.shape())));
        }
        let outer = self.shape()[..axis].iter().product();
        let inner = self.shape()[axis + 1..].iter().product();
        SumAxis { outer, n: self.dim(axis), inner, axis }.apply(&[self])
    }

    /// The mean over one axis, which disappears.
    pub fn mean_axis(&self, axis: usize) -> Result<Tensor> {
        let n = *self.shape().get(axis).unwrap_or(&1);
        self.sum_axis(axis)?.scale(1.0 / n as f64)
    }
}

struct Sum {
    shape: Vec<usize>,
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        dispatch_real!("sum", inputs[0].dtype(), T => {
            Tensor::from_slice(&[parallel::sum(inputs[0].as_slice::<T>(), |x| x)], &[])
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        grads.add(0, Tensor::full(&self.shape, dy.dtype(), dy.item())?)
    }
}

struct SumAxis {
    outer: usize,
    n: usize,
    inner: usize,
    axis: usize,
}

impl Op for SumAxis {
    fn name(&self) -> &'static str {
        "sum_axis"
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let mut shape = inputs[0].shape().to_vec();
        shape.remove(self.axis);
        let mut out = Tensor::zeros(&shape, inputs[0].dtype());
        dispatch_real!("sum_axis", inputs[0].dtype(), T => {
            let x = inputs[0].as_slice::<T>();
            let y = out.as_mut_slice::<T>();
            for o in 0..self.outer {
                let y = &mut y[o * self.inner..][..self.inner];
                for i in 0..self.n {
                    let x = &x[(o * self.n + i) * self.inner..][..self.inner];
                    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
                }
            }
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let mut dx = Tensor::uninit(&[self.outer * self.n * self.inner], dy.dtype());
        dispatch_real!("sum_axis", dy.dtype(), T => {
            let (out, dy) = (dx.as_mut_slice::<T>(), dy.as_slice::<T>());
            for o in 0..self.outer {
                for i in 0..self.n {
                    out[(o * self.n + i) * self.inner..][..self.inner].copy_from_slice(&dy[o * self.inner..][..self.inner]);
                }
            }
            Ok(())
        })?;
        grads.add(0, dx)
    }
}
