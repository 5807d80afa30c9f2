//! Sinkhorn-Knopp: teacher logits to assignments that use every prototype equally.

use std::ops::Range;

use crate::comm::Shards;
use crate::cuda::{args, Arg, Gpu, Launch};
use crate::ops::scalars_of;
use crate::ops::softmax::block_of;
use crate::tensor::blocks::*;
use crate::tensor::parallel::{lane_max, lane_sum};
use crate::tensor::Real;
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static SINKHORN = "sinkhorn_knopp" {
    include_str!("log_sum.cuh"), include_str!("sinkhorn_knopp.cu")
} }

impl Tensor {
    /// Assignments of samples to prototypes (SwAV, Caron et al., arXiv:2006.09882; DINOv2, arXiv:2304.07193): logits
    /// `[B, K]` to `[B, K]`, rows sum to 1. No gradient.
    ///
    /// `Q = exp(self / temperature)`, then `iterations` times: every prototype is divided by its sum over the samples
    /// of all `shards`, every sample by its sum over the prototypes. (The reference also divides by sum(Q), K and B and
    /// multiplies by B; in exact numbers these cancel.) `temperature` has rank 0; it is f32 beside bf16 logits.
    ///
    /// The exponentials are taken relative to the greatest logit of each prototype, then of each sample; the first
    /// cancels in the first division and the second is put back as the sample's first factor. The result is that of
    /// the formula, and no prototype or sample can underflow to zero or overflow, however far apart the logits are and
    /// however many iterations there are.
    ///
    /// # Errors
    /// If the shape is not `[B, K]` with at least one column and, over all shards, one row, or `iterations` is 0.
    pub fn sinkhorn_knopp(&self, temperature: &Tensor, iterations: usize, shards: &Shards<'_>) -> Result<Tensor> {
        scalars_of("sinkhorn_knopp", self, &[temperature])?;
        let misshapen = self.rank() != 2 || self.last_dim() == 0 || temperature.len() != 1 || iterations == 0;
        if misshapen || shards.all_rows(self.dim(0))? == 0 {
            let problem = format!(
                "logits {:?}, temperature {:?}, {iterations} iterations: expected [B, K], a scalar, at least one",
                self.shape(),
                temperature.shape()
            );
            return Err(Error::shape("sinkhorn_knopp", problem));
        }
        if let Some(gpu) = self.gpu() {
            let _on = self.device().enter();
            return OnGpu::new(gpu, self, temperature, shards)?.run(iterations);
        }
        dispatch_real!("sinkhorn_knopp", self.dtype(), T => sinkhorn_knopp::<T>(self, temperature, iterations, shards))
    }
}

/// Columns that go through the cache together.
const CHUNK: usize = 2048;
/// Tasks that the samples are dealt to; each has sums over the prototypes of its own.
const TASKS: usize = 16;
/// Factors of prototypes are within 1 / `REACH` and `REACH`, 2^40: products of three such numbers fit into f32.
const REACH: f64 = (1u64 << 40) as f64;

