//! Distances to nearest neighbours, from which the entropy of features is estimated.
//!
//! Kozachenko-Leonenko estimator as a regulariser: Sablayrolles et al., arXiv:1806.03198, eq. 3; used on CLS tokens by
//! DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104).

use crate::cuda::{args, Gpu, Matrix, Product};
use crate::ops::matmul::{product, Mat, Threads};
use crate::tensor::blocks::*;
use crate::tensor::parallel::lane_sum;
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static NEIGHBOURS = "neighbour_distance" { include_str!("neighbours.cu") } }

impl Tensor {
    /// Per row, the mean over its `topk` nearest neighbours of `-ln(d + eps)`: `[rows, D]` to `[rows]`.
    ///
    /// Rows are normalised, `y = x / max(|x|, eps)`; the neighbours of `i` are the rows with the greatest `y_i . y_n`
    /// among the other rows of its group (`group` consecutive rows, all if `None`); `d = |y_i - y_n + eps|` with
    /// eps = 1e-8 added to every component, so that equal rows have a finite loss. With `g = -1 / (topk d (d + eps))`
    /// and `e = y_i - y_n + eps`, dy_i = g e and dy_n = -g e; the choice of neighbours has no derivative.
    ///
    /// bf16 features are computed with in f32. The loss is the mean over rows. Over several ranks: gather the rows of all, take the mean of one's own.
    ///
    /// # Errors
    /// If the shape is not `[rows, D]`, groups do not divide the rows, or a group has fewer than `topk + 1` rows.
    pub fn neighbour_distance(&self, topk: usize, group: Option<usize>) -> Result<Tensor> {
        let group = group_size(self, topk, group)?;
        NeighbourDistance { topk, group, saved: None }.apply(&[&unit_rows(self)?])
    }

    /// The nearest neighbours that [`neighbour_distance`](Self::neighbour_distance) uses, nearest first (of equals, the first row first):
    /// `[rows, D]` to `[rows, topk]`, u32.
    ///
    /// # Errors
    /// As [`neighbour_distance`](Self::neighbour_distance).
    pub fn nearest_neighbours(&self, topk: usize, group: Option<usize>) -> Result<Tensor> {
        let group = group_size(self, topk, group)?;
        let unit = unit_rows(&self.detach())?;
        if let Some(gpu) = unit.gpu() {
            let _on = unit.device().enter();
            return Ok(Found::on(gpu, &unit, topk, group)?.neighbours);
        }
        let found = dispatch_real!("neighbour_distance", unit.dtype(), T => Ok(neighbours::<T>(&unit, topk, group)))?;
        Tensor::from_slice(&found, &[self.dim(0), topk])
    }
}

/// In the norm, the difference and the logarithm, as the reference has it.
const EPS: f64 = 1e-8;
/// Rows of a tile of similarities, and rows that a task handles.
const ROWS: usize = 128;
/// Columns of a tile of similarities.
const COLUMNS: usize = 512;

fn unit_rows(x: &Tensor) -> Result<Tensor> {
    x.cast(x.dtype().wide())?.l2_normalize(EPS)
}

struct NeighbourDistance {
    topk: usize,
    group: usize,
    saved: Option<Saved>,
}

struct Saved {
    /// The normalised rows.
    unit: Tensor,
    /// Neighbours of every row: `[rows, topk]`, u32.
    neighbours: Tensor,
    /// `g` of every row and neighbour.
    slopes: Tensor,
}

/// The rows of a group in which [`Tensor::neighbour_distance`] looks for `topk` neighbours, of `rows` in all; or why there are none.
pub fn neighbour_group(rows: usize, topk: usize, group: Option<usize>) -> Result<usize, String> {
    let group = group.unwrap_or(rows);
    if topk == 0 || group <= topk {
        return Err(format!(
            "{topk} neighbours need groups of at least {} rows, and a group has {group}",
            topk.max(1) + 1
        ));
    }
    if !rows.is_multiple_of(group) {
        return Err(format!("{rows} rows cannot be split into groups of {group}"));
    }
    Ok(group)
}

fn group_size(x: &Tensor, topk: usize, group: Option<usize>) -> Result<usize> {
    let &[rows, _] = x.shape() else {
        return Err(Error::shape("neighbour_distance", format!("features {:?}, expected [rows, D]", x.shape())));
    };
    neighbour_group(rows, topk, group).map_err(|problem| Error::shape("neighbour_distance", problem))
}

