//! Values and gradients of a function of a case, and central differences to hold them to.

use super::case::{normal, Bound, Case};
use crate::tensor::Tape;
use crate::{Result, Tensor};

/// What the engine gave for a case.
pub(super) struct Measured {
    pub(super) value: Vec<f64>,
    /// The gradient that the result was given.
    pub(super) seed: Vec<f64>,
    /// By input; empty for those that are held fixed.
    pub(super) gradients: Vec<Vec<f64>>,
}

/// A function of a case's inputs.
pub(super) type Function<'a> = dyn Fn(&Bound<'_>) -> Result<Tensor> + 'a;

pub(super) fn tensors(case: &Case, tape: Option<&Tape>) -> Vec<Tensor> {
    let tensor = |x: &super::case::Input| {
        let value = Tensor::from_slice(&x.values, &x.shape).expect("an input has as many values as its shape says");
        tape.filter(|_| x.tracked).map_or(value.clone(), |tape| tape.leaf(&value))
    };
    case.inputs.iter().map(tensor).collect()
}

/// The gradient that a result of this many numbers is given: 1 for a scalar, so that what is printed can be read.
pub(super) fn seed_of(len: usize) -> Vec<f64> {
    if len == 1 {
        vec![1.0]
    } else {
        normal(99, 99, &[len]).to_f64_vec()
    }
}

/// Runs `f` forward and backward.
pub(super) fn measure(case: &Case, f: &Function<'_>) -> Result<Measured, String> {
    let tape = Tape::new();
    let bound = Bound { case, tensors: tensors(case, Some(&tape)) };
    let out = f(&bound).map_err(|e| e.to_string())?;
    let (value, seed) = (out.to_f64_vec(), seed_of(out.len()));
    let zeros = |x: &super::case::Input| if x.tracked { vec![0.0; x.values.len()] } else { Vec::new() };
    let mut gradients: Vec<Vec<f64>> = case.inputs.iter().map(zeros).collect();
    if out.is_tracked() {
        let backward = || {
            let loss = out.mul(&Tensor::from_slice(&seed, out.shape())?)?.sum()?;
            tape.backward(&loss, 1.0, None)
        };
        let grads = backward().map_err(|e| e.to_string())?;
        for (gradient, leaf) in gradients.iter_mut().zip(&bound.tensors) {
            if let Some(found) = grads.of(leaf) {
                *gradient = found.to_f64_vec();
            }
        }
    }
    Ok(Measured { value, seed, gradients })
}

/// Coordinates of every input that are moved.
const COORDINATES: usize = 12;
/// The step of the differences.
const STEP: f64 = 1e-4;
/// How far a gradient may be from them, relative to the largest.
const TOLERANCE: f64 = 1e-6;

/// Holds the gradients to central differences of fourth order in f64. Where differences of two step sizes do not agree
/// with each other (a kink is near, or rounding wins), they say nothing and the coordinate does not count.
pub(super) fn hold_to_differences(case: &Case, f: &Function<'_>, measured: &Measured) -> Result<(), String> {
    for (i, input) in case.inputs.iter().enumerate().filter(|(_, x)| x.tracked) {
        let gradient = &measured.gradients[i];
        let size = gradient.iter().fold(1e-2, |m: f64, g| m.max(g.abs()));
        for j in (0..gradient.len()).step_by(gradient.len().div_ceil(COORDINATES).max(1)) {
            let moved = |by: f64| -> Result<f64, String> {
                let mut case = case.clone();
                case.inputs[i].values[j] += by;
                let out = f(&Bound { case: &case, tensors: tensors(&case, None) }).map_err(|e| e.to_string())?;
                Ok(out.to_f64_vec().iter().zip(&measured.seed).map(|(y, d)| y * d).sum())
            };
            let slope = |far: f64| moved(far).and_then(|a| Ok(a - moved(-far)?));
            let [one, two, four] = [STEP, 2.0 * STEP, 4.0 * STEP].map(slope);
            let (one, two, four) = (one?, two?, four?);
            let fourth_order = |near: f64, far: f64, h: f64| (8.0 * near - far) / (12.0 * h);
            let (fine, coarse) = (fourth_order(one, two, STEP), fourth_order(two, four, 2.0 * STEP));
            if (fine - coarse).abs() > 0.3 * TOLERANCE * size {
                continue;
            }
            let error = (gradient[j] - fine).abs();
            if error.is_nan() || error > TOLERANCE * size {
                let place = position(j, &input.shape);
                return Err(format!(
                    "the gradient of `{}` at {place} is {}, but differences give {}",
                    input.name,
                    number(gradient[j]),
                    number(fine)
                ));
            }
        }
    }
    Ok(())
}

/// How far numbers of an operation, or of a loss of features alone, may be from another statement of them.
pub(super) const CLOSE: f64 = 1e-9;

/// Holds numbers to others: `|a - b| / |b|` is less than [`CLOSE`], with lengths below 1e-3 counted as 1e-3.
pub(super) fn close(what: &str, shape: &[usize], ours: &[f64], theirs: &[f64], who: &str) -> Result<(), String> {
    close_by(CLOSE, what, shape, ours, theirs, who)
}

/// [`close`] with another tolerance.
pub(super) fn close_by(
    tolerance: f64,
    what: &str,
    shape: &[usize],
    ours: &[f64],
    theirs: &[f64],
    who: &str,
) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{what} has {} numbers, but {who} has {}", ours.len(), theirs.len()));
    }
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let norm = length(&mut theirs.iter().copied()).max(1e-3);
    let error = length(&mut ours.iter().zip(theirs).map(|(a, b)| a - b)) / norm;
    if error < tolerance {
        return Ok(());
    }
    let distance = |i: &usize| (ours[*i] - theirs[*i]).abs();
    let worst = (0..ours.len()).max_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
    let place = if ours.len() == 1 { String::new() } else { format!(" at {}", position(worst, shape)) };
    Err(format!("{what}{place} is {}, but {who} gives {}", number(ours[worst]), number(theirs[worst])))
}

fn number(x: f64) -> String {
    let text = format!("{x:.10}");
    if x != 0.0 && (x.abs() < 1e-3 || x.abs() >= 1e6) || !x.is_finite() {
        format!("{x:e}")
    } else {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    }
}

/// Element `i` by its place along each axis.
fn position(mut i: usize, shape: &[usize]) -> String {
    let mut place = vec![0; shape.len()];
    for (p, n) in place.iter_mut().zip(shape).rev() {
        *p = i % n;
        i /= n;
    }
    format!("{place:?}")
}
