//! What can be said about a few runs: means with intervals, paired differences, and how sure they are.
//!
//! Arms of a suite are paired by seed (same initialisation, data order, crops and masks), so the quantity of interest is
//! the difference of an arm to the baseline *within* a seed. The interval and p-value that decide come from Student's
//! paired t; the bootstrap interval and the exact sign-flip p-value stand beside it because they assume less.

use std::cmp::Ordering;

use dinolab_core::rng::{Rng, Stream};
use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, Normal, StudentsT};
use statrs::function::gamma::ln_gamma;

/// Two-sided error rate of every interval and verdict.
pub const ALPHA: f64 = 0.05;
/// Chance of finding an effect that the "seeds needed" are computed for.
pub const POWER: f64 = 0.8;
/// Resamples of the bootstrap interval.
const RESAMPLES: usize = 10_000;
/// Up to this many pairs the sign-flip test enumerates all 2^n sign patterns; beyond, the t-test's assumption matters
/// less and the test is left out.
const MAX_EXACT_PAIRS: usize = 16;
/// Beyond this many seeds an effect counts as out of reach.
const MAX_SEEDS: usize = 10_000;

/// Mean of one arm over its seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Arithmetic mean; `None` without values.
    pub mean: Option<f64>,
    /// Sample standard deviation (divided by n - 1); `None` for fewer than two values.
    pub std: Option<f64>,
    /// 95% interval of the mean, mean ± t(0.975, n - 1) · std / √n; `None` for fewer than two values.
    pub ci95: Option<[f64; 2]>,
    /// Values that went in.
    pub n: usize,
}

/// Mean, standard deviation and 95% t-interval of `values`.
pub fn estimate(values: &[f64]) -> Estimate {
    let n = values.len();
    let std = std(values);
    let ci95 = std.map(|s| interval(mean(values), s, n));
    Estimate { mean: (n > 0).then(|| mean(values)), std, ci95, n }
}

/// An arm against the baseline, over the seeds that both finished.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Mean of arm - baseline within a seed; `None` without pairs.
    pub difference: Option<f64>,
    /// Sample standard deviation of the differences.
    pub std: Option<f64>,
    /// 95% interval of the mean difference by Student's t; `None` for one pair, and where all differ by the same, not zero: then
    /// there is no spread to judge by.
    pub ci95: Option<[f64; 2]>,
    /// Two-sided p-value of the paired t-test.
    pub p_value: Option<f64>,
    /// 95% percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13) over resampled pairs.
    pub bootstrap95: Option<[f64; 2]>,
    /// Two-sided p-value of the exact sign-flip test (Fisher 1935): it assumes only that differences are symmetric
    /// around zero when the arm has no effect. With n pairs it cannot be below 2 / 2^n.
    pub p_sign_flip: Option<f64>,
    /// Cohen's d_z: mean difference over its standard deviation (Lakens 2013, eq. 6).
    pub effect_size: Option<f64>,
    /// Seeds that a suite needs to find an effect of this size with 80% power, corrected for the arms that it compares: whoever knows
    /// these fills it in.
    pub seeds_for_80_percent_power: Option<usize>,
    /// Pairs that went in.
    pub n: usize,
}

/// Compares `pairs` of (arm, baseline), one a seed.
///
/// One pair gives a difference and nothing else: no spread can be known from it.
pub fn paired(pairs: &[(f64, f64)]) -> Paired {
    let differences: Vec<f64> = pairs.iter().map(|(arm, baseline)| arm - baseline).collect();
    let n = differences.len();
    let difference = (n > 0).then(|| mean(&differences));
    // Differences that are all the same, as of a score that counts a few images, vary by what rounding does: by nothing.
    let same = |std: f64| difference.is_some_and(|difference| std <= 1e-12 * difference.abs());
    let std = std(&differences).map(|std| if same(std) { 0.0 } else { std });
    let mut result = Paired {
        difference,
        std,
        ci95: None,
        p_value: None,
        bootstrap95: None,
        p_sign_flip: None,
        effect_size: None,
        seeds_for_80_percent_power: None,
        n,
    };
    if let (Some(difference), Some(std)) = (difference, std) {
        // Without any spread, they say nothing of how others would spread.
        if difference == 0.0 || std > 0.0 {
            result.ci95 = Some(interval(difference, std, n));
            result.p_value = Some(t_test(difference, std, n));
            result.bootstrap95 = Some(bootstrap(&differences));
        }
        result.p_sign_flip = (n <= MAX_EXACT_PAIRS).then(|| sign_flip(&differences));
        result.effect_size = (std > 0.0 && result.p_value.is_some()).then(|| difference / std);
    }
    result
}

/// Holm's step-down correction (Holm 1979): adjusted p-values of `k` tests, in the order given. The smallest is
/// multiplied by k, the next by k - 1, and so on; none may be below one before it.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|&a, &b| p_values[a].partial_cmp(&p_values[b]).unwrap_or(Ordering::Equal).then(a.cmp(&b)));
    let mut adjusted = vec![1.0; p_values.len()];
    let mut least = 0.0f64;
    for (rank, &i) in order.iter().enumerate() {
        least = least.max((p_values.len() - rank) as f64 * p_values[i]).min(1.0);
        adjusted[i] = least;
    }
    adjusted
}

