//! Matrix products: the one door to the `gemm` crate, and batched products of tensors.

use gemm::{gemm, Parallelism};

use crate::cuda::{Gpu, Matrix, Product};
use crate::ops::same_dtype;
use crate::profile;
use crate::tensor::blocks::*;
use crate::tensor::{GradMut, Grads, Op, Real};
use crate::{dispatch_real, Error, Result, Tensor};

/// A matrix inside a slice: rows, columns, and the distance in elements between neighbours in each direction.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    pub data: &'a [T],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major `rows x cols` matrix.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose; no copy.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn last(&self) -> usize {
        match self.rows * self.cols {
            0 => 0,
            _ => (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1,
        }
    }
}

/// One factor of [`multiply`]: a dense matrix, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    of: &'a Tensor,
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl<'a> Factor<'a> {
    /// `of` as a `rows x cols` matrix.
    pub(crate) fn new(of: &'a Tensor, rows: usize, cols: usize) -> Self {
        Self { of, rows, cols, transposed: false }
    }

    /// The transpose; no copy.
    pub(crate) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn on_gpu(self) -> Matrix {
        let matrix = Matrix::of(self.of, self.rows, self.cols);
        if self.transposed {
            matrix.t()
        } else {
            matrix
        }
    }

    fn on_cpu<T: Real>(self) -> Mat<'a, T> {
        let matrix = Mat::new(self.of.as_slice(), self.rows, self.cols);
        if self.transposed {
            matrix.t()
        } else {
            matrix
        }
    }

    fn dims(self) -> (usize, usize) {
        match self.transposed {
            true => (self.cols, self.rows),
            false => (self.rows, self.cols),
        }
    }
}

/// `out (+)= a b`, where the factors are.
pub(crate) fn multiply(out: &mut GradMut<'_>, a: Factor<'_>, b: Factor<'_>) -> Result<()> {
    let ((rows, _), (_, cols)) = (a.dims(), b.dims());
    if let Some(gpu) = a.of.gpu() {
        let (at, dtype) = out.device_place();
        let place = Matrix::at(at, dtype, rows, cols);
        return gpu.matmul(&Product { add: out.add, ..Product::new(a.on_gpu(), b.on_gpu(), place) });
    }
    dispatch_real!("matmul", a.of.dtype(), T => {
        let add = out.add;
        product(out.as_mut_slice::<T>(), cols, add, T::ONE, a.on_cpu(), b.on_cpu(), Threads::All);
        Ok(())
    })
}

/// Whether a product may use the thread pool: not inside a loop that is parallel already.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    One,
    All,
}

