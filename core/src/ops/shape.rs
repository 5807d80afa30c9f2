//! Operations that move or reinterpret elements: `reshape`, `narrow`, `narrow_axis`, `cat`, `gather_rows`.

use crate::cuda::{args, Gpu};
use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::{GradMut, Grads, Op};
use crate::{cuda_source, dispatch_real, Error, Result, Tensor};

cuda_source! { pub(crate) static SHAPE = "shape" { include_str!("shape.cu") } }

impl Tensor {
    /// The same elements with another shape of equal size; no copy.
    ///
    /// # Errors
    /// If the sizes differ.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        if shape.iter().product::<usize>() != self.len() {
            return Err(Error::shape("reshape", format!("{:?} to {shape:?}", self.shape())));
        }
        Narrow { start: 0, shape: shape.to_vec(), full: self.shape().to_vec() }.apply(&[self])
    }

    /// Rows `start..start + len` of the first axis; no copy.
    ///
    /// # Errors
    /// If the range is out of bounds.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Tensor> {
        let full = self.shape();
        if self.rank() == 0 || start + len > full[0] {
            return Err(Error::shape("narrow", format!("rows {start}..{} of {full:?}", start + len)));
        }
        let inner: usize = full[1..].iter().product();
        let shape = [len].into_iter().chain(full[1..].iter().copied()).collect();
        Narrow { start: start * inner, shape, full: full.to_vec() }.apply(&[self])
    }

    /// Entries `start..start + len` of axis `axis`, copied unless it is the first.
    ///
    /// # Errors
    /// If the range is out of bounds.
    pub fn narrow_axis(&self, axis: usize, start: usize, len: usize) -> Result<Tensor> {
        let full = self.shape();
        if axis >= self.rank() || start + len > full[axis] {
            return Err(Error::shape("narrow", format!("{start}..{} of axis {axis} of {full:?}", start + len)));
        }
        if axis == 0 {
            return self.narrow(start, len);
        }
        let mut shape = full.to_vec();
        shape[axis] = len;
        let inner: usize = full[axis + 1..].iter().product();
        NarrowAxis { row: full[axis] * inner, start: start * inner, len: len * inner, shape }.apply(&[self])
    }

    /// Tensors joined along the first axis.
    ///
    /// # Errors
    /// If there is none, or their types or other axes differ.
    pub fn cat(parts: &[&Tensor]) -> Result<Tensor> {
        match parts {
            [] => Err(Error::shape("cat", "nothing to join")),
            [one] => Ok((*one).clone()),
            _ => Cat::default().apply(parts),
        }
    }

    /// Rows of the first axis by index (u32), repeats allowed: `out[i] = self[rows[i]]`; `dself[rows[i]] += dout[i]`.
    ///
    /// # Errors
    /// If an index is out of bounds.
    pub fn gather_rows(&self, rows: &Tensor) -> Result<Tensor> {
        GatherRows { rows: rows.clone(), full: self.shape().to_vec() }.apply(&[self])
    }
}

/// A contiguous run of elements with a shape of its own; the gradient is zero elsewhere.
struct Narrow {
    start: usize,
    shape: Vec<usize>,
    full: Vec<usize>,
}

impl Op for Narrow {
    fn name(&self) -> &'static str {
        "narrow"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        Ok(inputs[0].view(self.start, &self.shape))
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        if dy.len() == self.full.iter().product::<usize>() {
            return grads.add(0, dy);
        }
        if let Some(gpu) = dy.gpu() {
            let window = Window { row: self.full.iter().product(), start: self.start, len: dy.len() };
            return grads.accumulate(0, |dx| window.backward(gpu, dx, &dy, 1));
        }
        dispatch_real!("narrow", dy.dtype(), T => grads.accumulate(0, |mut dx| {
            let add = dx.add;
            let dx = dx.as_mut_slice::<T>();
            let dy = dy.as_slice::<T>();
            let range = self.start..self.start + dy.len();
            if add {
                dx[range].iter_mut().zip(dy).for_each(|(a, b)| *a += b);
            } else {
                dx[..range.start].fill(0.0);
                dx[range.end..].fill(0.0);
                dx[range].copy_from_slice(dy);
            }
            Ok(())
        }))
    }
}

/// Elements `start..start + len` of rows of `row` elements, on a GPU.
struct Window {
    row: usize,
    start: usize,
    len: usize,
}

impl Window {
    fn forward(&self, gpu: &'static Gpu, out: &mut Tensor, x: &Tensor, rows: usize) -> Result<()> {
        let bytes = out.len() * out.dtype().size();
        let launch = gpu.kernel(&SHAPE, "window", x.dtype())?.over(bytes.div_ceil(16));
        launch.work(0.0, 2.0 * bytes as f64).launch(args![out, x, self.row, self.start, self.len, rows])
    }

    fn backward(&self, gpu: &'static Gpu, mut dx: GradMut<'_>, dy: &Tensor, rows: usize) -> Result<()> {
        let (read, written) = if dx.add { (2 * dy.len(), dy.len()) } else { (dy.len(), rows * self.row) };
        let size = dy.dtype().size();
        let launch = gpu.kernel(&SHAPE, "window_backward", dy.dtype())?.over((written * size).div_ceil(16));
        let launch = launch.work(0.0, ((read + written) * size) as f64);
        launch.launch(args![&mut dx, dy, self.row, self.start, self.len, rows])
    }
}

/// Elements `start..start + len` of every `row` elements; the gradient is zero elsewhere.
struct NarrowAxis {
    row: usize,
    start: usize,
    len: usize,
    shape: Vec<usize>,
}

impl NarrowAxis {
    fn window(&self) -> Window {
        Window { row: self.row, start: self.start, len: self.len }
    }
}