/// With Q fixed, only the factors u (prototypes) and v (samples) change: u_k = 1 / sum_b Q_bk v_b, and
/// v_b = 1 / sum_k Q_bk u_k. One pass over a row gives v_b and its part of the next u.
///
/// Factors grow without bound: all by K / B an iteration, and those of some prototypes against those of others where
/// samples cannot be spread evenly. Before they leave what the type holds, their logarithms are moved into the
/// exponents of Q, which is made again (Schmitzer, arXiv:1610.06519), and they begin at 1.
fn sinkhorn_knopp<T: Real>(
    logits: &Tensor,
    temperature: &Tensor,
    iterations: usize,
    shards: &Shards<'_>,
) -> Result<Tensor> {
    let (samples, k) = (logits.dim(0), logits.dim(1));
    let x = logits.as_slice::<T>();
    let scale = T::ONE / temperature.as_slice::<T>()[0];
    let top = shards.max(column_max::<T>(logits))?;
    let top = top.as_slice::<T>();
    // What was moved from the factors: ln u.
    let mut moved: Option<Vec<T>> = None;

    let mut out = Tensor::uninit(logits.shape(), logits.dtype());
    let q = out.as_mut_slice::<T>();
    let ranges = shards.ranges(samples)?;
    // The first factors v undo the shift by the greatest logit of each sample.
    let mut factors = prototype_factors(q, k, &ranges, shards, |sample, q, sums: &mut [T]| {
        let v = exponentials(q, &x[sample * k..], top, scale, None).exp();
        q.iter().zip(sums).for_each(|(&q, sum)| *sum += q * v);
    })?;
    for _ in 1..iterations {
        let u = factors;
        let within = |u: &T| (1.0 / REACH..REACH).contains(&u.f64());
        if u.iter().all(within) {
            factors = prototype_factors(q, k, &ranges, shards, |_, q, sums: &mut [T]| {
                let v = sample_factor(q, &u);
                sums.iter_mut().zip(q).for_each(|(sum, &mut q)| *sum += q * v);
            })?;
            continue;
        }
        let all = moved.get_or_insert_with(|| vec![T::ZERO; k]);
        all.iter_mut().zip(&u).for_each(|(ln, &u)| *ln += T::of(u.f64().ln()));
        // A factor that all prototypes have in common changes nothing.
        let most = all.iter().fold(T::NEG_INF, |most, &ln| most.max(ln));
        all.iter_mut().for_each(|ln| *ln -= most);
        let all = &*all;
        factors = prototype_factors(q, k, &ranges, shards, |sample, q, sums: &mut [T]| {
            exponentials(q, &x[sample * k..], top, scale, Some(all));
            let v = T::ONE / q.chunks(CHUNK).map(|q| lane_sum([q], |[q]| q)).sum();
            sums.iter_mut().zip(q).for_each(|(sum, &mut q)| *sum += q * v);
        })?;
    }
    q.par_chunks_mut(samples.div_ceil(TASKS).max(1) * k).for_each(|q| {
        for q in q.chunks_exact_mut(k) {
            simd!(T, {
                let v = sample_factor(q, &factors);
                q.iter_mut().zip(&factors).for_each(|(q, &u)| *q *= u * v);
            });
        }
    });
    Ok(out)
}

/// A row of Q, relative to its greatest element, from the logits `x`, the greatest logits of the prototypes and what was
/// moved from their factors; gives the logarithm of that element.
#[inline(always)]
fn exponentials<T: Real>(q: &mut [T], x: &[T], top: &[T], scale: T, moved: Option<&[T]>) -> T {
    q.iter_mut().zip(x).zip(top).for_each(|((q, &x), &top)| *q = (x - top) * scale);
    q.iter_mut().zip(moved.into_iter().flatten()).for_each(|(q, &ln)| *q += ln);
    let peak = lane_max(q);
    q.iter_mut().for_each(|q| *q = (*q - peak).exp());
    peak
}

/// v_b = 1 / sum_k Q_bk u_k.
#[inline(always)]
fn sample_factor<T: Real>(q: &[T], u: &[T]) -> T {
    let mut sum = T::ZERO;
    for (i, q) in q.chunks(CHUNK).enumerate() {
        sum += lane_sum([q, &u[i * CHUNK..][..q.len()]], |[q, u]| q * u);
    }
    T::ONE / sum
}

