//! Whether an update stays among the finite numbers, told before it is made and without looking at a single weight.
//!
//! An optimizer moves every number by little, and says by how much at most: AdamW, with clipped gradients of length `g`,
//! has a mean of gradients of at most `m' = b1 m + (1 - b1) g`, squares of at most `g^2`, and moves a weight by no more than
//! `lr / (1 - b1^t) * m' / eps`. So from bounds of all numbers and `g` follow bounds of all numbers after the update. The
//! type reaches so much farther than training does that these coarse bounds suffice for any run that works; weights are
//! measured when they come from elsewhere, and when the bounds of a long run have drifted too far.

use crate::comm::Ranks;
use crate::contract;
use crate::params::ParamSpec;
use crate::tensor::greatest;
use crate::{DType, Error, Result, Tensor};

use super::flat::Flat;
use super::parts::within;
use super::weights::role_of;
use super::{Declared, Weights};

/// Numbers stay below this share of the type's greatest, so that no rounding of theirs (to bf16 too) overflows.
const SHARE: f64 = 0.25;

/// No number of the weights is greater in size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Student's and teachers' weights.
    weights: f64,
    /// The first moment.
    moment: f64,
    /// The greatest number that is let in.
    limit: f64,
}

/// What an update does to a number of the weights, at most: the sum over what all parameters may do.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reach {
    /// What a weight is multiplied by: 1 less the decay.
    keep: f64,
    /// What of the first moment stays, and what of the gradient goes into it.
    memory: f64,
    share: f64,
    /// A weight moves by at most `gain` times the first moment, and `most`.
    gain: f64,
    most: f64,
}

impl Reach {
    /// Includes a parameter of this learning rate, of which the share `decay` is taken away.
    pub(super) fn include(&mut self, own: contract::Reach, lr: f64, decay: f64) {
        self.keep = self.keep.max((1.0 - decay).abs());
        self.memory = self.memory.max(own.memory);
        self.share = self.share.max(own.share);
        self.gain = self.gain.max(lr * own.gain);
        self.most = self.most.max(lr * own.most);
    }
}

impl Bounds {
    /// Measures all weights.
    ///
    /// # Errors
    /// If one is not finite; the message names its tensor.
    pub(super) fn measured(weights: &Weights, model: &Declared) -> Result<Self> {
        let specs = model.layout.specs();
        let of_role = |role: &str, flat: &Flat| -> Result<f64> {
            let most = flat.bound()?;
            if most.is_finite() {
                return Ok(most);
            }
            let inside = specs.iter().filter(|spec| !within(&spec.range(), flat.held()).is_empty());
            let of = |spec: &ParamSpec| {
                let here = within(&spec.range(), flat.held());
                of_tensor(
                    &format!("{role}.{}", spec.name),
                    &flat.here().view(here.start - flat.held().start, &[here.len()]),
                )
            };
            inside.map(of).try_fold(0.0, |most: f64, of| Ok(most.max(of?)))
        };
        let mut most = of_role("student", &weights.student)?;
        let named = weights.named.iter().map(|(name, flat)| (role_of(name), flat));
        for (role, flat) in weights.teacher.iter().map(|flat| ("teacher".to_string(), flat)).chain(named) {
            most = most.max(of_role(&role, flat)?);
        }
        let of_moment = |(i, name): (usize, &&'static str)| -> Result<f64> {
            // The greatest number of a block in eight bits is its scale.
            let eight = weights.eight.get(i).map_or(Ok(0.0), |eight| greatest(eight.scales()))?;
            let whole = greatest(&weights.moments[i])?;
            if eight.is_finite() && whole.is_finite() {
                return Ok(eight.max(whole));
            }
            let of = |(param, spec): (usize, &ParamSpec)| {
                of_tensor(&format!("{name}.{}", spec.name), &weights.moment(i, param))
            };
            specs.iter().enumerate().map(of).try_fold(0.0, |most: f64, of| Ok(most.max(of?)))
        };
        let moments = weights.moment_names.iter().enumerate().map(of_moment);
        let moment = moments.collect::<Result<Vec<f64>>>()?.first().copied().unwrap_or(0.0);
        for (loss, state) in model.losses.iter().zip(&weights.loss_state) {
            for (name, value) in state {
                of_tensor(&format!("state.{}.{name}", loss.name), value)?;
            }
        }
        let limit = match weights.student.dtype() {
            DType::F64 => f64::MAX,
            _ => f64::from(f32::MAX),
        };
        Ok(Self { weights: most, moment, limit: SHARE * limit })
    }

    /// The same of the numbers of all ranks.
    pub(super) fn of_all(self, ranks: &Ranks) -> Result<Self> {
        Ok(Self { weights: ranks.greatest(self.weights)?, moment: ranks.greatest(self.moment)?, ..self })
    }

    /// The longest clipped gradient of a sub-model with which every number stays finite; negative if there is none.
    pub(super) fn longest_gradient(&self, reach: Reach) -> f64 {
        let room = self.limit - self.weights * reach.keep.max(1.0);
        // How large the first moment may become, and how much of it is left for the gradient.
        let moved = if reach.gain > 0.0 { (room - reach.most) / reach.gain } else { self.limit };
        let left = moved.min(self.limit) - reach.memory * self.moment;
        let fits = room >= reach.most && left >= 0.0 && reach.keep.max(reach.gain) <= self.limit;
        if fits {
            // Squares of gradients are numbers too.
            (if reach.share > 0.0 { left / reach.share } else { self.limit }).min(self.limit.sqrt())
        } else {
            -1.0
        }
    }

    /// After an update with a gradient of this length.
    pub(super) fn after(self, reach: Reach, gradient: f64) -> Self {
        let moment = reach.memory * self.moment + reach.share * gradient;
        let weights = self.weights * reach.keep.max(1.0) + reach.gain * moment + reach.most;
        Self { weights, moment, ..self }
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
            let bounds = Bounds { weights: weight, moment: mean, limit: SHARE * f64::from(f32::MAX) };
            let config = AdamW { beta1, beta2, eps: f64::from(eps as f32) };
            let mut reach = Reach::default();
            reach.include(contract::Reach::adamw(config, step), lr, lr * weight_decay);
            prop_assume!(gradient <= bounds.longest_gradient(reach));
            let moments = Moments { mean: &mut m, square: &mut v };
            let groups = [Group { range: 0..1, lr, weight_decay, clip: 1.0 }];
            let follow = Some(Ema { params: &mut ema, start: 0, momentum: 0.5 });
            adamw_step(&mut p, &number(gradient), moments, follow, &groups, config, step).unwrap();
            let after = bounds.after(reach, gradient);
            // Below the smallest normal number a product keeps few digits, before it is divided by eps.
            let coarse = f64::from(f32::MIN_POSITIVE) * f64::from(f32::EPSILON) / config.eps;
            prop_assert!(p.item().abs() <= after.weights * 1.001 + coarse && m.item().abs() <= after.moment * 1.001);
            prop_assert!([&p, &m, &v, &ema].iter().all(|x| x.item().is_finite()), "{p:?} {m:?} {v:?} {ema:?}");
        }
    }
}
