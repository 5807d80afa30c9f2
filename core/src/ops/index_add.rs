//! Rows added to some of a matrix's rows: the residual connection of stochastic depth by sample subset (Oquab et al.,
//! arXiv:2304.07193, section 5: dropped samples are not computed at all).

use crate::cuda::args;
use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::{Grads, Op};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { static INDEX_ADD = "index_add" { include_str!("index_add.cu") } }

impl Tensor {
    /// `out[rows[i]] = x[rows[i]] + scale[i] y[i]`, other rows as in x: `x [.., D]`, u32 `rows [S]`, all different,
    /// `y [S, D]`, `scale [S]` (no gradient) to the shape of x.
    ///
    /// `dx = dout, dy[i] = scale[i] dout[rows[i]]`.
    ///
    /// # Errors
    /// If the shapes do not fit, or (on the CPU) a row number is out of bounds or repeated.
    pub fn index_add(&self, rows: &Tensor, y: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let scale = scale.detach().cast(self.dtype().wide())?;
        IndexAdd { rows: rows.detach(), scale }.apply(&[self, y])
    }
}

struct IndexAdd {
    rows: Tensor,
    scale: Tensor,
}

/// Rows a task handles.
const ROWS: usize = 64;
/// No row of `y` belongs here.
const NONE: u32 = u32::MAX;

impl IndexAdd {
    fn check(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        let (d, Self { rows, scale }) = (x.last_dim(), self);
        let count = y.len() / d.max(1);
        if x.rank() == 0 || d == 0 || y.last_dim() != d || rows.len() != count || scale.len() != count {
            let (x, y, rows, scale) = (x.shape(), y.shape(), rows.shape(), scale.shape());
            return Err(Error::shape("index_add", format!("x {x:?}, rows {rows:?}, y {y:?}, scale {scale:?}")));
        }
        same_dtype("index_add", &[x, y])
    }

    /// For each of `count` rows of x, which row of y it receives.
    fn inverse(&self, count: usize) -> Result<Vec<u32>> {
        let mut inverse = vec![NONE; count];
        for (i, &row) in self.rows.as_slice::<u32>().iter().enumerate() {
            match inverse.get_mut(row as usize) {
                Some(slot) if *slot == NONE => *slot = i as u32,
                Some(_) => return Err(Error::shape("index_add", format!("row {row} is given twice"))),
                None => return Err(Error::shape("index_add", format!("row {row} of {count}"))),
            }
        }
        Ok(inverse)
    }
}

impl Op for IndexAdd {
    fn name(&self) -> &'static str {
        "index_add"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let (x, y) = (inputs[0], inputs[1]);
        self.check(x, y)?;
        let (d, Self { rows, scale }) = (x.last_dim(), &*self);
        if let Some(gpu) = x.gpu() {
            let mut out = x.to_owned();
            let launch = gpu.kernel(&INDEX_ADD, "index_add", x.dtype())?.rows(rows.len());
            let launch = launch.work(0.0, (3 * y.len() * x.dtype().size()) as f64);
            launch.launch(args![&mut out, y, rows, scale, rows.len() as i32, d as i32])?;
            return Ok(out);
        }
        let inverse = self.inverse(x.len() / d)?;
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        dispatch_real!("index_add", x.dtype(), T => {
            let (y, scale) = (y.as_slice::<T>(), scale.as_slice::<T>());
            let blocks = out.as_mut_slice::<T>().par_chunks_mut(ROWS * d).zip(x.as_slice::<T>().par_chunks(ROWS * d));
            blocks.zip(inverse.par_chunks(ROWS)).for_each(|((out, x), inverse)| simd!(T, {
                out.copy_from_slice(x);
                for (out, &source) in out.chunks_exact_mut(d).zip(inverse).filter(|(_, &source)| source != NONE) {
                    let (y, scale) = (&y[source as usize * d..][..d], scale[source as usize]);
                    out.iter_mut().zip(y).for_each(|(o, &y)| *o += y * scale);
                }
            }));
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dout: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (d, Self { rows, scale }) = (dout.last_dim(), *self);
        if grads.needs(1) {
            let mut dy = Tensor::uninit(&[rows.len(), d], dout.dtype());
            if let Some(gpu) = dout.gpu() {
                let launch = gpu.kernel(&INDEX_ADD, "index_add_backward", dout.dtype())?.rows(rows.len());
                let launch = launch.work(0.0, (2 * dy.len() * dy.dtype().size()) as f64);
                launch.launch(args![&mut dy, &dout, &rows, &scale, rows.len() as i32, d as i32])?;
            } else {
                dispatch_real!("index_add", dout.dtype(), T => {
                    let dout = dout.as_slice::<T>();
                    let each = rows.as_slice::<u32>().par_iter().zip(scale.as_slice::<T>().par_iter());
                    dy.as_mut_slice::<T>().par_chunks_mut(d).zip(each).for_each(|(dy, (&row, &scale))| {
                        dy.iter_mut().zip(&dout[row as usize * d..]).for_each(|(dy, &g)| *dy = g * scale);
                    });
                    Ok(())
                })?;
            }
            grads.add(1, dy)?;
        }
        grads.add(0, dout)
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn rows_that_were_dropped_pass_unchanged() {
        let x = Tensor::from_slice(&[1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2]).unwrap();
        let y = Tensor::from_slice(&[10.0f64, 20.0], &[1, 2]).unwrap();
        let (rows, scale) = (Tensor::from_slice(&[2u32], &[1]).unwrap(), Tensor::from_slice(&[3.0f64], &[1]).unwrap());
        let out = x.index_add(&rows, &y, &scale).unwrap();
        assert_eq!(out.as_slice::<f64>(), [1.0, 2.0, 3.0, 4.0, 5.0 + 30.0, 6.0 + 60.0]);
    }

    #[test]
    fn a_row_given_twice_is_an_error() {
        let x = Tensor::zeros(&[3, 2], crate::DType::F32);
        let y = Tensor::zeros(&[2, 2], crate::DType::F32);
        let (rows, scale) = (Tensor::from_slice(&[1u32, 1], &[2]).unwrap(), Tensor::zeros(&[2], crate::DType::F32));
        let error = x.index_add(&rows, &y, &scale).unwrap_err();
        assert!(error.to_string().contains("row 1 is given twice"), "{error}");
    }
}
