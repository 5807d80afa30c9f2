//! Cross-entropy between soft targets and logits, over a list of weighted pairs of rows.
//!
//! This is the sum inside the DINO loss (Caron et al., arXiv:2104.14294, eq. 1) and the iBOT loss (Zhou et al.,
//! arXiv:2111.07832, eq. 2). A list of pairs says which crop is compared with which, so that a student row that meets
//! two teacher rows goes through its softmax once.

use std::ops::Range;

use crate::cuda::{args, Arg, Gpu};
use crate::ops::softmax::block_of;
use crate::ops::{same_dtype, scalars_of};
use crate::tensor::blocks::*;
use crate::tensor::parallel::{lane_max, lane_sum, BLOCK};
use crate::tensor::{Grads, Op, Real};
use crate::DType;
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { static CROSS_ENTROPY = "soft_cross_entropy" {
    include_str!("log_sum.cuh"), include_str!("soft_cross_entropy.cu")
} }

impl Tensor {
    /// `sum_e weights[e] * CE(targets[target_rows[e]], self[student_rows[e]] / temperature)`, rank 0, with
    /// `CE(q, z) = -sum_k q_k log_softmax(z)_k`.
    ///
    /// `self` (the student's logits) is `[R, K]`, `targets` `[Q, K]`; `student_rows` and `target_rows` are `[E]` (u32)
    /// and `weights` `[E]`. Entries of one student row are consecutive, on a GPU in ascending order of the rows (which
    /// it cannot check); a row without entries has no part in the loss. Beside bf16 logits and targets, weights and
    /// loss are f32. Targets and weights get no gradient. With `W = sum_e w_e sum_k q_k` over the entries of a row,
    /// dz = W softmax(z / T) / T - (sum_e w_e q) / T.
    ///
    /// # Errors
    /// If shapes do not fit, a row is out of bounds, or the entries of a student row are not consecutive.
    pub fn soft_cross_entropy(
        &self,
        targets: &Tensor,
        student_rows: &Tensor,
        target_rows: &Tensor,
        weights: &Tensor,
        temperature: f64,
    ) -> Result<Tensor> {
        check_shapes(self, targets, student_rows, target_rows, weights)?;
        let [targets, student_rows, target_rows, weights] =
            [targets, student_rows, target_rows, weights].map(Tensor::detach);
        SoftCrossEntropy { targets, student_rows, target_rows, weights, temperature, saved: None }.apply(&[self])
    }
}

struct SoftCrossEntropy {
    targets: Tensor,
    student_rows: Tensor,
    target_rows: Tensor,
    weights: Tensor,
    temperature: f64,
    saved: Option<Saved>,
}

enum Saved {
    /// The gradient for dy = 1: forward has the exponentials at hand, so on the CPU it is made there.
    Gradient(Tensor),
    /// On a GPU: the logits, which cost less to read again than a gradient to write, and two numbers a row.
    Logits(Tensor, Tensor),
}

/// Elements of a row that go through the cache together; also the length of partial sums.
const CHUNK: usize = 2048;

fn check_shapes(
    logits: &Tensor,
    targets: &Tensor,
    student_rows: &Tensor,
    target_rows: &Tensor,
    weights: &Tensor,
) -> Result<()> {
    let fail = |problem: String| Err(Error::shape("soft_cross_entropy", problem));
    same_dtype("soft_cross_entropy", &[logits, targets])?;
    scalars_of("soft_cross_entropy", logits, &[weights])?;
    if logits.rank() != 2 || targets.rank() != 2 || logits.dim(1) != targets.dim(1) {
        return fail(format!("logits {:?}, targets {:?}: expected [R, K] and [Q, K]", logits.shape(), targets.shape()));
    }
    let lists = [student_rows, target_rows, weights].map(Tensor::len);
    if lists != [lists[0]; 3] || student_rows.dtype() != DType::U32 || target_rows.dtype() != DType::U32 {
        return fail(format!("pairs of lengths {lists:?}: expected three lists of one length, rows as u32"));
    }
    Ok(())
}

/// The entries of every one of `rows` student rows; checks the pairs.
fn entries_of_rows(
    rows: usize,
    targets: &Tensor,
    student_rows: &Tensor,
    target_rows: &Tensor,
) -> Result<Vec<Range<usize>>> {
    let fail = |problem: String| Err(Error::shape("soft_cross_entropy", problem));
    let (student, target) = (student_rows.as_slice::<u32>(), target_rows.as_slice::<u32>());
    if let Some(row) = target.iter().find(|&&r| r as usize >= targets.dim(0)) {
        return fail(format!("target row {row} of {}", targets.dim(0)));
    }
    let mut entries = vec![0..0; rows];
    let mut start = 0;
    for run in student.chunk_by(|a, b| a == b) {
        let (row, end) = (run[0] as usize, start + run.len());
        match entries.get_mut(row) {
            None => return fail(format!("student row {row} of {rows}")),
            Some(range) if range.end > 0 => return fail(format!("the entries of row {row} are not consecutive")),
            Some(range) => *range = start..end,
        }
        start = end;
    }
    Ok(entries)
}