/// For every row the `topk` other rows of its group with the greatest dot product.
fn neighbours<T: Real>(unit: &Tensor, topk: usize, group: usize) -> Vec<u32> {
    let (rows, d, x) = (unit.dim(0), unit.dim(1), unit.as_slice::<T>());
    let mut found = vec![0u32; rows * topk];
    found.par_chunks_mut(group * topk).enumerate().for_each(|(g, found)| {
        let first = g * group;
        let x = &x[first * d..][..group * d];
        found.par_chunks_mut(ROWS * topk).enumerate().for_each(|(block, found)| {
            let (start, height) = (block * ROWS, found.len() / topk);
            let rows = Mat::new(&x[start * d..], height, d);
            let mut tile = vec![T::ZERO; height * COLUMNS.min(group)];
            let mut best = vec![T::NEG_INF; height * topk];
            for column in (0..group).step_by(COLUMNS) {
                let width = COLUMNS.min(group - column);
                product(&mut tile, width, false, T::ONE, rows, Mat::new(&x[column * d..], width, d).t(), Threads::One);
                for i in 0..height {
                    let (best, found) = (&mut best[i * topk..][..topk], &mut found[i * topk..][..topk]);
                    for (j, &dot) in tile[i * width..][..width].iter().enumerate() {
                        if dot > best[topk - 1] && column + j != start + i {
                            insert(best, found, dot, (first + column + j) as u32);
                        }
                    }
                }
            }
        });
    });
    found
}

/// Puts `(dot, row)` in its place of a list in descending order, after its equals; the last entry falls out.
fn insert<T: Real>(best: &mut [T], found: &mut [u32], dot: T, row: u32) {
    let mut at = best.len() - 1;
    while at > 0 && dot > best[at - 1] {
        (best[at], found[at]) = (best[at - 1], found[at - 1]);
        at -= 1;
    }
    (best[at], found[at]) = (dot, row);
}

impl Op for NeighbourDistance {
    fn name(&self) -> &'static str {
        "neighbour_distance"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (unit, topk) = (inputs[0], self.topk);
        let (rows, d) = (unit.dim(0), unit.dim(1));
        if let Some(gpu) = unit.gpu() {
            let Found { values, neighbours, slopes } = Found::on(gpu, unit, topk, self.group)?;
            if save {
                self.saved = Some(Saved { unit: unit.detach(), neighbours, slopes });
            }
            return Ok(values);
        }
        let mut out = Tensor::uninit(&[rows], unit.dtype());
        let mut slopes = Tensor::uninit(&[rows, topk], unit.dtype());
        let neighbours = dispatch_real!("neighbour_distance", unit.dtype(), T => {
            let (eps, share) = (T::of(EPS), T::of(1.0 / topk as f64));
            let neighbours = neighbours::<T>(unit, topk, self.group);
            let x = unit.as_slice::<T>();
            let found = out.as_mut_slice::<T>().par_iter_mut().zip(neighbours.par_chunks(topk));
            let rows = found.zip(slopes.as_mut_slice::<T>().par_chunks_mut(topk)).enumerate().with_min_len(16);
            rows.for_each(|(i, ((value, neighbours), slopes))| {
                *value = T::ZERO;
                for (&n, slope) in neighbours.iter().zip(slopes) {
                    let (a, b) = (&x[i * d..][..d], &x[n as usize * d..][..d]);
                    let squared = simd!(T, lane_sum([a, b], |[a, b]| {
                        let e = a - b + eps;
                        e * e
                    }));
                    let distance = squared.sqrt();
                    *value -= share * (distance + eps).ln();
                    // The norm's derivative at 0 is taken as 0.
                    let inverse = if distance > T::ZERO { T::ONE / distance } else { T::ZERO };
                    *slope = -share * inverse / (distance + eps);
                }
            });
            Ok(neighbours)
        })?;
        if save {
            let neighbours = Tensor::from_slice(&neighbours, &[rows, topk])?;
            self.saved = Some(Saved { unit: unit.detach(), neighbours, slopes });
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Saved { unit, neighbours, slopes } = self.saved.expect("saved by forward");
        let (rows, d, topk) = (unit.dim(0), unit.dim(1), self.topk);
        if let Some(gpu) = unit.gpu() {
            let mut dx = Tensor::uninit(unit.shape(), DType::F32);
            let launch =
                gpu.kernel(&NEIGHBOURS, "neighbour_distance_backward", DType::F32)?.grid((rows, d.div_ceil(256)), 256);
            let (group, topk, d) = (self.group as i32, topk as i32, d as i32);
            launch.launch(args![&mut dx, &dy, &unit, &neighbours, &slopes, group, topk, d])?;
            return grads.add(0, dx);
        }
        let neighbours = neighbours.as_slice::<u32>();
        // Who has row n as a neighbour: entries `start[n]..start[n + 1]` of `incoming`.
        let mut start = vec![0usize; rows + 1];
        neighbours.iter().for_each(|&n| start[n as usize + 1] += 1);
        (0..rows).for_each(|n| start[n + 1] += start[n]);
        let (mut next, mut incoming) = (start.clone(), vec![0usize; neighbours.len()]);
        for (edge, &n) in neighbours.iter().enumerate() {
            incoming[next[n as usize]] = edge;
            next[n as usize] += 1;
        }
        let mut dx = Tensor::zeros(unit.shape(), unit.dtype());
        dispatch_real!("neighbour_distance", unit.dtype(), T => {
            let (x, dy, slopes, eps) = (unit.as_slice::<T>(), dy.as_slice::<T>(), slopes.as_slice::<T>(), T::of(EPS));
            let row = |i: usize| &x[i * d..][..d];
            dx.as_mut_slice::<T>().par_chunks_mut(d.max(1)).enumerate().with_min_len(16).for_each(|(i, dx)| simd!(T, {
                for edge in i * topk..(i + 1) * topk {
                    let g = dy[i] * slopes[edge];
                    let pair = row(i).iter().zip(row(neighbours[edge] as usize));
                    dx.iter_mut().zip(pair).for_each(|(dx, (&a, &b))| *dx += g * (a - b + eps));
                }
                for &edge in &incoming[start[i]..start[i + 1]] {
                    let from = edge / topk;
                    let g = dy[from] * slopes[edge];
                    let pair = row(from).iter().zip(row(i));
                    dx.iter_mut().zip(pair).for_each(|(dx, (&a, &b))| *dx -= g * (a - b + eps));
                }
            }));
            grads.add(0, dx)
        })
    }
}

