//! Depthwise convolution: every channel with a square kernel of its own, stride 1, zeros beyond the border
//! (Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545, uses 7x7).
//!
//! Over pixels p, channels c and the kernel's taps t: `y[p, c] = bias[c] + sum of w[c, t] x[p + t, c]` over t;
//! `dx[p, c] = sum of w[c, t] dy[p - t, c]`, `dw[c, t] = sum of dy[p, c] x[p + t, c]`, `dbias[c] = sum of dy[p, c]`.
//!
//! Channels are last, so that neighbours in memory go through the same tap: vectors run over channels.

use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::columns::sum_rows;
use crate::tensor::parallel::with_scratch;
use crate::tensor::{Grads, Op, Real};
use crate::{dispatch_real, simd, Error, Result, Tensor};

impl Tensor {
    /// Depthwise convolution of feature maps of `grid` (rows, columns): `[B, rows * columns, C]` with a weight
    /// `[C, 1, k, k]` (k odd) and a bias `[C]` to `[B, rows * columns, C]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn depthwise_conv(&self, grid: (usize, usize), weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let inputs = [self, weight, bias];
        same_dtype("depthwise_conv", &inputs)?;
        let (c, k) = (self.last_dim(), weight.last_dim());
        let fits = self.rank() == 3
            && self.dim(1) == grid.0 * grid.1
            && !self.is_empty()
            && weight.shape() == [c, 1, k, k]
            && k % 2 == 1
            && bias.shape() == [c];
        if !fits {
            let (x, w, b) = (self.shape(), weight.shape(), bias.shape());
            let problem = format!("x {x:?} of grid {grid:?}, weight {w:?}, bias {b:?}");
            return Err(Error::shape("depthwise_conv", problem));
        }
        let map = Map { images: self.dim(0), height: grid.0, width: grid.1, channels: c, kernel: k };
        DepthwiseConv { map, saved: None }.apply(&inputs)
    }
}

/// Sizes of the feature maps and of the kernel.
#[derive(Clone, Copy)]
struct Map {
    images: usize,
    height: usize,
    width: usize,
    channels: usize,
    kernel: usize,
}

struct DepthwiseConv {
    map: Map,
    /// x and the weight.
    saved: Option<(Tensor, Tensor)>,
}

/// Rows of an image that a task handles.
const ROWS: usize = 8;
/// Channels that are computed together.
const LANES: usize = 16;
/// Pixels of a row that share the loads of a tap's weights.
const PIXELS: usize = 4;

/// The weight `[C, k * k]` as `[k * k, C]`, or its gradient back.
fn transposed<T: Real>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
}

impl Map {
    /// Bands of [`ROWS`] rows in an image.
    fn bands(&self) -> usize {
        self.height.div_ceil(ROWS)
    }

    /// First row and rows of band `band` of all images.
    fn band(&self, band: usize) -> (usize, usize) {
        let first = band % self.bands() * ROWS;
        (first, ROWS.min(self.height - first))
    }

    /// The rows of `x` that band `band` sees, with zeros beyond the image: `[rows + k - 1, width + k - 1, C]`.
    fn padded<T: Real>(&self, x: &[T], band: usize, out: &mut [T]) {
        let (c, reach) = (self.channels, self.kernel / 2);
        let (first, _) = self.band(band);
        let image = &x[band / self.bands() * self.height * self.width * c..][..self.height * self.width * c];
        out.fill(T::ZERO);
        for (i, out) in out.chunks_exact_mut((self.width + self.kernel - 1) * c).enumerate() {
            let row = (first + i).checked_sub(reach).filter(|&row| row < self.height);
            if let Some(row) = row {
                out[reach * c..][..self.width * c].copy_from_slice(&image[row * self.width * c..][..self.width * c]);
            }
        }
    }

    /// Elements of [`padded`](Self::padded).
    fn padded_len(&self, band: usize) -> usize {
        let k = self.kernel - 1;
        (self.band(band).1 + k) * (self.width + k) * self.channels
    }

