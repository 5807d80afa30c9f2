//! An operation's independent statement in dfdx.

use dfdx::prelude::{
    Backward as _, Cpu, Gradients, HasShape as _, OwnedTape, Shape, SumTo as _, Tensor as Dfdx, TensorFromVec as _,
};

use super::case::{Bound, Case, Cases};
use super::gradient::{close, hold_to_differences, measure, seed_of};
use super::on_device::{hold_on, on, OnDevice};
use crate::dfdx_loss::gradient;
use crate::{DType, Device, Result, Tensor};

/// What an operation is held to: registered with `inventory::submit!`, found by name. [`check`](super::check) holds it to
/// dfdx and to differences on random cases, `dinolab doctor` [on a device](Self::on_device) to the CPU on large ones.
///
/// ```
/// use dfdx::prelude::*;
/// use dinolab_core::testing::{cases, tracked, OpOracle};
/// use dinolab_core::{dfdx, inventory};
/// use proptest::strategy::Strategy as _;
/// use serde_json::json;
///
/// inventory::submit! {
///     OpOracle {
///         name: "cube",
///         cases: || {
///             let options = (1usize..9).prop_map(|n| json!({ "n": n }));
///             cases(options, |c| vec![tracked("x", &[c.size("n")])]).large([json!({ "n": 300 })])
///         },
///         engine: |c| c.tensor("x").square()?.mul(c.tensor("x")),
///         dfdx: |mut s| {
///             let x = s.leaf("x", (s.size("n"),));
///             Some(s.is(x.leaky_trace().powi(3)))
///         },
///     }
/// }
/// # dinolab_core::testing::check(&["cube".into()], 20, 0).unwrap().iter().for_each(|o| assert!(o.failure.is_none()));
/// ```
pub struct OpOracle {
    /// The operation's name.
    pub name: &'static str,
    /// Random cases and large ones.
    pub cases: fn() -> Cases,
    /// The operation as the engine has it.
    pub engine: fn(&Bound<'_>) -> Result<Tensor>,
    /// The same in dfdx; `None` for a case at which it has no derivative or several right results.
    pub dfdx: fn(Statement<'_>) -> Option<Stated>,
}

inventory::collect!(OpOracle);

/// A case on its way to a statement in dfdx.
pub struct Statement<'a> {
    case: &'a Case,
    leaves: Vec<(String, Gradient)>,
}

type Gradient = Box<dyn Fn(&mut Gradients<f64, Cpu>) -> Vec<f64>>;

impl std::ops::Deref for Statement<'_> {
    type Target = Case;
    fn deref(&self) -> &Case {
        self.case
    }
}

impl Statement<'_> {
    /// An input as a dfdx tensor. It joins the tape by `leaky_trace()`.
    ///
    /// # Panics
    /// If the case has no such input, or the shape does not fit.
    pub fn leaf<S: Shape>(&mut self, name: &str, shape: S) -> Dfdx<S, f64, Cpu> {
        let input = self.case.input(name);
        let leaf = Cpu::default().tensor_from_vec(input.values.clone(), shape);
        if input.tracked {
            let own = leaf.clone();
            self.leaves.push((name.into(), Box::new(move |gradients| gradient(gradients, &own))));
        }
        leaf
    }

    /// The statement: the result is `y`.
    pub fn is<S: Shape>(self, y: Dfdx<S, f64, Cpu, OwnedTape<f64, Cpu>>) -> Stated {
        let value = y.as_vec();
        let seed = Cpu::default().tensor_from_vec(seed_of(value.len()), *y.shape());
        let mut gradients = (y * seed).sum::<(), _>().backward();
        let gradients = self.leaves.iter().map(|(name, of)| (name.clone(), of(&mut gradients))).collect();
        Stated { value, gradients }
    }

    /// The statement of an operation without a gradient.
    pub fn is_constant<S: Shape>(self, y: Dfdx<S, f64, Cpu>) -> Stated {
        Stated { value: y.as_vec(), gradients: Vec::new() }
    }
}

/// Value and gradients by dfdx.
pub struct Stated {
    value: Vec<f64>,
    gradients: Vec<(String, Vec<f64>)>,
}

impl OpOracle {
    /// All of them, by name.
    pub fn all() -> Vec<&'static Self> {
        let mut all: Vec<_> = inventory::iter::<Self>.into_iter().collect();
        all.sort_unstable_by_key(|oracle| oracle.name);
        all
    }

    /// How far the operation in `dtype` on `device` is from the CPU in f64, over its large cases.
    ///
    /// # Errors
    /// If it fails.
    pub fn on_device(&self, device: Device, dtype: DType) -> Result<OnDevice> {
        let cases = (self.cases)().for_device();
        cases
            .iter()
            .try_fold(OnDevice::default(), |worst, case| Ok(worst.worse(on(device, dtype, case, &self.engine)?)))
    }

    /// Holds the operation to dfdx and to central differences on one case, and on a device to the CPU; false if the case
    /// says nothing.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn hold(&self, case: &Case, device: Device) -> Result<bool, String> {
        let Some(stated) = (self.dfdx)(Statement { case, leaves: Vec::new() }) else { return Ok(false) };
        let measured = measure(case, &self.engine)?;
        let all = [measured.value.len()];
        close("the value", &all, &measured.value, &stated.value, "dfdx")?;
        for (name, theirs) in &stated.gradients {
            let at = case.inputs.iter().position(|x| x.name == *name).expect("the leaf was made from it");
            let what = format!("the gradient of `{name}`");
            close(&what, &case.inputs[at].shape, &measured.gradients[at], theirs, "dfdx")?;
        }
        hold_to_differences(case, &self.engine, &measured)?;
        if device != Device::Cpu {
            hold_on(device, case, &self.engine)?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tolerance;

    #[test]
    fn large_cases_in_f32_agree_with_f64_on_the_cpu() {
        for oracle in OpOracle::all() {
            let error = oracle.on_device(Device::Cpu, DType::F32).unwrap();
            let limit = tolerance(DType::F32);
            assert!(error.value < limit && error.gradient < limit, "{}: {error:?}", oracle.name);
        }
    }
}
