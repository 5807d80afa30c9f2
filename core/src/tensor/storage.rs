//! Where tensors' bytes live, and how they are reused from step to step.
//!
//! A buffer that is dropped goes back to a pool of its size class; the next allocation of that class takes it. After
//! the first step of a training run every allocation is served from the pool, so a step asks the system for nothing,
//! and the peak is known exactly.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::Device;
use crate::cuda::CudaBuffer;

/// Bytes are aligned to a cache line, which is also the widest vector register.
const ALIGN: usize = 64;

/// Host or device memory of one tensor and its views.
#[derive(Debug)]
pub(crate) enum Buffer {
    Cpu(CpuBuffer),
    Cuda(CudaBuffer),
}

impl Buffer {
    /// On the thread's current device; unspecified content.
    pub(crate) fn new(bytes: usize) -> Self {
        match Device::current().gpu() {
            None => Self::Cpu(CpuBuffer::new(bytes)),
            Some(gpu) => Self::Cuda(CudaBuffer::new(gpu, bytes)),
        }
    }

    pub(crate) fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            Self::Cuda(buffer) => Device::Cuda(buffer.gpu().ordinal()),
        }
    }

    /// The host memory.
    ///
    /// # Panics
    /// If it is on a device.
    pub(crate) fn host(&self) -> &CpuBuffer {
        match self {
            Self::Cpu(buffer) => buffer,
            Self::Cuda(_) => panic!("a tensor on a GPU is looked at after `to(Device::Cpu)`, or by a kernel"),
        }
    }

    /// As [`host`](Self::host).
    pub(crate) fn host_mut(&mut self) -> &mut CpuBuffer {
        match self {
            Self::Cpu(buffer) => buffer,
            Self::Cuda(_) => panic!("a tensor on a GPU is written by a kernel"),
        }
    }
}

/// A block of host memory that returns to the pool when dropped.
#[derive(Debug)]
pub(crate) struct CpuBuffer {
    ptr: *mut u8,
    class: usize,
    bytes: usize,
}

// SAFETY: the buffer is plain memory owned by this value; sharing rules are enforced by `Tensor` (a shared buffer is
// read-only, a unique one may be written).
unsafe impl Send for CpuBuffer {}
// SAFETY: as above.
unsafe impl Sync for CpuBuffer {}

#[derive(Default)]
struct Pool {
    free: BTreeMap<usize, Vec<usize>>,
    stats: MemoryStats,
}

/// Exact accounting of host tensor memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// In live tensors.
    pub live: usize,
    /// The most that was ever live since the start or the last [`reset_peak`].
    pub peak: usize,
    /// Taken from the system: live and pooled.
    pub reserved: usize,
    /// How often the system was asked.
    pub system_allocations: usize,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

fn with_pool<R>(f: impl FnOnce(&mut Pool) -> R) -> R {
    // A panic while the lock is held leaves the pool consistent: every field is updated before anything can fail.
    let mut guard = POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    f(guard.get_or_insert_with(Pool::default))
}

/// Memory held by host tensors now, and at its peak.
pub fn memory_stats() -> MemoryStats {
    with_pool(|p| p.stats)
}

/// Starts a new measurement of the peak.
pub fn reset_peak() {
    with_pool(|p| p.stats.peak = p.stats.live);
}

/// Size classes: eight steps to each power of two, at least one cache line; at most 12.5% is lost.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGN);
    let step = (bytes.next_power_of_two() / 16).max(ALIGN);
    bytes.div_ceil(step) * step
}

impl CpuBuffer {
    /// A buffer whose content is unspecified (but initialised memory: zeros, or what an earlier owner left).
    pub(crate) fn new(bytes: usize) -> Self {
        let class = size_class(bytes);
        let pooled = with_pool(|p| {
            let pooled = p.free.get_mut(&class).and_then(Vec::pop);
            p.stats.live += class;
            p.stats.peak = p.stats.peak.max(p.stats.live);
            if pooled.is_none() {
                p.stats.reserved += class;
                p.stats.system_allocations += 1;
            }
            pooled
        });
        let ptr = match pooled {
            Some(address) => address as *mut u8,
            None => {
                let layout = std::alloc::Layout::from_size_align(class, ALIGN).expect("class is a multiple of ALIGN");
                // SAFETY: the layout has a non-zero size.
                let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
                if ptr.is_null() {
                    std::alloc::handle_alloc_error(layout);
                }
                ptr
            }
        };
        Self { ptr, class, bytes }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `class >= bytes` initialised bytes for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        with_pool(|p| {
            p.free.entry(self.class).or_default().push(self.ptr as usize);
            p.stats.live -= self.class;
        });
    }
}

/// Gives pooled memory back to the system.
pub fn trim() {
    let freed = with_pool(|p| {
        let freed = std::mem::take(&mut p.free);
        p.stats.reserved -= freed.iter().map(|(class, list)| class * list.len()).sum::<usize>();
        freed
    });
    for (class, list) in freed {
        let layout = std::alloc::Layout::from_size_align(class, ALIGN).expect("class is a multiple of ALIGN");
        for address in list {
            // SAFETY: allocated in `CpuBuffer::new` with this layout, and in no live buffer.
            unsafe { std::alloc::dealloc(address as *mut u8, layout) };
        }
    }
}
