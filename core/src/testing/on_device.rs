//! The same operation or loss on another device, in the types of that device.

use half::bf16;

use super::case::{Bound, Case};
use super::gradient::{seed_of, Function, Measured};
use crate::tensor::Tape;
use crate::{DType, Device, Result, Tensor};

/// How far a result or gradient may be from the CPU's in f64, as the length of the difference over its own length.
const fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1.5e-2,
        _ => 2e-5,
    }
}

/// Holds `f` on `device`, in f32 and bf16, to the CPU in f64, on inputs that bf16 holds exactly.
///
/// # Errors
/// What differs.
pub(super) fn hold_on(device: Device, case: &Case, f: &Function<'_>) -> Result<(), String> {
    let mut case = case.clone();
    for x in case.inputs.iter_mut().flat_map(|x| &mut x.values) {
        *x = bf16::from_f64(*x).to_f64();
    }
    let exact = measure_in(&case, f, DType::F64).map_err(|e| e.to_string())?;
    for dtype in [DType::F32, DType::BF16] {
        let found =
            device.with(|| measure_in(&case, f, dtype)).map_err(|e| format!("on {device} in {dtype:?}: {e}"))?;
        near(device, dtype, "the value", &found.value, &exact.value)?;
        for ((input, found), exact) in case.inputs.iter().zip(&found.gradients).zip(&exact.gradients) {
            near(device, dtype, &format!("the gradient of `{}`", input.name), found, exact)?;
        }
    }
    Ok(())
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

fn near(device: Device, dtype: DType, what: &str, found: &[f64], exact: &[f64]) -> Result<(), String> {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    // Numbers that cancel to almost nothing are held to the size of what cancelled: about 1.
    let size = length(&mut exact.iter().copied()).max(0.1 * (exact.len() as f64).sqrt());
    let error = length(&mut found.iter().zip(exact).map(|(a, b)| a - b)) / size;
    if found.len() == exact.len() && (exact.is_empty() || error <= tolerance(dtype)) {
        return Ok(());
    }
    Err(format!("on {device} in {dtype:?} {what} has a relative error of {error:.1e} to the CPU in F64"))
}
