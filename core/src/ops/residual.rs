//! The residual connection, with LayerScale (Touvron et al., arXiv:2103.17239) and stochastic depth by sample subset
//! (Oquab et al., arXiv:2304.07193, section 5: dropped samples are not computed at all).

use rayon::prelude::*;

use crate::cuda::{args, Arg, Gpu};
use crate::ops::columns::Partial;
use crate::ops::linear::sum_rows;
use crate::ops::{same_dtype, with_grad};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { static RESIDUAL = "residual" { include_str!("columns.cuh"), include_str!("residual.cu") } }

impl Tensor {
    /// `x + gamma y` by rows: `x [T, D]`, `y [T, D]`, `gamma [D]` (1 if not given) to `[T, D]`.
    ///
    /// With `rows` = (u32 row numbers `[S]`, all different; a scale for each, `[S]`, which receives no gradient), `y` is
    /// `[S, D]` and belongs to these rows: `out[rows[i]] = x[rows[i]] + scale[i] gamma y[i]`; other rows are `x`.
    ///
    /// `dx = dout, dy[i] = scale[i] gamma dout[rows[i]], dgamma = sum of scale[i] y[i] dout[rows[i]]`.
    ///
    /// # Errors
    /// If the shapes do not fit, or a row number is out of bounds or repeated.
    pub fn residual(&self, y: &Tensor, gamma: Option<&Tensor>, rows: Option<(&Tensor, &Tensor)>) -> Result<Tensor> {
        let inputs: Vec<&Tensor> = [self, y].into_iter().chain(gamma).collect();
        let rows = rows
            .map(|(rows, scale)| -> Result<_> { Ok((rows.detach(), scale.detach().cast(self.dtype().wide())?)) })
            .transpose()?;
        Residual { rows, saved: None }.apply(&inputs)
    }
}

struct Residual {
    rows: Option<(Tensor, Tensor)>,
    /// y (needed for dgamma only) and gamma.
    saved: Option<(Tensor, Tensor)>,
}

/// Rows a task handles.
const ROWS: usize = 64;
/// No row of `y` belongs here.
const NONE: u32 = u32::MAX;

impl Residual {
    fn check(&self, inputs: &[&Tensor]) -> Result<()> {
        let (x, y, gamma) = (inputs[0], inputs[1], inputs.get(2));
        let d = x.last_dim();
        let count = |t: &Tensor| t.len() / d.max(1);
        let fits = x.rank() > 0
            && d > 0
            && y.last_dim() == d
            && gamma.is_none_or(|g| g.shape() == [d])
            && match &self.rows {
                Some((rows, scale)) => {
                    rows.len() == count(y) && scale.len() == count(y) && scale.dtype() == x.dtype().wide()
                }
                None => y.len() == x.len(),
            };
        if !fits {
            let rows = self.rows.as_ref().map(|(rows, scale)| (rows.shape(), scale.shape()));
            let gamma = gamma.map(|g| g.shape());
            let problem = format!("x {:?}, y {:?}, gamma {gamma:?}, rows and scale {rows:?}", x.shape(), y.shape());
            return Err(Error::shape("residual", problem));
        }
        same_dtype("residual", inputs)
    }

    /// For each of `count` rows of x, which row of y it receives.
    fn inverse(&self, count: usize) -> Result<Option<Vec<u32>>> {
        let Some((rows, _)) = &self.rows else { return Ok(None) };
        let mut inverse = vec![NONE; count];
        for (i, &row) in rows.as_slice::<u32>().iter().enumerate() {
            match inverse.get_mut(row as usize) {
                Some(slot) if *slot == NONE => *slot = i as u32,
                Some(_) => return Err(Error::shape("residual", format!("row {row} is given twice"))),
                None => return Err(Error::shape("residual", format!("row {row} of {count}"))),
            }
        }
        Ok(Some(inverse))
    }
}

