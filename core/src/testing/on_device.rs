//! The same operation or loss on another device, in the types of that device.

use half::bf16;

use super::case::{Bound, Case};
use super::gradient::{seed_of, Function, Measured};
use crate::tensor::Tape;
use crate::{DType, Device, Result, Tensor};

/// How far a function on a device is from the CPU in f64: the length of the difference over that of the CPU's numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct OnDevice {
    /// Of the result.
    pub value: f64,
    /// Of the gradient of the worst input, given a random gradient of the result.
    pub gradient: f64,
}

impl OnDevice {
    pub(super) fn worse(self, other: Self) -> Self {
        Self { value: self.value.max(other.value), gradient: self.gradient.max(other.gradient) }
    }
}

/// The error that is permitted: 1e-5 in f32, 1e-2 in bf16.
pub const fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1e-2,
        _ => 1e-5,
    }
}

/// On random cases, which are small: few numbers, whose rounding does not average out, and that may cancel to almost
/// nothing. Their error is held to the size of what cancelled, about 1.
const SMALL: (f64, fn(usize) -> f64) = (5.0, |len| 0.1 * (len as f64).sqrt());

/// Measures `f` in `dtype` on `device`.
///
/// # Errors
/// If it fails.
pub(super) fn on(device: Device, dtype: DType, case: &Case, f: &Function<'_>) -> Result<OnDevice> {
    let case = in_bf16(case);
    let errors = errors(device, dtype, &case, f, &measure_in(&case, f, DType::F64)?, |_| 1e-3)?;
    Ok(OnDevice { value: errors[0], gradient: errors[1..].iter().copied().fold(0.0, f64::max) })
}

/// Holds `f` on `device`, in f32 and bf16, to the CPU in f64.
///
/// # Errors
/// What differs.
pub(super) fn hold_on(device: Device, case: &Case, f: &Function<'_>) -> Result<(), String> {
    let case = in_bf16(case);
    let exact = measure_in(&case, f, DType::F64).map_err(|e| e.to_string())?;
    for dtype in [DType::F32, DType::BF16] {
        let (times, least) = SMALL;
        let errors =
            errors(device, dtype, &case, f, &exact, least).map_err(|e| format!("on {device} in {dtype:?}: {e}"))?;
        if let Some(i) = errors.iter().position(|error| *error > times * tolerance(dtype)) {
            let input = i.checked_sub(1).map(|i| format!("gradient of `{}`", case.inputs[i].name));
            let what = input.as_deref().unwrap_or("value");
            return Err(format!(
                "on {device} in {dtype:?} the {what} has a relative error of {:.1e} to the CPU in F64",
                errors[i]
            ));
        }
    }
    Ok(())
}

/// The case with inputs that bf16 holds exactly.
fn in_bf16(case: &Case) -> Case {
    let mut case = case.clone();
    for x in case.inputs.iter_mut().flat_map(|x| &mut x.values) {
        *x = bf16::from_f64(*x).to_f64();
    }
    case
}

/// The error of the value, then of every input's gradient; `least` is the least length, of so many numbers, that an error is
/// held to.
fn errors(
    device: Device,
    dtype: DType,
    case: &Case,
    f: &Function<'_>,
    exact: &Measured,
    least: fn(usize) -> f64,
) -> Result<Vec<f64>> {
    let found = device.with(|| measure_in(case, f, dtype))?;
    let found = [&found.value].into_iter().chain(&found.gradients);
    let exact = [&exact.value].into_iter().chain(&exact.gradients);
    Ok(found.zip(exact).map(|(found, exact)| error(found, exact, least(exact.len()))).collect())
}

/// Infinite where there is no number.
fn error(found: &[f64], exact: &[f64], least: f64) -> f64 {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let size = length(&mut exact.iter().copied()).max(least);
    let error = length(&mut found.iter().zip(exact).map(|(a, b)| a - b)) / size;
    match found.len() == exact.len() {
        true if exact.is_empty() => 0.0,
        true if !error.is_nan() => error,
        _ => f64::INFINITY,
    }
}

/// [`measure`](super::gradient::measure) with inputs of `dtype` on the current device, and a gradient of the result that
/// bf16 holds.
fn measure_in(case: &Case, f: &Function<'_>, dtype: DType) -> Result<Measured> {
    let tape = Tape::new();
    let tensor = |x: &super::case::Input| {
        let value = Tensor::from_f64(&x.values, &x.shape, dtype)?;
        Ok(if x.tracked { tape.leaf(&value) } else { value })
    };
    let tensors: Vec<Tensor> = case.inputs.iter().map(tensor).collect::<Result<_>>()?;
    let bound = Bound { case, tensors };
    let out = f(&bound)?;
    let value = out.to_f64_vec();
    let seed: Vec<f64> = seed_of(out.len()).into_iter().map(|x| bf16::from_f64(x).to_f64()).collect();
    let zeros = |x: &super::case::Input| if x.tracked { vec![0.0; x.values.len()] } else { Vec::new() };
    let mut gradients: Vec<Vec<f64>> = case.inputs.iter().map(zeros).collect();
    if out.is_tracked() {
        let grads = tape.backward_from(&out, Tensor::from_f64(&seed, out.shape(), out.dtype())?, None)?;
        for (gradient, leaf) in gradients.iter_mut().zip(&bound.tensors) {
            if let Some(found) = grads.of(leaf) {
                *gradient = found.to_f64_vec();
            }
        }
    }
    Ok(Measured { value, seed, gradients })
}
