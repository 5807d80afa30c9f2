//! Tensors: dynamic rank, row-major, contiguous, with a reverse-mode [`tape`].
//!
//! A [`Tensor`] is a cheap handle to a shared, read-only buffer. Operations live in [`crate::ops`] as methods, but for
//! [`cast`](Tensor::cast), which the tape needs itself; each computes its result at once and, when an operand is tracked by a
//! [`Tape`], records itself for the backward pass.
//! A tensor made from untracked operands is untracked, so a teacher runs without a tape by being given plain weights.

mod args;
mod cast;
mod device;
mod kernels;
mod math;
mod real;
mod storage;
pub mod tape;
mod watch;

use std::fmt;
use std::sync::Arc;

pub(crate) use device::{cannot_record, copy_elements, recording};
pub use device::{catch_out_of_memory, is_recording};
pub use kernels::parallel;
pub(crate) use kernels::{blocks, columns, greatest};
pub use real::{Element, Real};
pub use storage::{memory_stats, reset_peak, trim, MemoryStats};
pub use tape::{GradMut, Grads, LeafGrads, Op, Tape};
pub(crate) use tape::{ParamGrads, Slot};
pub use watch::first_non_finite;

use crate::cuda::{CudaBuffer, Gpu};
use crate::{cuda, DType, Device, Error, Result};
use storage::Buffer;

/// A dense, row-major, contiguous array; rank 0 is a scalar.
#[derive(Clone)]
pub struct Tensor {
    buffer: Arc<Buffer>,
    /// In elements.
    offset: usize,
    shape: Vec<usize>,
    dtype: DType,
    var: Option<tape::Var>,
}

/// Calls `$body` with `$T` bound to `f32` or `f64`, whichever the dtype is; other types are an error of `$op`.
#[macro_export]
macro_rules! dispatch_real {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::Error::shape($op, format!("not implemented for {other:?} on the CPU"))),
        }
    };
}

impl Tensor {
    /// A tensor with unspecified content, to be filled by the caller. Tensors are made where the operation that makes
    /// them runs: on the device of its inputs; outside operations in host memory, in a step on the run's device.
    pub fn uninit(shape: &[usize], dtype: DType) -> Self {
        let len: usize = shape.iter().product();
        let buffer = Arc::new(Buffer::new(len * dtype.size()));
        Self { buffer, offset: 0, shape: shape.to_vec(), dtype, var: None }
    }

    /// All elements zero.
    pub fn zeros(shape: &[usize], dtype: DType) -> Self {
        let mut out = Self::uninit(shape, dtype);
        out.fill_zero();
        out
    }

    /// The same of a GPU, in pinned host memory, which its kernels read and write in place.
    ///
    /// # Errors
    /// If there is not that much of it.
    pub(crate) fn zeros_beside(gpu: &'static Gpu, shape: &[usize], dtype: DType) -> Result<Self> {
        let len: usize = shape.iter().product();
        let buffer = Arc::new(Buffer::Cuda(CudaBuffer::zeros_on_host(gpu, len * dtype.size())?));
        Ok(Self { buffer, offset: 0, shape: shape.to_vec(), dtype, var: None })
    }

    /// All elements `value`.
    pub fn full(shape: &[usize], dtype: DType, value: f64) -> Result<Self> {
        let mut out = Self::uninit(shape, dtype);
        if out.gpu().is_some() {
            kernels::fill(&mut out, value)?;
            return Ok(out);
        }
        dispatch_real!("full", dtype, T => {
            out.as_mut_slice::<T>().fill(T::of(value));
            Ok(out)
        })
    }

    /// A rank-0 tensor.
    pub fn scalar(value: f64, dtype: DType) -> Self {
        Self::full(&[], dtype, value).expect("scalars are made in a real type")
    }

    /// A copy of `data`, in its own type.
    ///
    /// # Errors
    /// If the lengths differ.
    pub fn from_slice<T: Element>(data: &[T], shape: &[usize]) -> Result<Self> {
        if data.len() != shape.iter().product::<usize>() {
            return Err(Error::shape("from_slice", format!("{} elements cannot have shape {shape:?}", data.len())));
        }
        if let Device::Cuda(_) = Device::current() {
            return device::constant(bytemuck::cast_slice(data), shape, T::DTYPE);
        }
        let mut out = Self::uninit(shape, T::DTYPE);
        out.as_mut_slice().copy_from_slice(data);
        Ok(out)
    }

    /// `data` converted to `dtype` (a real type).
    pub fn from_f64(data: &[f64], shape: &[usize], dtype: DType) -> Result<Self> {
        let here = Device::current();
        let host = here.leave(|| Self::from_slice(data, shape)?.cast(dtype))?;
        match here {
            Device::Cpu => Ok(host),
            Device::Cuda(_) => device::constant(host.as_bytes(), shape, dtype),
        }
    }

    /// The lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The length of axis `axis`.
    pub fn dim(&self, axis: usize) -> usize {
        self.shape[axis]
    }

