//! Softmax of centred logits: DINO's first way to make teacher targets (Caron et al., arXiv:2104.14294, eq. 4).

use crate::comm::Comm;
use crate::ops::blocks::*;
use crate::ops::columns::sum_rows;
use crate::ops::parallel::{lane_max, lane_sum};
use crate::ops::scalars_of;
use crate::ops::softmax::softmax_on;
use crate::tensor::Real;
use crate::{dispatch_real, simd, Error, Result, Tensor};

/// Elements of a row that are summed together.
const CHUNK: usize = 2048;

impl Tensor {
    /// `softmax((self - center) / temperature)` over the last axis: logits `[.., K]`, `center` with K elements,
    /// `temperature` rank 0; these two are f32 beside bf16 logits. No gradient.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn centered_softmax(&self, center: &Tensor, temperature: &Tensor) -> Result<Tensor> {
        scalars_of("centered_softmax", self, &[center, temperature])?;
        let k = self.last_dim();
        if center.len() != k || temperature.len() != 1 || self.is_empty() {
            let problem = format!("logits {:?}, center {:?}", self.shape(), center.shape());
            return Err(Error::shape("centered_softmax", problem));
        }
        if let Some(gpu) = self.gpu() {
            let _on = self.device().enter();
            return softmax_on(gpu, self, Some([center, temperature]), false);
        }
        let mut out = Tensor::uninit(self.shape(), self.dtype());
        dispatch_real!("centered_softmax", self.dtype(), T => {
            let center = center.as_slice::<T>();
            let scale = T::ONE / temperature.as_slice::<T>()[0];
            let rows = out.as_mut_slice::<T>().par_chunks_mut(k).zip(self.as_slice::<T>().par_chunks(k));
            rows.for_each(|(y, x)| simd!(T, {
                y.iter_mut().zip(x).zip(center).for_each(|((y, &x), &c)| *y = (x - c) * scale);
                let peak = lane_max(y);
                let mut sum = T::ZERO;
                for y in y.chunks_mut(CHUNK) {
                    y.iter_mut().for_each(|y| *y = (*y - peak).exp());
                    sum += lane_sum([y], |[y]| y);
                }
                let scale = T::ONE / sum;
                y.iter_mut().for_each(|y| *y *= scale);
            }));
            Ok(out)
        })
    }

    /// The mean row over all leading axes and all ranks: `[.., K]` to `[K]`; what a centre moves towards
    /// (see [`ema_update`](crate::ops::ema_update)). No gradient.
    pub fn mean_row(&self, comm: &dyn Comm) -> Result<Tensor> {
        let k = self.last_dim();
        if self.gpu().is_some() {
            let _on = self.device().enter();
            let rows = self.len() / k.max(1);
            let sums = self.view(0, &[rows, k]).sum_axis(0)?;
            let count = Tensor::scalar(rows as f64, sums.dtype());
            return comm.all_reduce_sum(&sums)?.div(&comm.all_reduce_sum(&count)?);
        }
        let mut sums = Tensor::uninit(&[k], self.dtype());
        dispatch_real!("mean_row", self.dtype(), T => {
            sum_rows(sums.as_mut_slice::<T>(), self.as_slice::<T>(), false);
            Ok(())
        })?;
        let rows = Tensor::scalar((self.len() / k.max(1)) as f64, self.dtype());
        comm.all_reduce_sum(&sums)?.div(&comm.all_reduce_sum(&rows)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Single;
    use crate::DType;

    #[test]
    fn logits_at_the_center_give_uniform_targets() {
        let x = Tensor::from_slice(&[4.0f32, -2.0, 7.0], &[1, 3]).unwrap();
        let p = x.centered_softmax(&x, &Tensor::scalar(0.04, DType::F32)).unwrap();
        assert!(p.to_f64_vec().iter().all(|p| (p - 1.0 / 3.0).abs() < 1e-6));
    }

    #[test]
    fn the_mean_row_is_over_all_leading_axes() {
        let x = Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], &[2, 2, 2]).unwrap();
        assert_eq!(x.mean_row(&Single).unwrap().to_f64_vec(), [4.0, 5.0]);
    }
}
