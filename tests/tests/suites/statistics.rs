//! Statistics of a suite against values known in closed form or from published tables, and properties.

use dinolab::statistics::{effect_found, estimate, holm, paired, power, prediction, seeds_needed};
use proptest::prelude::*;

fn close(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * b.abs().max(1.0)
}

fn pairs(differences: &[f64]) -> Vec<(f64, f64)> {
    differences.iter().map(|d| (*d, 0.0)).collect()
}

/// Table of Student's t: t(0.975, 1) = 12.7062, t(0.975, 2) = 4.30265, t(0.975, 4) = 2.77645.
#[test]
fn the_interval_of_a_mean_uses_the_t_table() {
    let two = estimate(&[1.0, 3.0]);
    assert_eq!((two.mean, two.n), (Some(2.0), 2));
    assert!(close(two.std.expect("two values"), 2.0f64.sqrt(), 1e-12));
    assert!(close(two.ci95.expect("two values")[1], 2.0 + 12.7062, 1e-5));
    let three = estimate(&[1.0, 2.0, 3.0]).ci95.expect("three values");
    assert!(close(three[0], 2.0 - 4.30265 / 3.0f64.sqrt(), 1e-5), "{three:?}");
    let five = estimate(&[1.0, 2.0, 3.0, 4.0, 5.0]).ci95.expect("five values");
    assert!(close(five[1], 3.0 + 2.77645 * (2.5f64 / 5.0).sqrt(), 1e-5), "{five:?}");
}

/// With 2 degrees of freedom P(|T| > t) = 1 - t / √(2 + t²), and with 1 it is 1 - (2/π) atan t.
#[test]
fn the_paired_p_value_has_its_closed_form() {
    let t = 2.0 * 3.0f64.sqrt();
    let three = paired(&pairs(&[1.0, 2.0, 3.0])).p_value.expect("three pairs");
    assert!(close(three, 1.0 - t / (2.0 + t * t).sqrt(), 1e-9), "{three}");
    let two = paired(&pairs(&[1.0, 3.0])).p_value.expect("two pairs");
    assert!(close(two, 1.0 - 2.0 / std::f64::consts::PI * 2.0f64.atan(), 1e-9), "{two}");
}

/// Student's own data (1908): hours of sleep gained by ten patients with two drugs; t = 4.0621, p = 0.00283, interval
/// 0.7001 to 2.4599.
#[test]
fn students_sleep_data_give_the_published_result() {
    let first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0];
    let second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4];
    let both: Vec<(f64, f64)> = second.into_iter().zip(first).collect();
    let result = paired(&both);
    assert!(close(result.difference.expect("pairs"), 1.58, 1e-12));
    assert!((result.p_value.expect("pairs") - 0.00283).abs() < 5e-6, "{result:?}");
    let [low, high] = result.ci95.expect("pairs");
    assert!((low - 0.7001).abs() < 1e-4 && (high - 2.4599).abs() < 1e-4, "{low} {high}");
}

#[test]
fn the_sign_flip_test_counts_patterns() {
    // All positive: only the pattern seen and its mirror image are as far from zero.
    assert_eq!(paired(&pairs(&[1.0, 2.0, 3.0])).p_sign_flip, Some(2.0 / 8.0));
    // Sums of ±1 ±2 ±4 are ±1, ±3, ±5, ±7; four of the eight are at least 5 from zero.
    assert_eq!(paired(&pairs(&[-1.0, 2.0, 4.0])).p_sign_flip, Some(4.0 / 8.0));
}

#[test]
fn one_pair_gives_a_difference_and_no_interval() {
    let one = paired(&[(0.75, 0.5)]);
    assert_eq!((one.difference, one.n), (Some(0.25), 1));
    assert_eq!((one.ci95, one.p_value, one.effect_size, one.p_sign_flip), (None, None, None, None));
    assert_eq!(estimate(&[0.5]).ci95, None);
    assert_eq!(paired(&[]).difference, None);
}

#[test]
fn arms_that_agree_exactly_have_a_p_value_of_one() {
    let same = paired(&[(0.5, 0.5), (0.7, 0.7), (0.9, 0.9)]);
    assert_eq!((same.p_value, same.ci95, same.effect_size), (Some(1.0), Some([0.0, 0.0]), None));
    // Differences that are all the same have no spread to judge by: only the sign-flip test says something.
    let counted = paired(&[(0.5, 0.25), (0.75, 0.5), (1.0, 0.75)]);
    assert_eq!((counted.p_value, counted.ci95, counted.bootstrap95), (None, None, None));
    assert_eq!((counted.difference, counted.p_sign_flip), (Some(0.25), Some(0.25)));
    // 0.1 twice, but for rounding.
    let rounded = paired(&[(0.3, 0.2), (0.4, 0.3)]);
    assert_eq!((rounded.std, rounded.ci95, rounded.effect_size), (Some(0.0), None, None));
}