/// One student row and what it is compared with.
struct Row<'a, T> {
    logits: &'a [T],
    /// Pairs of target and weight.
    pairs: &'a [(&'a [T], T)],
    inverse_temperature: T,
}

impl<T: Real> Row<'_, T> {
    /// The row's part of the loss; its gradient is left in `gradient` (empty if nobody asks for it).
    #[inline(always)]
    fn loss(&self, gradient: &mut [T]) -> T {
        let scale = self.inverse_temperature;
        let peak = lane_max(self.logits);
        let mut exp_sum = T::ZERO;
        // sum_e w_e sum_k q_k and sum_e w_e sum_k q_k (x_k - max x).
        let (mut mass, mut energy) = (T::ZERO, T::ZERO);
        for (c, x) in self.logits.chunks(CHUNK).enumerate() {
            let at = c * CHUNK;
            exp_sum += if gradient.is_empty() {
                lane_sum([x], |[x]| ((x - peak) * scale).exp())
            } else {
                let g = &mut gradient[at..][..x.len()];
                g.iter_mut().zip(x).for_each(|(g, &x)| *g = ((x - peak) * scale).exp());
                lane_sum([g], |[e]| e)
            };
            for (q, w) in self.pairs {
                let q = &q[at..][..x.len()];
                mass += *w * lane_sum([q], |[q]| q);
                energy += *w * lane_sum([q, x], |[q, x]| q * (x - peak));
            }
        }
        let softmax = mass * scale / exp_sum;
        for (c, g) in gradient.chunks_mut(CHUNK).enumerate() {
            g.iter_mut().for_each(|g| *g *= softmax);
            for (q, w) in self.pairs {
                let w = *w * scale;
                g.iter_mut().zip(&q[c * CHUNK..]).for_each(|(g, &q)| *g -= w * q);
            }
        }
        mass * exp_sum.ln() - energy * scale
    }
}

impl Op for SoftCrossEntropy {
    fn name(&self) -> &'static str {
        "soft_cross_entropy"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let logits = inputs[0];
        let (rows, k) = (logits.dim(0), logits.dim(1));
        if let Some(gpu) = logits.gpu() {
            return self.forward_on(gpu, logits, save);
        }
        let entries = entries_of_rows(rows, &self.targets, &self.student_rows, &self.target_rows)?;
        let mut gradient = save.then(|| Tensor::uninit(logits.shape(), logits.dtype()));
        let loss = dispatch_real!("soft_cross_entropy", logits.dtype(), T => {
            let (x, q, weights) = (logits.as_slice::<T>(), self.targets.as_slice::<T>(), self.weights.as_slice::<T>());
            let target_rows = self.target_rows.as_slice::<u32>();
            let loss_of = |row: usize, gradient: &mut [T]| {
                let pairs: Vec<(&[T], T)> = entries[row]
                    .clone()
                    .map(|e| (&q[target_rows[e] as usize * k..][..k], weights[e]))
                    .collect();
                if pairs.is_empty() {
                    gradient.fill(T::ZERO);
                    return T::ZERO;
                }
                let inverse_temperature = T::of(1.0 / self.temperature);
                let row = Row { logits: &x[row * k..][..k], pairs: &pairs, inverse_temperature };
                simd!(T, row.loss(gradient))
            };
            let rows_of_task = (BLOCK / k.max(1)).max(1);
            let losses: Vec<T> = match &mut gradient {
                Some(gradient) => {
                    let gradients = gradient.as_mut_slice::<T>().par_chunks_mut(k.max(1)).with_min_len(rows_of_task);
                    gradients.enumerate().map_to_vec(|(row, gradient)| loss_of(row, gradient))
                }
                None => {
                    Numbers(rows).with_min_len(rows_of_task).map_to_vec(|row| loss_of(row, &mut []))
                }
            };
            Ok(losses.into_iter().map(Real::f64).sum::<f64>())
        })?;
        self.saved = gradient.map(Saved::Gradient);
        Ok(Tensor::scalar(loss, logits.dtype()))
    }

    fn backward(mut self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let mut gradient = match self.saved.take().expect("saved by forward") {
            Saved::Gradient(gradient) => gradient,
            Saved::Logits(logits, stats) => return self.backward_on(&logits, &stats, &dy, grads),
        };
        dispatch_real!("soft_cross_entropy", dy.dtype(), T => {
            let dy = dy.as_slice::<T>()[0];
            gradient.as_mut_slice::<T>().par_chunks_mut(BLOCK).for_each(|g| simd!(T, g.iter_mut().for_each(|g| *g *= dy)));
            grads.add(0, gradient)
        })
    }
}

impl SoftCrossEntropy {
    /// A kernel's `Pairs`, and exponents of two for a difference of 1 between logits.
    fn pairs_and_scale(&self) -> (Arg, f32) {
        let lists = [&self.student_rows, &self.target_rows, &self.weights].map(Tensor::device_address);
        let pairs = Arg::plain([lists[0], lists[1], lists[2], self.weights.len() as u64]);
        (pairs, (std::f64::consts::LOG2_E / self.temperature) as f32)
    }

