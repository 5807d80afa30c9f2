//! Pinned host memory that kernels read and write in place, over the bus.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::{check, Gpu};
use crate::{Error, Result};

/// A block of pinned host memory. With unified addressing, which every 64-bit system has, its address on the host is its address
/// on the device.
#[derive(Debug)]
pub(crate) struct Pinned {
    gpu: &'static Gpu,
    at: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone; the host looks at it only behind all work of the device.
unsafe impl Send for Pinned {}
// SAFETY: as above, and the host writes it only through `&mut`.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` zeros.
    ///
    /// # Errors
    /// If the system has not that much memory that can be pinned.
    pub(crate) fn zeros(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        gpu.bind();
        let mut at = std::ptr::null_mut();
        // SAFETY: an out-pointer to a local; the block is freed when this value is dropped. Fresh memory may be uninitialised.
        unsafe {
            check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut at, bytes.max(1), 0)).map_err(|failure| {
                let (size, why) = (crate::text::bytes(bytes as f64), Error::from(failure).problem());
                let problem = format!("the system gives no {size} of host memory that the GPU can read: {why}");
                Error::user(
                    problem,
                    "set optimizer.offload = false, or use a machine with more memory (`ulimit -l` may limit it too)",
                )
            })?;
            at.cast::<u8>().write_bytes(0, bytes);
        }
        Ok(Self { gpu, at, bytes })
    }

    /// For kernels.
    pub(crate) fn address(&self) -> u64 {
        self.at as u64
    }

    /// The content, once the device has done all that it was given.
    ///
    /// # Errors
    /// If that work failed.
    pub(crate) fn bytes(&self) -> Result<&[u8]> {
        self.gpu.synchronize()?;
        // SAFETY: `bytes` initialised bytes, which nothing writes before the device is given more work, with this value borrowed.
        Ok(unsafe { std::slice::from_raw_parts(self.at.cast(), self.bytes) })
    }

    /// As [`bytes`](Self::bytes), to be written.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        self.gpu.synchronize()?;
        // SAFETY: as in `bytes`, and `&mut self` is exclusive.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.gpu.bind();
        let _ = self.gpu.synchronize();
        // SAFETY: allocated in `zeros`, freed once, and the device is done with it.
        unsafe { sys::cuMemFreeHost(self.at) };
    }
}
