//! Resize of patch features: bicubic for the larger grid of a teacher's crops, bilinear for backbones with another stride.
//!
//! Cubic convolution: Keys, "Cubic convolution interpolation for digital image processing" (1981).

use crate::cuda::{args, Arg, Gpu};
use crate::tensor::blocks::*;
use crate::tensor::parallel::with_scratch;
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { static RESAMPLE = "resample" { include_str!("resample.cu") } }

impl Tensor {
    /// Patches on another grid: `[B, h * w, D]` to `[B, h2 * w2, D]`, as `torch.nn.functional.interpolate` with
    /// `mode="bicubic", align_corners=False`.
    ///
    /// Without `antialias`: a = -0.75, four taps an axis, taps outside the grid use its border. With: a = -0.5, the
    /// kernel is widened by the factor of shrinking, taps outside are left out and the rest renormalised.
    /// The map is linear in the features; its gradient is the transpose.
    ///
    /// # Errors
    /// If the shape is not `[B, h * w, D]`, or a side is 0.
    pub fn resize_bicubic(&self, from: (usize, usize), to: (usize, usize), antialias: bool) -> Result<Tensor> {
        self.resize("resize_bicubic", from, to, Filter::Cubic { antialias })
    }

    /// Patches on another grid: `[B, h * w, D]` to `[B, h2 * w2, D]`, as `torch.nn.functional.interpolate` with
    /// `mode="bilinear", align_corners=False, antialias=True`.
    ///
    /// # Errors
    /// If the shape is not `[B, h * w, D]`, or a side is 0.
    pub fn resize_bilinear(&self, from: (usize, usize), to: (usize, usize)) -> Result<Tensor> {
        self.resize("resize_bilinear", from, to, Filter::Triangle)
    }

    fn resize(&self, name: &'static str, from: (usize, usize), to: (usize, usize), filter: Filter) -> Result<Tensor> {
        let sides = [from.0, from.1, to.0, to.1];
        if self.rank() != 3 || self.dim(1) != from.0 * from.1 || sides.contains(&0) {
            let problem = format!("{:?} from grid {from:?} to {to:?}: expected [B, h * w, D]", self.shape());
            return Err(Error::shape(name, problem));
        }
        let axes = Axes { rows: Taps::new(from.0, to.0, filter), columns: Taps::new(from.1, to.1, filter) };
        Resize { name, axes }.apply(&[self])
    }
}

/// How inputs are weighted by their distance.
#[derive(Clone, Copy)]
enum Filter {
    /// Keys' kernel.
    Cubic { antialias: bool },
    /// `1 - |x|`, anti-aliased.
    Triangle,
}

/// One axis of the map as a sparse matrix: for every output the inputs it sees, with their weights.
struct Taps {
    inputs: usize,
    taps: Vec<Vec<(usize, f64)>>,
}

/// Keys' kernel: support [-2, 2], slope `a` at 1.
fn cubic(x: f64, a: f64) -> f64 {
    match x.abs() {
        x if x < 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
        x if x < 2.0 => ((x - 5.0) * x + 8.0) * a * x - 4.0 * a,
        _ => 0.0,
    }
}

impl Taps {
    fn new(inputs: usize, outputs: usize, filter: Filter) -> Self {
        let scale = inputs as f64 / outputs as f64;
        let antialias = !matches!(filter, Filter::Cubic { antialias: false });
        let stretch = if antialias { scale.max(1.0) } else { 1.0 };
        let kernel = |x: f64| match filter {
            Filter::Cubic { antialias } => cubic(x, if antialias { -0.5 } else { -0.75 }),
            Filter::Triangle => (1.0 - x.abs()).max(0.0),
        };
        let taps = (0..outputs).map(|i| {
            // The centre of output i, where input j has its centre at j.
            let center = (i as f64 + 0.5) * scale - 0.5;
            let support = 2.0 * stretch;
            let (first, last) = ((center - support).floor() as i64, (center + support).ceil() as i64);
            let mut taps: Vec<(usize, f64)> = Vec::new();
            for j in first..=last {
                let weight = kernel((j as f64 - center) / stretch);
                let inside = j.clamp(0, inputs as i64 - 1);
                if weight == 0.0 || (antialias && inside != j) {
                    continue;
                }
                match taps.last_mut() {
                    Some((at, sum)) if *at == inside as usize => *sum += weight,
                    _ => taps.push((inside as usize, weight)),
                }
            }
            // Without antialiasing the weights sum to 1 as they are.
            let total: f64 = taps.iter().map(|(_, w)| w).sum();
            taps.iter_mut().for_each(|(_, w)| *w /= total);
            taps
        });
        Self { inputs, taps: taps.collect() }
    }

    fn transpose(&self) -> Self {
        let mut taps = vec![Vec::new(); self.inputs];
        for (i, row) in self.taps.iter().enumerate() {
            row.iter().for_each(|&(j, weight)| taps[j].push((i, weight)));
        }
        Self { inputs: self.taps.len(), taps }
    }
}

/// The two axes of the map; the features go through the rows first.
struct Axes {
    rows: Taps,
    columns: Taps,
}

impl Axes {
    fn run<T: Real>(&self, x: &[T], d: usize, out: &mut [T]) {
        let (h, w) = (self.rows.inputs, self.columns.inputs);
        let (h2, w2) = (self.rows.taps.len(), self.columns.taps.len());
        // One output row of one image a task: mix the input rows it sees, then the columns of the mixture.
        out.par_chunks_mut(w2 * d).enumerate().for_each(|(row, out)| {
            let image = &x[row / h2 * h * w * d..][..h * w * d];
            with_scratch(w * d, |mixed: &mut [T]| {
                simd!(T, {
                    mix(mixed, image, w * d, &self.rows.taps[row % h2]);
                    for (out, taps) in out.chunks_exact_mut(d).zip(&self.columns.taps) {
                        mix(out, mixed, d, taps);
                    }
                });
            });
        });
    }
}

