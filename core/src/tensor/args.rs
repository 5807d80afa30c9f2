//! Tensors as arguments of kernels and matrix products.

use crate::cuda::{Arg, Matrix};
use crate::{DType, Result};

use super::{GradMut, Grads, Tensor};

/// A tensor that is read: its address.
impl From<&Tensor> for Arg {
    fn from(tensor: &Tensor) -> Self {
        Self::plain(tensor.device_address())
    }
}

/// A tensor that may be missing: its address, or a null pointer.
impl From<Option<&Tensor>> for Arg {
    fn from(tensor: Option<&Tensor>) -> Self {
        Self::plain(tensor.map_or(0, Tensor::device_address))
    }
}

/// A tensor that is written: its address.
///
/// # Panics
/// If its buffer is shared: only a tensor that was just made is written to.
impl From<&mut Tensor> for Arg {
    fn from(tensor: &mut Tensor) -> Self {
        assert!(tensor.is_unique(), "only an unshared tensor is written to");
        Self::plain(tensor.device_address())
    }
}

/// A gradient that is written or added to: the kernel's `Gradient`.
impl From<&mut GradMut<'_>> for Arg {
    fn from(grad: &mut GradMut<'_>) -> Self {
        let (at, dtype) = grad.device_place();
        Self::plain([at, u64::from(dtype == DType::BF16) | u64::from(grad.add) << 32])
    }
}

/// A whole tensor as a gradient that is overwritten.
impl Arg {
    /// The kernel's `Gradient` that overwrites `tensor`.
    pub fn gradient(tensor: &mut Tensor) -> Self {
        assert!(tensor.is_unique(), "only an unshared tensor is written to");
        Self::plain([tensor.device_address(), u64::from(tensor.dtype() == DType::BF16)])
    }

    /// The kernel's `Gradient` for an input of an operation, if there is one and it is tracked, to be filled by the next
    /// launch.
    pub(crate) fn gradient_of(grads: &mut Grads<'_>, input: impl Into<Option<usize>>) -> Result<Self> {
        let mut arg = Self::no_gradient();
        if let Some(input) = input.into() {
            grads.accumulate(input, |mut place| {
                arg = Self::from(&mut place);
                Ok(())
            })?;
        }
        Ok(arg)
    }

    /// The kernel's `Gradient` that nobody asked for: a null pointer.
    pub fn no_gradient() -> Self {
        Self::plain([0u64; 2])
    }
}

impl Matrix {
    /// A dense `rows x cols` matrix at the start of `tensor`, the first of a batch of dense ones.
    pub fn of(tensor: &Tensor, rows: usize, cols: usize) -> Self {
        Self::at(tensor.device_address(), tensor.dtype(), rows, cols)
    }
}
