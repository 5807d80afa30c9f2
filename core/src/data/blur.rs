//! Gaussian blur of planar 8-bit values: torchvision's with a kernel of 9, as two passes of one dimension.

use crate::simd;
use crate::tensor::parallel::map_array;

/// Taps on either side of the centre.
const RADIUS: usize = 4;
/// Every tap's distance from the first.
const SHIFTS: [usize; 2 * RADIUS + 1] = [0, 1, 2, 3, 4, 5, 6, 7, 8];

/// Blurs the square planes `[channels, side, side]` with standard deviation `sigma` (pixels) and rounds to whole
/// numbers. Beyond the border the image is mirrored without repeating the border. `scratch` is reused between calls.
pub(super) fn gaussian_blur(pixels: &mut [f32], side: usize, sigma: f32, scratch: &mut Vec<f32>) {
    let taps = taps(sigma);
    scratch.resize(side * side + side + 2 * RADIUS, 0.0);
    let (rows, padded) = scratch.split_at_mut(side * side);
    for plane in pixels.chunks_exact_mut(side * side) {
        simd!(f32, {
            for (row, out) in plane.chunks_exact(side).zip(rows.chunks_exact_mut(side)) {
                pad(row, padded);
                weigh(&taps, map_array(SHIFTS, |i| &padded[i..i + side]), out);
            }
            for (y, out) in plane.chunks_exact_mut(side).enumerate() {
                let shifted = map_array(SHIFTS, |i| {
                    let y = mirror(y as isize + i as isize - RADIUS as isize, side);
                    &rows[y * side..(y + 1) * side]
                });
                weigh(&taps, shifted, out);
                out.iter_mut().for_each(|x| *x = x.round_ties_even());
            }
        });
    }
}

/// `taps[0]` is the centre, `taps[i]` the weight at distance `i`; all nine sum to 1.
pub(super) fn taps(sigma: f32) -> [f32; RADIUS + 1] {
    let sigma = f64::from(sigma);
    let raw: [f64; RADIUS + 1] = std::array::from_fn(|i| (-0.5 * (i as f64 / sigma).powi(2)).exp());
    let sum = 2.0 * raw.iter().sum::<f64>() - raw[0];
    raw.map(|x| (x / sum) as f32)
}

#[inline(always)]
fn weigh(taps: &[f32; RADIUS + 1], shifted: [&[f32]; 2 * RADIUS + 1], out: &mut [f32]) {
    let n = out.len();
    let [a, b, c, d, e, f, g, h, i] = map_array(shifted, |s| &s[..n]);
    for x in 0..n {
        out[x] = taps[0] * e[x]
            + taps[1] * (d[x] + f[x])
            + taps[2] * (c[x] + g[x])
            + taps[3] * (b[x] + h[x])
            + taps[4] * (a[x] + i[x]);
    }
}

#[inline(always)]
fn pad(row: &[f32], padded: &mut [f32]) {
    let n = row.len();
    padded[RADIUS..RADIUS + n].copy_from_slice(row);
    for i in 1..=RADIUS {
        padded[RADIUS - i] = row[mirror(-(i as isize), n)];
        padded[RADIUS + n - 1 + i] = row[mirror((n - 1 + i) as isize, n)];
    }
}

/// Index `i` mirrored at both ends of `0..n` as often as needed.
#[inline(always)]
fn mirror(i: isize, n: usize) -> usize {
    let last = n as isize - 1;
    if last == 0 {
        return 0;
    }
    let i = i.rem_euclid(2 * last);
    i.min(2 * last - i) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blur_equals_the_two_dimensional_sum() {
        let side = 13;
        let image: Vec<f32> = (0..side * side).map(|i| ((i * 7919) % 256) as f32).collect();
        let mut rng = crate::rng::Rng::new(1, crate::rng::Stream::Augment, 0, 0);
        for _ in 0..5 {
            let sigma = rng.uniform(0.1, 2.0) as f32;
            let mut blurred = image.clone();
            gaussian_blur(&mut blurred, side, sigma, &mut Vec::new());
            let kernel = |d: isize| (-0.5 * (d as f64 / f64::from(sigma)).powi(2)).exp();
            let sum: f64 = (-4..=4).map(kernel).sum();
            for y in 0..side {
                for x in 0..side {
                    let mut expected = 0.0;
                    for dy in -4..=4 {
                        for dx in -4..=4 {
                            let at = |v: usize, d: isize| {
                                let v = (v as isize + d).abs();
                                v.min(2 * (side as isize - 1) - v) as usize
                            };
                            let value = f64::from(image[at(y, dy) * side + at(x, dx)]);
                            expected += kernel(dy) * kernel(dx) / (sum * sum) * value;
                        }
                    }
                    let got = f64::from(blurred[y * side + x]);
                    assert!((got - expected).abs() <= 0.5001, "sigma {sigma} at {x},{y}: {got}, {expected}");
                }
            }
        }
    }

    #[test]
    fn a_crop_smaller_than_the_kernel_is_blurred_too() {
        let mut one = vec![100.0; 3];
        gaussian_blur(&mut one, 1, 2.0, &mut Vec::new());
        assert_eq!(one, [100.0; 3]);
        let mut two = vec![0.0, 200.0, 0.0, 200.0];
        gaussian_blur(&mut two, 2, 2.0, &mut Vec::new());
        assert!(two.iter().all(|&x| x > 80.0 && x < 120.0), "{two:?}");
    }
}
