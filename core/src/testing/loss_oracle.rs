//! A loss's independent statement in dfdx, and what holds for every loss.

use proptest::prelude::*;
use proptest::strategy::BoxedStrategy;
use serde_json::{json, Value as Json};

use super::case::{Bound, Case};
use super::gradient::{close_by, hold_to_differences, measure, tensors, CLOSE};
use super::on_device::hold_on;
use super::step_case::{build, config, with_outputs, PARAMS};
pub use super::step_case::{loss_cases, loss_value};
use crate::dfdx_loss::{evaluate, student, DfdxLoss};
use crate::{DType, Device, Error, Result, Tensor};

/// What a registered loss is held to by [`check`](super::check()): made by [`loss_oracle!`](crate::loss_oracle).
pub struct LossOracle {
    /// The loss's name.
    pub name: &'static str,
    /// Reads the loss's config.
    pub read: fn(Json) -> Result<Box<dyn DfdxLoss>>,
    /// Values for options beyond those that are drawn from the schema: a table.
    pub options: fn() -> BoxedStrategy<Json>,
}

inventory::collect!(LossOracle);

/// Registers the independent statement of a loss: `loss_oracle!("name", Config)`, where `Config` is the loss's config,
/// or one that reads the same keys, and implements [`DfdxLoss`]. A third argument draws options
/// beyond those that are true or false or a choice: `|| (1usize..4).prop_map(|k| json!({ "topk": k })).boxed()`.
#[macro_export]
macro_rules! loss_oracle {
    ($name:literal, $config:ty) => {
        $crate::loss_oracle!($name, $config, $crate::testing::loss_oracle::no_options);
    };
    ($name:literal, $config:ty, $options:expr) => {
        $crate::inventory::submit! {
            $crate::testing::loss_oracle::LossOracle {
                name: $name,
                read: |config| Ok(Box::new($crate::registry::read_config::<$config>($name, config)?)),
                options: $options,
            }
        }
    };
}

/// Used by [`loss_oracle!`](crate::loss_oracle).
pub fn no_options() -> BoxedStrategy<Json> {
    Just(Json::Object(serde_json::Map::new())).boxed()
}

/// A case of a loss and what the engine makes of it, as plain data for another implementation to be compared with:
/// `config` with every default, `images` and other sizes, what was drawn (`draws`, `image_draws`), `inputs` by name (`shape`, `values`), the `loss`, and `gradients`
/// by the names of those inputs that have one.
///
/// # Errors
/// If the loss refuses the case.
pub fn loss_record(name: &str, case: &Case) -> Result<Json, String> {
    let text = |e: Error| e.to_string();
    let built = build(name, case).map_err(text)?;
    let compute = |bound: &Bound<'_>| built.value(bound);
    let measured = measure(case, &compute)?;
    let inputs = case.inputs.iter().map(|x| (x.name.clone(), json!({ "shape": x.shape, "values": x.values })));
    let gradients = case.inputs.iter().zip(&measured.gradients).filter(|(x, _)| x.tracked);
    let mut record = case.options.clone();
    let bound = Bound { case, tensors: tensors(case, None) };
    let drawn = with_outputs(&bound, &built, |_, out, _| {
        Ok([out.draws, out.image_draws].map(|drawn| drawn.map(Tensor::to_f64_vec).unwrap_or_default()))
    });
    let [drawn, of_images] = drawn.map_err(text)?;
    record["draws"] = json!(drawn);
    record["image_draws"] = json!(of_images);
    record["config"] = config(name, case).map_err(text)?;
    record["inputs"] = inputs.collect::<serde_json::Map<_, _>>().into();
    record["loss"] = measured.value[0].into();
    record["gradients"] = gradients.map(|(x, g)| (x.name.clone(), json!(g))).collect::<serde_json::Map<_, _>>().into();
    Ok(record)
}

pub(super) fn find(name: &str) -> Option<&'static LossOracle> {
    inventory::iter::<LossOracle>.into_iter().find(|o| o.name == name)
}

