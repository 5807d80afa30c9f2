//! Colour distortion with the formulas that torchvision uses on 8-bit images (Pillow's): every step rounds to whole
//! numbers in 0..=255. Values of 16 bits have the same formulas in 0..=65535.
//!
//! Pixels are planar: red, green and blue, each a whole number held in an f32, so that the loops vectorise. Of 8 bits, sums of
//! products below stay under 2^24, so f32 is exact where Pillow uses integers.
//!
//! Images of another number of channels have brightness and contrast, value by value: contrast is the distance to the mean of
//! all values.

use super::value::Value;
use crate::contract::{ColorPlan, Jitter, JitterOp};
use crate::simd;
use crate::tensor::parallel::map_array;

/// Applies `plan` to planar pixels `[channels, n]`.
pub(super) fn distort<V: Value>(pixels: &mut [f32], channels: usize, plan: &ColorPlan) {
    if let Some(jitter) = &plan.jitter {
        for &op in &jitter.order {
            match channels {
                3 => step::<V>(pixels, jitter, op),
                _ => step_of_values::<V>(pixels, jitter, op),
            }
        }
    }
    if plan.grey {
        each(
            pixels,
            #[inline(always)]
            |rgb| [luma::<V>(rgb); 3],
        );
    }
}

/// Inverts values of `threshold` (of 255) and more.
pub(super) fn solarize<V: Value>(pixels: &mut [f32], threshold: u8) {
    let threshold = f32::from(threshold) * (V::TOP / 255.0);
    simd!(f32, {
        for x in pixels {
            *x = if *x < threshold { *x } else { V::TOP - *x };
        }
    });
}

/// A step of the jitter of images that are not RGB: `ImagePlan::fault` has seen that saturation and hue change nothing.
fn step_of_values<V: Value>(pixels: &mut [f32], jitter: &Jitter, op: JitterOp) {
    let (base, factor) = match op {
        JitterOp::Brightness => (0.0, jitter.brightness),
        JitterOp::Contrast => {
            let sum: f64 = pixels.iter().map(|&x| f64::from(x)).sum();
            ((sum / pixels.len() as f64 + 0.5).floor() as f32, jitter.contrast)
        }
        JitterOp::Saturation | JitterOp::Hue => return,
    };
    simd!(f32, pixels.iter_mut().for_each(|x| *x = blend::<V>(base, *x, factor)));
}

fn step<V: Value>(pixels: &mut [f32], jitter: &Jitter, op: JitterOp) {
    match op {
        JitterOp::Brightness => each(
            pixels,
            #[inline(always)]
            |rgb| map_array(rgb, |x| blend::<V>(0.0, x, jitter.brightness)),
        ),
        JitterOp::Contrast => {
            let grey = (mean_luma::<V>(pixels) + 0.5).floor() as f32;
            each(
                pixels,
                #[inline(always)]
                |rgb| map_array(rgb, |x| blend::<V>(grey, x, jitter.contrast)),
            );
        }
        JitterOp::Saturation => each(
            pixels,
            #[inline(always)]
            |rgb| {
                let grey = luma::<V>(rgb);
                map_array(rgb, |x| blend::<V>(grey, x, jitter.saturation))
            },
        ),
        JitterOp::Hue => {
            let shift = jitter.hue_shift() * (V::TOP / 255.0);
            if shift != 0.0 {
                each(
                    pixels,
                    #[inline(always)]
                    |rgb| turn_hue::<V>(rgb, shift),
                );
            }
        }
    }
}

/// `f` of every pixel.
#[inline(always)]
fn each(pixels: &mut [f32], f: impl Fn([f32; 3]) -> [f32; 3]) {
    let n = pixels.len() / 3;
    let (red, rest) = pixels.split_at_mut(n);
    let (green, blue) = rest.split_at_mut(n);
    simd!(f32, {
        for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
            [*r, *g, *b] = f([*r, *g, *b]);
        }
    });
}

/// From `base` (factor 0) to `x` (factor 1) and beyond, cut to 0..=255 (65535).
#[inline(always)]
fn blend<V: Value>(base: f32, x: f32, factor: f32) -> f32 {
    (base + factor * (x - base)).clamp(0.0, V::TOP).floor()
}

/// Grey value: ITU-R 601-2 luma in 16-bit fixed point.
#[inline(always)]
fn luma<V: Value>([r, g, b]: [f32; 3]) -> f32 {
    if V::TOP > 255.0 {
        let [r, g, b] = map_array([r, g, b], f64::from);
        return ((19595.0 * r + 38470.0 * g + 7471.0 * b + 32768.0) * (1.0 / 65536.0)).floor() as f32;
    }
    ((19595.0 * r + 38470.0 * g + 7471.0 * b + 32768.0) * (1.0 / 65536.0)).floor()
}

