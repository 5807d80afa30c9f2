//! Losses stated in dfdx tensors (f64, on the host, on dfdx's own tape): to try an idea in ten lines before it is made
//! fast, and to hold a fast loss to an independent statement (see [`testing`](crate::testing)).
//!
//! ```
//! use dfdx::prelude::*;
//! use dinolab_core::contract::StepContext;
//! use dinolab_core::dfdx_loss::{on_the_host, DfdxLoss, DfdxOutputs, Scalar};
//! use dinolab_core::{dfdx, plugin, Result};
//!
//! /// Mean squared distance of student and teacher CLS.
//! #[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct ClsDistance {}
//!
//! impl DfdxLoss for ClsDistance {
//!     fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
//!         Ok((out.student_cls.leaky_trace() - out.teacher_cls.clone()).square().mean())
//!     }
//! }
//!
//! plugin!(Loss, "cls_distance", ClsDistance, on_the_host);
//! ```

use std::collections::BTreeMap;
use std::fmt;

use dfdx::prelude::{
    Axes2, Axis, Backward as _, BroadcastTo as _, Cpu, Gradients, HasShape as _, NoneTape, OwnedTape, PermuteTo as _,
    Shape, SumTo as _, Tensor as Dfdx, TensorFromVec as _, Trace as _, TryMatMul as _, WithEmptyTape as _,
};
use dfdx::tensor::AsArray as _;

use crate::contract::{Features, Loss, LossContext, LossValue, ModelOutputs, Needs, Outputs, StepContext};
use crate::params::{ParamId, Params};
use crate::tensor::{Grads, Op};
use crate::{Result, Tensor};

/// Rows of features, logits or targets.
pub type Matrix<T = NoneTape> = Dfdx<(usize, usize), f64, Cpu, T>;
/// Numbers of any shape on dfdx's tape.
pub type OnTape<S> = Dfdx<S, f64, Cpu, OwnedTape<f64, Cpu>>;
/// A matrix on dfdx's tape.
pub type Taped = OnTape<(usize, usize)>;
/// A loss on dfdx's tape.
pub type Scalar = OnTape<()>;

/// A constant matrix with these elements, ready to be multiplied with taped ones.
pub fn constant(rows: usize, columns: usize, f: impl Fn(usize, usize) -> f64) -> Taped {
    let values = (0..rows * columns).map(|i| f(i / columns, i % columns)).collect();
    Cpu::default().tensor_from_vec::<(usize, usize)>(values, (rows, columns)).leaky_traced()
}

/// The matrix whose product with `n` rows picks `rows` of them.
pub fn picking(rows: &[usize], n: usize) -> Taped {
    constant(rows.len(), n, |i, j| f64::from(u8::from(rows[i] == j)))
}

/// Rows divided by their length.
pub fn unit_rows(x: Taped) -> Taped {
    let shape = *x.shape();
    let length = x.with_empty_tape().square().sum::<(usize,), Axis<1>>().sqrt();
    x / length.broadcast_like::<_, Axis<1>>(&shape)
}