/// Lets `visit(sample, row of Q, sums)` add each sample's part to the sums over samples, shard by shard; gives u = 1 / sums.
fn prototype_factors<T: Real>(
    q: &mut [T],
    k: usize,
    ranges: &[Range<usize>],
    shards: &Shards<'_>,
    visit: impl Fn(usize, &mut [T], &mut [T]) + Sync,
) -> Result<Vec<T>> {
    let of_shard = |range: &Range<usize>| {
        let rows = range.len().div_ceil(TASKS).max(1);
        let own = &mut q[range.start * k..range.end * k];
        let partial: Vec<Vec<T>> = own.par_chunks_mut(rows * k).enumerate().map_to_vec(|(task, q)| {
            let mut sums = vec![T::ZERO; k];
            for (i, q) in q.chunks_exact_mut(k).enumerate() {
                simd!(T, visit(range.start + task * rows + i, q, &mut sums));
            }
            sums
        });
        let mut sums = Tensor::zeros(&[k], T::DTYPE);
        sums.as_mut_slice::<T>().par_chunks_mut(CHUNK).enumerate().for_each(|(c, sums)| {
            for part in &partial {
                sums.iter_mut().zip(&part[c * CHUNK..]).for_each(|(s, &p)| *s += p);
            }
        });
        sums
    };
    let sums = shards.sum(ranges.iter().map(of_shard).collect())?;
    Ok(sums.as_slice::<T>().iter().map(|&s| T::ONE / s).collect())
}

/// The greatest logit of each prototype: `[B, K]` to `[K]`.
fn column_max<T: Real>(logits: &Tensor) -> Tensor {
    let (k, x) = (logits.dim(1), logits.as_slice::<T>());
    let mut out = Tensor::uninit(&[k], T::DTYPE);
    out.as_mut_slice::<T>().par_chunks_mut(CHUNK).enumerate().for_each(|(c, top)| {
        simd!(T, {
            top.fill(T::NEG_INF);
            for x in x.chunks_exact(k) {
                top.iter_mut().zip(&x[c * CHUNK..]).for_each(|(t, &x)| *t = t.max(x));
            }
        });
    });
    out
}

/// The same on a GPU, in the logarithm, because exponentials stored as bf16 would lose three digits: the assignment of
/// sample b to prototype k is `2^(c x_bk - shift_k - norm_b)`, c = log2(e) / temperature, with two steps in turn:
/// `norm_b = log2(sum_k 2^(c x_bk - shift_k))`, and `shift_k += log2(mass_k)`, the mass that prototype k has of all
/// samples, divided by B / K, which it is in the end: shifts do not grow with the iterations. The mass is between 1 / (B K)
/// and B. Shifts round at 2^-24 of `x / temperature`.
///
/// The logits are read 2 n times in n iterations and once more for the result (a row that was just read, so mostly from
/// the cache), which is written once; nothing else of their size is read or written. For 5,056 x 65,536 bf16 and
/// n = 3 that are 4.6 to 5.3 GB: 1.6 to 1.8 ms at 3 TB/s.
struct OnGpu<'a> {
    gpu: &'static Gpu,
    logits: &'a Tensor,
    temperature: &'a Tensor,
    shards: &'a Shards<'a>,
    /// Rows of all shards.
    all_rows: usize,
    /// Of every own shard: its rows, and how they are summed.
    own: Vec<Runs>,
}

/// The rows of a shard, in runs that are summed by themselves.
struct Runs {
    rows: Range<usize>,
    /// Rows of a run at most: fixed by the shape.
    run: usize,
    /// Which of the runs of all own shards.
    runs: Range<usize>,
}

/// Threads of a block, each with a pack of columns.
const THREADS: usize = 128;

impl<'a> OnGpu<'a> {
    fn new(gpu: &'static Gpu, logits: &'a Tensor, temperature: &'a Tensor, shards: &'a Shards<'a>) -> Result<Self> {
        let mut end = 0;
        let runs_of = |rows: Range<usize>| {
            let run = rows.len().div_ceil(32).max(16);
            let start = end;
            end += rows.len().div_ceil(run);
            Runs { rows, run, runs: start..end }
        };
        let own = shards.ranges(logits.dim(0))?.into_iter().map(runs_of).collect();
        let all_rows = shards.all_rows(logits.dim(0))?;
        Ok(Self { gpu, logits, temperature, shards, all_rows, own })
    }