    /// The convolution of `x` with taps `[k * k, C]`, `start[c]` added, written or added to `out`.
    fn convolve<T: Real>(&self, x: &[T], taps: &[T], start: Option<&[T]>, out: &mut [T], add: bool) {
        let c = self.channels;
        // Bands of one image are of ROWS rows but the last, so `out` is cut by image first.
        let image = self.height * self.width * c;
        let mut bands: Vec<&mut [T]> =
            out.chunks_mut(image).flat_map(|i| i.chunks_mut(ROWS * self.width * c)).collect();
        bands.par_iter_mut().enumerate().for_each(|(band, out)| {
            with_scratch(self.padded_len(band), |padded: &mut [T]| {
                self.padded(x, band, padded);
                simd!(T, {
                    let mut channel = 0;
                    while channel < c {
                        let place = Place { channel, start, add };
                        let whole = channel + LANES <= c;
                        match (whole, self.width >= PIXELS) {
                            (true, true) => self.lanes::<T, LANES, PIXELS>(padded, taps, out, place),
                            (true, false) => self.lanes::<T, LANES, 1>(padded, taps, out, place),
                            (false, true) => self.lanes::<T, 1, PIXELS>(padded, taps, out, place),
                            (false, false) => self.lanes::<T, 1, 1>(padded, taps, out, place),
                        }
                        channel += if whole { LANES } else { 1 };
                    }
                });
            });
        });
    }

    /// `L` channels of one band, `P` pixels of a row at a time.
    #[inline(always)]
    fn lanes<T: Real, const L: usize, const P: usize>(
        &self,
        padded: &[T],
        taps: &[T],
        out: &mut [T],
        place: Place<'_, T>,
    ) {
        let (c, k, at) = (self.channels, self.kernel, place.channel);
        let stride = (self.width + k - 1) * c;
        let first = place.start.map_or([T::ZERO; L], |s| load(s, at));
        for (y, out) in out.chunks_exact_mut(self.width * c).enumerate() {
            let mut x = 0;
            while x < self.width {
                // The last group begins earlier, so that all are whole; what is computed twice is the same.
                let begin = x.min(self.width - P);
                let mut sums = [first; P];
                for dy in 0..k {
                    for dx in 0..k {
                        let w: [T; L] = load(taps, (dy * k + dx) * c + at);
                        let base = (y + dy) * stride + (begin + dx) * c + at;
                        for (p, sum) in sums.iter_mut().enumerate() {
                            let v: [T; L] = load(padded, base + p * c);
                            for l in 0..L {
                                sum[l] += v[l] * w[l];
                            }
                        }
                    }
                }
                // Pixels of the group that no earlier group has written.
                for p in x - begin..P {
                    let out = &mut out[(begin + p) * c + at..][..L];
                    for l in 0..L {
                        out[l] = if place.add { out[l] + sums[p][l] } else { sums[p][l] };
                    }
                }
                x = begin + P;
            }
        }
    }

    /// For every band its part of the gradient of the taps and of the bias: `[bands of all images, k * k + 1, C]`.
    fn weight_parts<T: Real>(&self, x: &[T], dy: &[T], parts: &mut [T]) {
        let (c, k) = (self.channels, self.kernel);
        parts.par_chunks_mut((k * k + 1) * c).enumerate().for_each(|(band, part)| {
            with_scratch(self.padded_len(band), |padded: &mut [T]| {
                self.padded(x, band, padded);
                let (first, rows) = self.band(band);
                let start = (band / self.bands() * self.height + first) * self.width * c;
                let dy = &dy[start..][..rows * self.width * c];
                simd!(T, {
                    part.fill(T::ZERO);
                    let (dw, db) = part.split_at_mut(k * k * c);
                    for (pixel, dy) in dy.chunks_exact(c).enumerate() {
                        let (y, x) = (pixel / self.width, pixel % self.width);
                        db.iter_mut().zip(dy).for_each(|(s, &g)| *s += g);
                        for (tap, dw) in dw.chunks_exact_mut(c).enumerate() {
                            let at = ((y + tap / k) * (self.width + k - 1) + x + tap % k) * c;
                            let seen = &padded[at..][..c];
                            for ((s, &g), &v) in dw.iter_mut().zip(dy).zip(seen) {
                                *s += g * v;
                            }
                        }
                    }
                });
            });
        });
    }
}