impl Op for Residual {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        self.check(inputs)?;
        let (x, y, gamma) = (inputs[0], inputs[1], inputs.get(2));
        let d = x.last_dim();
        if let Some(gpu) = x.gpu() {
            if let (true, Some(gamma)) = (save, gamma) {
                self.saved = Some((y.detach(), gamma.detach()));
            }
            return self.forward_on(gpu, x, y, gamma.map(|g| &**g));
        }
        let inverse = self.inverse(x.len() / d)?;
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        dispatch_real!("residual", x.dtype(), T => {
            let (y, gamma) = (y.as_slice::<T>(), gamma.map(|g| g.as_slice::<T>()));
            let scale = self.rows.as_ref().map(|(_, scale)| scale.as_slice::<T>());
            let blocks = out.as_mut_slice::<T>().par_chunks_mut(ROWS * d).zip(x.as_slice::<T>().par_chunks(ROWS * d));
            blocks.enumerate().for_each(|(block, (out, x))| simd!({
                for (r, (out, x)) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).enumerate() {
                    let row = block * ROWS + r;
                    let source = inverse.as_ref().map_or(row, |inverse| inverse[row] as usize);
                    if source == NONE as usize {
                        out.copy_from_slice(x);
                        continue;
                    }
                    let (y, scale) = (&y[source * d..][..d], scale.map_or(T::ONE, |s| s[source]));
                    let each = out.iter_mut().zip(x).zip(y);
                    match gamma {
                        Some(gamma) => each.zip(gamma).for_each(|(((o, &x), &y), &g)| *o = x + g * (y * scale)),
                        None => each.for_each(|((o, &x), &y)| *o = x + y * scale),
                    }
                }
            }));
            Ok(())
        })?;
        if let (true, Some(gamma)) = (save, gamma) {
            self.saved = Some((inputs[1].detach(), gamma.detach()));
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dout: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let d = dout.last_dim();
        let count = self.rows.as_ref().map_or(dout.len() / d, |(rows, _)| rows.len());
        if let (Some(gpu), true) = (dout.gpu(), self.rows.is_some() || self.saved.is_some()) {
            self.backward_on(gpu, &dout, grads, count, d)?;
            return grads.add(0, dout);
        }
        dispatch_real!("residual", dout.dtype(), T => {
            if self.rows.is_none() && self.saved.is_none() {
                grads.add(1, dout.clone())?;
                return grads.add(0, dout);
            }
            let mut partial = self.saved.as_ref().map(|_| Tensor::uninit(&[count.div_ceil(ROWS), d], dout.dtype()));
            with_grad::<T>(grads, 1, count * d, |dy, add| {
                self.rows(dout.as_slice::<T>(), dy, add, partial.as_mut().map(|p| p.as_mut_slice::<T>()), d);
            })?;
            if let Some(partial) = partial {
                grads.accumulate(2, |mut dgamma| {
                    let add = dgamma.add;
                    sum_rows(dgamma.as_mut_slice::<T>(), partial.as_slice::<T>(), add);
                    Ok(())
                })?;
            }
            grads.add(0, dout)
        })
    }
}

impl Residual {
    fn forward_on(&self, gpu: &'static Gpu, x: &Tensor, y: &Tensor, gamma: Option<&Tensor>) -> Result<Tensor> {
        let d = x.last_dim();
        let bytes = (3 * y.len() * x.dtype().size()) as f64;
        let (count, width) = (y.len() / d, d as i32);
        let Some((rows, scale)) = &self.rows else {
            let mut out = Tensor::uninit(x.shape(), x.dtype());
            let launch = gpu.kernel(&RESIDUAL, "residual", x.dtype())?.rows(count).work(0.0, bytes);
            launch.launch(args![&mut out, x, y, gamma, count as i32, width])?;
            return Ok(out);
        };
        let mut out = x.to_owned();
        let launch = gpu.kernel(&RESIDUAL, "residual_subset", x.dtype())?.rows(count).work(0.0, bytes);
        launch.launch(args![&mut out, y, gamma, rows, scale, count as i32, width])?;
        Ok(out)
    }

