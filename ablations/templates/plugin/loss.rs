//! Loss `my_plugin`.

use dinolab_core::contract::{
    Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext,
};
use dinolab_core::dfdx::prelude::*;
use dinolab_core::dfdx_loss::{gelu, linear, unit_rows, DfdxLoss, DfdxOutputs, Scalar};
use dinolab_core::nn::{Activation, Mlp};
use dinolab_core::params::Params;
use dinolab_core::{loss_oracle, plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Squared distance between a prediction from the student's class token of one global crop and the teacher's of the other,
/// both of length 1: `mean |q(s) / |q(s)| - t / |t||^2`, with the predictor q an MLP (the loss of BYOL, arXiv:2006.07733,
/// without its projector).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// Width of the predictor's hidden layer.
    #[schemars(range(min = 1, max = 100_000), extend("x-width" = true))]
    pub hidden: usize,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { hidden: 64 }
    }
}

/// The loss, with the layers that it owns.
#[derive(Debug)]
struct Predicted {
    predictor: Mlp,
}

impl Predicted {
    fn build(config: MyPlugin, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let widths = [context.dim, config.hidden, context.dim];
        // In recipes and checkpoints these are `my_plugin_head.predictor.0.weight` and so on.
        let predictor = context.params.scope("predictor", |p| Mlp::declare(p, &widths, Activation::Gelu, true));
        Ok(Box::new(Self { predictor }))
    }
}

impl Loss for Predicted {
    fn needs(&self) -> Needs {
        Needs { min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        // Rows are crop-major: the first half is crop 0 of every image, the second half crop 1.
        let (b, teacher) = (out.images, out.teacher.cls);
        let other = Tensor::cat(&[&teacher.narrow(b, b)?, &teacher.narrow(0, b)?])?;
        let predicted = self.predictor.forward(params, out.student.cls)?;
        let difference = predicted.l2_normalize(1e-12)?.sub(&other.l2_normalize(1e-12)?)?;
        difference.square()?.sum_axis(1)?.mean().map(LossValue::of)
    }

    // For `dinolab recipe check --cost`.
    fn cost(&self, rows: &LossRows) -> LossCost {
        let forward_flops = 2.0 * self.predictor.parameters() * rows.globals;
        let activations = rows.globals * self.predictor.activations();
        LossCost { forward_flops, activations, ..LossCost::default() }
    }
}

plugin!(Loss, "my_plugin", MyPlugin, Predicted::build);

// The same once more, in dfdx: what `check my_plugin` holds the loss above to.
loss_oracle!("my_plugin", MyPlugin);

impl DfdxLoss for MyPlugin {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let shape = *out.teacher_cls.shape();
        let mut teacher = out.teacher_cls.as_vec();
        let half = teacher.len() / 2;
        teacher.rotate_left(half);
        let teacher = unit_rows(Cpu::default().tensor_from_vec(teacher, shape).leaky_traced());
        let hidden = gelu(linear(out.student_cls.leaky_trace(), &out.params, "predictor.0."));
        let predicted = unit_rows(linear(hidden, &out.params, "predictor.2."));
        Ok((predicted - teacher).square().sum::<(), _>() / shape.0 as f64)
    }
}
