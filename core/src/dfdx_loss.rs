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

use std::fmt;

use dfdx::prelude::{
    Axis, Backward as _, BroadcastTo as _, Cpu, Gradients, HasShape as _, NoneTape, OwnedTape, SumTo as _,
    Tensor as Dfdx, TensorFromVec as _, Trace as _, WithEmptyTape as _,
};
use dfdx::tensor::AsArray as _;

use crate::contract::{Loss, LossValue, Needs, Outputs, StepContext};
use crate::registry::LossContext;
use crate::tensor::{Grads, Op};
use crate::{Result, Tensor};

/// Rows of features, logits or targets.
pub type Matrix<T = NoneTape> = Dfdx<(usize, usize), f64, Cpu, T>;
/// A matrix on dfdx's tape.
pub type Taped = Matrix<OwnedTape<f64, Cpu>>;
/// A loss on dfdx's tape.
pub type Scalar = Dfdx<(), f64, Cpu, OwnedTape<f64, Cpu>>;

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
    /// `[(G+L)*B, K]` or `[M, K]`.
    pub student_logits: Option<Matrix>,
    /// `[G*B, D]`.
    pub teacher_cls: Matrix,
    /// `[G*B*P, D]`.
    pub teacher_patches: Matrix,
    /// `[G*B, K]` or `[M, K]`.
    pub targets: Option<Matrix>,
    /// `[G*B*P, D]`.
    pub gram_patches: Option<Matrix>,
}

/// A loss stated in dfdx. [`on_the_host`] makes it a [`Loss`] like any other;
/// [`loss_oracle!`](crate::loss_oracle) makes it what another loss is held to.
pub trait DfdxLoss: fmt::Debug + Send + Sync {
    /// What the step has to compute for it.
    fn needs(&self) -> Needs {
        Needs::default()
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
/// only. Features are copied to the host, gradients back.
pub fn on_the_host<L: DfdxLoss + 'static>(loss: L, _: &mut LossContext) -> Result<Box<dyn Loss>> {
    Ok(Box::new(OnTheHost(loss)))
}

#[derive(Debug)]
struct OnTheHost<L>(L);

impl<L: DfdxLoss> Loss for OnTheHost<L> {
    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn note(&self) -> Option<&'static str> {
        Some("takes the slow path: it is computed in dfdx, in f64 on the host")
    }

    fn compute(&self, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let (value, gradients) = evaluate(&self.0, out, context)?;
        let inputs: Vec<&Tensor> = student(out).into_iter().map(|(_, x)| x).collect();
        let pairs = gradients.iter().zip(&inputs);
        let gradients = pairs.map(|(g, x)| Tensor::from_f64(g, x.shape(), x.dtype())).collect::<Result<_>>()?;
        let value = Tensor::scalar(value, context.dtype);
        Known { value, gradients }.apply(&inputs).map(LossValue::of)
    }
}

/// The student's tensors of a step, by name: what a loss may have a gradient to.
pub(crate) fn student<'a>(out: &Outputs<'a>) -> Vec<(&'static str, &'a Tensor)> {
    let all = [
        ("student_cls", Some(out.student_cls)),
        ("student_local_cls", out.student_local_cls),
        ("student_patches", Some(out.student_patches)),
        ("student_logits", out.student_logits),
    ];
    all.into_iter().filter_map(|(name, x)| Some((name, x?))).collect()
}

/// The value, and the gradients of the [`student`]'s tensors.
pub(crate) fn evaluate(
    loss: &dyn DfdxLoss,
    out: &Outputs<'_>,
    context: &StepContext<'_>,
) -> Result<(f64, Vec<Vec<f64>>)> {
    let cpu = Cpu::default();
    let matrix = |x: &Tensor| cpu.tensor_from_vec(x.to_f64_vec(), (x.len() / x.last_dim().max(1), x.last_dim()));
    let outputs = DfdxOutputs {
        step: out,
        student_cls: matrix(out.student_cls),
        student_local_cls: out.student_local_cls.map(matrix),
        student_patches: matrix(out.student_patches),
        student_logits: out.student_logits.map(matrix),
        teacher_cls: matrix(out.teacher_cls),
        teacher_patches: matrix(out.teacher_patches),
        targets: out.targets.map(matrix),
        gram_patches: out.gram.map(|g| matrix(&g.patches)),
    };
    let value = loss.loss(&outputs, context)?;
    let number = value.array();
    let mut gradients = value.backward();
    let DfdxOutputs { student_cls, student_local_cls, student_patches, student_logits, .. } = &outputs;
    let leaves = [Some(student_cls), student_local_cls.as_ref(), Some(student_patches), student_logits.as_ref()];
    Ok((number, leaves.into_iter().flatten().map(|leaf| gradient(&mut gradients, leaf)).collect()))
}

/// The gradient of a leaf; zero if the result does not depend on it.
pub(crate) fn gradient<S: dfdx::prelude::Shape>(
    gradients: &mut Gradients<f64, Cpu>,
    leaf: &Dfdx<S, f64, Cpu>,
) -> Vec<f64> {
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