    fn run(&self, iterations: usize) -> Result<Tensor> {
        let (x, temperature, k) = (self.logits, self.temperature, self.logits.dim(1) as i32);
        // The first sums over samples are held relative to the greatest exponent of each prototype.
        let [tops, sums] = [(); 2].map(|()| self.per_run());
        for own in self.own.iter().filter(|own| !own.rows.is_empty()) {
            let (tops, sums) = (self.of_runs(&tops, own), self.of_runs(&sums, own));
            self.columns("column_sums", own)?.launch(args![
                &tops,
                &sums,
                &self.of_rows(x, own),
                temperature,
                own.run as i32,
                own.rows.len() as i32,
                k
            ])?;
        }
        let mut top = self.per_prototype();
        let runs = self.own.last().map_or(0, |own| own.runs.end);
        self.over("top_of_runs")?.launch(args![&mut top, &tops, runs as i32, k])?;
        if let Some(all) = self.shards.stacked(&top)? {
            self.over("top_of_runs")?.launch(args![&mut top, &all, all.dim(0) as i32, k])?;
        }
        let mut shift = self.shifted(&top, &sums, Some(&tops))?;
        for _ in 1..iterations {
            let mut norms = Tensor::uninit(&[x.dim(0)], DType::F32);
            self.rows(Arg::from(0u64), Arg::from(&mut norms), &shift)?;
            let mass = self.per_run();
            for own in self.own.iter().filter(|own| !own.rows.is_empty()) {
                self.columns("column_mass", own)?.launch(args![
                    &self.of_runs(&mass, own),
                    &self.of_rows(x, own),
                    temperature,
                    &shift,
                    &norms.view(own.rows.start, &[own.rows.len()]),
                    own.run as i32,
                    own.rows.len() as i32,
                    k
                ])?;
            }
            shift = self.shifted(&shift, &mass, None)?;
        }
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        self.rows(Arg::from(&mut out), Arg::from(0u64), &shift)?;
        Ok(out)
    }

    fn per_run(&self) -> Tensor {
        let runs = self.own.last().map_or(0, |own| own.runs.end);
        Tensor::uninit(&[runs, self.logits.dim(1)], DType::F32)
    }

    /// What a tensor `[runs, K]` has of a shard.
    fn of_runs(&self, x: &Tensor, own: &Runs) -> Tensor {
        let k = self.logits.dim(1);
        x.view(own.runs.start * k, &[own.runs.len(), k])
    }

    /// What a tensor `[B, K]` has of a shard.
    fn of_rows(&self, x: &Tensor, own: &Runs) -> Tensor {
        let k = self.logits.dim(1);
        x.view(own.rows.start * k, &[own.rows.len(), k])
    }

    fn per_prototype(&self) -> Tensor {
        Tensor::uninit(&[self.logits.dim(1)], DType::F32)
    }

    fn bytes(&self) -> f64 {
        (self.logits.len() * self.logits.dtype().size()) as f64
    }

    /// A launch that goes down the columns of every run of a shard's rows.
    fn columns(&self, name: &'static str, own: &Runs) -> Result<Launch> {
        let (x, pack) = (self.of_rows(self.logits, own), 16 / self.logits.dtype().size());
        let packs = x.dim(1).is_multiple_of(pack) && x.device_address().is_multiple_of(16);
        let threads = x.dim(1) / if packs { pack } else { 1 };
        let kernel = self.gpu.kernel(&SINKHORN, name, x.dtype())?;
        let bytes = (x.len() * x.dtype().size()) as f64;
        Ok(kernel.grid((threads.div_ceil(THREADS), own.runs.len()), THREADS as u32).work(0.0, bytes))
    }

    /// A launch with a thread for each prototype.
    fn over(&self, name: &'static str) -> Result<Launch> {
        Ok(self.gpu.kernel(&SINKHORN, name, DType::F32)?.over(self.logits.dim(1)))
    }

