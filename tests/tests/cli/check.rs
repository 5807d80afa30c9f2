//! `dinolab check` passes on everything that is built in, and catches mistakes that are planted here.

use dfdx::prelude::{Axis, BroadcastTo as _, MeanTo as _, SumTo as _, Trace as _, TryMatMul as _, WithEmptyTape as _};
use dinolab_core::contract::{Loss, LossValue, Needs, Outputs, StepContext};
use dinolab_core::dfdx_loss::{DfdxLoss, DfdxOutputs, Scalar};
use dinolab_core::params::Params;
use dinolab_core::tensor::{Grads, Op};
use dinolab_core::testing::{check, hold, names, Case};
use dinolab_core::{dfdx, loss_oracle, plugin, Result, Tensor};
use dinolab_plugins as _;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// A loss of the student's CLS, and perhaps its statement in dfdx.
macro_rules! planted {
    ($type:ident, $name:literal, |$x:ident, $images:ident| $loss:expr) => {
        /// For a test.
        #[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        struct $type {}

        impl Loss for $type {
            fn needs(&self) -> Needs {
                Needs { min_batch: 1, ..Needs::default() }
            }
            fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
                let ($x, $images) = (out.student.cls, out.images);
                let _ = $images;
                let loss: Result<Tensor> = $loss;
                loss.map(LossValue::of)
            }
        }

        plugin!(Loss, $name, $type);
    };
    ($type:ident, $name:literal, |$x:ident, $images:ident| $loss:expr, stops: $stops:literal, |$out:ident| $dfdx:expr) => {
        planted!($type, $name, |$x, $images| $loss);

        impl DfdxLoss for $type {
            fn loss(&self, $out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
                Ok($dfdx)
            }
            fn stops_gradients(&self) -> bool {
                $stops
            }
        }

        loss_oracle!($name, $type);
    };
}

/// x^2, whose derivative is said to be `slope` x.
struct Square {
    slope: f64,
    x: Option<Tensor>,
}

impl Op for Square {
    fn name(&self) -> &'static str {
        "square"
    }
    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        self.x = Some(inputs[0].detach());
        inputs[0].detach().square()
    }
    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let x = self.x.expect("saved by forward");
        grads.add(0, x.mul(&dy)?.scale(self.slope)?)
    }
}

planted!(Right, "planted_nothing", |x, images| Square { slope: 2.0, x: None }.apply(&[x])?.mean());
planted!(FactorTwo, "planted_factor_two", |x, images| Square { slope: 4.0, x: None }.apply(&[x])?.mean());
planted!(Sign, "planted_sign", |x, images| Square { slope: -2.0, x: None }.apply(&[x])?.mean());

// Each global crop predicts the other, which should be held fixed.
planted!(
    Detach,
    "planted_missing_detach",
    |x, images| {
        let other = Tensor::cat(&[&x.narrow(images, images)?, &x.narrow(0, images)?])?;
        x.mul(&other)?.sum()
    },
    stops: true,
    |out| {
        let n = 2 * out.step.images;
        let swap: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % n == (i / n + n / 2) % n))).collect();
        let swap = dfdx::prelude::TensorFromVec::tensor_from_vec(&dfdx::prelude::Cpu::default(), swap, (n, n));
        (out.student_cls.leaky_trace() * swap.matmul(out.student_cls.clone())).sum()
    }
);

planted!(
    WrongAxis,
    "planted_wrong_axis",
    |x, images| x.transpose()?.softmax()?.square()?.sum(),
    stops: false,
    |out| out.student_cls.leaky_trace().softmax::<Axis<1>>().square().sum()
);

/// Added to a squared length; the statement in dfdx adds 1e-12.
const EPSILON: f64 = 1e-6;

planted!(
    Epsilon,
    "planted_epsilon",
    |x, images| {
        let length = x.square()?.sum_axis(1)?.shift(EPSILON)?.sqrt()?;
        x.scale_rows(&length.recip()?)?.abs()?.mean()
    },
    stops: false,
    |out| {
        let x = out.student_cls.leaky_trace();
        let shape = *dfdx::prelude::HasShape::shape(&x);
        let length = (x.with_empty_tape().square().sum::<(usize,), Axis<1>>() + 1e-12).sqrt();
        (x / length.broadcast_like::<_, Axis<1>>(&shape)).abs().mean()
    }
);

