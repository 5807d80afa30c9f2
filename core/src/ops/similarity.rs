//! The difference between the similarity matrices of two sets of features: `X X^T` of a student's and of a teacher's.
//!
//! DINOv3 (arXiv:2508.10104), eq. 3: `|X_S X_S^T - X_G X_G^T|_F^2` of normalised patch features, here divided by the
//! number of entries as in the reference.

use crate::cuda::{args, Arg, Gpu, Matrix, Product};
use crate::ops::matmul::{product, Mat, Threads};
use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::parallel::{lane_sum, with_scratch, BLOCK};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static SIMILARITY = "similarity_distance" { include_str!("similarity.cu") } }

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

/// How [`Tensor::similarity_distance`] compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimilarityOptions {
    /// Divide features by their length first, `x / max(|x|, 1e-12)`.
    pub normalize: bool,
    /// Compare patches within an image; otherwise all patches of the batch with each other.
    pub image_level: bool,
    /// Negative similarities set to 0.
    pub remove: NegativeRemoval,
}

impl Default for SimilarityOptions {
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
    /// The teacher gets no gradient. The loss of bf16 features is f32. No matrix of similarities is kept: tiles of them are made and used at once.
    ///
    /// # Errors
    /// If the shapes differ or have another rank.
    pub fn similarity_distance(&self, teacher: &Tensor, options: SimilarityOptions) -> Result<Tensor> {
        same_dtype("similarity_distance", &[self, teacher])?;
        if self.shape() != teacher.shape() || !(2..=3).contains(&self.rank()) || self.is_empty() {
            let problem =
                format!("student {:?}, teacher {:?}: expected [B, N, D] or [M, D]", self.shape(), teacher.shape());
            return Err(Error::shape("similarity_distance", problem));
        }
        let normalized = |x: &Tensor| if options.normalize { x.l2_normalize(1e-12) } else { Ok(x.clone()) };
        let teacher = normalized(&teacher.detach())?;
        SimilarityDistance { teacher, options, gradient: None }.apply(&[&normalized(self)?])
    }
}

struct SimilarityDistance {
    teacher: Tensor,
    options: SimilarityOptions,
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
                squares += simd!(T, {
                    let mut sum = 0.0;
                    for e in tile.chunks(width) {
                        sum += lane_sum([e], |[e]| e * e).f64();
                    }
                    sum
                });
            } else {
                similarities(self.teacher, other, false, T::ONE);
                let keep_student = self.remove == NegativeRemoval::Teacher;
                squares += simd!(T, {
                    let mut sum = 0.0;
                    for (row, s) in tile.chunks_mut(width).enumerate() {
                        sum += subtract(s, &other[row * width..][..width], keep_student).f64();
                    }
                    sum
                });
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
    let t = &t[..s.len()];
    for i in 0..s.len() {
        let removed = !keep_student && s[i] < T::ZERO;
        s[i] = if removed { T::ZERO } else { s[i] - positive(t[i]) };
    }
    squares
}

impl Op for SimilarityDistance {
    fn name(&self) -> &'static str {
        "similarity_distance"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let student = inputs[0];
        let d = student.last_dim();
        let rows = student.len() / d;
        let n = if self.options.image_level && student.rank() == 3 { student.dim(1) } else { rows };
        let entries = (rows * n) as f64;
        let mut gradient = save.then(|| Tensor::uninit(student.shape(), student.dtype()));
        if let Some(gpu) = student.gpu() {
            let loss = self.forward_on(gpu, student, n, gradient.as_ref());
            self.gradient = gradient;
            return loss;
        }
        let squares = dispatch_real!("similarity_distance", student.dtype(), T => {
            let (s, t) = (student.as_slice::<T>(), self.teacher.as_slice::<T>());
            let blocks = n.div_ceil(ROWS);
            // Where the gradient of every block of rows goes.
            let mut places: Vec<&mut [T]> = match &mut gradient {
                Some(gradient) => {
                    gradient.as_mut_slice::<T>().chunks_mut(n * d).flat_map(|image| image.chunks_mut(ROWS * d)).collect()
                }
                None => (0..rows / n * blocks).map(|_| <&mut [T]>::default()).collect(),
            };
            let squares: Vec<f64> = places.par_iter_mut().enumerate().map_to_vec(|(task, gradient)| {
                let (from, start) = (task / blocks * n * d, task % blocks * ROWS);
                let (student, teacher) = (&s[from..][..n * d], &t[from..][..n * d]);
                let image = Image { student, teacher, n, d, remove: self.options.remove };
                let factor = T::of(4.0 / entries);
                with_scratch(2 * ROWS * COLUMNS, |tiles| image.rows(start, ROWS.min(n - start), gradient, factor, tiles))
            });
            Ok(squares.into_iter().sum::<f64>())
        })?;
        self.gradient = gradient;
        Ok(Tensor::scalar(squares / entries, student.dtype()))
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let mut gradient = self.gradient.expect("saved by forward");
        if gradient.gpu().is_some() {
            return grads.add(0, gradient.mul(&dy)?);
        }
        dispatch_real!("similarity_distance", dy.dtype(), T => {
            let dy = dy.as_slice::<T>()[0];
            gradient.as_mut_slice::<T>().par_chunks_mut(BLOCK).for_each(|g| simd!(T, g.iter_mut().for_each(|g| *g *= dy)));
            grads.add(0, gradient)
        })
    }
}

/// Entries of a tile on a GPU. There are two in f32, because a difference of similarities has few digits in bf16, and
/// one of the difference, in the type of the features.
const ENTRIES_OF_TILE: usize = 1 << 24;
/// Entries that a block of `similarity.cu` compares.
const ENTRIES_OF_BLOCK: usize = 4096;

