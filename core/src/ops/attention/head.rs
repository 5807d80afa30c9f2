//! The work of one image and head.

use std::ops::Range;

use crate::ops::matmul::{product, Mat, Threads};
use crate::simd;
use crate::tensor::parallel::{lane_max, lane_sum, with_scratch, Parts};
use crate::tensor::Real;

/// One head of one image: its place in the packed rows, and its positions.
pub(super) struct Head<'a, T> {
    /// `[T, 3 width]`.
    pub qkv: &'a [T],
    /// D.
    pub width: usize,
    /// D / H.
    pub d: usize,
    /// Where the head begins in a row of D.
    pub column: usize,
    /// The image's first row.
    pub row: usize,
    pub tokens: usize,
    /// Tokens before the patches.
    pub prefix: usize,
    /// Sine and cosine, `[P, d]`.
    pub rotary: Option<(&'a [T], &'a [T])>,
    /// `[P, P]`.
    pub bias: Option<&'a [T]>,
}

/// The three parts of a packed row.
#[derive(Clone, Copy)]
enum Which {
    Query,
    Key,
    Value,
}

/// Scores held at a time: query rows are taken in blocks, so that the scores stay in the cache.
const SCORES: usize = 1 << 17;
/// Query rows in a block, however long the rows: fewer make slow products.
const MIN_ROWS: usize = 64;

