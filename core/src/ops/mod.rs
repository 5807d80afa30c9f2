//! Operations on tensors: one file an operation, each with its formula, derivative, shapes and CPU kernel.
//!
//! They are methods of [`Tensor`], so that a loss reads like its formula:
//!
//! ```
//! use dinolab_core::Tensor;
//!
//! let x = Tensor::from_slice(&[3.0f32, 4.0, 0.0, 2.0], &[2, 2])?;
//! let unit = x.l2_normalize(1e-12)?;
//! assert_eq!(unit.square()?.sum()?.item(), 2.0);
//! # Ok::<(), dinolab_core::Error>(())
//! ```
//!
//! Kernels are generic over `f32` and `f64`. Every reduction has a fixed order, so results do not depend on the number
//! of threads.

pub mod parallel;

mod adamw;
mod broadcast;
mod elementwise;
mod gram_loss;
mod koleo;
mod l2_normalize;
mod linear;
mod matmul;
mod reduce;
mod resample;
mod shape;
mod sinkhorn_knopp;
mod soft_cross_entropy;
mod softmax_centering;
mod transpose;

pub use adamw::{adamw_step, ema_update, l2_norm, AdamW, Ema, Group, Moments};
pub use gram_loss::{GramOptions, NegativeRemoval};

use crate::{Error, Result, Tensor};

/// Fails unless all operands have the type of the first.
pub(crate) fn same_dtype(op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    match inputs.iter().find(|x| x.dtype() != inputs[0].dtype()) {
        Some(other) => Err(Error::shape(op, format!("operands are {:?} and {:?}", inputs[0].dtype(), other.dtype()))),
        None => Ok(()),
    }
}
