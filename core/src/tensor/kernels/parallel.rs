//! Parallel loops of CPU kernels.
//!
//! Work is cut into blocks by size alone, never by the number of threads, and partial results are combined in order,
//! so that a result does not depend on how many threads computed it. Bodies are compiled for the vector instructions
//! that the machine has (crate `pulp`).

use super::blocks::*;
use crate::tensor::Real;
use crate::{Result, Tensor};

pub use super::blocks::Parts;

/// Elements that one task handles: small enough to balance, large enough to hide the hand-over.
pub const BLOCK: usize = 16 * 1024;

/// Rows of `width` elements that one task handles, by the same rule.
pub fn rows_per_task(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}

/// Evaluates an expression compiled for the widest vector instructions of this machine: `simd!(T, { .. })`, where `T` is
/// the type that is computed with.
///
/// Only code that is inlined profits. Calls of a few lines are; a closure with a long body, handed to
/// [`zip_mut`](crate::tensor::parallel::zip_mut) and the like, needs `#[inline(always)]`.
#[macro_export]
macro_rules! simd {
    ($T:ty, $body:expr) => {
        $crate::tensor::parallel::dispatch_for::<$T, _>(
            #[inline(always)]
            || $body,
        )
    };
}

/// What [`simd!`](crate::simd) calls: [`dispatch`], but in f64, which is for checks, what every machine has is enough. The
/// numbers are the same, and a third less is compiled.
#[inline(always)]
pub fn dispatch_for<T, R>(f: impl FnOnce() -> R) -> R {
    if const { size_of::<T>() == size_of::<f64>() } {
        f()
    } else {
        dispatch(f)
    }
}

/// Calls a function compiled for the widest vector instructions of this machine. Without an inlined closure there is no gain.
#[inline(always)]
pub fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    struct Run<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Run<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Run(f))
}

/// `f(&mut dst[i], src[i])` for all i.
pub fn zip_mut<D: Send, S: Copy + Sync>(dst: &mut [D], src: &[S], f: impl Fn(&mut D, S) + Sync) {
    debug_assert_eq!(dst.len(), src.len(), "element-wise operands have equal length");
    dst.par_chunks_mut(BLOCK).zip(src.par_chunks(BLOCK)).for_each(|(dst, src)| {
        simd!(D, {
            for (d, &s) in dst.iter_mut().zip(src) {
                f(d, s);
            }
        });
    });
}

/// `f(x[i])` for all i, in a new tensor of the same shape.
pub fn map<T: Real>(x: &Tensor, f: impl Fn(T) -> T + Sync) -> Result<Tensor> {
    let mut out = Tensor::uninit(x.shape(), x.dtype());
    zip_mut(out.as_mut_slice::<T>(), x.as_slice::<T>(), |y, x| *y = f(x));
    Ok(out)
}

/// `f(x[i], y[i])` for all i, in a new tensor of the shape of `x`.
pub fn map2<T: Real>(x: &Tensor, y: &Tensor, f: impl Fn(T, T) -> T + Sync) -> Result<Tensor> {
    let mut out = Tensor::uninit(x.shape(), x.dtype());
    let chunks = out.as_mut_slice::<T>().par_chunks_mut(BLOCK);
    chunks.zip(x.as_slice::<T>().par_chunks(BLOCK)).zip(y.as_slice::<T>().par_chunks(BLOCK)).for_each(
        |((out, x), y)| {
            simd!(T, {
                for ((o, &x), &y) in out.iter_mut().zip(x).zip(y) {
                    *o = f(x, y);
                }
            });
        },
    );
    Ok(out)
}

/// The sum of `f(x[i])` over blocks, blocks in order: the same on any number of threads.
pub fn sum<T: Real>(x: &[T], f: impl Fn(T) -> T + Sync) -> T {
    let partial = x.par_chunks(BLOCK).map_to_vec(|block| {
        simd!(T, {
            // Independent lanes, so that the loop vectorises; their order is fixed.
            let mut lanes = [T::ZERO; 16];
            let mut chunks = block.chunks_exact(16);
            for chunk in &mut chunks {
                for (lane, &x) in lanes.iter_mut().zip(chunk) {
                    *lane += f(x);
                }
            }
            let rest: T = chunks.remainder().iter().map(|&x| f(x)).sum();
            lanes.into_iter().sum::<T>() + rest
        })
    });
    partial.into_iter().sum()
}

/// `f` of every element. The standard library's `map` is a call, and no loop around it vectorises.
#[inline(always)]
pub fn map_array<T: Copy, R: Copy + Default, const N: usize>(of: [T; N], f: impl Fn(T) -> R) -> [R; N] {
    let mut results = [R::default(); N];
    for i in 0..N {
        results[i] = f(of[i]);
    }
    results
}

/// The sum over i of `f([a[i], b[i], ..])`: 16 lanes in a fixed order, so that it vectorises and is the same everywhere.
#[inline(always)]
pub fn lane_sum<T: Real, const N: usize>(of: [&[T]; N], f: impl Fn([T; N]) -> T) -> T {
    const LANES: usize = 16;
    let mut lanes = [T::ZERO; LANES];
    let count = of[0].len() / LANES;
    let blocks = map_array(of, |x| &x.as_chunks::<LANES>().0[..count]);
    for block in 0..count {
        for i in 0..LANES {
            lanes[i] += f(map_array(blocks, |x| x[block][i]));
        }
    }
    for i in 0..of[0].len() % LANES {
        lanes[i] += f(map_array(of, |x| x[count * LANES + i]));
    }
    // Halving keeps the sum short and vectorised.
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// The greatest element, or negative infinity if there is none.
#[inline(always)]
pub fn lane_max<T: Real>(x: &[T]) -> T {
    const LANES: usize = 16;
    let mut lanes = [T::NEG_INF; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] = block[i].max(lanes[i]);
        }
    }
    for i in 0..rest.len() {
        lanes[i] = rest[i].max(lanes[i]);
    }
    let mut greatest = T::NEG_INF;
    for lane in lanes {
        greatest = greatest.max(lane);
    }
    greatest
}

/// Runs `f` on `len` elements of memory that belongs to this thread and is used again by the next call; their content
/// is unspecified.
pub fn with_scratch<T: Real, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    /// A cache line, for alignment.
    #[repr(C, align(64))]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Line([u64; 8]);
    thread_local! {
        static SCRATCH: std::cell::Cell<Vec<Line>> = const { std::cell::Cell::new(Vec::new()) };
    }
    // Taken out while in use: a call from inside `f` finds none and makes its own.
    let mut lines = SCRATCH.take();
    let needed = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    if lines.len() < needed {
        lines.resize(needed, Line([0; 8]));
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut lines)[..len]);
    SCRATCH.set(lines);
    result
}
