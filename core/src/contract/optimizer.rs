//! How weights follow their gradients.

use std::fmt;

use super::scheduler::At;
use crate::ops::AdamW;
use crate::params::ParamSpec;
use crate::{DType, Error, Result, Tensor};

/// An update rule: in what direction a parameter moves, given its gradient and moments.
///
/// Core does what is common to all of them, once, on both devices: groups of parameters with learning rates of their own,
/// clipping by sub-model, frozen last layers, decoupled weight decay and the EMA teacher:
///
/// ```text
/// weight = weight (1 - lr weight_decay) - lr direction;   teacher = momentum teacher + (1 - momentum) weight
/// ```
///
/// An optimizer states [`direction`](Self::direction) in operations on tensors, which run on both devices and are recorded
/// on a GPU. It may leave some parameters, or all, to AdamW, which is one pass over flat memory.
///
/// ```
/// use dinolab_core::contract::{At, Direction, Optimizer, ParamUpdate, Reach};
/// use dinolab_core::params::ParamSpec;
/// use dinolab_core::{plugin, Result};
///
/// /// Lion (Chen et al., arXiv:2302.06675), with a softened sign: `direction = c / (|c| + 1e-12)`,
/// /// `c = 0.9 m + 0.1 g`, `m = 0.99 m + 0.01 g`.
/// #[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
/// #[serde(deny_unknown_fields)]
/// struct SoftLion {}
///
/// impl Optimizer for SoftLion {
///     fn moments(&self) -> &[&'static str] {
///         &["exp_avg"]
///     }
///     fn direction(&self, p: &ParamUpdate<'_>) -> Result<Direction> {
///         let (gradient, mean) = (&p.gradient, &p.moments[0]);
///         let c = mean.scale(0.9)?.add(&gradient.scale(0.1)?)?;
///         let direction = c.mul(&c.abs()?.shift(1e-12)?.recip()?)?;
///         Ok(Direction { direction, moments: vec![mean.scale(0.99)?.add(&gradient.scale(0.01)?)?] })
///     }
///     fn reach(&self, _: &ParamSpec, _: At, _: u64) -> Reach {
///         Reach { memory: 0.99, share: 0.01, gain: 0.0, most: 1.0 }
///     }
/// }
///
/// plugin!(Optimizer, "soft_lion", SoftLion);
/// ```
pub trait Optimizer: fmt::Debug + Send + Sync {
    /// The numbers that are kept for every weight, by the names that they have in a checkpoint; each starts at zero.
    fn moments(&self) -> &[&'static str];

    /// AdamW's numbers, for a parameter that is left to AdamW. The first two moments are AdamW's then: the mean of
    /// gradients, and that of their squares.
    fn adamw(&self, param: &ParamSpec) -> Option<AdamW> {
        let _ = param;
        None
    }

    /// Numbers of an update that change over time, such as the value of a schedule or a bias correction:
    /// [`ParamUpdate::numbers`]. Their number never changes. `update` counts the updates of the moments, from 1; a skipped
    /// step does not count.
    fn numbers(&self, at: At, update: u64) -> Vec<f64> {
        let _ = (at, update);
        Vec::new()
    }

    /// The direction in which a parameter moves that is not left to AdamW, and its moments after the update.
    ///
    /// # Errors
    /// If an operation fails.
    fn direction(&self, param: &ParamUpdate<'_>) -> Result<Direction> {
        Err(Error::shape("optimizer", format!("no direction is stated for {}", param.spec.name)))
    }

    /// Upper bounds of the effect of an update on a parameter that is not left to AdamW. A step after which a number
    /// could be infinite is not taken. If this method is not implemented, no step is taken.
    fn reach(&self, param: &ParamSpec, at: At, update: u64) -> Reach {
        let _ = (param, at, update);
        Reach { memory: 1.0, share: 1.0, gain: 1.0, most: f64::INFINITY }
    }
}

/// One parameter at an update.
#[derive(Debug)]
pub struct ParamUpdate<'a> {
    /// Its name, shape and role.
    pub spec: &'a ParamSpec,
    /// The parameter before the update, in its own shape.
    pub weight: Tensor,
    /// Its gradient, clipped, in the same shape.
    pub gradient: Tensor,
    /// Its moments in the order of [`Optimizer::moments`], in the same shape.
    pub moments: Vec<Tensor>,
    /// What [`Optimizer::numbers`] gave for this update: tensors of rank 0.
    pub numbers: Vec<Tensor>,
    /// The type for matrix products: bf16 in a step on bf16 features, else that of the weights.
    pub products: DType,
}

/// Where a parameter goes.
#[derive(Debug)]
pub struct Direction {
    /// `weight -= lr direction`, beside the decay: as many elements as the parameter has.
    pub direction: Tensor,
    /// The moments after the update, in the order of [`Optimizer::moments`]; those that are left out at the end stay.
    pub moments: Vec<Tensor>,
}

/// Bounds of what an update does. With `m` the greatest size of a number of the first moment and `g` the length of the
/// gradient: afterwards `m' <= memory m + share g`, and no number of the direction is greater than `gain m' + most`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reach {
    /// What is kept of the first moment.
    pub memory: f64,
    /// What of the gradient goes into it.
    pub share: f64,
    /// What the first moment is multiplied by.
    pub gain: f64,
    /// What does not depend on it.
    pub most: f64,
}

impl Reach {
    /// That of AdamW at update number `update`, from 1.
    pub(crate) fn adamw(AdamW { beta1, eps, .. }: AdamW, update: u64) -> Self {
        // The product with the learning rate comes before the division, so a large `eps` bounds nothing by itself.
        let gain = 1.0 / ((1.0 - beta1.powf(update as f64)) * eps.min(1.0));
        Self { memory: beta1, share: 1.0 - beta1, gain, most: 0.0 }
    }
}
