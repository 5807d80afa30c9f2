//! Laws of the operations of the losses and of the built-in losses themselves, and kernels across the bounds of their
//! tiles. Values and gradients on small shapes are held to dfdx and to differences by `dinolab check` (see `cli/check.rs`).

use dinolab_core::comm::Shards;
use dinolab_core::contract::{At, Scheduler as _};
use dinolab_core::ops::{ema_update, NegativeRemoval, SimilarityOptions};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::loss_oracle::{loss_cases, loss_value, no_options};
use dinolab_core::testing::strategies::features;
use dinolab_core::testing::{hold, laws, normal, Case};
use dinolab_core::{DType, Result, Tensor};
use dinolab_plugins::constant::Constant;
use proptest::prelude::*;
use serde_json::json;

const REMOVALS: [NegativeRemoval; 3] = [NegativeRemoval::None, NegativeRemoval::Both, NegativeRemoval::Teacher];

/// All ways to compare Gram matrices.
fn gram_options() -> impl Strategy<Value = SimilarityOptions> {
    (any::<bool>(), any::<bool>(), 0..3usize).prop_map(|(normalize, image_level, removal)| SimilarityOptions {
        normalize,
        image_level,
        remove: REMOVALS[removal],
    })
}

/// `B` times `N` patches of width `D`.
fn images(x: &Tensor, images: usize) -> Result<Tensor> {
    x.reshape(&[images, x.dim(0) / images, x.dim(1)])
}

/// One row that meets one target.
fn cross_entropy(student: &Tensor, target: &Tensor) -> Result<Tensor> {
    let center = Tensor::zeros(&[target.dim(1)], DType::F64);
    let targets = target.centered_softmax(&center, &Tensor::scalar(0.1, DType::F64))?;
    let row = Tensor::from_slice(&[0u32], &[1])?;
    student.soft_cross_entropy(&targets, &row, &row, &Tensor::from_slice(&[1.0], &[1])?, 0.1)
}

fn sinkhorn(logits: &Tensor, iterations: usize) -> Tensor {
    logits.sinkhorn_knopp(&Tensor::scalar(0.2, logits.dtype()), iterations, &Shards::one()).unwrap()
}

