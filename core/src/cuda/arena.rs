//! Device memory: a reserved range of addresses that is backed with memory as it fills, and its blocks.
//!
//! All work goes to one stream, so a block that is dropped may be handed out again at once: whoever gets it is later in
//! the stream. The range only grows; addresses that a recorded graph knows stay valid.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use super::{check, Failure};

/// Blocks begin at multiples of this many bytes: what cuBLASLt's fastest kernels ask for.
const ALIGN: usize = 256;
/// Memory is backed in pieces of this size, so that growing is rare.
const PIECE: usize = 64 << 20;
/// The granularity of the driver's memory.
const LEAST: usize = 2 << 20;

/// Exact accounting of one arena, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaStats {
    /// In live blocks.
    pub live: usize,
    /// The most that was ever live since the start or the last reset.
    pub peak: usize,
    /// Backed with device memory.
    pub mapped: usize,
    /// How often the driver was asked for memory.
    pub growths: usize,
}

/// Which bytes of a growing range are free: best fit, neighbours merged.
#[derive(Debug, Default)]
struct Blocks {
    by_offset: BTreeMap<usize, usize>,
    by_size: BTreeSet<(usize, usize)>,
    end: usize,
}

impl Blocks {
    fn insert(&mut self, offset: usize, size: usize) {
        self.by_offset.insert(offset, size);
        self.by_size.insert((size, offset));
    }

    fn remove(&mut self, offset: usize) -> usize {
        let size = self.by_offset.remove(&offset).expect("a free block is known by its offset");
        self.by_size.remove(&(size, offset));
        size
    }

    /// The smallest free block that is large enough, cut to size.
    fn take(&mut self, size: usize) -> Option<usize> {
        let &(found, offset) = self.by_size.range((size, 0)..).next()?;
        self.remove(offset);
        if found > size {
            self.insert(offset + size, found - size);
        }
        Some(offset)
    }

    fn give(&mut self, mut offset: usize, mut size: usize) {
        if let Some((&before, &len)) = self.by_offset.range(..offset).next_back() {
            if before + len == offset {
                self.remove(before);
                (offset, size) = (before, len + size);
            }
        }
        if self.by_offset.contains_key(&(offset + size)) {
            size += self.remove(offset + size);
        }
        self.insert(offset, size);
    }

    /// How many bytes more at the end would make room for `size`.
    fn missing(&self, size: usize) -> usize {
        let tail = self.by_offset.iter().next_back().filter(|(o, s)| *o + *s == self.end).map_or(0, |(_, &s)| s);
        size - tail.min(size)
    }

    fn grow(&mut self, by: usize) {
        let end = self.end;
        self.end += by;
        self.give(end, by);
    }
}

#[derive(Default)]
struct State {
    blocks: Blocks,
    stats: ArenaStats,
}

/// A range of device addresses and what of it is in use.
pub(super) struct Arena {
    base: sys::CUdeviceptr,
    /// Addresses that may be backed.
    reserved: usize,
    ordinal: i32,
    state: Mutex<State>,
}

impl Arena {
    /// Reserves `bytes` of addresses on the current device; nothing is backed yet.
    pub(super) fn new(ordinal: usize, bytes: usize) -> Result<Self, Failure> {
        let reserved = bytes.div_ceil(PIECE) * PIECE;
        let mut base = 0;
        // SAFETY: an out-pointer to a local.
        check("cuMemAddressReserve", unsafe { sys::cuMemAddressReserve(&mut base, reserved, 0, 0, 0) })?;
        Ok(Self { base, reserved, ordinal: ordinal as i32, state: Mutex::default() })
    }

    /// A block of at least `bytes`; its address, and its true size for [`give`](Self::give).
    pub(super) fn take(&self, bytes: usize) -> Result<(sys::CUdeviceptr, usize), Failure> {
        let size = bytes.max(1).div_ceil(ALIGN) * ALIGN;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = match state.blocks.take(size) {
            Some(offset) => offset,
            None => {
                let (missing, end) = (state.blocks.missing(size), state.blocks.end);
                let mut more = missing.next_multiple_of(PIECE);
                if self.back(end, more).is_err() {
                    // A device that is nearly full may have room for what is needed and no more.
                    more = missing.next_multiple_of(LEAST);
                    self.back(end, more)?;
                }
                state.blocks.grow(more);
                state.stats.mapped += more;
                state.stats.growths += 1;
                state.blocks.take(size).expect("the range was grown to fit")
            }
        };
        state.stats.live += size;
        state.stats.peak = state.stats.peak.max(state.stats.live);
        Ok((self.base + offset as u64, size))
    }

    /// Takes a block back.
    pub(super) fn give(&self, address: sys::CUdeviceptr, size: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.blocks.give((address - self.base) as usize, size);
        state.stats.live -= size;
    }

    pub(super) fn stats(&self) -> ArenaStats {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stats
    }

    pub(super) fn reset_peak(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.stats.peak = state.stats.live;
    }

    /// Backs `bytes` from `offset` with memory of the device.
    fn back(&self, offset: usize, bytes: usize) -> Result<(), Failure> {
        if offset + bytes > self.reserved {
            return Err(Failure { call: "cuMemCreate", result: sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY });
        }
        let location =
            sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.ordinal };
        // SAFETY: the struct is plain data for which zeros are the defaults.
        let mut prop: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        prop.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location = location;
        let access =
            sys::CUmemAccessDesc { location, flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
        let at = self.base + offset as u64;
        let mut handle = 0;
        // SAFETY: the range lies inside the reservation and is not backed yet; the handle may be released once mapped.
        unsafe {
            check("cuMemCreate", sys::cuMemCreate(&mut handle, bytes, &prop, 0))?;
            let mapped = check("cuMemMap", sys::cuMemMap(at, bytes, 0, handle, 0));
            check("cuMemRelease", sys::cuMemRelease(handle))?;
            mapped?;
            let opened = check("cuMemSetAccess", sys::cuMemSetAccess(at, bytes, &access, 1));
            if opened.is_err() {
                // Else the range could not be backed at another try.
                check("cuMemUnmap", sys::cuMemUnmap(at, bytes))?;
            }
            opened
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Blocks;

    #[test]
    fn freed_neighbours_merge_and_the_best_fit_is_taken() {
        let mut blocks = Blocks::default();
        blocks.grow(1000);
        let offsets: Vec<usize> = [100, 200, 300, 400].map(|size| blocks.take(size).unwrap()).into();
        assert_eq!(offsets, [0, 100, 300, 600]);
        assert_eq!(blocks.take(1), None);
        blocks.give(0, 100);
        blocks.give(300, 300);
        assert_eq!(blocks.take(90), Some(0), "the smaller hole fits better");
        blocks.give(100, 200);
        assert_eq!(blocks.take(500), Some(90), "what was left of the hole and its freed neighbours are one");
        assert_eq!(blocks.missing(50), 50, "the end is in use");
    }

    #[test]
    fn whatever_the_order_all_memory_comes_back_in_one_piece() {
        let mut blocks = Blocks::default();
        blocks.grow(64 * 100);
        let mut taken: Vec<usize> = (0..100).map(|_| blocks.take(64).unwrap()).collect();
        taken.sort_by_key(|o| (o / 64 * 37) % 101);
        taken.into_iter().for_each(|offset| blocks.give(offset, 64));
        assert_eq!(blocks.by_offset.into_iter().collect::<Vec<_>>(), [(0, 6400)]);
    }
}
