//! Softmax of centred logits: DINO's first way to make teacher targets (Caron et al., arXiv:2104.14294, eq. 4).

use std::ops::Range;

use crate::comm::Shards;
use crate::ops::scalars_of;
use crate::ops::softmax::softmax_on;
use crate::tensor::blocks::*;
use crate::tensor::parallel::{lane_max, lane_sum};
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
        if center.len() != k || temperature.len() != 1 || k == 0 {
            let problem = format!("logits {:?}, center {:?}", self.shape(), center.shape());
            return Err(Error::shape("centered_softmax", problem));
        }
        if self.is_empty() {
            return Ok(self.detach());
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

    /// The mean row over all `shards`: `[B, K]` to `[K]`; what a centre moves towards (see
    /// [`ema_update`](crate::ops::ema_update)). No gradient.
    ///
    /// # Errors
    /// If the rows are not those of the shards, or a rank has failed.
    pub fn mean_row(&self, shards: &Shards<'_>) -> Result<Tensor> {
        let (rows, k) = (self.len() / self.last_dim().max(1), self.last_dim());
        let _on = self.device().enter();
        let of_shard = |rows: Range<usize>| self.detach().view(rows.start * k, &[rows.len(), k]).sum_axis(0);
        let sums = shards.sum(shards.ranges(rows)?.into_iter().map(of_shard).collect::<Result<_>>()?)?;
        sums.scale(1.0 / shards.all_rows(rows)? as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        assert_eq!(x.mean_row(&Shards::one()).unwrap().to_f64_vec(), [4.0, 5.0]);
    }
}
