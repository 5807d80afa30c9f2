//! Branch-free `exp` and `erf` in f32, so that loops over them vectorise.

/// e^x. Range reduction to [-ln2/2, ln2/2] and a degree-6 polynomial (the Cephes `expf` scheme);
/// relative error below 2e-7, clamped to the normal range.
#[inline(always)]
pub(crate) fn exp_f32(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first exact in few bits, so that n * LN2_HI is exact.
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let nan_or_inf = x;
    let x = if x > 88.722_83 { 88.722_83 } else { x };
    let x = if x < -87.336_54 { -87.336_54 } else { x };
    let n = x * LOG2_E + ROUND - ROUND;
    let r = x - n * LN2_HI - n * LN2_LO;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    // 2^n in two factors, so that n = 128 does not overflow before the product.
    let n = n as i32;
    let half = n >> 1;
    let scale = |k: i32| f32::from_bits(((k + 127) << 23) as u32);
    let y = y * scale(half) * scale(n - half);
    let y = if nan_or_inf < -103.972_08 { 0.0 } else { y };
    let y = if nan_or_inf > 88.722_84 { f32::INFINITY } else { y };
    if nan_or_inf.is_nan() {
        nan_or_inf
    } else {
        y
    }
}

/// erf(x). Abramowitz and Stegun 7.1.28-style rational approximations lose digits near zero, so small arguments
/// use the Taylor-like minimax polynomial and larger ones `1 - exp(-x^2) * P(t)`; absolute error below 2e-7.
#[inline(always)]
pub(crate) fn erf_f32(x: f32) -> f32 {
    let a = x.abs();
    // Small arguments: x * P(x^2), Cephes `erff`.
    let z = a * a;
    let p = 7.853_861e-5;
    let p = p * z - 8.010_193_6e-4;
    let p = p * z + 5.188_327e-3;
    let p = p * z - 2.685_381_2e-2;
    let p = p * z + 1.128_358_6e-1;
    let p = p * z - 3.761_262_6e-1;
    let p = p * z + 1.128_379_2;
    let small = p * a;
    // Large arguments: 7.1.26 of Abramowitz and Stegun with t = 1 / (1 + 0.3275911 a).
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let q = 1.061_405_4;
    let q = q * t - 1.453_152;
    let q = q * t + 1.421_413_8;
    let q = q * t - 0.284_496_74;
    let q = q * t + 0.254_829_6;
    let large = 1.0 - q * t * exp_f32(-z);
    let y = if a < 1.0 { small } else { large };
    if x < 0.0 {
        -y
    } else {
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -870_000..887_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            let error = (f64::from(exp_f32(x)) - want).abs() / want;
            assert!(error < 2.4e-7, "exp({x}): relative error {error:e}");
        }
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
        assert_eq!(exp_f32(0.0), 1.0);
    }

    #[test]
    fn erf_is_accurate_everywhere() {
        for i in -60_000..60_000 {
            let x = i as f32 * 1e-4;
            let error = (f64::from(erf_f32(x)) - libm::erf(f64::from(x))).abs();
            assert!(error < 2.5e-7, "erf({x}): error {error:e}");
        }
        assert!(erf_f32(f32::NAN).is_nan());
    }
}