/// `out = alpha * a b (+ out if add)`; `out` has `out_stride` elements from row to row.
pub(crate) fn product<T: Real>(
    out: &mut [T],
    out_stride: usize,
    add: bool,
    alpha: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    threads: Threads,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(a.cols, b.rows, "inner lengths of a matrix product");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * out_stride + n <= out.len() && a.last() <= a.data.len() && b.last() <= b.data.len());
    let work = 2 * m * n * k;
    profile::flops(work);
    let parallelism = match threads {
        Threads::All if work > 2 << 18 => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    // SAFETY: the assertion above keeps every access in bounds; `out` is exclusive.
    unsafe {
        gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ONE,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

impl Tensor {
    /// Matrix product, batched over all leading axes: `[.., m, k] x [.., k, n] -> [.., m, n]`.
    ///
    /// # Errors
    /// If the inner lengths or the leading axes differ.
    pub fn matmul(&self, other: &Tensor) -> Result<Tensor> {
        Matmul { transpose: false, saved: None }.apply(&[self, other])
    }

    /// Product with the transpose, batched over all leading axes: `[.., m, k] x [.., n, k] -> [.., m, n]`: the Gram
    /// matrix of rows when both are the same.
    ///
    /// # Errors
    /// If the inner lengths or the leading axes differ.
    pub fn matmul_t(&self, other: &Tensor) -> Result<Tensor> {
        Matmul { transpose: true, saved: None }.apply(&[self, other])
    }
}

/// y = a b, da = dy b^T, db = a^T dy; or y = a b^T, da = dy b, db = dy^T a.
struct Matmul {
    transpose: bool,
    saved: Option<(Tensor, Tensor)>,
}

fn matrix_dims(x: &Tensor) -> (usize, usize, usize) {
    let shape = x.shape();
    let [.., rows, cols] = shape else { unreachable!("checked in forward") };
    (shape[..shape.len() - 2].iter().product(), *rows, *cols)
}

/// Calls `f(batch, out)` for every matrix of `out`; in parallel when there are several.
fn each_matrix<T: Real>(out: &mut [T], size: usize, f: impl Fn(usize, &mut [T], Threads) + Sync) {
    match out.len() / size.max(1) {
        0 => {}
        1 => f(0, out, Threads::All),
        _ => out.par_chunks_mut(size).enumerate().for_each(|(i, out)| f(i, out, Threads::One)),
    }
}

fn batched(gpu: &'static Gpu, a: Matrix, b: Matrix, out: Matrix, batch: usize, add: bool) -> Result<()> {
    match batch {
        0 => Ok(()),
        _ => gpu.matmul(&Product { add, batch, ..Product::new(a, b, out) }),
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (a, b) = (inputs[0], inputs[1]);
        same_dtype("matmul", inputs)?;
        let inner = |x: &Tensor, back: usize| x.rank().checked_sub(back).map(|i| x.dim(i));
        let fits = a.rank() >= 2
            && a.rank() == b.rank()
            && a.shape()[..a.rank() - 2] == b.shape()[..b.rank() - 2]
            && inner(a, 1) == inner(b, if self.transpose { 1 } else { 2 });
        if !fits {
            let sign = if self.transpose { "^T" } else { "" };
            return Err(Error::shape("matmul", format!("{:?} x {:?}{sign}", a.shape(), b.shape())));
        }
        let (_, m, k) = matrix_dims(a);
        let (_, b_rows, b_cols) = matrix_dims(b);
        let n = if self.transpose { b_rows } else { b_cols };
        let mut shape = a.shape().to_vec();
        shape[a.rank() - 1] = n;
        let mut out = Tensor::uninit(&shape, a.dtype());
        if let Some(gpu) = a.gpu() {
            let right = Matrix::of(b, b_rows, b_cols);
            let right = if self.transpose { right.t() } else { right };
            batched(gpu, Matrix::of(a, m, k), right, Matrix::of(&out, m, n), out.len() / (m * n).max(1), false)?;
        } else {
            dispatch_real!("matmul", a.dtype(), T => {
                let (a, b) = (a.as_slice::<T>(), b.as_slice::<T>());
                each_matrix(out.as_mut_slice::<T>(), m * n, |i, out, threads| {
                    let a = Mat::new(&a[i * m * k..], m, k);
                    let b = Mat::new(&b[i * k * n..], b_rows, b_cols);
                    product(out, n, false, T::ONE, a, if self.transpose { b.t() } else { b }, threads);
                });
                Ok(())
            })?;
        }
        if save {
            self.saved = Some((a.detach(), b.detach()));
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (a, b) = self.saved.expect("saved by forward");
        let (_, m, k) = matrix_dims(&a);
        let (_, b_rows, b_cols) = matrix_dims(&b);
        let n = dy.last_dim();
        if let Some(gpu) = dy.gpu() {
            let count = dy.len() / (m * n).max(1);
            let (left, right, g) = (Matrix::of(&a, m, k), Matrix::of(&b, b_rows, b_cols), Matrix::of(&dy, m, n));
            let place = |d: &crate::tensor::GradMut<'_>, rows, cols| {
                let (at, dtype) = d.device_place();
                Matrix::at(at, dtype, rows, cols)
            };
            grads.accumulate(0, |da| {
                let factor = if self.transpose { right } else { right.t() };
                batched(gpu, g, factor, place(&da, m, k), count, da.add)
            })?;
            return grads.accumulate(1, |db| {
                let (l, r) = if self.transpose { (g.t(), left) } else { (left.t(), g) };
                batched(gpu, l, r, place(&db, b_rows, b_cols), count, db.add)
            });
        }
        dispatch_real!("matmul", dy.dtype(), T => {
            let (a, b, dy) = (a.as_slice::<T>(), b.as_slice::<T>(), dy.as_slice::<T>());
            grads.accumulate(0, |mut da| {
                let add = da.add;
                each_matrix(da.as_mut_slice::<T>(), m * k, |i, da, threads| {
                    let b = Mat::new(&b[i * k * n..], b_rows, b_cols);
                    let dy = Mat::new(&dy[i * m * n..], m, n);
                    product(da, k, add, T::ONE, dy, if self.transpose { b } else { b.t() }, threads);
                });
                Ok(())
            })?;
            grads.accumulate(1, |mut db| {
                let add = db.add;
                each_matrix(db.as_mut_slice::<T>(), k * n, |i, db, threads| {
                    let a = Mat::new(&a[i * m * k..], m, k);
                    let dy = Mat::new(&dy[i * m * n..], m, n);
                    let (left, right) = if self.transpose { (dy.t(), a) } else { (a.t(), dy) };
                    product(db, b_cols, add, T::ONE, left, right, threads);
                });
                Ok(())
            })
        })
    }
}
