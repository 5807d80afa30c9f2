//! Gram anchoring: the similarities between patches, held to those of a teacher.
//!
//! DINOv3 (arXiv:2508.10104), eq. 3: `|X_S X_S^T - X_G X_G^T|_F^2` of normalised patch features, here divided by the
//! number of entries as in the reference.

use rayon::prelude::*;

use crate::ops::matmul::{product, Mat, Threads};
use crate::ops::parallel::{lane_sum, BLOCK};
use crate::ops::same_dtype;
use crate::tensor::{Grads, Op, Real};
use crate::{dispatch_real, simd, Error, Result, Tensor};

/// Which negative similarities are set to 0 before the comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NegativeRemoval {
    /// None.
    #[default]
    None,
    /// The student's and the teacher's (`remove_neg` of the reference).
    Both,
    /// The teacher's alone (what `remove_only_teacher_neg` of the reference does: it means to clear the student's
    /// entries where both are negative too, but looks at the teacher's after they were cleared).
    Teacher,
}

/// How [`Tensor::gram_loss`] compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GramOptions {
    /// Divide features by their length first, `x / max(|x|, 1e-12)`.
    pub normalize: bool,
    /// Compare patches within an image; otherwise all patches of the batch with each other.
    pub image_level: bool,
    /// Negative similarities set to 0.
    pub remove: NegativeRemoval,
}

impl Default for GramOptions {
    /// DINOv3's: normalised, within images, nothing removed.
    fn default() -> Self {
        Self { normalize: true, image_level: true, remove: NegativeRemoval::None }
    }
}

impl Tensor {
    /// Mean over all entries of `(S S^T - T T^T)^2`, rank 0: `self` (the student) and `teacher` are `[B, N, D]`, or
    /// `[M, D]` for chosen patches of a batch. The mean is over B N^2 entries at image level, (B N)^2 at batch level.
    ///
    /// With `E` the difference, dS = 4 E S / entries; where a negative entry of the student was removed, E counts as 0.
    /// The teacher gets no gradient. No matrix of similarities is kept: tiles of them are made and used at once.
    ///
    /// # Errors
    /// If the shapes differ or have another rank.
    pub fn gram_loss(&self, teacher: &Tensor, options: GramOptions) -> Result<Tensor> {
        same_dtype("gram_loss", &[self, teacher])?;
        if self.shape() != teacher.shape() || !(2..=3).contains(&self.rank()) || self.is_empty() {
            let problem =
                format!("student {:?}, teacher {:?}: expected [B, N, D] or [M, D]", self.shape(), teacher.shape());
            return Err(Error::shape("gram_loss", problem));
        }
        let normalized = |x: &Tensor| if options.normalize { x.l2_normalize(1e-12) } else { Ok(x.clone()) };
        let teacher = normalized(&teacher.detach())?;
        GramLoss { teacher, options, gradient: None }.apply(&[&normalized(self)?])
    }
}

struct GramLoss {
    teacher: Tensor,
    options: GramOptions,
    /// The gradient for dy = 1: its tiles are at hand in forward.
    gradient: Option<Tensor>,
}

/// Rows of a tile of similarities, and of a task.
const ROWS: usize = 128;
/// Columns of a tile of similarities.
const COLUMNS: usize = 512;

/// The features of one image (or batch), `n` rows of `d`.
struct Image<'a, T> {
    student: &'a [T],
    teacher: &'a [T],
    n: usize,
    d: usize,
    remove: NegativeRemoval,
}

impl<T: Real> Image<'_, T> {
    /// The sum of squared differences in `height` rows from `start`; `factor * E S` is put in `gradient` (empty if nobody
    /// asks for it). `tiles` is scratch for two tiles.
    fn rows(&self, start: usize, height: usize, gradient: &mut [T], factor: T, tiles: &mut [T]) -> f64 {
        let d = self.d;
        let mut squares = 0.0;
        for column in (0..self.n).step_by(COLUMNS) {
            let width = COLUMNS.min(self.n - column);
            let (tile, other) = tiles.split_at_mut(ROWS * COLUMNS);
            let (tile, other) = (&mut tile[..height * width], &mut other[..height * width]);
            let similarities = |x: &[T], out: &mut [T], add: bool, alpha: T| {
                let (a, b) = (Mat::new(&x[start * d..], height, d), Mat::new(&x[column * d..], width, d));
                product(out, width, add, alpha, a, b.t(), Threads::One);
            };
            similarities(self.student, tile, false, T::ONE);
            if self.remove == NegativeRemoval::None {
                similarities(self.teacher, tile, true, -T::ONE);
                squares += simd!(tile.chunks(width).map(|e| lane_sum([e], |[e]| e * e).f64()).sum::<f64>());
            } else {
                similarities(self.teacher, other, false, T::ONE);
                let keep_student = self.remove == NegativeRemoval::Teacher;
                let rows = tile.chunks_mut(width).zip(other.chunks(width));
                squares += simd!(rows.map(|(s, t)| subtract(s, t, keep_student).f64()).sum::<f64>());
            }
            if !gradient.is_empty() {
                let (e, s) = (Mat::new(tile, height, width), Mat::new(&self.student[column * d..], width, d));
                product(gradient, d, column > 0, factor, e, s, Threads::One);
            }
        }
        squares
    }
}

