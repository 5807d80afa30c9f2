//! The CUDA back end: one device, its memory, kernels, matrix products and recorded graphs.
//!
//! Built everywhere; libraries are looked for when a GPU is first asked for ([`Gpu::get`]). There is one compute stream:
//! work runs in the order in which it is given, so memory that a dropped tensor leaves can be used at once, and nothing
//! waits for events except at the copy boundary.
//!
//! An operation launches a kernel of its own source like this:
//!
//! ```no_run
//! use dinolab_core::cuda::args;
//! use dinolab_core::{cuda_source, Result, Tensor};
//!
//! cuda_source! { static DOUBLE = "double" {
//!     r#"
//!     template <class T> __device__ void twice(T* y, const T* x, size_t n) {
//!         size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
//!         if (i < n) y[i] = from_float<T>(2.0f * to_float(x[i]));
//!     }
//!     KERNEL(twice, (T* y, const T* x, size_t n), (y, x, n))
//!     "#
//! }}
//!
//! fn twice(x: &Tensor) -> Result<Tensor> {
//!     let gpu = x.gpu().expect("called for a tensor on a GPU");
//!     let mut y = Tensor::uninit(x.shape(), x.dtype());
//!     let n = x.len();
//!     gpu.kernel(&DOUBLE, "twice", x.dtype())?.over(n).launch(args![&mut y, x, n])?;
//!     Ok(y)
//! }
//! ```

mod arena;
mod blas;
mod buffer;
mod device;
mod graph;
mod kernels;
mod launch;
mod libraries;
mod place;
mod profile;
mod source;
mod staging;

use cudarc::driver::sys;

pub use arena::ArenaStats;
pub(crate) use blas::{with_tf32, WORKSPACE};
pub use blas::{Matrix, Product};
pub use device::{Gpu, GpuInfo};
pub use graph::Graph;
pub use launch::{Arg, Kernel, Launch};
pub use libraries::{libraries, missing_in_driver, Library};
pub use place::Device;
pub use source::{compile, sources, Compiled, Source, SourceRef};
pub use staging::Staging;

pub use crate::cuda_args as args;

pub(crate) use buffer::CudaBuffer;
pub(crate) use device::{in_step, lasting_scope, step_scope, unwind};

use crate::Error;

/// A driver call that failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    call: &'static str,
    result: sys::CUresult,
}

/// The result of a driver call by name.
pub(crate) fn check(call: &'static str, result: sys::CUresult) -> Result<(), Failure> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        result => Err(Failure { call, result }),
    }
}

impl Failure {
    pub(crate) fn is_out_of_memory(self) -> bool {
        self.result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        use sys::CUresult as R;
        let Failure { call, result } = failure;
        let text = cudarc::driver::DriverError(result);
        let text = text.error_string().map_or_else(|_| "unknown error".into(), |s| s.to_string_lossy().into_owned());
        let help = match result {
            R::CUDA_ERROR_NO_DEVICE | R::CUDA_ERROR_INVALID_DEVICE => {
                "`nvidia-smi` lists the GPUs; CUDA_VISIBLE_DEVICES may hide them; --device cpu runs without one"
            }
            R::CUDA_ERROR_ILLEGAL_ADDRESS | R::CUDA_ERROR_MISALIGNED_ADDRESS => {
                "a kernel reached outside its memory; run again with DINOLAB_CUDA_SYNC=1 and the message names it"
            }
            R::CUDA_ERROR_LAUNCH_FAILED => {
                "a kernel was stopped by the device: run again with DINOLAB_CUDA_SYNC=1 and the message names it; where it passes, \
                 `dmesg | grep Xid` tells what the driver saw (13: a fault in a kernel, 109: a switch between processes that hung, 43 alone: no more than this)"
            }
            R::CUDA_ERROR_OUT_OF_MEMORY => "lower batch.size, or raise batch.micro_batches",
            R::CUDA_ERROR_NO_BINARY_FOR_GPU | R::CUDA_ERROR_INVALID_PTX | R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
                "the driver is older than the CUDA libraries: update the driver"
            }
            R::CUDA_ERROR_SYSTEM_NOT_READY | R::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | R::CUDA_ERROR_UNKNOWN => {
                "the driver does not answer as it should: restart the machine, or reinstall the driver"
            }
            _ => "run `dinolab doctor`: it tries every part of the GPU engine alone",
        };
        Self::user(format!("the GPU failed: {call}: {text} ({result:?})"), help)
    }
}
