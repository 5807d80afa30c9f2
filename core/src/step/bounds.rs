//! Whether an update stays among the finite numbers, told before it is made and without looking at a single weight.
//!
//! AdamW moves every number by little: with clipped gradients of length `g` at most, no mean of gradients exceeds the
//! greatest seen so far or `g`, no mean of squares the greatest or `g^2`, and no weight grows by more than
//! `lr / (1 - b1^t) * m / eps`. So from bounds of all numbers and `g` follow bounds of all numbers after the update. The
//! type reaches so much farther than training does that these coarse bounds suffice for any run that works; weights are
//! measured when they come from elsewhere, and when the bounds of a long run have drifted too far.

use crate::ops::greatest;
use crate::{DType, Error, Result, Tensor};

use super::{Declared, Weights};

/// Numbers stay below this share of the type's greatest, so that no rounding of theirs (to bf16 too) overflows.
const SHARE: f64 = 0.25;

/// No number of the weights is greater in size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Student's and teachers' weights.
    weights: f64,
    /// First moments.
    mean: f64,
    /// The greatest number that is let in.
    limit: f64,
}

/// What an update does to a number, at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    /// What a weight is multiplied by: 1 less the decay.
    pub(super) keep: f64,
    /// What a mean of gradients is multiplied by.
    pub(super) step_size: f64,
    /// What it is divided by, at the least; no more than 1, as the product comes first.
    pub(super) eps: f64,
}

impl Bounds {
    /// Measures all weights.
    ///
    /// # Errors
    /// If one is not finite; the message names its tensor.
    pub(super) fn measured(weights: &Weights, model: &Declared) -> Result<Self> {
        let layout = &model.layout;
        let of_role = |role: &str, flat: &Tensor| -> Result<f64> {
            let most = greatest(flat)?;
            if most.is_finite() {
                return Ok(most);
            }
            let inside = layout.specs().iter().filter(|s| s.range().end <= flat.len());
            inside
                .map(|spec| of_tensor(&format!("{role}.{}", spec.name), &flat.view(spec.offset, &spec.shape)))
                .try_fold(0.0, |most: f64, of| Ok(most.max(of?)))
        };
        let mut most = of_role("student", &weights.student)?.max(of_role("teacher", &weights.teacher)?);
        if let Some(gram) = &weights.gram {
            most = most.max(of_role("gram_teacher", gram)?);
        }
        of_role("exp_avg_sq", &weights.exp_avg_sq)?;
        for (loss, state) in model.losses.iter().zip(&weights.loss_state) {
            for (spec, value) in loss.loss.state().iter().zip(state) {
                of_tensor(&format!("state.{}.{}", loss.name, spec.name), value)?;
            }
        }
        let limit = match weights.student.dtype() {
            DType::F64 => f64::MAX,
            _ => f64::from(f32::MAX),
        };
        Ok(Self { weights: most, mean: of_role("exp_avg", &weights.exp_avg)?, limit: SHARE * limit })
    }

    /// The longest clipped gradient of a sub-model with which every number stays finite; negative if there is none.
    pub(super) fn longest_gradient(&self, reach: Reach) -> f64 {
        let room = self.limit - self.weights * reach.keep.max(1.0);
        let longest = if reach.step_size > 0.0 { room / reach.step_size * reach.eps } else { f64::INFINITY };
        let fits = room >= 0.0 && self.mean <= longest && reach.keep.max(reach.step_size) <= self.limit;
        if fits {
            longest.min(self.limit.sqrt())
        } else {
            -1.0
        }
    }

    /// After an update with a gradient of this length.
    pub(super) fn after(self, reach: Reach, gradient: f64) -> Self {
        let mean = self.mean.max(gradient);
        Self { weights: self.weights * reach.keep.max(1.0) + reach.step_size * (mean / reach.eps), mean, ..self }
    }
}

/// The greatest number of a tensor, wherever it is.
fn of_tensor(name: &str, tensor: &Tensor) -> Result<f64> {
    let most = greatest(tensor)?;
    if most.is_finite() {
        return Ok(most);
    }
    let problem = format!("the weights are not finite: there is {most} in {name}");
    Err(Error::user(problem, "the file they came from was spoiled before it was written: start from another"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::ops::{adamw_step, AdamW, Ema, Group, Moments};

    proptest! {
        /// However odd the numbers of the optimizer are, an update that is let through leaves finite numbers.
        #[test]
        fn an_update_within_the_bounds_is_finite(
            weight in -38.0..38.0f64, mean in -38.0..19.0f64, gradient in -38.0..38.0f64, eps in -37.0..0.0f64,
            lr in -10.0..30.0f64, decay in -5.0..20.0f64, beta1 in 0.0..1.0f64, beta2 in 0.0..1.0f64, step in 1u64..50,
            signs in any::<[bool; 2]>(),
        ) {
            let sign = |negative: bool| if negative { -1.0 } else { 1.0 };
            let number = |x: f64| Tensor::from_f64(&[x], &[1], DType::F32).unwrap();
            let [weight, mean, gradient, eps, lr, weight_decay] =
                [weight, mean, gradient, eps, lr, decay].map(|x: f64| 10f64.powf(x));
            let (mut p, mut m, mut v) = (number(sign(signs[0]) * weight), number(sign(signs[1]) * mean), number(mean * mean));
            let mut ema = number(weight);
            let bounds = Bounds { weights: weight, mean, limit: SHARE * f64::from(f32::MAX) };
            let step_size = lr / (1.0 - beta1.powf(step as f64));
            let reach = Reach { keep: (1.0 - lr * weight_decay).abs(), step_size, eps: f64::from(eps as f32).min(1.0) };
            prop_assume!(gradient <= bounds.longest_gradient(reach));
            let moments = Moments { mean: &mut m, square: &mut v };
            let groups = [Group { range: 0..1, lr, weight_decay, clip: 1.0 }];
            let config = AdamW { beta1, beta2, eps };
            let follow = Some(Ema { params: &mut ema, momentum: 0.5 });
            adamw_step(&mut p, &number(gradient), moments, follow, &groups, config, step).unwrap();
            let after = bounds.after(reach, gradient);
            prop_assert!(p.item().abs() <= after.weights * 1.001 && m.item().abs() <= after.mean * 1.001);
            prop_assert!([&p, &m, &v, &ema].iter().all(|x| x.item().is_finite()), "{p:?} {m:?} {v:?} {ema:?}");
        }
    }
}