fn mean_luma<V: Value>(pixels: &[f32]) -> f64 {
    const LANES: usize = 16;
    // Blocks so short that the f32 sums of whole numbers are exact.
    let block = if V::TOP > 255.0 { 256 } else { 4096 };
    let n = pixels.len() / 3;
    let (red, rest) = pixels.split_at(n);
    let (green, blue) = rest.split_at(n);
    let sum = simd!(f32, {
        let mut total = 0.0f64;
        for ((r, g), b) in red.chunks(block).zip(green.chunks(block)).zip(blue.chunks(block)) {
            let mut lanes = [0.0f32; LANES];
            let wide = r.chunks_exact(LANES).zip(g.chunks_exact(LANES)).zip(b.chunks_exact(LANES));
            for ((r, g), b) in wide {
                for i in 0..LANES {
                    lanes[i] += luma::<V>([r[i], g[i], b[i]]);
                }
            }
            for i in r.len() / LANES * LANES..r.len() {
                lanes[0] += luma::<V>([r[i], g[i], b[i]]);
            }
            total += f64::from(lanes.iter().sum::<f32>());
        }
        total
    });
    sum / n as f64
}

/// To hue, saturation and value of as many bits, saturation and value, `shift` added to the hue, and back.
///
/// Colours often lie on the border between two hues of 8 bits, so the way there rounds exactly where Pillow does.
#[inline(always)]
fn turn_hue<V: Value>([r, g, b]: [f32; 3], shift: f32) -> [f32; 3] {
    let top = V::TOP;
    let max = r.max(g).max(b);
    let range = max - r.min(g).min(b);
    let saturation = (f64::from(range / max.max(1.0)) * f64::from(top)).floor() as f32;
    // Sixths of a turn from red; a grey pixel (range 0) has saturation 0, so its hue does not matter.
    let [red, green, blue] = map_array([r, g, b], |x| (max - x) / range.max(1.0));
    let (sector, plus, minus) = if r == max {
        (0.0, blue, green)
    } else if g == max {
        (2.0, red, blue)
    } else {
        (4.0, green, red)
    };
    let sixths = (sector + f64::from(plus) - f64::from(minus)) as f32;
    let turns = f64::from(sixths) * (1.0 / 6.0) + 1.0;
    let turns = (turns - turns.floor()) as f32;
    let hue = (f64::from(turns) * f64::from(top)).floor() as f32 + shift;
    let hue = if hue < 0.0 { hue + (top + 1.0) } else { hue };
    let hue = if hue > top { hue - (top + 1.0) } else { hue };

    let sixths = hue * (6.0 / top);
    let chroma = max * saturation * (1.0 / top);
    map_array([5.0, 3.0, 1.0], |offset| {
        let k = offset + sixths;
        let k = if k >= 6.0 { k - 6.0 } else { k };
        (max - chroma * k.min(4.0 - k).clamp(0.0, 1.0) + 0.5).floor()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pixels() -> Vec<[u8; 3]> {
        let levels = [0u8, 1, 17, 60, 127, 128, 200, 254, 255];
        let mut all = Vec::new();
        for r in levels {
            for g in levels {
                for b in levels {
                    all.push([r, g, b]);
                }
            }
        }
        all
    }

    fn planar(pixels: &[[u8; 3]]) -> Vec<f32> {
        (0..3).flat_map(|c| pixels.iter().map(move |p| f32::from(p[c]))).collect()
    }

    fn run(jitter: Jitter, op: JitterOp) -> Vec<f32> {
        let mut planes = planar(&pixels());
        step::<u8>(&mut planes, &jitter, op);
        planes
    }

    const NEUTRAL: Jitter = Jitter {
        order: [JitterOp::Brightness, JitterOp::Contrast, JitterOp::Saturation, JitterOp::Hue],
        brightness: 1.0,
        contrast: 1.0,
        saturation: 1.0,
        hue: 0.0,
    };

    #[test]
    fn neutral_factors_change_nothing() {
        for op in NEUTRAL.order {
            assert_eq!(run(NEUTRAL, op), planar(&pixels()), "{op:?}");
        }
    }

    #[test]
    fn blending_equals_integer_formulas_of_pillow() {
        let pixels = pixels();
        let grey = |p: &[u8; 3]| (p[0] as u32 * 19595 + p[1] as u32 * 38470 + p[2] as u32 * 7471 + 0x8000) >> 16;
        let mean = pixels.iter().map(grey).sum::<u32>() as f64 / pixels.len() as f64;
        let mean = (mean + 0.5) as i32;
        for factor in [0.6f32, 0.83, 1.17, 1.4] {
            let out = |base: i32, x: u8| (base as f32 + factor * (x as i32 - base) as f32).clamp(0.0, 255.0) as u8;
            let jitter = Jitter { brightness: factor, contrast: factor, saturation: factor, ..NEUTRAL };
            let expect = |base: &dyn Fn(&[u8; 3]) -> i32| {
                planar(&pixels.iter().map(|p| p.map(|x| out(base(p), x))).collect::<Vec<_>>())
            };
            assert_eq!(run(jitter, JitterOp::Brightness), expect(&|_| 0), "brightness {factor}");
            assert_eq!(run(jitter, JitterOp::Contrast), expect(&|_| mean), "contrast {factor}");
            assert_eq!(run(jitter, JitterOp::Saturation), expect(&|p| grey(p) as i32), "saturation {factor}");
        }
    }

    /// Values of 16 bits that lie 257 apart are those of 8 bits.
    #[test]
    fn every_operation_on_16_bits_is_that_on_8_bits_to_within_rounding() {
        let eight = planar(&pixels());
        let factors = Jitter { brightness: 0.83, contrast: 1.17, saturation: 0.6, ..NEUTRAL };
        let jitters = NEUTRAL.order.map(|op| match op {
            JitterOp::Hue => (op, Jitter { hue: 0.1, ..NEUTRAL }),
            op => (op, factors),
        });
        for (op, jitter) in jitters {
            let (mut narrow, mut wide) = (eight.clone(), eight.iter().map(|x| 257.0 * x).collect::<Vec<f32>>());
            step::<u8>(&mut narrow, &jitter, op);
            step::<u16>(&mut wide, &jitter, op);
            // An 8-bit hue is one of 255, a degree and a half each.
            let most = if op == JitterOp::Hue { 16.0 } else { 2.0 };
            for (a, b) in narrow.iter().zip(&wide) {
                assert!((a - b / 257.0).abs() <= most, "{op:?}: {a}, {}", b / 257.0);
            }
        }
        let mut grey = vec![0.0, 100.0 * 257.0, 65535.0];
        solarize::<u16>(&mut grey, 100);
        assert_eq!(grey, [0.0, 65535.0 - 25700.0, 0.0]);
    }

    #[test]
    fn two_channels_have_brightness_and_the_distance_to_the_mean_of_all_values() {
        let jitter = Jitter { brightness: 0.5, contrast: 2.0, ..NEUTRAL };
        let plan = ColorPlan { jitter: Some(jitter), grey: false };
        let mut planes = vec![100.0, 110.0, 150.0, 160.0];
        distort::<u8>(&mut planes, 2, &plan);
        // Halved they are 50, 55, 75 and 80, of mean 65.
        assert_eq!(planes, [35.0, 45.0, 85.0, 95.0]);
    }

    /// Pillow's conversions with its mixture of float and double, one sector after the other.
    fn turn_hue_by_sectors(p: [u8; 3], shift: i32) -> [u8; 3] {
        let (max, min) = (*p.iter().max().unwrap(), *p.iter().min().unwrap());
        if max == min {
            return p;
        }
        let range = f32::from(max - min);
        let [r, g, b] = p.map(|x| f32::from(max - x) / range);
        let sixths = if p[0] == max {
            b - g
        } else if p[1] == max {
            (2.0 + f64::from(r) - f64::from(b)) as f32
        } else {
            (4.0 + f64::from(g) - f64::from(r)) as f32
        };
        let turns = ((f64::from(sixths) / 6.0 + 1.0) % 1.0) as f32;
        let hue = (f64::from(turns) * 255.0) as i32;
        let saturation = (f64::from(range / f32::from(max)) * 255.0) as i32;

        let hue = f64::from((hue + shift).rem_euclid(256)) * 6.0 / 255.0;
        let sector = hue.floor();
        let f = f64::from((hue - sector) as f32);
        let (v, s) = (f64::from(max), f64::from((f64::from(saturation) / 255.0) as f32));
        let value = |x: f64| x.round() as u8;
        let (p, q, t) = (value(v * (1.0 - s)), value(v * (1.0 - s * f)), value(v * (1.0 - s * (1.0 - f))));
        match sector as i32 % 6 {
            0 => [max, t, p],
            1 => [q, max, p],
            2 => [p, max, t],
            3 => [p, q, max],
            4 => [t, p, max],
            _ => [max, p, q],
        }
    }

    #[test]
    fn hue_equals_the_conversion_by_sectors() {
        let pixels = pixels();
        for hue in [-0.1, -0.03, 0.05, 0.1] {
            let out = run(Jitter { hue, ..NEUTRAL }, JitterOp::Hue);
            let shift = (hue * 255.0) as i32;
            for (i, &p) in pixels.iter().enumerate() {
                let ours: Vec<f32> = (0..3).map(|c| out[c * pixels.len() + i]).collect();
                let theirs = turn_hue_by_sectors(p, shift).map(f32::from);
                assert!(ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() <= 1.0), "{p:?}: {ours:?}, {theirs:?}");
            }
            let same = |i: &usize| {
                let theirs = turn_hue_by_sectors(pixels[*i], shift);
                (0..3).all(|c| out[c * pixels.len() + i] == f32::from(theirs[c]))
            };
            let share = (0..pixels.len()).filter(same).count() as f64 / pixels.len() as f64;
            assert!(share > 0.99, "hue {hue}: only {share} of the pixels are equal");
        }
    }
}
