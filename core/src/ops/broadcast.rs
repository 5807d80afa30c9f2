//! A vector met with every row of a tensor: `add_row`, `mul_row` (a vector as long as a row), `scale_rows` (a number a
//! row).

use crate::cuda::{args, Gpu};
use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::columns::{sum_rows, Partial, RowSums, COLUMN_SUMS};
use crate::tensor::parallel::{lane_sum, BLOCK};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static BROADCAST = "broadcast" { COLUMN_SUMS, include_str!("broadcast.cu") } }

impl Tensor {
    /// `self + row` for every row of the last axis: `[.., D]`, `row [D]`; drow = sum of the rows of dy.
    ///
    /// # Errors
    /// If `row` is not as long as the last axis.
    pub fn add_row(&self, row: &Tensor) -> Result<Tensor> {
        Broadcast { kind: Kind::AddRow, saved: None }.apply(&[self, row])
    }

    /// `self * row` for every row of the last axis: `[.., D]`, `row [D]`; dx = dy * row, drow = sum of the rows of x dy.
    ///
    /// # Errors
    /// If `row` is not as long as the last axis.
    pub fn mul_row(&self, row: &Tensor) -> Result<Tensor> {
        Broadcast { kind: Kind::MulRow, saved: None }.apply(&[self, row])
    }

    /// Row `r` of the last axis times `factors[r]`: `[.., D]`, `factors` with one element a row (any shape);
    /// dx = dy * factor, dfactor = x . dy of the row.
    ///
    /// # Errors
    /// If there is not one factor a row.
    pub fn scale_rows(&self, factors: &Tensor) -> Result<Tensor> {
        // Sums of bf16 features are f32.
        let factors = if self.dtype() == DType::BF16 { &factors.cast(DType::BF16)? } else { factors };
        Broadcast { kind: Kind::ScaleRows, saved: None }.apply(&[self, factors])
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    AddRow,
    MulRow,
    ScaleRows,
}

struct Broadcast {
    kind: Kind,
    /// x and the vector, where the derivative needs them.
    saved: Option<(Tensor, Tensor)>,
}

/// `out[r] = f(x[r], r)` for rows of `d`, rows of a fixed number a task.
fn each_row<T: Real>(out: &mut [T], x: &[T], d: usize, f: impl Fn(&mut [T], &[T], usize) + Sync) {
    let d = d.max(1);
    let rows = (BLOCK / d).max(1);
    out.par_chunks_mut(rows * d).zip(x.par_chunks(rows * d)).enumerate().for_each(|(block, (out, x))| {
        simd!(T, {
            for (i, (out, x)) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).enumerate() {
                f(out, x, block * rows + i);
            }
        });
    });
}

/// `out = x * v`, v a row or a factor for each row.
fn multiply<T: Real>(kind: Kind, out: &mut [T], x: &[T], v: &[T], d: usize) {
    match kind {
        Kind::ScaleRows => each_row(out, x, d, |o, x, r| o.iter_mut().zip(x).for_each(|(o, &x)| *o = x * v[r])),
        _ => each_row(out, x, d, |o, x, _| o.iter_mut().zip(x).zip(v).for_each(|((o, &x), &v)| *o = x * v)),
    }
}

