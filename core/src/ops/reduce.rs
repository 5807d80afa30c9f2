//! Sums and means: over everything, or over one axis.

use crate::cuda::args;
use crate::tensor::parallel;
use crate::tensor::{Grads, Op};
use crate::{cuda_source, dispatch_real, DType, Error, Result, Tensor};

cuda_source! { static REDUCE = "reduce" { include_str!("reduce.cu") } }

/// Elements that a block of `reduce.cu` sums.
const ELEMENTS_OF_BLOCK: usize = 8192;

impl Tensor {
    /// The sum of all elements, rank 0; f32 for bf16, as every sum.
    pub fn sum(&self) -> Result<Tensor> {
        Sum { shape: self.shape().to_vec(), dtype: self.dtype() }.apply(&[self])
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
        SumAxis { outer, n: self.dim(axis), inner, axis, dtype: self.dtype() }.apply(&[self])
    }

    /// The mean over one axis, which disappears.
    pub fn mean_axis(&self, axis: usize) -> Result<Tensor> {
        let n = *self.shape().get(axis).unwrap_or(&1);
        self.sum_axis(axis)?.scale(1.0 / n as f64)
    }
}

struct Sum {
    shape: Vec<usize>,
    dtype: DType,
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let x = inputs[0];
        if let Some(gpu) = x.gpu() {
            let blocks = x.len().div_ceil(ELEMENTS_OF_BLOCK);
            let mut partial = Tensor::uninit(&[blocks], DType::F32);
            let mut y = Tensor::uninit(&[], DType::F32);
            let launch = gpu.kernel(&REDUCE, "sum_blocks", x.dtype())?.grid(blocks, 256);
            launch.work(0.0, (x.len() * x.dtype().size()) as f64).launch(args![&mut partial, x, x.len()])?;
            let last = gpu.kernel(&REDUCE, "sum_partial", DType::F32)?.grid(1, 1024);
            last.launch(args![&mut y, &partial, blocks as i32])?;
            return Ok(y);
        }
        dispatch_real!("sum", inputs[0].dtype(), T => {
            Tensor::from_slice(&[parallel::sum(inputs[0].as_slice::<T>(), |x| x)], &[])
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        if let Some(gpu) = dy.gpu() {
            let mut dx = Tensor::uninit(&self.shape, self.dtype);
            let (n, bytes) = (dx.len(), dx.len() * self.dtype.size());
            let launch = gpu.kernel(&REDUCE, "spread", self.dtype)?.over(bytes.div_ceil(16));
            launch.work(0.0, bytes as f64).launch(args![&mut dx, &dy, n])?;
            return grads.add(0, dx);
        }
        grads.add(0, Tensor::full(&self.shape, dy.dtype(), dy.item())?)
    }
}

struct SumAxis {
    outer: usize,
    n: usize,
    inner: usize,
    axis: usize,
    dtype: DType,
}

impl Op for SumAxis {
    fn name(&self) -> &'static str {
        "sum_axis"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let mut shape = inputs[0].shape().to_vec();
        shape.remove(self.axis);
        if let Some(gpu) = inputs[0].gpu() {
            let mut y = Tensor::uninit(&shape, DType::F32);
            let launch = gpu.kernel(&REDUCE, "sum_axis", self.dtype)?.over(y.len());
            let launch = launch.work(0.0, (inputs[0].len() * self.dtype.size()) as f64);
            launch.launch(args![&mut y, inputs[0], self.outer, self.n, self.inner])?;
            return Ok(y);
        }
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
        let len = self.outer * self.n * self.inner;
        if let Some(gpu) = dy.gpu() {
            let mut dx = Tensor::uninit(&[len], self.dtype);
            let launch = gpu.kernel(&REDUCE, "sum_axis_backward", self.dtype)?.over(len);
            launch.launch(args![&mut dx, &dy, self.outer, self.n, self.inner])?;
            return grads.add(0, dx);
        }
        let mut dx = Tensor::uninit(&[len], dy.dtype());
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