    /// Writes the norms of all samples, or (with `out`) their assignments.
    fn rows(&self, out: Arg, norms: Arg, shift: &Tensor) -> Result<()> {
        let (x, rows, k) = (self.logits, self.logits.dim(0), self.logits.dim(1));
        // Four rows a block read the shifts once, where there are rows enough for all multiprocessors.
        let (name, rows_of_block) = if rows < 1024 { ("row_norms", 1) } else { ("row_norms_by_four", 4) };
        let launch = self.gpu.kernel(&SINKHORN, name, x.dtype())?.grid(rows.div_ceil(rows_of_block), block_of(k));
        let launch = launch.work(0.0, self.bytes());
        launch.launch(args![&out, &norms, x, self.temperature, shift, rows as i32, k as i32])
    }

    /// `base + log2(sum over runs and shards / (B / K))`; sums that are relative to `tops` are made relative to `base` first.
    fn shifted(&self, base: &Tensor, sums: &Tensor, tops: Option<&Tensor>) -> Result<Tensor> {
        let k = self.logits.dim(1);
        let (share, k) = ((k as f64 / self.all_rows as f64) as f32, k as i32);
        let of_shard = |own: &Runs| {
            if own.rows.is_empty() {
                return Ok(Tensor::zeros(&[self.logits.dim(1)], DType::F32));
            }
            let (mut total, tops) = (self.per_prototype(), tops.map(|tops| self.of_runs(tops, own)));
            let (sums, runs) = (self.of_runs(sums, own), own.runs.len() as i32);
            self.over("sum_of_runs")?.launch(args![&mut total, &sums, tops.as_ref(), base, runs, k])?;
            Ok(total)
        };
        let total = self.shards.sum(self.own.iter().map(of_shard).collect::<Result<_>>()?)?;
        let mut shift = self.per_prototype();
        self.over("shift")?.launch(args![&mut shift, base, &total, share, k])?;
        Ok(shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Rng, Stream};
    use crate::DType;

    fn logits(rows: usize, k: usize, spread: f64, dtype: DType) -> Tensor {
        let mut rng = Rng::new(1, Stream::Probe, 0, 0);
        let x: Vec<f64> = (0..rows * k).map(|_| spread * rng.normal()).collect();
        Tensor::from_f64(&x, &[rows, k], dtype).unwrap()
    }

    #[test]
    fn rows_sum_to_one_even_when_logits_are_far_apart() {
        for (dtype, spread) in [(DType::F64, 1.0), (DType::F32, 1.0), (DType::F32, 300.0)] {
            let q =
                logits(40, 21, spread, dtype).sinkhorn_knopp(&Tensor::scalar(0.04, dtype), 3, &Shards::one()).unwrap();
            for row in q.to_f64_vec().chunks(21) {
                assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{row:?}");
            }
        }
    }

    #[test]
    fn prototypes_get_equal_mass_after_convergence() {
        let q = logits(30, 7, 0.1, DType::F64)
            .sinkhorn_knopp(&Tensor::scalar(0.07, DType::F64), 200, &Shards::one())
            .unwrap();
        for mass in q.sum_axis(0).unwrap().to_f64_vec() {
            assert!((mass - 30.0 / 7.0).abs() < 1e-9, "{mass}");
        }
    }

    #[test]
    fn a_prototype_that_no_sample_likes_gives_no_nan() {
        let mut x = vec![0.0f32; 12];
        for row in x.chunks_exact_mut(3) {
            row[2] = -1e4;
        }
        let x = Tensor::from_slice(&x, &[4, 3]).unwrap();
        let q = x.sinkhorn_knopp(&Tensor::scalar(0.04, DType::F32), 3, &Shards::one()).unwrap();
        for q in q.to_f64_vec() {
            assert!((q - 1.0 / 3.0).abs() < 1e-6, "{q}");
        }
    }
}