impl Op for Broadcast {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::AddRow => "add_row",
            Kind::MulRow => "mul_row",
            Kind::ScaleRows => "scale_rows",
        }
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (x, v) = (inputs[0], inputs[1]);
        same_dtype(self.name(), inputs)?;
        let d = x.last_dim();
        let fits = if self.kind == Kind::ScaleRows { v.len() * d == x.len() } else { v.shape() == [d] };
        if !fits {
            return Err(Error::shape(self.name(), format!("{:?} and {:?}", x.shape(), v.shape())));
        }
        if let Some(gpu) = x.gpu() {
            if save && self.kind != Kind::AddRow {
                self.saved = Some((x.detach(), v.detach()));
            }
            return by_row(gpu, self.name(), x, v, d);
        }
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        dispatch_real!(self.name(), x.dtype(), T => {
            let (y, a, v) = (out.as_mut_slice::<T>(), x.as_slice::<T>(), v.as_slice::<T>());
            if self.kind == Kind::AddRow {
                each_row(y, a, d, |y, x, _| y.iter_mut().zip(x).zip(v).for_each(|((y, &x), &v)| *y = x + v));
            } else {
                multiply(self.kind, y, a, v, d);
            }
            Ok(())
        })?;
        if save && self.kind != Kind::AddRow {
            self.saved = Some((x.detach(), v.detach()));
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let d = dy.last_dim();
        if let Some(gpu) = dy.gpu() {
            return self.backward_on(gpu, dy, grads, d);
        }
        dispatch_real!("broadcast", dy.dtype(), T => {
            let Some((x, v)) = self.saved else {
                grads.accumulate(1, |mut dv| {
                    let add = dv.add;
                    sum_rows(dv.as_mut_slice::<T>(), dy.as_slice::<T>(), add);
                    Ok(())
                })?;
                return grads.add(0, dy);
            };
            let (a, g) = (x.as_slice::<T>(), dy.as_slice::<T>());
            if grads.needs(1) {
                let mut dv = Tensor::uninit(v.shape(), v.dtype());
                if self.kind == Kind::ScaleRows {
                    each_row(dv.as_mut_slice::<T>(), v.as_slice::<T>(), 1, |dv, _, r| {
                        dv[0] = lane_sum([&a[r * d..][..d], &g[r * d..][..d]], |[x, g]| x * g);
                    });
                } else {
                    sum_rows(dv.as_mut_slice::<T>(), dy.mul(&x)?.as_slice::<T>(), false);
                }
                grads.add(1, dv)?;
            }
            if !grads.needs(0) {
                return Ok(());
            }
            let mut dx = Tensor::uninit(x.shape(), x.dtype());
            multiply(self.kind, dx.as_mut_slice::<T>(), g, v.as_slice::<T>(), d);
            grads.add(0, dx)
        })
    }
}

/// The kernel of that name on every row.
fn by_row(gpu: &'static Gpu, name: &'static str, x: &Tensor, v: &Tensor, d: usize) -> Result<Tensor> {
    let mut out = Tensor::uninit(x.shape(), x.dtype());
    let rows = x.len() / d.max(1);
    let launch = gpu.kernel(&BROADCAST, name, x.dtype())?.rows(rows);
    launch.work(0.0, (2 * x.len() * x.dtype().size()) as f64).launch(args![&mut out, x, v, rows as i32, d as i32])?;
    Ok(out)
}

impl Broadcast {
    fn backward_on(self, gpu: &'static Gpu, dy: Tensor, grads: &mut Grads<'_>, d: usize) -> Result<()> {
        let (kind, name, rows) = (self.kind, self.name(), dy.len() / d.max(1));
        let Some((x, v)) = self.saved else {
            grads.accumulate(1, |mut dv| RowSums::of(&dy, d)?.put(&mut dv))?;
            return grads.add(0, dy);
        };
        if grads.needs(1) && kind == Kind::ScaleRows {
            let mut dv = Tensor::uninit(v.shape(), v.dtype());
            let launch = gpu.kernel(&BROADCAST, "row_dots", dy.dtype())?.rows(rows);
            launch.launch(args![&mut dv, &dy, &x, rows as i32, d as i32])?;
            grads.add(1, dv)?;
        } else {
            grads.accumulate(1, |mut dv| {
                let mut sums = Partial::new(rows, 1, d);
                let launch = sums.launch(gpu.kernel(&BROADCAST, "product_sums", dy.dtype())?, dy.dtype());
                launch.launch(args![sums.buffer(), &dy, &x, rows as i32, d as i32])?;
                sums.sum(0).put(&mut dv)
            })?;
        }
        match grads.needs(0) {
            true => grads.add(0, by_row(gpu, name, &dy, &v, d)?),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_factors_meet_every_row() {
        let x = Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1, 3, 2]).unwrap();
        let row = Tensor::from_slice(&[10.0, -1.0], &[2]).unwrap();
        let factors = Tensor::from_slice(&[1.0, 2.0, 3.0], &[3]).unwrap();
        assert_eq!(x.add_row(&row).unwrap().to_f64_vec(), [11.0, 1.0, 13.0, 3.0, 15.0, 5.0]);
        assert_eq!(x.mul_row(&row).unwrap().to_f64_vec(), [10.0, -2.0, 30.0, -4.0, 50.0, -6.0]);
        assert_eq!(x.scale_rows(&factors).unwrap().to_f64_vec(), [1.0, 2.0, 6.0, 8.0, 15.0, 18.0]);
        assert!(x.mul_row(&factors).is_err() && x.scale_rows(&row).is_err());
    }
}