/// Holm (1979) by hand: 0.01·4, 0.02·3, 0.03·2, 0.9·1.
#[test]
fn holms_correction_steps_down() {
    let adjusted = holm(&[0.9, 0.01, 0.03, 0.02]);
    for (a, b) in adjusted.iter().zip([0.9, 0.04, 0.06, 0.06]) {
        assert!(close(*a, b, 1e-12), "{adjusted:?}");
    }
}

/// The sample sizes that G*Power gives for "means: difference between two dependent means" at 5% and 80%.
#[test]
fn seeds_needed_are_the_tabulated_sample_sizes() {
    for (d, n) in [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)] {
        assert_eq!((seeds_needed(d, 1), seeds_needed(-d, 1)), (Some(n), Some(n)), "d = {d}");
    }
    // Of several arms, at Holm's first step.
    assert_eq!([1, 3, 7].map(|arms| seeds_needed(1.5, arms)), [Some(6), Some(8), Some(10)]);
    assert_eq!(seeds_needed(0.0, 1), None);
    assert_eq!(seeds_needed(1e-4, 1), None);
}

#[test]
fn the_smallest_effect_that_seeds_find_is_the_inverse_of_the_seeds_needed() {
    assert_eq!((effect_found(0, 1), effect_found(1, 1)), (None, None));
    for n in [2, 3, 5, 10, 34] {
        let d = effect_found(n, 1).expect("two seeds or more");
        assert!(close(power(d, n, 0.05), 0.8, 1e-9), "{n}: {d}");
        // A little more is found by as many, a little less is not.
        assert_eq!((seeds_needed(1.001 * d, 1), seeds_needed(0.999 * d, 1)), (Some(n), Some(n + 1)));
    }
}

/// With n = 3 earlier values and one further the half width is t(0.975, 2) · sd · √(4/3).
#[test]
fn the_interval_of_a_further_mean_uses_the_t_table() {
    let one = prediction(1.0, 0.5, 3, 1).expect("three values");
    assert!(close(one[1], 1.0 + 4.30265 * 0.5 * (4.0f64 / 3.0).sqrt(), 1e-5), "{one:?}");
    let many = prediction(1.0, 0.5, 3, 1_000_000).expect("three values");
    assert!(close(many[0], 1.0 - 4.30265 * 0.5 / 3.0f64.sqrt(), 1e-5), "{many:?}");
    assert_eq!(prediction(1.0, 0.5, 1, 1), None);
}

#[test]
fn without_an_effect_power_is_the_error_rate() {
    for n in [2, 3, 5, 30] {
        assert!((power(0.0, n, 0.05) - 0.05).abs() < 1e-4, "n = {n}: {}", power(0.0, n, 0.05));
    }
}

fn scores() -> impl Strategy<Value = Vec<(f64, f64)>> {
    prop::collection::vec((-1.0..1.0f64, -1.0..1.0f64), 2..9)
}

proptest! {
    #[test]
    fn a_shift_that_both_arms_share_changes_no_difference(both in scores(), shift in -10.0..10.0f64) {
        let shifted: Vec<_> = both.iter().map(|(x, y)| (x + shift, y + shift)).collect();
        let (a, b) = (paired(&both), paired(&shifted));
        prop_assert!(close(a.difference.unwrap(), b.difference.unwrap(), 1e-9));
        prop_assert!(close(a.ci95.unwrap()[0], b.ci95.unwrap()[0], 1e-7));
        prop_assert!(close(a.p_value.unwrap(), b.p_value.unwrap(), 1e-6));
    }

    #[test]
    fn intervals_hold_the_mean_and_agree_with_the_p_value(both in scores()) {
        let result = paired(&both);
        let (difference, [low, high]) = (result.difference.unwrap(), result.ci95.unwrap());
        prop_assert!(low <= difference && difference <= high);
        let p = result.p_value.unwrap();
        prop_assume!((p - 0.05).abs() > 1e-6);
        prop_assert_eq!(p < 0.05, low > 0.0 || high < 0.0);
    }

    #[test]
    fn swapping_the_arms_mirrors_the_result(both in scores()) {
        let swapped: Vec<_> = both.iter().map(|(x, y)| (*y, *x)).collect();
        let (a, b) = (paired(&both), paired(&swapped));
        prop_assert!(close(a.difference.unwrap(), -b.difference.unwrap(), 1e-12));
        prop_assert!(close(a.ci95.unwrap()[0], -b.ci95.unwrap()[1], 1e-9));
        prop_assert!(close(a.p_value.unwrap(), b.p_value.unwrap(), 1e-9));
        prop_assert_eq!(a.p_sign_flip, b.p_sign_flip);
    }

    #[test]
    fn holm_keeps_the_order_and_only_raises(p in prop::collection::vec(0.0..1.0f64, 1..8)) {
        let adjusted = holm(&p);
        for i in 0..p.len() {
            prop_assert!(adjusted[i] >= p[i] && adjusted[i] <= 1.0);
            for j in 0..p.len() {
                prop_assert!(p[i] > p[j] || adjusted[i] <= adjusted[j]);
            }
        }
    }
}