    /// The length of the last axis (1 for a scalar).
    pub fn last_dim(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the elements are.
    pub fn device(&self) -> Device {
        self.buffer.device()
    }

    /// Whether a tape follows this tensor.
    pub fn is_tracked(&self) -> bool {
        self.var.is_some()
    }

    /// The same values, out of sight of the tape: PyTorch's `detach`.
    pub fn detach(&self) -> Self {
        Self { var: None, ..self.clone() }
    }

    /// The elements.
    ///
    /// # Panics
    /// If `T` is not the tensor's type (kernels dispatch on it first), or the tensor is on a GPU.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "kernels dispatch on the dtype before they look at the data");
        bytemuck::cast_slice(self.as_bytes())
    }

    /// The elements, to be written.
    ///
    /// # Panics
    /// If `T` is not the tensor's type, or the buffer is shared: only a tensor that was just made, or the sole owner of
    /// flat parameters, is written to.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "kernels dispatch on the dtype before they look at the data");
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// The raw bytes, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let size = self.dtype.size();
        let range = self.offset * size..(self.offset + self.len()) * size;
        let buffer = Arc::get_mut(&mut self.buffer).expect("only an unshared tensor is written to");
        &mut buffer.host_mut().bytes_mut()[range]
    }

    /// Sets all elements to zero.
    ///
    /// # Panics
    /// If the buffer is shared.
    pub fn fill_zero(&mut self) {
        match self.gpu() {
            Some(gpu) => {
                assert!(self.is_unique(), "only an unshared tensor is written to");
                if let Err(error) = gpu.zero(self.device_address(), self.len() * self.dtype.size()) {
                    cuda::unwind(error);
                }
            }
            None => self.bytes_mut().fill(0),
        }
    }

    /// Overwrites all elements with those of a tensor of the same length and type.
    ///
    /// # Errors
    /// If length or type differ.
    pub fn copy_from(&mut self, source: &Tensor) -> Result<()> {
        if source.len() != self.len() || source.dtype != self.dtype {
            let problem = format!("{:?} {:?} into {:?} {:?}", source.shape, source.dtype, self.shape, self.dtype);
            return Err(Error::shape("copy_from", problem));
        }
        device::copy(self, source)
    }

    /// Whether this handle is the only one to its buffer, so that a kernel may write the result in place.
    pub fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.buffer).is_some()
    }

    /// The same node of the tape, in a buffer that no other handle shares: this one's, or a copy.
    pub(crate) fn into_unique(mut self) -> Self {
        if self.is_unique() {
            return self;
        }
        Self { var: self.var.clone(), ..self.to_owned() }
    }

    /// An untracked copy in a buffer of its own.
    #[allow(clippy::should_implement_trait)]
    pub fn to_owned(&self) -> Self {
        let _on = self.device().enter();
        let mut own = Self::uninit(&self.shape, self.dtype);
        if let Err(error) = device::copy(&mut own, self) {
            cuda::unwind(error);
        }
        own
    }

    /// The elements widened to f64 (real types): for logs, tests and files, never inside a step.
    pub fn to_f64_vec(&self) -> Vec<f64> {
        if self.gpu().is_some() {
            return self.to(Device::Cpu).to_f64_vec();
        }
        match self.dtype {
            DType::F32 => self.as_slice::<f32>().iter().map(|&x| f64::from(x)).collect(),
            DType::F64 => self.as_slice::<f64>().to_vec(),
            DType::BF16 => self.as_slice::<half::bf16>().iter().map(|x| x.to_f64()).collect(),
            DType::U32 => self.as_slice::<u32>().iter().map(|&x| f64::from(x)).collect(),
        }
    }

    /// The value of a one-element tensor.
    ///
    /// # Panics
    /// If there is not exactly one element.
    pub fn item(&self) -> f64 {
        assert_eq!(self.len(), 1, "item() is for one-element tensors, this has shape {:?}", self.shape);
        self.to_f64_vec()[0]
    }

    /// The raw little-endian bytes, for files.
    ///
    /// # Panics
    /// If the tensor is on a GPU.
    pub fn as_bytes(&self) -> &[u8] {
        let size = self.dtype.size();
        &self.buffer.host().bytes()[self.offset * size..(self.offset + self.len()) * size]
    }

    /// BLAKE3 of its shape and elements: equal bytes of another shape are another tensor.
    ///
    /// # Panics
    /// If the tensor is on a GPU.
    pub fn hash(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        hash.update(format!("{:?}", self.shape()).as_bytes()).update(self.as_bytes());
        hash.finalize().into()
    }

    /// An untracked view of `len` elements from `start` with another shape: how a named parameter looks into its flat
    /// buffer.
    ///
    /// # Panics
    /// If the range is out of bounds: layouts are computed, not given.
    pub fn view(&self, start: usize, shape: &[usize]) -> Self {
        let len: usize = shape.iter().product();
        assert!(start + len <= self.len(), "view {start}+{len} of {} elements", self.len());
        Self { offset: self.offset + start, shape: shape.to_vec(), var: None, ..self.clone() }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?}, {:?}", self.shape, self.dtype)?;
        if self.len() <= 8 {
            write!(f, ", {:?}", self.to_f64_vec())?;
        }
        write!(f, ")")
    }
}