    fn backward_on(
        &self,
        gpu: &'static Gpu,
        dout: &Tensor,
        grads: &mut Grads<'_>,
        count: usize,
        d: usize,
    ) -> Result<()> {
        let (y, gamma) = self.saved.as_ref().map_or((None, None), |(y, gamma)| (Some(y), Some(gamma)));
        let (rows, scale) = self.rows.as_ref().map_or((None, None), |(rows, scale)| (Some(rows), Some(scale)));
        let mut sums = Partial::new(count, 1, d);
        let launch = sums.launch(gpu.kernel(&RESIDUAL, "residual_backward", dout.dtype())?, dout.dtype());
        let launch = launch.work(0.0, (3 * count * d * dout.dtype().size()) as f64);
        let mut run =
            |dy: Arg| launch.launch(args![&dy, sums.buffer(), dout, y, gamma, rows, scale, count as i32, d as i32]);
        match grads.needs(1) {
            true => grads.accumulate(1, |mut dy| run(Arg::from(&mut dy)))?,
            false => run(Arg::no_gradient())?,
        }
        match gamma {
            Some(_) => grads.accumulate(2, |mut dgamma| sums.finish(gpu, &RESIDUAL, 0, Arg::from(&mut dgamma))),
            None => Ok(()),
        }
    }

    /// dy of every row, and for every block of rows its part of dgamma (`[blocks, D]`).
    fn rows<T: Real>(&self, dout: &[T], dy: &mut [T], add: bool, dgamma: Option<&mut [T]>, d: usize) {
        let rows = self.rows.as_ref().map(|(rows, scale)| (rows.as_slice::<u32>(), scale.as_slice::<T>()));
        // Row `i` of y: the gradient that reaches it, and its scale.
        let reach = |i: usize| match rows {
            Some((rows, scale)) => (&dout[rows[i] as usize * d..][..d], scale[i]),
            None => (&dout[i * d..][..d], T::ONE),
        };
        let Some(dgamma) = dgamma else {
            dy.par_chunks_mut(ROWS * d).enumerate().for_each(|(block, dy)| {
                simd!({
                    for (r, dy) in dy.chunks_exact_mut(d).enumerate() {
                        let (g, scale) = reach(block * ROWS + r);
                        for (dy, &g) in dy.iter_mut().zip(g) {
                            *dy = g * scale + if add { *dy } else { T::ZERO };
                        }
                    }
                });
            });
            return;
        };
        let (y, gamma) = self.saved.as_ref().expect("saved by forward, as there is a gamma");
        let (y, gamma) = (y.as_slice::<T>(), gamma.as_slice::<T>());
        let blocks = dy.par_chunks_mut(ROWS * d).zip(dgamma.par_chunks_mut(d)).zip(y.par_chunks(ROWS * d));
        blocks.enumerate().for_each(|(block, ((dy, dgamma), y))| {
            simd!({
                dgamma.fill(T::ZERO);
                for (r, (dy, y)) in dy.chunks_exact_mut(d).zip(y.chunks_exact(d)).enumerate() {
                    let (g, scale) = reach(block * ROWS + r);
                    let each = dy.iter_mut().zip(y).zip(g).zip(gamma).zip(dgamma.iter_mut());
                    for ((((dy, &y), &g), &gamma), dgamma) in each {
                        let g = g * scale;
                        *dy = g * gamma + if add { *dy } else { T::ZERO };
                        *dgamma += g * y;
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
    fn rows_that_were_dropped_pass_unchanged() {
        let x = Tensor::from_slice(&[1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2]).unwrap();
        let y = Tensor::from_slice(&[10.0f64, 20.0], &[1, 2]).unwrap();
        let gamma = Tensor::from_slice(&[0.5f64, 0.1], &[2]).unwrap();
        let (rows, scale) = (Tensor::from_slice(&[2u32], &[1]).unwrap(), Tensor::from_slice(&[3.0f64], &[1]).unwrap());
        let out = x.residual(&y, Some(&gamma), Some((&rows, &scale))).unwrap();
        assert_eq!(out.as_slice::<f64>(), [1.0, 2.0, 3.0, 4.0, 5.0 + 15.0, 6.0 + 6.0]);
    }

    #[test]
    fn a_row_given_twice_is_an_error() {
        let x = Tensor::zeros(&[3, 2], crate::DType::F32);
        let y = Tensor::zeros(&[2, 2], crate::DType::F32);
        let (rows, scale) = (Tensor::from_slice(&[1u32, 1], &[2]).unwrap(), Tensor::zeros(&[2], crate::DType::F32));
        let error = x.residual(&y, None, Some((&rows, &scale))).unwrap_err();
        assert!(error.to_string().contains("row 1 is given twice"), "{error}");
    }
}