/// Clears the negatives of `t`, and of `s` unless `keep_student`; gives the sum of squared differences. `s` becomes the
/// difference that counts in the gradient: a removed entry of the student has a loss but no slope.
#[inline(always)]
fn subtract<T: Real>(s: &mut [T], t: &[T], keep_student: bool) -> T {
    // Not `max`, which would hide a NaN.
    let positive = |x: T| if x < T::ZERO { T::ZERO } else { x };
    let squares = lane_sum([s, t], |[s, t]| {
        let e = if keep_student { s } else { positive(s) } - positive(t);
        e * e
    });
    s.iter_mut().zip(t).for_each(|(s, &t)| {
        let removed = !keep_student && *s < T::ZERO;
        *s = if removed { T::ZERO } else { *s - positive(t) };
    });
    squares
}

impl Op for GramLoss {
    fn name(&self) -> &'static str {
        "gram_loss"
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let student = inputs[0];
        let d = student.last_dim();
        let rows = student.len() / d;
        let n = if self.options.image_level && student.rank() == 3 { student.dim(1) } else { rows };
        let entries = (rows * n) as f64;
        let mut gradient = save.then(|| Tensor::uninit(student.shape(), student.dtype()));
        let squares = dispatch_real!("gram_loss", student.dtype(), T => {
            let (s, t) = (student.as_slice::<T>(), self.teacher.as_slice::<T>());
            let blocks = n.div_ceil(ROWS);
            // Where the gradient of every block of rows goes.
            let mut places: Vec<&mut [T]> = match &mut gradient {
                Some(gradient) => {
                    gradient.as_mut_slice::<T>().chunks_mut(n * d).flat_map(|image| image.chunks_mut(ROWS * d)).collect()
                }
                None => (0..rows / n * blocks).map(|_| <&mut [T]>::default()).collect(),
            };
            let scratch = || vec![T::ZERO; 2 * ROWS * COLUMNS];
            let squares: Vec<f64> = places
                .par_iter_mut()
                .enumerate()
                .map_init(scratch, |tiles, (task, gradient)| {
                    let (from, start) = (task / blocks * n * d, task % blocks * ROWS);
                    let (student, teacher) = (&s[from..][..n * d], &t[from..][..n * d]);
                    let image = Image { student, teacher, n, d, remove: self.options.remove };
                    image.rows(start, ROWS.min(n - start), gradient, T::of(4.0 / entries), tiles)
                })
                .collect();
            Ok(squares.into_iter().sum::<f64>())
        })?;
        self.gradient = gradient;
        Ok(Tensor::scalar(squares / entries, student.dtype()))
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let mut gradient = self.gradient.expect("saved by forward");
        dispatch_real!("gram_loss", dy.dtype(), T => {
            let dy = dy.as_slice::<T>()[0];
            gradient.as_mut_slice::<T>().par_chunks_mut(BLOCK).for_each(|g| simd!(g.iter_mut().for_each(|g| *g *= dy)));
            grads.add(0, gradient)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Rng, Stream};
    use crate::tensor::Tape;
    use crate::DType;

    fn features(index: u64, shape: &[usize]) -> Tensor {
        let mut rng = Rng::new(3, Stream::Probe, 0, index);
        let x: Vec<f64> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
        Tensor::from_slice(&x, shape).unwrap()
    }

    #[test]
    fn tiles_add_up_to_the_whole_matrix() {
        // More rows and columns than a tile has.
        let (x, t) = (features(0, &[2, 300, 5]), features(1, &[2, 300, 5]));
        for image_level in [true, false] {
            let options = GramOptions { normalize: false, image_level, remove: NegativeRemoval::None };
            let shape = if image_level { [2, 300, 5] } else { [1, 600, 5] };
            let tape = Tape::new();
            let (a, b) = (tape.leaf(&x), tape.leaf(&x));
            let fused = a.gram_loss(&t, options).unwrap();
            let (s, t) = (b.reshape(&shape).unwrap(), t.reshape(&shape).unwrap());
            let e = s.matmul_t(&s).unwrap().sub(&t.matmul_t(&t).unwrap()).unwrap();
            let plain = e.square().unwrap().mean().unwrap();
            assert!((fused.item() / plain.item() - 1.0).abs() < 1e-12);
            let both = tape.backward(&fused.add(&plain).unwrap(), 1.0, None).unwrap();
            let (fused, plain) = (both.of(&a).unwrap().to_f64_vec(), both.of(&b).unwrap().to_f64_vec());
            assert!(fused.iter().zip(&plain).all(|(f, p)| (f - p).abs() < 1e-12));
        }
    }

    #[test]
    fn a_student_equal_to_its_teacher_has_no_loss() {
        let x = features(0, &[2, 9, 4]);
        for remove in [NegativeRemoval::None, NegativeRemoval::Both] {
            assert_eq!(x.gram_loss(&x, GramOptions { remove, ..Default::default() }).unwrap().item(), 0.0);
        }
    }

    #[test]
    fn without_a_tape_the_value_is_the_same() {
        let (x, t) = (features(0, &[200, 6]), features(1, &[200, 6]));
        let tape = Tape::new();
        let tracked = tape.leaf(&x).gram_loss(&t, GramOptions::default()).unwrap();
        assert_eq!(tracked.item(), x.gram_loss(&t, GramOptions::default()).unwrap().item());
        assert_eq!(tracked.dtype(), DType::F64);
    }
}