/// Pairs needed for 80% power to find an effect of Cohen's `d_z` with a two-sided paired t-test at 5%, divided by `tests`: that is what
/// Holm's correction asks of the clearest of as many; `None` if more than ten thousand.
pub fn seeds_needed(d_z: f64, tests: usize) -> Option<usize> {
    let d = d_z.abs();
    let normal = Normal::standard();
    // The normal approximation is a little low, and so a safe place to start.
    let alpha = ALPHA / tests.max(1) as f64;
    let z = normal.inverse_cdf(1.0 - alpha / 2.0) + normal.inverse_cdf(POWER);
    let start = (z / d).powi(2);
    if start.is_nan() || start > MAX_SEEDS as f64 {
        return None;
    }
    (2.max(start as usize)..=MAX_SEEDS).find(|&n| power(d, n, alpha) >= POWER)
}

/// The smallest effect, as Cohen's d_z, that `n` pairs find with 80% power among `tests`, as [`seeds_needed`] counts them; `None` for
/// fewer than two.
pub fn effect_found(n: usize, tests: usize) -> Option<f64> {
    if n < 2 {
        return None;
    }
    let alpha = ALPHA / tests.max(1) as f64;
    let (mut low, mut high) = (0.0, 1.0);
    while power(high, n, alpha) < POWER {
        high *= 2.0;
    }
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if power(middle, n, alpha) < POWER {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some(high)
}

/// Where the mean of `m` further values of the same kind lies in 95 of 100 cases, given mean and standard deviation of `n`:
/// mean ± t(0.975, n - 1) · sd · √(1/n + 1/m); `None` for n below two.
pub fn prediction(mean: f64, sd: f64, n: usize, m: usize) -> Option<[f64; 2]> {
    if n < 2 || m < 1 {
        return None;
    }
    let half = student(n).inverse_cdf(1.0 - ALPHA / 2.0) * sd * (1.0 / n as f64 + 1.0 / m as f64).sqrt();
    Some([mean - half, mean + half])
}

/// Power of the two-sided paired t-test at `alpha` with `n` pairs and effect `d`: the chance that a noncentral t with n - 1 degrees
/// of freedom and noncentrality d√n falls outside ± t(1 - α/2).
///
/// Given s = √(χ²/ν), the statistic is (Z + d√n) / s with Z standard normal; the chance is averaged over the density of
/// s, `2 (ν/2)^(ν/2) / Γ(ν/2) · s^(ν-1) · exp(-ν s² / 2)`, by Simpson's rule.
pub fn power(d: f64, n: usize, alpha: f64) -> f64 {
    let dof = (n - 1) as f64;
    let normal = Normal::standard();
    let critical = student(n).inverse_cdf(1.0 - alpha / 2.0);
    let shift = d * (n as f64).sqrt();
    let log_norm = 2.0f64.ln() + 0.5 * dof * (0.5 * dof).ln() - ln_gamma(0.5 * dof);
    let integrand = |s: f64| {
        let rejected = normal.cdf(shift - critical * s) + normal.cdf(-shift - critical * s);
        // s^0 at s = 0 is 1, and 0 · ln 0 would not be.
        let log_power = if dof > 1.0 { (dof - 1.0) * s.ln() } else { 0.0 };
        rejected * (log_norm + log_power - 0.5 * dof * s * s).exp()
    };
    // s has mean near 1 and standard deviation near 1/√(2ν): eight of them hold all but a rounding error of it.
    let spread = 8.0 / (2.0 * dof).sqrt();
    let (low, high) = ((1.0 - spread).max(0.0), 1.0 + spread);
    let intervals = 400;
    let h = (high - low) / intervals as f64;
    let weight = |i: usize| if i == 0 || i == intervals { 1.0 } else { 2.0 + 2.0 * (i % 2) as f64 };
    (0..=intervals).map(|i| weight(i) * integrand(low + h * i as f64)).sum::<f64>() * h / 3.0
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn std(values: &[f64]) -> Option<f64> {
    let m = mean(values);
    let squares: f64 = values.iter().map(|v| (v - m).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// Student's t for the mean of `n` values.
fn student(n: usize) -> StudentsT {
    StudentsT::new(0.0, 1.0, (n - 1) as f64).expect("a spread is only asked for with two values or more")
}

fn interval(mean: f64, std: f64, n: usize) -> [f64; 2] {
    let half = student(n).inverse_cdf(1.0 - ALPHA / 2.0) * std / (n as f64).sqrt();
    [mean - half, mean + half]
}

fn t_test(difference: f64, std: f64, n: usize) -> f64 {
    if difference == 0.0 {
        return 1.0;
    }
    let t = difference.abs() / (std / (n as f64).sqrt());
    2.0 * student(n).sf(t)
}

fn bootstrap(differences: &[f64]) -> [f64; 2] {
    let n = differences.len();
    let mut rng = Rng::new(0, Stream::Statistics, 0, 0);
    let mut means: Vec<f64> =
        (0..RESAMPLES).map(|_| (0..n).map(|_| differences[rng.below(n)]).sum::<f64>() / n as f64).collect();
    means.sort_by(f64::total_cmp);
    let quantile = |q: f64| means[(q * (RESAMPLES - 1) as f64).round() as usize];
    [quantile(ALPHA / 2.0), quantile(1.0 - ALPHA / 2.0)]
}

/// The share of sign patterns whose sum is at least as far from zero as the one seen.
fn sign_flip(differences: &[f64]) -> f64 {
    let seen = differences.iter().sum::<f64>().abs();
    // A pattern that ties with the one seen must count as at least as far in spite of rounding.
    let least = seen - 1e-12 * differences.iter().map(|d| d.abs()).sum::<f64>();
    let patterns = 1u32 << differences.len();
    let flipped = |pattern: u32| -> f64 {
        let signed = differences.iter().enumerate().map(|(i, d)| if pattern >> i & 1 == 1 { -d } else { *d });
        signed.sum::<f64>().abs()
    };
    (0..patterns).filter(|&p| flipped(p) >= least).count() as f64 / f64::from(patterns)
}
