//! The copy boundary: pinned host memory, and device memory that it is copied to beside the compute stream.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::{check, Failure, Gpu};
use crate::Result;

/// A block of pinned host memory with one as large on the device, and a stream that copies from one to the other while
/// the compute stream works. It goes round: write [`host`](Self::host), [`send`](Self::send), [`receive`](Self::receive)
/// the address, give work that reads it, [`release`](Self::release). The first two may be done by another thread than
/// the last two.
///
/// Its memory is not the arena's: a block of the arena may be handed out while the compute stream still uses it for
/// something else, which another stream does not wait for.
#[derive(Debug)]
pub struct Staging {
    gpu: &'static Gpu,
    stream: sys::CUstream,
    /// When the copy is done: the device's content is complete, the host's may be overwritten.
    filled: sys::CUevent,
    /// When the work that reads the device's content is done.
    drained: sys::CUevent,
    host: *mut c_void,
    device: sys::CUdeviceptr,
    capacity: usize,
    used: usize,
}

// SAFETY: the driver's handles may be used from any thread with their context bound; the host memory belongs to this
// value alone.
unsafe impl Send for Staging {}

impl Staging {
    /// Without memory yet.
    ///
    /// # Errors
    /// If the driver gives no stream or events.
    pub fn new(gpu: &'static Gpu) -> Result<Self> {
        gpu.bind();
        let (mut stream, mut events) = (std::ptr::null_mut(), [std::ptr::null_mut(); 2]);
        // SAFETY: out-pointers to locals.
        unsafe {
            let kind = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("cuStreamCreate", sys::cuStreamCreate(&mut stream, kind))?;
            for event in &mut events {
                let kind = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                check("cuEventCreate", sys::cuEventCreate(event, kind))?;
            }
        }
        let [filled, drained] = events;
        Ok(Self { gpu, stream, filled, drained, host: std::ptr::null_mut(), device: 0, capacity: 0, used: 0 })
    }

    /// Room for `bytes` in host memory, content unspecified. Waits until what was there before is copied.
    ///
    /// # Errors
    /// If the driver gives no memory, or work given before failed.
    pub fn host(&mut self, bytes: usize) -> Result<&mut [u8]> {
        self.gpu.bind();
        // SAFETY: the event is alive; one that was never recorded counts as reached.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.filled) })?;
        if bytes > self.capacity {
            self.free()?;
            // Some room to grow: images differ in size from step to step.
            let capacity = (bytes + bytes / 4).next_multiple_of(1 << 20);
            // SAFETY: out-pointers to fields; both blocks are freed in `free`.
            unsafe {
                check("cuMemAlloc", sys::cuMemAlloc_v2(&mut self.device, capacity))?;
                check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut self.host, capacity, 0))?;
                // Fresh memory may be uninitialised, which a slice must not be.
                self.host.cast::<u8>().write_bytes(0, capacity);
            }
            self.capacity = capacity;
        }
        self.used = bytes;
        if bytes == 0 {
            return Ok(&mut []);
        }
        // SAFETY: `capacity >= bytes` initialised bytes that only this value points to.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.host.cast(), bytes) })
    }

    /// Starts the copy of what was written, behind the work that reads what was there before.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn send(&mut self) -> Result<()> {
        self.gpu.bind();
        // SAFETY: stream and events are alive; both blocks hold `used` bytes until the copy is waited for.
        unsafe {
            check("cuStreamWaitEvent", sys::cuStreamWaitEvent(self.stream, self.drained, 0))?;
            if self.used > 0 {
                let copy = sys::cuMemcpyHtoDAsync_v2(self.device, self.host, self.used, self.stream);
                check("cuMemcpyHtoDAsync", copy)?;
            }
            check("cuEventRecord", sys::cuEventRecord(self.filled, self.stream))?;
        }
        Ok(())
    }

    /// The address of the copy, for work given from now on: the compute stream waits for it, the host does not.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn receive(&self) -> Result<u64> {
        // SAFETY: stream and event are alive.
        let waits = unsafe { sys::cuStreamWaitEvent(self.gpu.stream(), self.filled, 0) };
        check("cuStreamWaitEvent", waits)?;
        Ok(self.device)
    }

    /// Says that the work given so far is all that reads the copy.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn release(&mut self) -> Result<()> {
        // SAFETY: stream and event are alive.
        let recorded = unsafe { sys::cuEventRecord(self.drained, self.gpu.stream()) };
        Ok(check("cuEventRecord", recorded)?)
    }

    /// Gives the memory back, once nothing uses it.
    fn free(&mut self) -> Result<(), Failure> {
        self.gpu.bind();
        self.capacity = 0;
        // SAFETY: both events are alive; behind them nothing uses the blocks, which are freed once.
        unsafe {
            check("cuEventSynchronize", sys::cuEventSynchronize(self.filled))?;
            check("cuEventSynchronize", sys::cuEventSynchronize(self.drained))?;
            let (host, device) =
                (std::mem::replace(&mut self.host, std::ptr::null_mut()), std::mem::take(&mut self.device));
            if !host.is_null() {
                check("cuMemFreeHost", sys::cuMemFreeHost(host))?;
            }
            if device != 0 {
                check("cuMemFree", sys::cuMemFree_v2(device))?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A device that failed cannot be tidied up; the failure was reported where it was met.
        let _ = self.free();
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.filled);
            let _ = sys::cuEventDestroy_v2(self.drained);
            let _ = sys::cuStreamDestroy_v2(self.stream);
        }
    }
}