/// The same in the logarithm, from its definition.
fn sinkhorn_by_logarithms(logits: &Tensor, iterations: usize) -> Vec<f64> {
    let (b, k) = (logits.dim(0), logits.dim(1));
    let mut z: Vec<f64> = logits.to_f64_vec().iter().map(|x| x / 0.2).collect();
    let log_sum = |of: &dyn Fn(usize) -> f64, n: usize| {
        let top = (0..n).map(of).fold(f64::NEG_INFINITY, f64::max);
        top + (0..n).map(|i| (of(i) - top).exp()).sum::<f64>().ln()
    };
    for _ in 0..iterations {
        let masses: Vec<f64> = (0..k).map(|j| log_sum(&|i| z[i * k + j], b)).collect();
        z.iter_mut().enumerate().for_each(|(at, z)| *z -= masses[at % k]);
        let masses: Vec<f64> = (0..b).map(|i| log_sum(&|j| z[i * k + j], k)).collect();
        z.iter_mut().enumerate().for_each(|(at, z)| *z -= masses[at / k]);
    }
    z.into_iter().map(f64::exp).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(28) })]

    #[test]
    fn cross_entropy_is_least_when_the_student_equals_the_teacher(k in 2usize..50, seed: u64) {
        let (teacher, other) = (normal(seed, 0, &[1, k]), normal(seed, 1, &[1, k]));
        laws::least_at_the_target(&teacher, &other, cross_entropy)?;
    }

    #[test]
    fn sinkhorn_rows_sum_to_one_and_prototypes_get_equal_mass(b in 1usize..30, k in 1usize..30, seed: u64) {
        // Logits that are not far apart: convergence is slower the farther they are.
        let assigned = sinkhorn(&normal(seed, 0, &[b, k]).scale(0.2).unwrap(), 300);
        let ones = |n: usize| Tensor::full(&[n], DType::F64, 1.0).unwrap();
        laws::equal(&assigned.sum_axis(1).unwrap(), &ones(b), 1e-12)?;
        let mass = assigned.sum_axis(0).unwrap().scale(k as f64 / b as f64).unwrap();
        laws::equal(&mass, &ones(k), 1e-3)?;
    }

    #[test]
    fn sinkhorn_is_its_formula_for_any_rows_prototypes_iterations_and_spread(
        b in 1usize..80, k in 1usize..80, iterations in prop_oneof![1usize..20, 100usize..1500], spread in -2.0..2.5f64,
        single: bool, seed: u64,
    ) {
        let logits = normal(seed, 0, &[b, k]).scale(10f64.powf(spread)).unwrap();
        let (dtype, tolerance) = if single { (DType::F32, 1e-2) } else { (DType::F64, 1e-8) };
        let logits = logits.cast(dtype).unwrap();
        let assigned = sinkhorn(&logits, iterations).to_f64_vec();
        for row in assigned.chunks(k) {
            prop_assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-4, "{row:?}");
        }
        for (got, want) in assigned.iter().zip(sinkhorn_by_logarithms(&logits, iterations)) {
            prop_assert!((got - want).abs() < tolerance, "{got} and {want}");
        }
    }

    #[test]
    fn sinkhorn_does_not_see_what_is_added_to_a_prototype(b in 1usize..20, k in 1usize..30, seed: u64) {
        let (logits, shift) = (normal(seed, 0, &[b, k]), normal(seed, 1, &[k]));
        laws::equal(&sinkhorn(&logits.add_row(&shift).unwrap(), 3), &sinkhorn(&logits, 3), 1e-11)?;
    }

    #[test]
    fn koleo_is_invariant_to_rotation_length_and_order(x in features(3..30, 2..20), seed: u64) {
        let koleo = |x: &Tensor| x.neighbour_distance(1, None)?.mean();
        // The eps in the difference, 1e-8 along one direction, is not rotated.
        laws::invariant_to_rotation(&x, seed, 1e-5, koleo)?;
        laws::invariant_to_scale(&x, seed, 1e-5, koleo)?;
        laws::invariant_to_permutation(&x, seed, 1e-5, koleo)?;
    }

    #[test]
    fn koleo_is_finite_on_sick_features_and_shows_a_nan(rows in 3usize..20, d in 2usize..9, seed: u64) {
        laws::finite_on_degenerate_input(seed, rows, d, |x| x.neighbour_distance(1, None)?.mean())?;
        laws::shows_non_finite_input(seed, rows, d, |x| x.neighbour_distance(1, None)?.mean())?;
    }

    #[test]
    fn gram_loss_is_invariant_to_an_orthogonal_map_of_the_features(
        b in 1usize..4, n in 1usize..20, d in 1usize..12, options in gram_options(), seed: u64,
    ) {
        let (s, t) = (normal(seed, 0, &[b, n, d]), normal(seed, 1, &[b, n, d]));
        laws::invariant_to_rotation(&s, seed, 1e-9, |s| s.similarity_distance(&t, options))?;
        laws::invariant_to_rotation(&t, seed, 1e-9, |t| s.similarity_distance(t, options))?;
    }

    #[test]
    fn gram_loss_is_zero_when_the_student_equals_the_teacher(
        b in 1usize..4, n in 1usize..20, d in 1usize..12, image_level: bool, both: bool, seed: u64,
    ) {
        let remove = if both { NegativeRemoval::Both } else { NegativeRemoval::None };
        let options = SimilarityOptions { remove, image_level, ..SimilarityOptions::default() };
        laws::zero_at_the_target(&normal(seed, 0, &[b, n, d]), |s, t| s.similarity_distance(t, options))?;
    }

    #[test]
    fn gram_loss_at_image_level_is_a_mean_over_images_and_survives_sick_features(seed: u64, options in gram_options()) {
        let teacher = normal(seed, 1, &[3, 5, 4]);
        let options = SimilarityOptions { image_level: true, ..options };
        let of = |x: &Tensor| {
            let copies = vec![&teacher; x.dim(0) / 3];
            x.similarity_distance(&Tensor::cat(&copies)?, options)
        };
        laws::indifferent_to_batch_size(&normal(seed, 0, &[3, 5, 4]), 1e-11, of)?;
        laws::finite_on_degenerate_input(seed, 15, 4, |x| images(x, 3)?.similarity_distance(&teacher, options))?;
        laws::shows_non_finite_input(seed, 15, 4, |x| images(x, 3)?.similarity_distance(&teacher, options))?;
    }

    #[test]
    fn gram_loss_is_never_negative_and_does_not_see_the_length_of_normalised_features(
        b in 1usize..4, n in 1usize..20, d in 1usize..12, options in gram_options(), factor in 0.01..100.0f64, seed: u64,
    ) {
        let (s, t) = (normal(seed, 0, &[b, n, d]), normal(seed, 1, &[b, n, d]));
        prop_assert!(s.similarity_distance(&t, options).unwrap().item() >= 0.0);
        let options = SimilarityOptions { normalize: true, ..options };
        laws::invariant_to_scale(&s, seed, 1e-9, |s| s.similarity_distance(&t, options))?;
        laws::invariant_to_scale(&t, seed, 1e-9, |t| s.similarity_distance(t, options))?;
        // Without normalisation similarities grow by the square of both lengths, and the loss by its square.
        let plain = SimilarityOptions { normalize: false, ..options };
        let loss = |factor: f64| {
            let [s, t] = [&s, &t].map(|x| x.scale(factor).unwrap());
            s.similarity_distance(&t, plain).unwrap().item()
        };
        let (one, grown) = (loss(1.0), loss(factor));
        prop_assert!((grown - factor.powi(4) * one).abs() <= 1e-9 * grown.abs().max(1e-12), "{one}, {grown}");
    }

    #[test]
    fn the_gram_plugin_is_invariant_to_an_orthogonal_map(case in loss_cases("gram", no_options()).unwrap(), seed: u64) {
        let turned = case.mapped("student_patches", |x| laws::rotated(x, seed));
        let (a, b) = (loss_value("gram", &case).unwrap(), loss_value("gram", &turned).unwrap());
        prop_assert!((a - b).abs() < 1e-9 * a.abs().max(1.0), "{} against {}", a, b);
    }

    #[test]
    fn the_koleo_plugin_is_invariant_to_rotation(case in loss_cases("koleo", no_options()).unwrap(), seed: u64) {
        let turned = case.mapped("student_cls", |x| laws::rotated(x, seed));
        let (a, b) = (loss_value("koleo", &case).unwrap(), loss_value("koleo", &turned).unwrap());
        prop_assert!((a - b).abs() < 1e-4 * a.abs().max(1.0), "{} against {}", a, b);
    }

    #[test]
    fn bicubic_resize_of_an_image_upside_down_is_upside_down(
        from in (1usize..12, 1usize..12), to in (1usize..12, 1usize..12), antialias: bool, seed: u64,
    ) {
        // Turned by half: the patches in reverse order.
        let turned = |x: &Tensor| {
            let (n, d) = (x.dim(1), x.dim(2));
            let order: Vec<u32> = (0..n as u32).rev().collect();
            let order = Tensor::from_slice(&order, &[n]).unwrap();
            x.reshape(&[n, d]).unwrap().gather_rows(&order).unwrap().reshape(&[1, n, d]).unwrap()
        };
        let x = normal(seed, 0, &[1, from.0 * from.1, 3]);
        let resized = |x: &Tensor| x.resize_bicubic(from, to, antialias).unwrap();
        laws::equal(&resized(&turned(&x)), &turned(&resized(&x)), 1e-11)?;
    }

    #[test]
    fn ema_is_a_contraction(n in 1usize..200, momentum in 0.0..1.0, seed: u64) {
        let student = normal(seed, 2, &[n]);
        let (mut a, mut b) = (normal(seed, 0, &[n]), normal(seed, 1, &[n]));
        let distance = |a: &Tensor, b: &Tensor| a.sub(b).unwrap().square().unwrap().sum().unwrap().item().sqrt();
        let (before, to_student) = (distance(&a, &b), distance(&a, &student));
        ema_update(&mut a, &student, momentum).unwrap();
        ema_update(&mut b, &student, momentum).unwrap();
        prop_assert!((distance(&a, &b) - momentum * before).abs() < 1e-12 * before.max(1.0));
        prop_assert!((distance(&a, &student) - momentum * to_student).abs() < 1e-12 * to_student.max(1.0));
    }

    #[test]
    fn ema_with_momentum_one_stays_and_with_zero_becomes_the_student(n in 1usize..200, seed: u64) {
        let (teacher, student) = (normal(seed, 0, &[n]), normal(seed, 1, &[n]));
        for (momentum, expected) in [(1.0, &teacher), (0.0, &student)] {
            let mut ema = Tensor::from_slice(teacher.as_slice::<f64>(), &[n]).unwrap();
            ema_update(&mut ema, &student, momentum).unwrap();
            prop_assert_eq!(ema.as_bytes(), expected.as_bytes());
        }
    }

    #[test]
    fn constant_schedules_are_constant(value in -1e3..1e3, step in 0u64..1000, total in 1u64..1000) {
        prop_assert_eq!(Constant { value }.value(At { step, total }), value);
    }
}

