//! Parallel loops of CPU kernels.
//!
//! Work is cut into blocks by size alone, never by the number of threads, and partial results are combined in order,
//! so that a result does not depend on how many threads computed it. Bodies are compiled for the vector instructions
//! that the machine has (crate `pulp`).

use rayon::prelude::*;

use crate::tensor::Real;
use crate::{Result, Tensor};

/// Elements that one task handles: small enough to balance, large enough to hide the hand-over.
pub const BLOCK: usize = 16 * 1024;

/// Runs `f` compiled for the widest vector instructions of this machine; `f` and what it calls must be inlined into it.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
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
        simd(|| {
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
            simd(|| {
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
    let partial: Vec<T> = x
        .par_chunks(BLOCK)
        .map(|block| {
            simd(|| {
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
        })
        .collect();
    partial.into_iter().sum()
}

/// The sum of `f(a[i], b[i])` in 16 lanes of fixed order, so that it vectorises and is the same everywhere. To be called
/// inside [`simd`]; long rows are cut into chunks first, as a lane's rounding error grows with its length.
#[inline(always)]
pub fn lane_sum<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    debug_assert_eq!(a.len(), b.len(), "element-wise operands have equal length");
    let mut lanes = [T::ZERO; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: T = a16.remainder().iter().zip(b16.remainder()).map(|(&a, &b)| f(a, b)).sum();
    for (a, b) in a16.zip(b16) {
        for i in 0..16 {
            lanes[i] += f(a[i], b[i]);
        }
    }
    lanes.into_iter().sum::<T>() + rest
}

/// The greatest element, in 16 lanes. To be called inside [`simd`].
#[inline(always)]
pub fn lane_max<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::NEG_INF; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder().iter().fold(T::NEG_INF, |m, &x| m.max(x));
    for x in chunks {
        for i in 0..16 {
            lanes[i] = lanes[i].max(x[i]);
        }
    }
    lanes.into_iter().fold(rest, T::max)
}