/// `x Phi(x)`, with the normal distribution's Phi. In dfdx 0.13 the derivative of `accurate_gelu` is wrong by a factor in
/// one of its terms, so it is stated here: `Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)`.
pub fn gelu<S: Shape>(x: OnTape<S>) -> OnTape<S> {
    let (shape, at) = (*x.shape(), x.as_vec());
    let tensor = |values: Vec<f64>| Cpu::default().tensor_from_vec(values, shape);
    let value = tensor(at.clone()).accurate_gelu().as_vec();
    let phi = |i: usize| if at[i] == 0.0 { 0.5 } else { value[i] / at[i] };
    let density = |x: f64| (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let slope: Vec<f64> = (0..at.len()).map(|i| phi(i) + at[i] * density(at[i])).collect();
    let rest = (0..at.len()).map(|i| value[i] - at[i] * slope[i]).collect();
    x * tensor(slope) + tensor(rest)
}

/// `x W^T + b`: a linear layer's weight `[O, I]` and bias `[1, O]` among the parameters of a loss.
///
/// # Panics
/// If there is no weight of that name.
pub fn linear(x: Taped, params: &BTreeMap<String, Matrix>, layer: &str) -> Taped {
    let weight = &params[&format!("{layer}weight")];
    let y = x.matmul(weight.leaky_trace().permute::<(usize, usize), Axes2<1, 0>>());
    let Some(bias) = params.get(&format!("{layer}bias")) else { return y };
    let rows = y.shape().0;
    y + constant(rows, 1, |_, _| 1.0).matmul(bias.leaky_trace())
}

/// A step's outputs as dfdx sees them: every tensor a matrix of rows, crop-major. A student's tensor joins the tape by
/// `leaky_trace()`; everything else is a constant.
pub struct DfdxOutputs<'a> {
    /// The step itself: sizes and masks.
    pub step: &'a Outputs<'a>,
    /// `[G*B, D]`.
    pub student_cls: Matrix,
    /// `[L*B, D]`.
    pub student_local_cls: Option<Matrix>,
    /// `[G*B*P, D]`.
    pub student_patches: Matrix,
    /// The loss's own parameters by name, without the loss's prefix: a vector is one row.
    pub params: BTreeMap<String, Matrix>,
    /// `[G*B, D]`.
    pub teacher_cls: Matrix,
    /// `[G*B*P, D]`.
    pub teacher_patches: Matrix,
    /// `[rows, K]`.
    pub targets: Option<Matrix>,
    /// What else the student gives, by name: `view_<i>_cls` `[crops*B, D]` and `view_<i>_patches` `[crops*B*P, D]` of every
    /// view; with [`Needs::tokens`] `student_registers` `[G*B*R, D]`, `student_local_patches` `[L*B*P, D]` and
    /// `student_prenorm` `[G*B*(1+R+P), D]`; `student_layer_<i>` `[G*B*(1+R+P), D]` of [`Needs::layers`]. And what teachers
    /// give: `teachers.<name>.cls` and `.patches`, `teacher_layer_<i>`, `teacher_view_<i>_cls` and `_patches`.
    pub more: BTreeMap<String, Matrix>,
}

/// A loss stated in dfdx. [`on_the_host`] makes it a [`Loss`] like any other;
/// [`loss_oracle!`](crate::loss_oracle) makes it what another loss is held to.
pub trait DfdxLoss: fmt::Debug + Send + Sync {
    /// What the step has to compute for it.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Declares the loss's own parameters, by the names that [`DfdxOutputs::params`] has; only called for a loss that is
    /// [`on_the_host`].
    fn declare(&self, context: &mut LossContext<'_>) -> Vec<(&'static str, ParamId)> {
        let _ = context;
        Vec::new()
    }

    /// The loss of one (micro-)batch.
    fn loss(&self, out: &DfdxOutputs<'_>, context: &StepContext<'_>) -> Result<Scalar>;

    /// Whether it holds some of the student's outputs fixed (a stop-gradient): then differences of its value say
    /// nothing about its gradient, and a check leaves them out.
    fn stops_gradients(&self) -> bool {
        false
    }
}

/// For [`plugin!`](crate::plugin): `plugin!(Loss, "name", Config, on_the_host)` registers a loss that exists in dfdx
/// only. Features and parameters are copied to the host, gradients back.
pub fn on_the_host<L: DfdxLoss + 'static>(loss: L, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
    let params = loss.declare(context);
    Ok(Box::new(OnTheHost { loss, params }))
}

#[derive(Debug)]
struct OnTheHost<L> {
    loss: L,
    params: Vec<(&'static str, ParamId)>,
}

impl<L: DfdxLoss> Loss for OnTheHost<L> {
    fn needs(&self) -> Needs {
        self.loss.needs()
    }

    fn note(&self) -> Option<&'static str> {
        Some("takes the slow path: it is computed in dfdx, in f64 on the host")
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let own: Vec<(String, Tensor)> =
            self.params.iter().map(|(name, id)| (name.to_string(), params.get(*id))).collect();
        let (value, gradients) = evaluate(&self.loss, &own, out, context)?;
        let inputs: Vec<&Tensor> = student(out).into_iter().map(|(_, x)| x).chain(own.iter().map(|(_, x)| x)).collect();
        let pairs = gradients.iter().zip(&inputs);
        let gradients = pairs.map(|(g, x)| Tensor::from_f64(g, x.shape(), x.dtype())).collect::<Result<_>>()?;
        let value = Tensor::scalar(value, context.dtype);
        Known { value, gradients }.apply(&inputs).map(LossValue::of)
    }
}