impl<T: Real> Head<'_, T> {
    /// Writes the head's columns of `out` (`[T, D]`) and the logarithm of each row's normaliser.
    pub(super) fn forward(&self, out: &Parts<'_, T>, log_sum: &mut [T]) {
        let (n, d, block) = (self.tokens, self.d, self.block());
        with_scratch(2 * n * d + block * (n + d + 1), |scratch| {
            let (q, rest) = scratch.split_at_mut(n * d);
            let (k, rest) = rest.split_at_mut(n * d);
            let (scores, rest) = rest.split_at_mut(block * n);
            let (values, sums) = rest.split_at_mut(block * d);
            self.load(q, k);
            for rows in self.blocks() {
                let scores = &mut scores[..rows.len() * n];
                self.scores(q, k, rows.clone(), scores);
                simd!(T, {
                    for (i, s) in scores.chunks_exact_mut(n).enumerate() {
                        let max = lane_max(s);
                        s.iter_mut().for_each(|s| *s = (*s - max).exp());
                        sums[i] = lane_sum([s], |[s]| s);
                        log_sum[rows.start + i] = max + sums[i].ln();
                    }
                });
                let weights = Mat::new(scores, rows.len(), n);
                product(values, d, false, T::ONE, weights, self.packed(Which::Value), Threads::One);
                simd!(T, {
                    for (i, row) in rows.enumerate() {
                        // SAFETY: these columns of these rows belong to this head alone.
                        let out = unsafe { out.part((self.row + row) * self.width + self.column, d) };
                        scaled(out, &values[i * d..], T::ONE / sums[i]);
                    }
                });
            }
        });
    }

    /// Writes the head's columns of `dqkv` (`[T, 3D]`), and adds to `dbias` (`[P, P]`).
    pub(super) fn backward(
        &self,
        dy: &[T],
        out: &[T],
        log_sum: &[T],
        dqkv: &Parts<'_, T>,
        mut dbias: Option<&mut [T]>,
    ) {
        let (n, d, block) = (self.tokens, self.d, self.block());
        with_scratch(4 * n * d + block * (2 * n + d), |scratch| {
            let (q, rest) = scratch.split_at_mut(n * d);
            let (k, rest) = rest.split_at_mut(n * d);
            let (dk, rest) = rest.split_at_mut(n * d);
            let (dv, rest) = rest.split_at_mut(n * d);
            let (p, rest) = rest.split_at_mut(block * n);
            let (ds, dq) = rest.split_at_mut(block * n);
            self.load(q, k);
            for rows in self.blocks() {
                let (add, len) = (rows.start > 0, rows.len());
                let (p, ds) = (&mut p[..len * n], &mut ds[..len * n]);
                let of_head = |x: &'_ [T], row: usize| (self.row + row) * self.width + self.column..x.len();
                let dy_block = Mat { row_stride: self.width, ..Mat::new(&dy[of_head(dy, rows.start)], len, d) };
                self.scores(q, k, rows.clone(), p);
                product(ds, n, false, T::ONE, dy_block, self.packed(Which::Value).t(), Threads::One);
                simd!(T, {
                    for (i, p) in p.chunks_exact_mut(n).enumerate() {
                        let (row, ds) = (rows.start + i, &mut ds[i * n..][..n]);
                        let (dy, out) = (&dy[of_head(dy, row)][..d], &out[of_head(out, row)][..d]);
                        let delta = lane_sum([dy, out], |[dy, out]| dy * out);
                        let log_sum = log_sum[row];
                        for i in 0..n {
                            p[i] = (p[i] - log_sum).exp();
                            ds[i] = p[i] * (ds[i] - delta);
                        }
                    }
                });
                if let Some(dbias) = dbias.as_deref_mut() {
                    self.add_dbias(ds, rows.clone(), dbias);
                }
                let (p, ds) = (Mat::new(p, len, n), Mat::new(ds, len, n));
                let q_block = Mat::new(&q[rows.start * d..], len, d);
                product(dv, d, add, T::ONE, p.t(), dy_block, Threads::One);
                product(dk, d, add, T::ONE, ds.t(), q_block, Threads::One);
                product(dq, d, false, T::ONE, ds, Mat::new(k, n, d), Threads::One);
                self.store(dqkv, Which::Query, rows, self.scale(), dq);
            }
            // Queries were scaled when they were loaded, so dk is scaled already.
            self.store(dqkv, Which::Key, 0..n, T::ONE, dk);
            self.store(dqkv, Which::Value, 0..n, T::ONE, dv);
        });
    }

    fn scale(&self) -> T {
        T::of(1.0 / (self.d as f64).sqrt())
    }

    /// Query rows in a block, depending on sizes alone.
    fn block(&self) -> usize {
        let blocks = self.tokens.div_ceil((SCORES / self.tokens.max(1)).max(MIN_ROWS));
        self.tokens.div_ceil(blocks.max(1))
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let (n, block) = (self.tokens, self.block());
        (0..n).step_by(block.max(1)).map(move |start| start..(start + block).min(n))
    }

    /// Where `which` of token `row` begins in the packed rows.
    #[inline(always)]
    fn place(&self, which: Which, row: usize) -> usize {
        (self.row + row) * 3 * self.width + which as usize * self.width + self.column
    }

    /// `which` of all tokens, where it lies.
    fn packed(&self, which: Which) -> Mat<'_, T> {
        let data = &self.qkv[self.place(which, 0)..];
        Mat { row_stride: 3 * self.width, ..Mat::new(data, self.tokens, self.d) }
    }

    /// The sines and cosines of token `row`, if it is rotated.
    #[inline(always)]
    fn angles(&self, row: usize) -> Option<(&[T], &[T])> {
        let (sin, cos) = self.rotary?;
        let patch = row.checked_sub(self.prefix)?;
        Some((&sin[patch * self.d..][..self.d], &cos[patch * self.d..][..self.d]))
    }

    /// Queries, rotated and scaled, and keys, rotated.
    fn load(&self, q: &mut [T], k: &mut [T]) {
        let (d, half) = (self.d, self.d / 2);
        simd!(T, {
            for (which, scale, to) in [(Which::Query, self.scale(), q), (Which::Key, T::ONE, k)] {
                for (row, to) in to.chunks_exact_mut(d).enumerate() {
                    let from = &self.qkv[self.place(which, row)..][..d];
                    match self.angles(row) {
                        Some((sin, cos)) => rotate(to, from, cos, sin.split_at(half), [scale, scale]),
                        None => scaled(to, from, scale),
                    }
                }
            }
        });
    }

    /// The transpose of [`load`](Self::load): gradients of rotated rows to gradients of packed ones.
    fn store(&self, dqkv: &Parts<'_, T>, which: Which, rows: Range<usize>, scale: T, from: &[T]) {
        let (d, half) = (self.d, self.d / 2);
        simd!(T, {
            for (i, row) in rows.enumerate() {
                let from = &from[i * d..][..d];
                // SAFETY: these columns of these rows belong to this head alone.
                let to = unsafe { dqkv.part(self.place(which, row), d) };
                let angles = if let Which::Value = which { None } else { self.angles(row) };
                match angles {
                    Some((sin, cos)) => {
                        let (sin_a, sin_b) = sin.split_at(half);
                        rotate(to, from, cos, (sin_b, sin_a), [scale, -scale]);
                    }
                    None => scaled(to, from, scale),
                }
            }
        });
    }

    /// The scores of a block of queries with all keys, bias included.
    fn scores(&self, q: &[T], k: &[T], rows: Range<usize>, scores: &mut [T]) {
        let (n, d, prefix) = (self.tokens, self.d, self.prefix);
        let q = Mat::new(&q[rows.start * d..], rows.len(), d);
        product(scores, n, false, T::ONE, q, Mat::new(k, n, d).t(), Threads::One);
        if let Some(bias) = self.bias {
            simd!(T, {
                for (row, scores) in rows.zip(scores.chunks_exact_mut(n)) {
                    let Some(patch) = row.checked_sub(prefix) else { continue };
                    let bias = &bias[patch * (n - prefix)..];
                    scores[prefix..].iter_mut().zip(bias).for_each(|(s, &b)| *s += b);
                }
            });
        }
    }

    fn add_dbias(&self, ds: &[T], rows: Range<usize>, dbias: &mut [T]) {
        let (n, prefix) = (self.tokens, self.prefix);
        simd!(T, {
            for (row, ds) in rows.zip(ds.chunks_exact(n)) {
                let Some(patch) = row.checked_sub(prefix) else { continue };
                let dbias = &mut dbias[patch * (n - prefix)..];
                dbias.iter_mut().zip(&ds[prefix..]).for_each(|(db, &ds)| *db += ds);
            }
        });
    }
}

/// `to = scale from`.
#[inline(always)]
fn scaled<T: Real>(to: &mut [T], from: &[T], scale: T) {
    let from = &from[..to.len()];
    for i in 0..to.len() {
        to[i] = from[i] * scale;
    }
}

/// A row `[a, b]` of two halves to `[a cos_a c - b sin_a s, b cos_b c + a sin_b s]`: `x cos + rotate_half(x) sin` for
/// `c = s = 1`, and its transpose when the halves of the sines change places and s is -1.
#[inline(always)]
fn rotate<T: Real>(to: &mut [T], from: &[T], cos: &[T], (sin_a, sin_b): (&[T], &[T]), [c, s]: [T; 2]) {
    let half = sin_a.len();
    let ((a, b), (cos_a, cos_b)) = (from.split_at(half), cos.split_at(half));
    let (to_a, to_b) = to.split_at_mut(half);
    let ([b, cos_a, cos_b, sin_b], to_b) =
        ([&b[..half], &cos_a[..half], &cos_b[..half], &sin_b[..half]], &mut to_b[..half]);
    for i in 0..half {
        to_a[i] = a[i] * cos_a[i] * c - b[i] * sin_a[i] * s;
        to_b[i] = b[i] * cos_b[i] * c + a[i] * sin_b[i] * s;
    }
}
