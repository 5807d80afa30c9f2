//! Parallel iteration over blocks of slices: what `rayon`'s iterators do, compiled once.
//!
//! A loop over `rayon`'s own iterators brings its scheduler into the program once more for every loop, element type and
//! combination of operands, which was a fifth of what was compiled of this crate. Here all loops share one, and pay a call
//! through a pointer for every block. The methods have `rayon`'s names and meaning.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::iter::{IntoParallelIterator, ParallelIterator};

/// Calls `f` for ranges of `at_once` numbers that cover `0..count`, on all threads.
fn run(count: usize, at_once: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    let ranges = (0..count.div_ceil(at_once)).into_par_iter();
    ranges.for_each(|i| f(i * at_once..count.min((i + 1) * at_once)));
}

/// Pieces of work, by number.
///
/// # Safety
/// `piece` may be called on any thread, and pieces of different numbers may be alive at the same time.
pub(crate) unsafe trait Blocks: Sync + Sized {
    /// What a task works on.
    type Piece;

    /// How many there are.
    fn count(&self) -> usize;

    /// How many one task takes.
    fn at_once(&self) -> usize {
        1
    }

    /// Piece `i`.
    ///
    /// # Safety
    /// `i` is less than [`count`](Self::count), and no other piece of this number is alive.
    unsafe fn piece(&self, i: usize) -> Self::Piece;

    /// With each piece that of the same number of `other`; as many as the shorter of both has.
    fn zip<B: Blocks>(self, other: B) -> Zip<Self, B> {
        Zip(self, other)
    }

    /// With each piece its number.
    fn enumerate(self) -> Zip<Numbers, Self> {
        Zip(Numbers(self.count()), self)
    }

    /// `count` pieces a task, for pieces that are small.
    fn with_min_len(self, count: usize) -> MinLen<Self> {
        MinLen { blocks: self, count: count.max(1) }
    }

    /// Calls `f` for every piece.
    fn for_each(self, f: impl Fn(Self::Piece) + Sync) {
        // SAFETY: `run` gives every number below `count` once.
        run(self.count(), self.at_once(), &|range| range.for_each(|i| f(unsafe { self.piece(i) })));
    }

    /// `f` of every piece, in order.
    fn map_to_vec<R: Send>(self, f: impl Fn(Self::Piece) -> R + Sync) -> Vec<R> {
        let mut results: Vec<MaybeUninit<R>> = (0..self.count()).map(|_| MaybeUninit::uninit()).collect();
        results.par_iter_mut().zip(self).for_each(|(result, piece)| _ = result.write(f(piece)));
        // SAFETY: all are written; a panic of `f` does not come here, and then they are forgotten.
        results.into_iter().map(|result| unsafe { result.assume_init() }).collect()
    }
}

/// The numbers from 0 on.
pub(crate) struct Numbers(pub(crate) usize);

// SAFETY: numbers are shared with nobody.
unsafe impl Blocks for Numbers {
    type Piece = usize;

    fn count(&self) -> usize {
        self.0
    }

    #[inline(always)]
    unsafe fn piece(&self, i: usize) -> usize {
        i
    }
}

/// Two pieces of the same number.
pub(crate) struct Zip<A, B>(A, B);

// SAFETY: as safe as both.
unsafe impl<A: Blocks, B: Blocks> Blocks for Zip<A, B> {
    type Piece = (A::Piece, B::Piece);

    fn count(&self) -> usize {
        self.0.count().min(self.1.count())
    }

    fn at_once(&self) -> usize {
        self.0.at_once().max(self.1.at_once())
    }

    #[inline(always)]
    unsafe fn piece(&self, i: usize) -> Self::Piece {
        // SAFETY: the caller's promise.
        unsafe { (self.0.piece(i), self.1.piece(i)) }
    }
}

/// Several pieces a task.
pub(crate) struct MinLen<A> {
    blocks: A,
    count: usize,
}

// SAFETY: as safe as its blocks.
unsafe impl<A: Blocks> Blocks for MinLen<A> {
    type Piece = A::Piece;

    fn count(&self) -> usize {
        self.blocks.count()
    }

    fn at_once(&self) -> usize {
        self.count
    }

    #[inline(always)]
    unsafe fn piece(&self, i: usize) -> A::Piece {
        // SAFETY: the caller's promise.
        unsafe { self.blocks.piece(i) }
    }
}

/// Blocks of a slice; the last may be shorter.
pub(crate) struct Chunks<'a, T> {
    slice: &'a [T],
    size: usize,
}

// SAFETY: shared references to what is `Sync`.
unsafe impl<'a, T: Sync> Blocks for Chunks<'a, T> {
    type Piece = &'a [T];

    fn count(&self) -> usize {
        self.slice.len().div_ceil(self.size)
    }

