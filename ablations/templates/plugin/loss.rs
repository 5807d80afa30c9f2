//! Loss `my_plugin`.

use dinolab_core::contract::{Loss, LossValue, Needs, Outputs, StepContext};
use dinolab_core::dfdx::prelude::*;
use dinolab_core::dfdx_loss::{DfdxLoss, DfdxOutputs, Scalar};
use dinolab_core::{loss_oracle, plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Squared distance between the student's class token of one global crop and the teacher's of the other, both of length
/// 1: `mean |s / |s| - t / |t||^2` (the loss of BYOL, arXiv:2006.07733, without its predictor).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// What the distance is multiplied by.
    pub scale: f64,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { scale: 1.0 }
    }
}

impl Loss for MyPlugin {
    fn needs(&self) -> Needs {
        Needs { min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        // Rows are crop-major: the first half is crop 0 of every image, the second half crop 1.
        let (b, teacher) = (out.images, out.teacher_cls);
        let other = Tensor::cat(&[&teacher.narrow(b, b)?, &teacher.narrow(0, b)?])?;
        let difference = out.student_cls.l2_normalize(1e-12)?.sub(&other.l2_normalize(1e-12)?)?;
        let distance = difference.square()?.sum_axis(1)?.mean()?;
        distance.scale(self.scale).map(LossValue::of)
    }
}

plugin!(Loss, "my_plugin", MyPlugin);

// The same once more, in dfdx: what `check my_plugin` holds the loss above to.
loss_oracle!("my_plugin", MyPlugin);

impl DfdxLoss for MyPlugin {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let shape = *out.student_cls.shape();
        let mut teacher = out.teacher_cls.as_vec();
        let half = teacher.len() / 2;
        teacher.rotate_left(half);
        let teacher = Cpu::default().tensor_from_vec(teacher, shape);
        let length = teacher.clone().square().sum::<_, Axis<1>>().sqrt();
        let teacher = teacher / length.broadcast_like::<_, Axis<1>>(&shape);
        let student = out.student_cls.leaky_trace();
        let length = student.with_empty_tape().square().sum::<(usize,), Axis<1>>().sqrt();
        let student = student / length.broadcast_like::<_, Axis<1>>(&shape);
        Ok((student - teacher).square().sum::<(), _>() * (self.scale / shape.0 as f64))
    }
}