#[test]
fn everything_that_is_built_in_holds() {
    let built_in: Vec<String> =
        names().iter().filter(|(_, name)| !name.starts_with("planted")).map(|(_, name)| name.to_string()).collect();
    for outcome in check(&built_in, 24, 1).unwrap() {
        let failure = outcome.failure.map(|f| format!("{}\n{}", f.reason, f.code)).unwrap_or_default();
        assert_eq!(failure, "", "{} {}", outcome.kind, outcome.name);
    }
    let losses = ["dino", "gram", "ibot", "koleo"];
    let checked = check(&losses.map(String::from), 1, 0).unwrap();
    assert!(checked.iter().all(|o| o.against.starts_with("dfdx")), "every built-in loss has an oracle");
}

/// What the check of a loss says, and the code of the smallest case.
fn caught(name: &str) -> (String, String) {
    let mut outcomes = check(&[name.into()], 32, 0).unwrap();
    let failure = outcomes.pop().unwrap().failure.unwrap_or_else(|| panic!("{name} was not caught"));
    (failure.reason, failure.code)
}

#[test]
fn a_right_gradient_is_not_blamed() {
    assert!(check(&["planted_nothing".into()], 32, 0).unwrap()[0].failure.is_none());
}

#[test]
fn a_factor_of_two_is_caught_by_differences_and_shrunk() {
    let (reason, code) = caught("planted_factor_two");
    assert!(reason.contains("`student_cls`") && reason.contains("differences give"), "{reason}");
    // One image of two channels in two crops is the smallest there is.
    assert!(code.contains(r#".tracked("student_cls", &[2, 2], "#), "{code}");
    assert!(code.contains(r#"hold("loss", "planted_factor_two", &case).unwrap();"#), "{code}");
}

#[test]
fn a_wrong_sign_is_caught_by_differences() {
    let (reason, _) = caught("planted_sign");
    assert!(reason.contains("differences give"), "{reason}");
}

#[test]
fn a_missing_detach_is_caught_by_the_oracle() {
    let (reason, _) = caught("planted_missing_detach");
    assert!(reason.contains("the gradient of `student_cls`") && reason.contains("dfdx gives"), "{reason}");
}

#[test]
fn a_wrong_axis_is_caught_by_the_oracle() {
    let (reason, _) = caught("planted_wrong_axis");
    assert!(reason.contains("dfdx gives"), "{reason}");
}

#[test]
fn another_epsilon_is_caught_by_the_oracle() {
    let (reason, _) = caught("planted_epsilon");
    assert!(reason.contains("dfdx gives"), "{reason}");
}

/// The code that a failure prints, for the factor of two, as anyone would paste it.
#[test]
fn the_printed_case_fails_in_the_same_way() {
    let case = Case::new(json!({
        "config": {}, "images": 1, "locals": 0, "height": 1, "width": 1, "dim": 2, "masked": [0]
    }))
    .tracked("student_cls", &[2, 2], &[0.5005, 0.0005, 0.0005, 0.0005])
    .tracked("student_patches", &[2, 1, 2], &[0.0005; 4])
    .fixed("teacher_cls", &[2, 2], &[0.0005; 4])
    .fixed("teacher_patches", &[2, 1, 2], &[0.0005; 4]);
    let reason = hold("loss", "planted_factor_two", &case).unwrap_err();
    assert_eq!(reason, "the gradient of `student_cls` at [0, 0] is 0.5005, but differences give 0.25025");
    assert_eq!(hold("loss", "planted_nothing", &case), Ok(()));
}

#[test]
fn an_unknown_name_is_an_error_with_the_nearest() {
    let error = check(&["koleoo".into()], 1, 0).unwrap_err().to_string();
    assert!(error.contains("did you mean `koleo`?"), "{error}");
}