/// Similarities that are compared at once: whole images, or some rows of one.
struct Tile {
    /// The first row of features that the tile's images begin with.
    image: usize,
    /// The tile's first row of features.
    row: usize,
    /// Rows of each image in the tile.
    height: usize,
    images: usize,
}

/// The tiles of `rows` rows of features in images of `n`, each of at most about `entries` similarities.
fn tiles(rows: usize, n: usize, entries: usize) -> Vec<Tile> {
    let (height, images) = ((entries / n).clamp(1, n), (entries / (n * n)).max(1));
    let starts = (0..rows).step_by(n * images);
    let of_images = |image: usize| {
        let images = images.min((rows - image) / n);
        let tile = move |start: usize| Tile { image, row: image + start, height: height.min(n - start), images };
        (0..n).step_by(height).map(tile)
    };
    starts.flat_map(of_images).collect()
}

impl SimilarityDistance {
    /// Writes `gradient` tile by tile, if it is given.
    fn forward_on(&self, gpu: &'static Gpu, student: &Tensor, n: usize, gradient: Option<&Tensor>) -> Result<Tensor> {
        let (dtype, d) = (student.dtype(), student.last_dim());
        let rows = student.len() / d;
        let entries = (rows * n) as f64;
        let remove = match self.options.remove {
            NegativeRemoval::None => 0,
            NegativeRemoval::Both => 1,
            NegativeRemoval::Teacher => 2,
        };
        let features = |x: &Tensor, row: usize, height: usize| {
            let at = x.device_address() + (row * d * dtype.size()) as u64;
            Matrix { batch_stride: n * d, ..Matrix::at(at, dtype, height, d) }
        };
        let mut sums: Option<Tensor> = None;
        for Tile { image, row, height, images } in tiles(rows, n, ENTRIES_OF_TILE) {
            let shape = [images, height, n];
            let similarities = |x: &Tensor| -> Result<Tensor> {
                let out = Tensor::uninit(&shape, DType::F32);
                let (rows, columns) = (features(x, row, height), features(x, image, n));
                let product = Product::new(rows, columns.t(), Matrix::of(&out, height, n));
                gpu.matmul(&Product { batch: images, ..product })?;
                Ok(out)
            };
            let (s, t) = (similarities(student)?, similarities(&self.teacher)?);
            let blocks = s.len().div_ceil(ENTRIES_OF_BLOCK);
            let mut partial = Tensor::uninit(&[blocks], DType::F32);
            let mut e = gradient.map(|_| Tensor::uninit(&shape, dtype));
            let at = e.as_mut().map_or(Arg::from(0u64), Arg::from);
            let bytes = (s.len() * (8 + if e.is_some() { dtype.size() } else { 0 })) as f64;
            let launch = gpu.kernel(&SIMILARITY, "similarity_difference", dtype)?.grid(blocks, 256).work(0.0, bytes);
            launch.launch(args![&at, &mut partial, &s, &t, remove, s.len()])?;
            if let (Some(e), Some(gradient)) = (&e, gradient) {
                let (e, x) = (Matrix::of(e, height, n), features(student, image, n));
                let product = Product::new(e, x, features(gradient, row, height));
                gpu.matmul(&Product { alpha: (4.0 / entries) as f32, batch: images, ..product })?;
            }
            let sum = partial.sum()?;
            sums = Some(match sums {
                Some(sums) => sums.add(&sum)?,
                None => sum,
            });
        }
        sums.expect("there is an image").scale(1.0 / entries)
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
            let options = SimilarityOptions { normalize: false, image_level, remove: NegativeRemoval::None };
            let shape = if image_level { [2, 300, 5] } else { [1, 600, 5] };
            let tape = Tape::new();
            let (a, b) = (tape.leaf(&x), tape.leaf(&x));
            let fused = a.similarity_distance(&t, options).unwrap();
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
    fn tiles_on_a_gpu_cover_every_row_once() {
        for (rows, n, entries) in [(12, 3, 100), (12, 3, 18), (12, 3, 7), (12, 12, 40), (12, 12, 1), (5, 1, 3)] {
            let mut covered = vec![0; rows];
            for Tile { image, row, height, images } in tiles(rows, n, entries) {
                assert!(images * height * n <= entries.max(n), "{images} images of {height} x {n}");
                let starts = (0..images).map(|i| row + i * n);
                starts.for_each(|start| covered[start..start + height].iter_mut().for_each(|c| *c += 1));
                assert!(image <= row && row + height <= image + n);
            }
            assert_eq!(covered, vec![1; rows], "{rows} rows in images of {n}, {entries} entries");
        }
    }

    #[test]
    fn a_student_equal_to_its_teacher_has_no_loss() {
        let x = features(0, &[2, 9, 4]);
        for remove in [NegativeRemoval::None, NegativeRemoval::Both] {
            assert_eq!(
                x.similarity_distance(&x, SimilarityOptions { remove, ..Default::default() }).unwrap().item(),
                0.0
            );
        }
    }

    #[test]
    fn without_a_tape_the_value_is_the_same() {
        let (x, t) = (features(0, &[200, 6]), features(1, &[200, 6]));
        let tape = Tape::new();
        let tracked = tape.leaf(&x).similarity_distance(&t, SimilarityOptions::default()).unwrap();
        assert_eq!(tracked.item(), x.similarity_distance(&t, SimilarityOptions::default()).unwrap().item());
        assert_eq!(tracked.dtype(), DType::F64);
    }
}