impl Op for NarrowAxis {
    fn name(&self) -> &'static str {
        "narrow_axis"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let mut out = Tensor::uninit(&self.shape, inputs[0].dtype());
        if let Some(gpu) = out.gpu() {
            let rows = inputs[0].len() / self.row.max(1);
            self.window().forward(gpu, &mut out, inputs[0], rows)?;
            return Ok(out);
        }
        dispatch_real!("narrow_axis", out.dtype(), T => {
            let rows = inputs[0].as_slice::<T>().par_chunks(self.row.max(1));
            out.as_mut_slice::<T>().par_chunks_mut(self.len.max(1)).zip(rows).for_each(|(y, x)| {
                y.copy_from_slice(&x[self.start..][..self.len]);
            });
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        if dy.is_empty() {
            return Ok(());
        }
        if let Some(gpu) = dy.gpu() {
            let rows = dy.len() / self.len;
            return grads.accumulate(0, |dx| self.window().backward(gpu, dx, &dy, rows));
        }
        let range = self.start..self.start + self.len;
        dispatch_real!("narrow_axis", dy.dtype(), T => grads.accumulate(0, |mut dx| {
            let add = dx.add;
            let rows = dx.as_mut_slice::<T>().par_chunks_mut(self.row).zip(dy.as_slice::<T>().par_chunks(self.len));
            rows.for_each(|(dx, dy)| {
                if add {
                    dx[range.clone()].iter_mut().zip(dy).for_each(|(a, b)| *a += b);
                } else {
                    dx[..range.start].fill(0.0);
                    dx[range.clone()].copy_from_slice(dy);
                    dx[range.end..].fill(0.0);
                }
            });
            Ok(())
        }))
    }
}

#[derive(Default)]
struct Cat {
    lens: Vec<usize>,
}

impl Op for Cat {
    fn name(&self) -> &'static str {
        "cat"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        same_dtype("cat", inputs)?;
        if let Some(other) = inputs.iter().find(|x| x.rank() == 0 || x.shape()[1..] != inputs[0].shape()[1..]) {
            return Err(Error::shape("cat", format!("{:?} and {:?}", inputs[0].shape(), other.shape())));
        }
        let mut shape = inputs[0].shape().to_vec();
        shape[0] = inputs.iter().map(|x| x.dim(0)).sum();
        self.lens = inputs.iter().map(|x| x.len()).collect();
        let mut out = Tensor::uninit(&shape, inputs[0].dtype());
        if let Some(gpu) = out.gpu() {
            let mut at = out.device_address();
            for x in inputs {
                let bytes = x.len() * x.dtype().size();
                gpu.copy(at, x.device_address(), bytes)?;
                at += bytes as u64;
            }
            return Ok(out);
        }
        dispatch_real!("cat", out.dtype(), T => {
            let mut rest = out.as_mut_slice::<T>();
            for x in inputs {
                let (head, tail) = rest.split_at_mut(x.len());
                head.copy_from_slice(x.as_slice());
                rest = tail;
            }
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let mut start = 0;
        for (i, len) in self.lens.iter().enumerate() {
            grads.add(i, dy.view(start, &[*len]))?;
            start += len;
        }
        Ok(())
    }
}

struct GatherRows {
    rows: Tensor,
    full: Vec<usize>,
}

impl GatherRows {
    fn inner(&self) -> usize {
        self.full[1..].iter().product()
    }
}

impl Op for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        if let Some(gpu) = inputs[0].gpu() {
            let (x, count, inner) = (inputs[0], self.rows.len(), self.inner());
            let mut shape = self.full.clone();
            shape[0] = count;
            let mut out = Tensor::uninit(&shape, x.dtype());
            let launch = gpu.kernel(&SHAPE, "gather", x.dtype())?.rows(count);
            let launch = launch.work(0.0, (2 * out.len() * x.dtype().size()) as f64);
            launch.launch(args![&mut out, x, &self.rows, count as i32, inner as i32])?;
            return Ok(out);
        }
        let (x, rows, inner) = (inputs[0], self.rows.as_slice::<u32>(), self.inner());
        if let Some(row) = rows.iter().find(|&&r| r as usize >= self.full[0]) {
            return Err(Error::shape("gather_rows", format!("row {row} of {:?}", self.full)));
        }
        let mut shape = self.full.clone();
        shape[0] = rows.len();
        let mut out = Tensor::uninit(&shape, x.dtype());
        dispatch_real!("gather_rows", x.dtype(), T => {
            let x = x.as_slice::<T>();
            for (y, &row) in out.as_mut_slice::<T>().chunks_exact_mut(inner.max(1)).zip(rows) {
                y.copy_from_slice(&x[row as usize * inner..][..inner]);
            }
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let inner = self.inner();
        if let Some(gpu) = dy.gpu() {
            let (count, total) = (self.rows.len() as i32, self.full[0]);
            return grads.accumulate(0, |mut dx| {
                let launch = gpu.kernel(&SHAPE, "gather_backward", dy.dtype())?.rows(total.div_ceil(8));
                launch.launch(args![&mut dx, &dy, &self.rows, count, total as i32, inner as i32])
            });
        }
        dispatch_real!("gather_rows", dy.dtype(), T => grads.accumulate(0, |mut dx| {
            let add = dx.add;
            let dx = dx.as_mut_slice::<T>();
            if !add {
                dx.fill(0.0);
            }
            for (dy, &row) in dy.as_slice::<T>().chunks_exact(inner.max(1)).zip(self.rows.as_slice::<u32>()) {
                dx[row as usize * inner..][..inner].iter_mut().zip(dy).for_each(|(a, b)| *a += b);
            }
            Ok(())
        }))
    }
}