    fn forward_on(&mut self, gpu: &'static Gpu, logits: &Tensor, save: bool) -> Result<Tensor> {
        let (rows, k) = (logits.dim(0), logits.dim(1));
        let (pairs, scale) = self.pairs_and_scale();
        let mut losses = Tensor::uninit(&[rows], DType::F32);
        let mut stats = save.then(|| Tensor::uninit(&[rows, 2], DType::F32));
        let at = stats.as_mut().map_or(Arg::from(0u64), Arg::from);
        let bytes = ((rows + self.weights.len()) * k * logits.dtype().size()) as f64;
        let launch = gpu.kernel(&CROSS_ENTROPY, "cross_entropy", logits.dtype())?.grid(rows, block_of(k));
        launch.work(0.0, bytes).launch(args![&mut losses, &at, logits, &self.targets, &pairs, scale, k as i32])?;
        self.saved = stats.map(|stats| Saved::Logits(logits.detach(), stats));
        losses.sum()
    }

    fn backward_on(&self, logits: &Tensor, stats: &Tensor, dy: &Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let gpu = logits.gpu().expect("saved on a GPU");
        let (rows, k) = (logits.dim(0), logits.dim(1));
        let (pairs, scale) = self.pairs_and_scale();
        let bytes = ((2 * rows + self.weights.len()) * k * logits.dtype().size()) as f64;
        let launch = gpu.kernel(&CROSS_ENTROPY, "cross_entropy_backward", logits.dtype())?.grid(rows, block_of(k));
        grads.accumulate(0, |mut dx| {
            let launch = launch.work(0.0, bytes);
            launch.launch(args![&mut dx, dy, stats, logits, &self.targets, &pairs, scale, k as i32])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tape;

    /// Two targets for row 0, none for row 1, one for row 2.
    fn case() -> [Tensor; 4] {
        [
            Tensor::from_slice(&[0.5, 0.2, 0.3, 0.1, 0.1, 0.7], &[2, 3]).unwrap(),
            Tensor::from_slice(&[0u32, 0, 2], &[3]).unwrap(),
            Tensor::from_slice(&[0u32, 1, 1], &[3]).unwrap(),
            Tensor::from_slice(&[1.0, 0.5, 2.0], &[3]).unwrap(),
        ]
    }

    #[test]
    fn loss_and_gradient_are_those_of_the_formula() {
        let x = [1.0, 2.0, -1.0, 9.0, 9.0, 9.0, 0.3, 0.1, 0.2];
        let [q, rows, target_rows, w] = case();
        let formula = |x: &[f64]| {
            let ce = |q: &[f64], z: &[f64]| {
                let z: Vec<f64> = z.iter().map(|z| z / 0.1).collect();
                let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
                q.iter().zip(&z).map(|(q, z)| q * (lse - z)).sum::<f64>()
            };
            let q = q.as_slice::<f64>();
            ce(&q[..3], &x[..3]) + 0.5 * ce(&q[3..], &x[..3]) + 2.0 * ce(&q[3..], &x[6..])
        };
        let tape = Tape::new();
        let logits = tape.leaf(&Tensor::from_slice(&x, &[3, 3]).unwrap());
        let loss = logits.soft_cross_entropy(&q, &rows, &target_rows, &w, 0.1).unwrap();
        assert!((loss.item() - formula(&x)).abs() < 1e-10);
        assert_eq!(logits.detach().soft_cross_entropy(&q, &rows, &target_rows, &w, 0.1).unwrap().item(), loss.item());
        let grads = tape.backward(&loss, 3.0, None).unwrap();
        for (i, g) in grads.of(&logits).unwrap().to_f64_vec().into_iter().enumerate() {
            let at = |h: f64| formula(&std::array::from_fn::<_, 9, _>(|j| if i == j { x[j] + h } else { x[j] }));
            let slope = 3.0 * (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((g - slope).abs() < 1e-6, "d/dx[{i}] is {g}, differences say {slope}");
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let [q, rows, target_rows, w] =
            case().map(|t| if t.dtype() == DType::F64 { t.cast(DType::F32).unwrap() } else { t });
        let logits = Tensor::from_slice(&[3e4f32, -3e4, 0.0, 0.0, 0.0, 0.0, 3e4, 3e4, 3e4], &[3, 3]).unwrap();
        assert!(logits.soft_cross_entropy(&q, &rows, &target_rows, &w, 0.1).unwrap().item().is_finite());
    }

    #[test]
    fn scattered_entries_of_a_row_are_an_error() {
        let [q, _, target_rows, w] = case();
        let logits = Tensor::zeros(&[3, 3], DType::F64);
        let rows = Tensor::from_slice(&[0u32, 2, 0], &[3]).unwrap();
        let error = logits.soft_cross_entropy(&q, &rows, &target_rows, &w, 0.1).unwrap_err();
        assert!(error.to_string().contains("row 0 are not consecutive"), "{error}");
    }
}