/// A case of the given inputs, standard normal: (name, shape, tracked).
fn large(options: serde_json::Value, inputs: &[(&str, &[usize], bool)]) -> Case {
    inputs.iter().enumerate().fold(Case::new(options), |case, (i, (name, shape, tracked))| {
        let values = normal(7, i as u64, shape).to_f64_vec();
        match tracked {
            true => case.tracked(name, shape, &values),
            false => case.fixed(name, shape, &values),
        }
    })
}

#[test]
fn kernels_hold_across_the_bounds_of_their_tiles() {
    let rows: Vec<u32> = Rng::new(1, Stream::Plugin, 0, 0).permutation(9);
    let cross_entropy = large(
        json!({ "rows": 9, "targets": 9, "k": 5000, "student_rows": (0..9).collect::<Vec<_>>(), "target_rows": rows }),
        &[("logits", &[9, 5000], true), ("targets", &[9, 5000], false), ("weights", &[9], false)],
    );
    hold("op", "soft_cross_entropy", &cross_entropy).unwrap();
    let options = json!({ "b": 1, "n": 150, "d": 5, "normalize": true, "image_level": true, "remove": "both" });
    let gram = large(options, &[("student", &[1, 150, 5], true), ("teacher", &[1, 150, 5], false)]);
    hold("op", "similarity_distance", &gram).unwrap();
    let koleo = large(json!({ "groups": 1, "size": 150, "topk": 3, "d": 6 }), &[("x", &[150, 6], true)]);
    hold("op", "neighbour_distance", &koleo).unwrap();
    let logits = large(json!({ "b": 40, "k": 60, "iterations": 3 }), &[("logits", &[40, 60], false)]);
    hold("op", "sinkhorn_knopp", &logits).unwrap();
}
