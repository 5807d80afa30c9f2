//! Blocks of memory of a device, and what is copied to and from them.

use std::ffi::c_void;
use std::sync::PoisonError;

use cudarc::driver::{result, sys};

use super::arena::Arena;
use super::device::{in_step, unwind};
use super::{check, Failure, Gpu};
use crate::scope;
use crate::{Error, Result};

/// A block of device memory that goes back to its arena when dropped.
#[derive(Debug)]
pub(crate) struct CudaBuffer {
    gpu: &'static Gpu,
    address: sys::CUdeviceptr,
    home: Home,
}

/// Where a block is from.
#[derive(Debug)]
enum Home {
    Arena {
        size: usize,
        in_step: bool,
    },
    /// Pinned host memory, which kernels read and write in place, over the bus.
    Host {
        bytes: usize,
    },
}

impl CudaBuffer {
    /// A block with unspecified content, from the arena of the thread's scope.
    ///
    /// A device that is full unwinds with the [`Error`] as payload (tensors are made by functions that cannot fail on a
    /// CPU); [`catch`](crate::tensor::catch_out_of_memory) turns it back into a result.
    pub(crate) fn new(gpu: &'static Gpu, bytes: usize) -> Self {
        gpu.bind();
        let in_step = in_step();
        match gpu.arena(in_step).take(bytes) {
            Ok((address, size)) => Self { gpu, address, home: Home::Arena { size, in_step } },
            Err(failure) => unwind(gpu.full(bytes, failure)),
        }
    }

    /// A block of zeros in pinned host memory. With unified addressing, which every 64-bit system has, its address on the host is its
    /// address on the device.
    ///
    /// # Errors
    /// If the system has not that much memory that can be pinned.
    pub(crate) fn zeros_on_host(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        gpu.bind();
        let mut at = std::ptr::null_mut();
        // SAFETY: an out-pointer to a local; the block is freed when this value is dropped. Fresh memory may be uninitialised.
        unsafe {
            check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut at, bytes.max(1), 0)).map_err(|failure| {
                let (size, why) = (crate::text::bytes(bytes as f64), Error::from(failure).problem());
                let problem = format!("the system gives no {size} of host memory that the GPU can read: {why}");
                let help = "set optimizer.offload and optimizer.offload_moments to false, or use a machine with more memory (`ulimit -l` \
                    may limit it too)";
                Error::user(problem, help)
            })?;
            at.cast::<u8>().write_bytes(0, bytes);
        }
        Ok(Self { gpu, address: at as u64, home: Home::Host { bytes } })
    }

    /// The content of a block in host memory, once the device has done all that it was given.
    ///
    /// # Errors
    /// If that work failed.
    pub(crate) fn on_host(&self) -> Result<Option<&[u8]>> {
        let Home::Host { bytes } = self.home else { return Ok(None) };
        self.gpu.synchronize()?;
        // SAFETY: `bytes` initialised bytes, which nothing writes before the device is given more work, with this value borrowed.
        Ok(Some(unsafe { std::slice::from_raw_parts(self.address as *const u8, bytes) }))
    }

    /// As [`on_host`](Self::on_host), to be written.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn on_host_mut(&mut self) -> Result<Option<&mut [u8]>> {
        let Home::Host { bytes } = self.home else { return Ok(None) };
        self.gpu.synchronize()?;
        // SAFETY: as above, and `&mut self` is exclusive.
        Ok(Some(unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, bytes) }))
    }

    pub(crate) fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    pub(crate) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        match self.home {
            Home::Arena { size, in_step } => self.gpu.arena(in_step).give(self.address, size),
            Home::Host { .. } => {
                self.gpu.bind();
                let _ = self.gpu.synchronize();
                // SAFETY: allocated in `zeros_on_host`, freed once, and the device is done with it.
                unsafe { sys::cuMemFreeHost(self.address as *mut c_void) };
            }
        }
    }
}

/// Pinned memory by way of which the host's numbers go up. Of pageable memory CUDA does not say that an asynchronous copy has
/// read it when the call returns.
pub(super) struct Pinned {
    at: *mut c_void,
    used: usize,
}

impl Default for Pinned {
    fn default() -> Self {
        Self { at: std::ptr::null_mut(), used: 0 }
    }
}

// SAFETY: only the holder of the lock around it writes to the memory.
unsafe impl Send for Pinned {}

/// Bytes of it.
const PINNED: usize = 1 << 20;

impl Gpu {
    fn arena(&self, step: bool) -> &Arena {
        if step {
            &self.step
        } else {
            &self.lasting
        }
    }

    /// What to say when there is no room for `bytes`.
    fn full(&self, bytes: usize, failure: Failure) -> Error {
        if !failure.is_out_of_memory() {
            return failure.into();
        }
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let free = result::mem_get_info().map_or(0, |(free, _)| free);
        let [lasting, step] = self.memory();
        let asked_by = match scope::current() {
            scope if scope.is_empty() => String::new(),
            scope => format!(" for {scope}"),
        };
        Error::user(
            format!(
                "GPU {} is full: {:.2} GiB were asked{asked_by}, {:.2} GiB are free; weights and their like hold {:.2} \
                 GiB, the step {:.2} GiB",
                self.ordinal(),
                gib(bytes),
                gib(free),
                gib(lasting.live),
                gib(step.live)
            ),
            "raise batch.micro_batches, set backbone.checkpointing = \"full\", or lower batch.size; \
             `dinolab recipe check --cost` tells beforehand",
        )
    }

    /// Copies host bytes to the device, before all work given later. The bytes may be gone when the call returns.
    pub(crate) fn upload(&self, to: sys::CUdeviceptr, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind();
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        for (to, part) in (to..).step_by(PINNED).zip(bytes.chunks(PINNED)) {
            // SAFETY: the caller owns the block at `to`; what is copied lies in pinned memory, which is written again when
            // the stream has done all copies from it, and never freed.
            unsafe {
                if pinned.at.is_null() {
                    check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut pinned.at, PINNED, 0))?;
                }
                if pinned.used + part.len() > PINNED {
                    check("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream()))?;
                    pinned.used = 0;
                }
                let from = pinned.at.cast::<u8>().add(pinned.used);
                from.copy_from_nonoverlapping(part.as_ptr(), part.len());
                let copy = sys::cuMemcpyHtoDAsync_v2(to, from.cast(), part.len(), self.stream());
                check("cuMemcpyHtoDAsync", copy)?;
            }
            pinned.used += part.len().next_multiple_of(16);
        }
        Ok(())
    }

    /// Waits for all work, and copies device bytes to the host.
    pub(crate) fn download(&self, bytes: &mut [u8], from: sys::CUdeviceptr) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller holds the block at `from`; the copy is complete after the synchronisation.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), from, bytes.len(), self.stream()) };
        check("cuMemcpyDtoHAsync", result)?;
        self.synchronize()
    }

    /// Copies within the device.
    pub(crate) fn copy(&self, to: sys::CUdeviceptr, from: sys::CUdeviceptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller holds both blocks.
        Ok(check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream()) })?)
    }

    /// Sets bytes to zero.
    pub(crate) fn zero(&self, at: sys::CUdeviceptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller owns the block.
        Ok(check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(at, 0, bytes, self.stream()) })?)
    }
}