    #[inline(always)]
    unsafe fn piece(&self, i: usize) -> &'a [T] {
        &self.slice[i * self.size..self.slice.len().min((i + 1) * self.size)]
    }
}

/// The elements of a slice.
pub(crate) struct Elements<'a, T>(&'a [T]);

// SAFETY: shared references to what is `Sync`.
unsafe impl<'a, T: Sync> Blocks for Elements<'a, T> {
    type Piece = &'a T;

    fn count(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    unsafe fn piece(&self, i: usize) -> &'a T {
        &self.0[i]
    }
}

/// Blocks of a slice, to be written; the last may be shorter.
pub(crate) struct ChunksMut<'a, T> {
    parts: Parts<'a, T>,
    size: usize,
}

// SAFETY: blocks of different numbers do not overlap, and `T` is `Send`.
unsafe impl<'a, T: Send> Blocks for ChunksMut<'a, T> {
    type Piece = &'a mut [T];

    fn count(&self) -> usize {
        self.parts.len.div_ceil(self.size)
    }

    #[inline(always)]
    unsafe fn piece(&self, i: usize) -> &'a mut [T] {
        let start = i * self.size;
        // SAFETY: the caller has no other piece of this number.
        unsafe { self.parts.part(start, self.size.min(self.parts.len - start)) }
    }
}

/// The elements of a slice, to be written.
pub(crate) struct ElementsMut<'a, T>(Parts<'a, T>);

// SAFETY: elements of different numbers do not overlap, and `T` is `Send`.
unsafe impl<'a, T: Send> Blocks for ElementsMut<'a, T> {
    type Piece = &'a mut T;

    fn count(&self) -> usize {
        self.0.len
    }

    #[inline(always)]
    unsafe fn piece(&self, i: usize) -> &'a mut T {
        // SAFETY: the caller has no other piece of this number.
        unsafe { &mut self.0.part(i, 1)[0] }
    }
}

/// Slices in blocks.
pub(crate) trait InBlocks<T> {
    /// Blocks of `size` elements, which is not 0.
    fn par_chunks(&self, size: usize) -> Chunks<'_, T>;
    /// Blocks of `size` elements, which is not 0, to be written.
    fn par_chunks_mut(&mut self, size: usize) -> ChunksMut<'_, T>;
    /// Its elements.
    fn par_iter(&self) -> Elements<'_, T>;
    /// Its elements, to be written.
    fn par_iter_mut(&mut self) -> ElementsMut<'_, T>;
}

impl<T> InBlocks<T> for [T] {
    fn par_chunks(&self, size: usize) -> Chunks<'_, T> {
        assert!(size > 0, "a block is not empty");
        Chunks { slice: self, size }
    }

    fn par_chunks_mut(&mut self, size: usize) -> ChunksMut<'_, T> {
        assert!(size > 0, "a block is not empty");
        ChunksMut { parts: Parts::new(self), size }
    }

    fn par_iter(&self) -> Elements<'_, T> {
        Elements(self)
    }

    fn par_iter_mut(&mut self) -> ElementsMut<'_, T> {
        ElementsMut(Parts::new(self))
    }
}

/// A slice whose parts are written by several tasks, when the parts are not whole blocks of it (columns of a matrix).
pub struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: only hands out parts that the caller of `part` promises to be disjoint, as `split_at_mut` would.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    /// All of `whole`.
    pub fn new(whole: &'a mut [T]) -> Self {
        Self { start: whole.as_mut_ptr(), len: whole.len(), life: std::marker::PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other part that is alive at the same time may overlap this one.
    ///
    /// # Panics
    /// If the part is out of bounds.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part lies inside the whole");
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_in_one_block_of_its_number() {
        for (len, size) in [(0, 3), (1, 1), (7, 3), (1000, 7), (64, 64), (5, 9)] {
            let x: Vec<usize> = (0..len).collect();
            let mut y = vec![usize::MAX; len];
            y.par_chunks_mut(size).zip(x.par_chunks(size)).enumerate().for_each(|(block, (y, x))| {
                assert!(x.iter().all(|x| x / size == block));
                y.copy_from_slice(x);
            });
            assert_eq!(y, x);
            y.par_iter_mut().zip(x.par_iter()).with_min_len(16).for_each(|(y, x)| *y += 2 * x);
            assert_eq!(Numbers(len).map_to_vec(|i| y[i]), (0..len).map(|i| 3 * i).collect::<Vec<_>>());
        }
    }

    #[test]
    fn zipped_blocks_end_with_the_shorter() {
        let sums = [1, 2, 3].par_iter().zip([10, 20].par_iter()).map_to_vec(|(a, b)| a + b);
        assert_eq!(sums, [11, 22]);
    }
}
