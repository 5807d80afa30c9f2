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

mod adamw;
mod attention;
mod broadcast;
mod depthwise_conv;
mod descend;
mod eight_bit;
mod elementwise;
mod entropy;
mod index_add;
mod l2_normalize;
mod layer_norm;
mod linear;
mod matmul;
mod neighbours;
mod patchify;
mod recompute;
mod reduce;
mod resample;
mod shape;
mod similarity;
mod sinkhorn_knopp;
mod soft_cross_entropy;
mod softmax;
mod softmax_centering;
mod swiglu;
mod tiles;
mod tokens;
mod transpose;

pub use adamw::{adamw_step, ema_update, l2_norm, AdamW, Ema, Group, Moments};
pub use attention::Segment;
pub use eight_bit::{adamw_step_8bit, EightBit, Map, MixedMoments, Place};
pub use linear::Linear;
pub use neighbours::neighbour_group;
pub use similarity::{NegativeRemoval, SimilarityOptions};
pub use tokens::rows_of_images;

pub(crate) use adamw::{adamw_part, square_sums, FromElement, PartMoments, ADAMW, NORM_BLOCK};
pub(crate) use attention::attention_kernels;
pub(crate) use descend::{descend, write_range};
pub(crate) use eight_bit::{adamw_part_8bit, BLOCK as EIGHT_BIT_BLOCK};
pub(crate) use elementwise::copy_if;
pub(crate) use entropy::row_entropies;

use crate::tensor::{Grads, Real};
use crate::{Error, Result, Tensor};

/// Fails unless all operands have the type of the first.
pub(crate) fn same_dtype(op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    match inputs.iter().find(|x| x.dtype() != inputs[0].dtype()) {
        Some(other) => Err(Error::shape(op, format!("operands are {:?} and {:?}", inputs[0].dtype(), other.dtype()))),
        None => Ok(()),
    }
}

/// Fails unless scalars, weights of rows and statistics have the type that they have beside `features`: f32 for bf16.
pub(crate) fn scalars_of(op: &'static str, features: &Tensor, scalars: &[&Tensor]) -> Result<()> {
    let wanted = features.dtype().wide();
    match scalars.iter().find(|x| x.dtype() != wanted) {
        Some(other) => {
            let problem =
                format!("{:?} operands beside {:?} features: expected {wanted:?}", other.dtype(), features.dtype());
            Err(Error::shape(op, problem))
        }
        None => Ok(()),
    }
}

/// Lets `f(place, add)` write, or add to, the gradient of input `i` (of `len` elements) where a pass computes more than
/// that gradient: if the input is not tracked, the place is memory that nobody reads.
pub(crate) fn with_grad<T: Real>(
    grads: &mut Grads<'_>,
    i: usize,
    len: usize,
    f: impl FnOnce(&mut [T], bool),
) -> Result<()> {
    if !grads.needs(i) {
        f(Tensor::uninit(&[len], T::DTYPE).as_mut_slice(), false);
        return Ok(());
    }
    grads.accumulate(i, |mut place| {
        let add = place.add;
        f(place.as_mut_slice(), add);
        Ok(())
    })
}