/// The student's tensors of a step, by name: what a loss may have a gradient to, beside its parameters.
pub(crate) fn student<'a>(out: &Outputs<'a>) -> Vec<(String, &'a Tensor)> {
    let all = [
        ("student_cls", Some(out.student.cls)),
        ("student_local_cls", out.student.local_cls),
        ("student_patches", Some(out.student.patches)),
        ("student_registers", out.student.registers),
        ("student_local_patches", out.student.local_patches),
        ("student_prenorm", out.student.prenorm),
    ];
    let own = all.into_iter().filter_map(|(name, x)| Some((name.to_string(), x?)));
    let views = out.views.iter().enumerate().flat_map(|(i, view)| of_view(format!("view_{i}"), view));
    own.chain(layers("student", &out.student)).chain(views).collect()
}

/// What teachers give for a loss that asks for it, by name.
fn teachers<'a>(out: &Outputs<'a>) -> Vec<(String, &'a Tensor)> {
    let named = out.teachers.iter().flat_map(|(name, given)| {
        [(format!("teachers.{name}.cls"), &given.cls), (format!("teachers.{name}.patches"), &given.patches)]
    });
    let views = out.teacher_views.iter().enumerate().flat_map(|(i, view)| of_view(format!("teacher_view_{i}"), view));
    named.chain(layers("teacher", &out.teacher)).chain(views).collect()
}

fn layers<'a>(model: &'static str, out: &ModelOutputs<'a>) -> impl Iterator<Item = (String, &'a Tensor)> {
    out.layers.iter().enumerate().map(move |(i, layer)| (format!("{model}_layer_{i}"), layer))
}

fn of_view(name: String, view: &Features) -> [(String, &Tensor); 2] {
    [(format!("{name}_cls"), &view.cls), (format!("{name}_patches"), &view.patches)]
}

/// The value, and the gradients of the [`student`]'s tensors and of the loss's own parameters.
pub(crate) fn evaluate(
    loss: &dyn DfdxLoss,
    params: &[(String, Tensor)],
    out: &Outputs<'_>,
    context: &StepContext<'_>,
) -> Result<(f64, Vec<Vec<f64>>)> {
    let cpu = Cpu::default();
    let matrix = |x: &Tensor| cpu.tensor_from_vec(x.to_f64_vec(), (x.len() / x.last_dim().max(1), x.last_dim()));
    let outputs = DfdxOutputs {
        step: out,
        student_cls: matrix(out.student.cls),
        student_local_cls: out.student.local_cls.map(matrix),
        student_patches: matrix(out.student.patches),
        params: params.iter().map(|(name, x)| (name.clone(), matrix(x))).collect(),
        teacher_cls: matrix(out.teacher.cls),
        teacher_patches: matrix(out.teacher.patches),
        targets: out.targets.map(matrix),
        more: student(out).into_iter().chain(teachers(out)).map(|(name, x)| (name, matrix(x))).collect(),
    };
    let value = loss.loss(&outputs, context)?;
    let number = value.array();
    let mut gradients = value.backward();
    let leaf = |name: &str| match name {
        "student_cls" => &outputs.student_cls,
        "student_local_cls" => outputs.student_local_cls.as_ref().expect("the step has local crops"),
        "student_patches" => &outputs.student_patches,
        more => &outputs.more[more],
    };
    let names: Vec<String> = student(out).into_iter().map(|(name, _)| name).collect();
    let leaves = names.iter().map(|name| leaf(name)).chain(params.iter().map(|(name, _)| &outputs.params[name]));
    Ok((number, leaves.map(|leaf| gradient(&mut gradients, leaf)).collect()))
}

/// The gradient of a leaf; zero if the result does not depend on it.
pub(crate) fn gradient<S: Shape>(gradients: &mut Gradients<f64, Cpu>, leaf: &Dfdx<S, f64, Cpu>) -> Vec<f64> {
    gradients.try_alloc_for(leaf).expect("the host has memory for a gradient");
    gradients.get(leaf).as_vec()
}

/// A scalar whose gradients were computed with it.
struct Known {
    value: Tensor,
    gradients: Vec<Tensor>,
}

impl Op for Known {
    fn name(&self) -> &'static str {
        "dfdx_loss"
    }

    fn forward(&mut self, _: &[&Tensor], _: bool) -> Result<Tensor> {
        Ok(self.value.clone())
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        for (i, gradient) in self.gradients.into_iter().enumerate() {
            grads.add(i, gradient.mul(&dy)?)?;
        }
        Ok(())
    }
}
