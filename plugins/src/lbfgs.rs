//! Minimisation of a smooth function by L-BFGS: for probes that fit a convex model to features.

use std::collections::VecDeque;

/// Pairs of steps and gradient changes that are remembered.
const MEMORY: usize = 10;

/// Follows L-BFGS (Nocedal and Wright, "Numerical Optimization", algorithm 7.4 and 7.5) with Armijo backtracking from
/// `x` for at most `iterations` steps, and leaves the best point in `x`. `f` gives value and gradient. There is nothing
/// random in it; it ends early when no step makes the value smaller.
pub(crate) fn minimize<E>(
    x: &mut Vec<f64>,
    iterations: usize,
    mut f: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
) -> Result<f64, E> {
    let (mut value, mut gradient) = f(x)?;
    let mut memory: VecDeque<(Vec<f64>, Vec<f64>)> = VecDeque::new();
    for _ in 0..iterations {
        // Nothing is left to gain but rounding.
        if dot(&gradient, &gradient).sqrt() <= 1e-10 * value.abs().max(1.0) {
            break;
        }
        let direction = direction(&gradient, &memory);
        let slope = dot(&direction, &gradient);
        // Without curvature yet, a step of unit length; with it, the full quasi-Newton step.
        let mut rate = if memory.is_empty() { 1.0 / dot(&gradient, &gradient).sqrt().max(1.0) } else { 1.0 };
        let accepted = loop {
            let next: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + rate * d).collect();
            let (next_value, next_gradient) = f(&next)?;
            if next_value < value && next_value <= value + 1e-4 * rate * slope {
                break Some((next, next_value, next_gradient));
            }
            rate *= 0.5;
            if rate < 1e-6 {
                break None;
            }
        };
        let Some((next, next_value, next_gradient)) = accepted else { break };
        let difference = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
        let (step, change) = (difference(&next, x), difference(&next_gradient, &gradient));
        if dot(&step, &change) > 1e-12 * dot(&change, &change) {
            memory.push_back((step, change));
            if memory.len() > MEMORY {
                memory.pop_front();
            }
        }
        (*x, value, gradient) = (next, next_value, next_gradient);
    }
    Ok(value)
}

/// The two-loop recursion: minus the inverse Hessian estimate times the gradient.
fn direction(gradient: &[f64], memory: &VecDeque<(Vec<f64>, Vec<f64>)>) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut along = Vec::with_capacity(memory.len());
    for (step, change) in memory.iter().rev() {
        let a = dot(step, &q) / dot(step, change);
        add(&mut q, -a, change);
        along.push(a);
    }
    if let Some((step, change)) = memory.back() {
        let scale = dot(step, change) / dot(change, change);
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((step, change), a) in memory.iter().zip(along.into_iter().rev()) {
        let b = dot(change, &q) / dot(step, change);
        add(&mut q, a - b, step);
    }
    q
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_finds_the_minimum_of_an_ill_conditioned_bowl() {
        let scale = [1.0, 100.0, 0.01];
        let mut x = vec![5.0, -3.0, 8.0];
        let f = |x: &[f64]| {
            let value = x.iter().zip(scale).map(|(x, s)| s * ((x - 1.0).powi(2) + (x - 1.0).powi(4))).sum();
            let gradient = x.iter().zip(scale).map(|(x, s)| s * (2.0 * (x - 1.0) + 4.0 * (x - 1.0).powi(3))).collect();
            Ok::<_, std::convert::Infallible>((value, gradient))
        };
        let Ok(value) = minimize(&mut x, 60, f);
        assert!(value < 1e-12 && x.iter().all(|x| (x - 1.0).abs() < 1e-5), "{x:?}");
    }
}
