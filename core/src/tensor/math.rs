//! Branch-free `exp` and normal distribution in f32, so that loops over them vectorise.

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
    let rounded = x * LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HI - n * LN2_LO;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    // 2^n in two factors, so that n = 128 does not overflow before the product. The low bits of the rounded sum are n.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let scale = |k: i32| f32::from_bits((k.wrapping_add(127) << 23) as u32);
    let y = y * scale(half) * scale(n - half);
    let y = if nan_or_inf < -103.972_08 { 0.0 } else { y };
    let y = if nan_or_inf > 88.722_84 { f32::INFINITY } else { y };
    if nan_or_inf.is_nan() {
        nan_or_inf
    } else {
        y
    }
}

/// The standard normal distribution function and density at x; absolute error below 3e-7 (Abramowitz and Stegun 7.1.26).
///
/// One formula for all x and one exponential for both results: with a case of its own for small x, a caller that needs
/// the distribution alone gets a branch around the exponential, and its loop does not vectorise.
#[inline(always)]
pub(crate) fn normal_f32(x: f32) -> (f32, f32) {
    let a = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let e = exp_f32(-a * a);
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    // The tail beyond |x|.
    let tail = 0.5 * p * t * e;
    let cdf = if x < 0.0 { tail } else { 1.0 - tail };
    (cdf, e * 0.398_942_3)
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
    fn the_normal_distribution_is_accurate_everywhere() {
        for i in -90_000..90_000 {
            let x = i as f32 * 1e-4;
            let (cdf, pdf) = normal_f32(x);
            let (want_cdf, want_pdf) = crate::tensor::Real::normal(f64::from(x));
            let error = (f64::from(cdf) - want_cdf).abs().max((f64::from(pdf) - want_pdf).abs());
            assert!(error < 3e-7, "normal({x}): error {error:e}");
        }
        assert!(normal_f32(f32::NAN).0.is_nan() && normal_f32(f32::NAN).1.is_nan());
        assert_eq!((normal_f32(f32::INFINITY).0, normal_f32(f32::NEG_INFINITY).0), (1.0, 0.0));
    }
}