/// What the kernel finds: `-ln` of distances, neighbours and slopes of every row.
struct Found {
    values: Tensor,
    neighbours: Tensor,
    slopes: Tensor,
}

impl Found {
    fn on(gpu: &'static Gpu, unit: &Tensor, topk: usize, group: usize) -> Result<Self> {
        let (rows, d) = (unit.dim(0), unit.dim(1));
        // Similarities within the groups.
        let dots = Tensor::uninit(&[rows, group], DType::F32);
        let features = Matrix::of(unit, group, d);
        let product = Product::new(features, features.t(), Matrix::of(&dots, group, group));
        gpu.matmul(&Product { batch: rows / group, ..product })?;
        let mut found = Self {
            values: Tensor::uninit(&[rows], DType::F32),
            neighbours: Tensor::uninit(&[rows, topk], DType::U32),
            slopes: Tensor::uninit(&[rows, topk], DType::F32),
        };
        let Self { values, neighbours, slopes } = &mut found;
        let [group, topk, rows_, d] = [group, topk, rows, d].map(|n| n as i32);
        let launch = gpu.kernel(&NEIGHBOURS, "neighbour_distance", DType::F32)?.rows(rows);
        launch.launch(args![values, neighbours, slopes, &dots, unit, group, topk, rows_, d])?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tape;
    use crate::DType;

    #[test]
    fn neighbours_stay_in_their_group_and_equals_come_in_order() {
        let x = Tensor::from_slice(&[1.0f32, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.1, 1.0, 1.0, 1.0], &[6, 2]).unwrap();
        let found = |topk, group| x.nearest_neighbours(topk, group).unwrap().as_slice::<u32>().to_vec();
        assert_eq!(found(1, Some(3)), [1, 0, 0, 4, 3, 4]);
        assert_eq!(found(2, None), [1, 2, 0, 2, 0, 1, 4, 5, 3, 5, 4, 0]);
    }

    #[test]
    fn neighbours_are_found_across_tiles() {
        // Unit vectors on a quarter circle, one row after the other: the neighbours are the rows next to it.
        let n = 1100;
        let angles = (0..n).map(|i| f64::from(i) * 1e-3 + f64::from(i * i) * 1e-9);
        let x: Vec<f64> = angles.flat_map(|a| [a.cos(), a.sin()]).collect();
        let found = Tensor::from_slice(&x, &[n as usize, 2]).unwrap().nearest_neighbours(1, None).unwrap();
        let expected: Vec<u32> = (0..n as u32).map(|i| i.checked_sub(1).unwrap_or(1)).collect();
        assert_eq!(found.as_slice::<u32>(), expected);
    }

    #[test]
    fn exact_duplicates_give_a_finite_value_and_gradient() {
        let tape = Tape::new();
        let x = tape.leaf(&Tensor::from_slice(&[1.0f32, 2.0, 1.0, 2.0, -3.0, 1.0, -3.0, 1.0], &[4, 2]).unwrap());
        let loss = x.neighbour_distance(1, None).unwrap().mean().unwrap();
        // d = sqrt(2) 1e-8.
        assert!((loss.item() + (2.0f64.sqrt() * 1e-8 + 1e-8).ln()).abs() < 1e-5, "{}", loss.item());
        let grads = tape.backward(&loss, 1.0, None).unwrap();
        assert!(grads.of(&x).unwrap().to_f64_vec().iter().all(|g| g.is_finite()));
    }

    #[test]
    fn a_group_without_enough_rows_is_an_error() {
        let x = Tensor::zeros(&[6, 2], DType::F32);
        assert!(
            x.neighbour_distance(3, Some(3)).is_err()
                && x.neighbour_distance(1, Some(4)).is_err()
                && x.neighbour_distance(2, Some(3)).is_ok()
        );
    }
}