/// Holds a loss to its oracle (if it has one), to central differences, and to what holds for every loss.
///
/// # Errors
/// What does not hold.
pub(super) fn hold(name: &str, case: &Case, device: Device) -> Result<(), String> {
    let text = |e: Error| e.to_string();
    let built = build(name, case).map_err(text)?;
    let compute = |bound: &Bound<'_>| built.value(bound);
    let measured = measure(case, &compute)?;
    let oracle = find(name).map(|oracle| (oracle.read)(config(name, case)?)).transpose().map_err(text)?;
    if let Some(oracle) = &oracle {
        let bound = Bound { case, tensors: tensors(case, None) };
        let stated = with_outputs(&bound, &built, |_, out, context| {
            let params = built.params(&bound, PARAMS);
            let (value, gradients) = evaluate(oracle.as_ref(), &params, out, context)?;
            let names = student(out).into_iter().map(|(name, _)| name);
            let names: Vec<String> = names.chain(params.iter().map(|(name, _)| format!("{PARAMS}{name}"))).collect();
            Ok((value, names.into_iter().zip(gradients).collect::<Vec<_>>()))
        });
        let (value, gradients) = stated.map_err(text)?;
        // Layers and norms of a loss's own enlarge rounding: drawn ones may map all rows nearly to zero.
        let tolerance = if built.layout.is_empty() { CLOSE } else { 1e2 * CLOSE };
        close_by(tolerance, "the loss", &[], &measured.value, &[value], "dfdx")?;
        for (input, theirs) in gradients {
            let at = case.inputs.iter().position(|x| x.name == input).expect("a step has its inputs from the case");
            let what = format!("the gradient of `{input}`");
            close_by(tolerance, &what, &case.inputs[at].shape, &measured.gradients[at], &theirs, "dfdx")?;
        }
    }
    if !oracle.is_some_and(|oracle| oracle.stops_gradients()) {
        hold_to_differences(case, &compute, &measured)?;
    }
    for (what, degenerate) in degenerate(case) {
        let measured = measure(&degenerate, &compute)?;
        let numbers = measured.value.iter().chain(measured.gradients.iter().flatten());
        if !numbers.copied().all(f64::is_finite) {
            return Err(format!("on {what} features the loss or its gradient is not finite"));
        }
    }
    single_precision(case, &compute)?;
    match device {
        Device::Cpu => Ok(()),
        device => hold_on(device, case, &compute),
    }
}

/// The case with the student's and the teachers' features as they are when training goes wrong.
fn degenerate(case: &Case) -> Vec<(&'static str, Case)> {
    let with = |f: &dyn Fn(usize, usize, f64) -> f64| {
        let mut case = case.clone();
        for input in case.inputs.iter_mut().filter(|x| !x.name.contains("params.")) {
            let d = input.shape.last().copied().unwrap_or(1);
            input.values = input.values.iter().enumerate().map(|(i, &x)| f(i / d, i % d, x)).collect();
        }
        case
    };
    vec![
        ("collapsed (all rows equal)", with(&|_, column, _| 0.5 + column as f64)),
        ("duplicated (every second row equal)", with(&|row, column, _| ((row / 2 * 7 + column * 3) % 5) as f64 - 1.7)),
        ("zero", with(&|_, _, _| 0.0)),
        ("tiny", with(&|_, _, x| 1e-30 * x)),
        ("huge", with(&|_, _, x| 1e6 * x)),
    ]
}

/// In f32 the loss is that of f64, to a few digits.
fn single_precision(case: &Case, compute: &dyn Fn(&Bound<'_>) -> Result<Tensor>) -> Result<(), String> {
    let value = |dtype: DType| -> Result<f64> {
        let cast = tensors(case, None).iter().map(|x| x.cast(dtype)).collect::<Result<_>>()?;
        Ok(compute(&Bound { case, tensors: cast })?.item())
    };
    let (double, single) =
        (value(DType::F64).map_err(|e| e.to_string())?, value(DType::F32).map_err(|e| e.to_string())?);
    if (double - single).abs() > 1e-3 * double.abs().max(1.0) {
        return Err(format!("in f32 the loss is {single}, in f64 {double}"));
    }
    Ok(())
}