/// Which channels are computed, what they begin with, and whether they are added to what is there.
#[derive(Clone, Copy)]
struct Place<'a, T> {
    channel: usize,
    start: Option<&'a [T]>,
    add: bool,
}

#[inline(always)]
fn load<T: Real, const L: usize>(from: &[T], at: usize) -> [T; L] {
    from[at..at + L].try_into().expect("the slice has L elements")
}

impl Op for DepthwiseConv {
    fn name(&self) -> &'static str {
        "depthwise_conv"
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let [x, weight, bias] = inputs else { unreachable!("there are three inputs") };
        let map = self.map;
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        dispatch_real!("depthwise_conv", x.dtype(), T => {
            let taps = transposed(weight.as_slice::<T>(), map.channels, map.kernel * map.kernel);
            map.convolve(x.as_slice::<T>(), &taps, Some(bias.as_slice::<T>()), out.as_mut_slice::<T>(), false);
            Ok(())
        })?;
        if save {
            self.saved = Some((x.detach(), weight.detach()));
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (x, weight) = self.saved.expect("saved by forward");
        let map = self.map;
        let (c, taps) = (map.channels, map.kernel * map.kernel);
        dispatch_real!("depthwise_conv", dy.dtype(), T => {
            grads.accumulate(0, |mut dx| {
                // Reversed in both axes, the kernel leads from results back to inputs.
                let forward = transposed(weight.as_slice::<T>(), c, taps);
                let reversed: Vec<T> = forward.chunks_exact(c).rev().flatten().copied().collect();
                let add = dx.add;
                map.convolve(dy.as_slice::<T>(), &reversed, None, dx.as_mut_slice::<T>(), add);
                Ok(())
            })?;
            if !grads.needs(1) && !grads.needs(2) {
                return Ok(());
            }
            let mut parts = Tensor::uninit(&[map.images * map.bands(), (taps + 1) * c], dy.dtype());
            map.weight_parts(x.as_slice::<T>(), dy.as_slice::<T>(), parts.as_mut_slice::<T>());
            let mut sum = vec![T::ZERO; (taps + 1) * c];
            sum_rows(&mut sum, parts.as_slice::<T>(), false);
            let (dw, db) = sum.split_at(taps * c);
            for (i, grad) in [(1, transposed(dw, taps, c)), (2, db.to_vec())] {
                let len = grad.len();
                grads.add(i, Tensor::from_slice(&grad, &[len])?)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn a_kernel_of_one_tap_moves_the_map() {
        let x: Vec<f64> = (0..2 * 6).map(f64::from).collect();
        let x = Tensor::from_slice(&x, &[1, 6, 2]).unwrap();
        // Channel 0 looks one column to the right, channel 1 one row up.
        let mut w = [0.0; 18];
        (w[5], w[9 + 1]) = (1.0, 1.0);
        let (w, bias) =
            (Tensor::from_slice(&w, &[2, 1, 3, 3]).unwrap(), Tensor::from_slice(&[0.0, 0.5], &[2]).unwrap());
        let y = x.depthwise_conv((2, 3), &w, &bias).unwrap();
        assert_eq!(y.to_f64_vec(), [2.0, 0.5, 4.0, 0.5, 0.0, 0.5, 8.0, 1.5, 10.0, 3.5, 0.0, 5.5]);
    }

    #[test]
    fn an_even_kernel_is_an_error_that_shows_the_shapes() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, crate::DType::F32);
        let error = zeros(&[1, 6, 2]).depthwise_conv((2, 3), &zeros(&[2, 1, 2, 2]), &zeros(&[2])).unwrap_err();
        assert!(error.to_string().contains("[2, 1, 2, 2]"), "{error}");
    }
}