/// An axis on a GPU, and the kernel's `Axis` that points to it.
struct DeviceTaps {
    _tables: [Tensor; 3],
    axis: Arg,
}

impl DeviceTaps {
    fn new(taps: &Taps) -> Result<Self> {
        let mut starts = vec![0u32];
        starts.extend(taps.taps.iter().scan(0, |end, t| {
            *end += t.len() as u32;
            Some(*end)
        }));
        let entries = || taps.taps.iter().flatten();
        let from: Vec<u32> = entries().map(|t| t.0 as u32).collect();
        let weight: Vec<f32> = entries().map(|t| t.1 as f32).collect();
        let tables = [
            Tensor::from_slice(&starts, &[starts.len()])?,
            Tensor::from_slice(&from, &[from.len()])?,
            Tensor::from_slice(&weight, &[weight.len()])?,
        ];
        let [starts, from, weight] = [0, 1, 2].map(|i| tables[i].device_address());
        let sizes = taps.inputs as u64 | (taps.taps.len() as u64) << 32;
        Ok(Self { axis: Arg::plain([starts, from, weight, sizes]), _tables: tables })
    }
}

impl Axes {
    fn run_on(&self, gpu: &'static Gpu, x: &Tensor, d: usize, out: &mut Tensor) -> Result<()> {
        let (rows, columns) = (DeviceTaps::new(&self.rows)?, DeviceTaps::new(&self.columns)?);
        let launch = gpu.kernel(&RESAMPLE, "resample", x.dtype())?.grid(out.len() / d, 128);
        let bytes = ((x.len() + out.len()) * x.dtype().size()) as f64;
        launch.work(0.0, bytes).launch(args![out, x, &rows.axis, &columns.axis, d as i32])
    }
}

/// `out = sum of weight * x[tap]`, x in pieces of `width`.
#[inline(always)]
fn mix<T: Real>(out: &mut [T], x: &[T], width: usize, taps: &[(usize, f64)]) {
    out.fill(T::ZERO);
    for &(tap, weight) in taps {
        let weight = T::of(weight);
        out.iter_mut().zip(&x[tap * width..][..width]).for_each(|(o, &x)| *o += weight * x);
    }
}

struct Resize {
    name: &'static str,
    axes: Axes,
}

impl Op for Resize {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let x = inputs[0];
        let patches = self.axes.rows.taps.len() * self.axes.columns.taps.len();
        let mut out = Tensor::uninit(&[x.dim(0), patches, x.dim(2)], x.dtype());
        if let Some(gpu) = x.gpu() {
            self.axes.run_on(gpu, x, x.dim(2), &mut out)?;
            return Ok(out);
        }
        dispatch_real!(self.name, x.dtype(), T => {
            self.axes.run(x.as_slice::<T>(), x.dim(2), out.as_mut_slice::<T>());
            Ok(out)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let axes = Axes { rows: self.axes.rows.transpose(), columns: self.axes.columns.transpose() };
        let mut dx = Tensor::uninit(&[grads.input_len(0)], dy.dtype());
        if let Some(gpu) = dy.gpu() {
            axes.run_on(gpu, &dy, dy.last_dim(), &mut dx)?;
            return grads.add(0, dx);
        }
        dispatch_real!(self.name, dy.dtype(), T => {
            axes.run(dy.as_slice::<T>(), dy.last_dim(), dx.as_mut_slice::<T>());
            grads.add(0, dx)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resize_to_the_same_grid_changes_nothing() {
        let x: Vec<f64> = (0..2 * 12 * 3).map(|i| f64::from(i).sin()).collect();
        let x = Tensor::from_slice(&x, &[2, 12, 3]).unwrap();
        for antialias in [false, true] {
            assert_eq!(x.resize_bicubic((3, 4), (3, 4), antialias).unwrap().to_f64_vec(), x.to_f64_vec());
        }
    }

    #[test]
    fn constants_stay_constant() {
        let x = Tensor::full(&[1, 35, 2], crate::DType::F32, 3.0).unwrap();
        for (to, antialias) in [((2, 3), false), ((2, 3), true), ((11, 9), false), ((11, 9), true)] {
            let y = x.resize_bicubic((5, 7), to, antialias).unwrap();
            assert!(y.to_f64_vec().iter().all(|y| (y - 3.0).abs() < 1e-5));
            let y = x.resize_bilinear((5, 7), to).unwrap();
            assert!(y.to_f64_vec().iter().all(|y| (y - 3.0).abs() < 1e-5));
        }
    }

    #[test]
    fn halving_and_doubling_use_the_known_taps() {
        // Outputs lie half-way between inputs: the kernel at 1.5 and 0.5.
        let taps = &Taps::new(8, 4, Filter::Cubic { antialias: false }).taps[1];
        assert_eq!(taps[..], [(1, -0.09375), (2, 0.59375), (3, 0.59375), (4, -0.09375)]);
        // The triangle widened to two inputs, and the plain one at a quarter.
        assert_eq!(Taps::new(8, 4, Filter::Triangle).taps[1][..], [(1, 0.125), (2, 0.375), (3, 0.375), (4, 0.125)]);
        let taps = Taps::new(4, 8, Filter::Triangle).taps;
        assert_eq!((&taps[0][..], &taps[1][..]), (&[(0, 1.0)][..], &[(0, 0.75), (1, 0.25)][..]));
    }
}
