//! Laws that may hold for a function, one line each in a property test.
//!
//! ```
//! use dinolab_core::proptest::prelude::*;
//! use dinolab_core::testing::{laws, strategies::features};
//!
//! proptest! {
//!     # #[allow(unused)]
//!     fn distances_are_invariant_to_rotation(x in features(3..9, 2..6), seed: u64) {
//!         // The eps in the difference, 1e-8 along one direction, is not rotated.
//!         laws::invariant_to_rotation(&x, seed, 1e-5, |x| x.neighbour_distance(1, None)?.mean())?;
//!     }
//! }
//! # distances_are_invariant_to_rotation();
//! ```

use proptest::test_runner::TestCaseError;

use super::case::{normal, Bound, Case};
use super::gradient::{hold_to_differences, measure};
use super::strategies::Features;
use crate::rng::{Rng, Stream};
use crate::tensor::Tape;
use crate::{Result, Tensor};

/// What a law says of one case, for `?` in a property test.
pub type Law = Result<(), TestCaseError>;

fn fail(reason: impl Into<String>) -> Law {
    Err(TestCaseError::fail(reason.into()))
}

fn engine(error: crate::Error) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

/// Every number of `a` is that of `b`, to within `tolerance` times the largest of them (or 1).
pub fn equal(a: &Tensor, b: &Tensor, tolerance: f64) -> Law {
    let (a, b) = (a.to_f64_vec(), b.to_f64_vec());
    let size = b.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
    let far = a.iter().zip(&b).find(|(a, b)| (*a - *b).abs() > tolerance * size || a.is_nan() != b.is_nan());
    match far {
        _ if a.len() != b.len() => fail(format!("{} numbers against {}", a.len(), b.len())),
        Some((a, b)) => fail(format!("{a} against {b}")),
        None => Ok(()),
    }
}

/// Every vector of the last axis mapped by one random orthogonal matrix (a product of reflections).
pub fn rotated(x: &Tensor, seed: u64) -> Tensor {
    let d = x.last_dim();
    let mut data = x.to_f64_vec();
    for axis in normal(seed, 50, &[3, d]).to_f64_vec().chunks(d) {
        let square: f64 = axis.iter().map(|a| a * a).sum();
        for row in data.chunks_mut(d) {
            let along: f64 = row.iter().zip(axis).map(|(x, a)| x * a).sum();
            row.iter_mut().zip(axis).for_each(|(x, a)| *x -= 2.0 * along / square * a);
        }
    }
    Tensor::from_slice(&data, x.shape()).expect("the shape it had")
}

/// The rows of the first axis in a random order.
pub fn permuted(x: &Tensor, seed: u64) -> Result<Tensor> {
    let order = Rng::new(seed, Stream::Plugin, 2, 0).permutation(x.dim(0));
    x.gather_rows(&Tensor::from_slice(&order, &[order.len()])?)
}

/// An orthogonal map of the features changes nothing.
pub fn invariant_to_rotation(x: &Tensor, seed: u64, tolerance: f64, f: impl Fn(&Tensor) -> Result<Tensor>) -> Law {
    equal(&f(&rotated(x, seed)).map_err(engine)?, &f(x).map_err(engine)?, tolerance)
}

/// Another order of the rows changes nothing.
pub fn invariant_to_permutation(x: &Tensor, seed: u64, tolerance: f64, f: impl Fn(&Tensor) -> Result<Tensor>) -> Law {
    equal(&f(&permuted(x, seed).map_err(engine)?).map_err(engine)?, &f(x).map_err(engine)?, tolerance)
}

/// A positive factor for every row changes nothing.
pub fn invariant_to_scale(x: &Tensor, seed: u64, tolerance: f64, f: impl Fn(&Tensor) -> Result<Tensor>) -> Law {
    let lengths = normal(seed, 51, &[x.len() / x.last_dim().max(1)]).exp().map_err(engine)?;
    equal(&f(&x.scale_rows(&lengths).map_err(engine)?).map_err(engine)?, &f(x).map_err(engine)?, tolerance)
}

/// A mean over the batch: the batch twice over gives the same.
pub fn indifferent_to_batch_size(x: &Tensor, tolerance: f64, f: impl Fn(&Tensor) -> Result<Tensor>) -> Law {
    let twice = Tensor::cat(&[x, x]).map_err(engine)?;
    equal(&f(&twice).map_err(engine)?, &f(x).map_err(engine)?, tolerance)
}

/// The gradient of every input is what central differences in f64 give. Coordinates with a kink nearby do not count.
pub fn gradient_is_right(inputs: &[&Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Law {
    let start = Case::new(serde_json::json!({}));
    let named = inputs.iter().enumerate();
    let case = named.fold(start, |case, (i, x)| case.tracked(&format!("input {i}"), x.shape(), &x.to_f64_vec()));
    let f = |bound: &Bound<'_>| f(&bound.tensors);
    measure(&case, &f).and_then(|m| hold_to_differences(&case, &f, &m)).map_err(TestCaseError::fail)
}

/// Value and gradient are finite on every kind of finite features, however sick: `[rows, d]`.
pub fn finite_on_degenerate_input(seed: u64, rows: usize, d: usize, f: impl Fn(&Tensor) -> Result<Tensor>) -> Law {
    for kind in Features::FINITE {
        let tape = Tape::new();
        let x = tape.leaf(&kind.batch(seed, rows, d));
        let y = f(&x).and_then(|y| y.sum()).map_err(engine)?;
        let grads = tape.backward(&y, 1.0, None).map_err(engine)?;
        let gradient = grads.of(&x).map(Tensor::to_f64_vec).unwrap_or_default();
        if !y.item().is_finite() || !gradient.iter().all(|g| g.is_finite()) {
            return fail(format!("value or gradient is not finite on {kind:?} features"));
        }
    }
    Ok(())
}

/// A NaN among the features shows in the value: the trainer stops before it reaches the weights.
pub fn shows_non_finite_input(seed: u64, rows: usize, d: usize, f: impl Fn(&Tensor) -> Result<Tensor>) -> Law {
    let value = f(&Features::NonFinite.batch(seed, rows, d)).and_then(|y| y.sum()).map_err(engine)?.item();
    if value.is_finite() {
        return fail(format!("a NaN among the features gives {value}"));
    }
    Ok(())
}

/// Zero, with a zero gradient, when the student is the teacher.
pub fn zero_at_the_target(x: &Tensor, f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Law {
    let tape = Tape::new();
    let student = tape.leaf(x);
    let value = f(&student, x).map_err(engine)?;
    let grads = tape.backward(&value, 1.0, None).map_err(engine)?;
    let gradient = grads.of(&student).map(Tensor::to_f64_vec).unwrap_or_default();
    if value.item().abs() > 1e-12 || gradient.iter().any(|g| g.abs() > 1e-9) {
        return fail(format!("at the target the value is {}, the gradient {gradient:?}", value.item()));
    }
    Ok(())
}

/// Least, with a zero gradient, when the student is the teacher; `other` is any other student.
pub fn least_at_the_target(x: &Tensor, other: &Tensor, f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Law {
    let least = f(x, x).map_err(engine)?.item();
    zero_at_the_target(x, |student, target| f(student, target)?.shift(-least))?;
    let elsewhere = f(other, x).map_err(engine)?.item();
    if elsewhere < least - 1e-12 {
        return fail(format!("{elsewhere} elsewhere, {least} at the target"));
    }
    Ok(())
}
