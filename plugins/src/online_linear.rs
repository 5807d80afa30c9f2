//! A linear classifier trained beside the rest on features that it does not change: how well they separate classes, in the
//! log.

use dinolab_core::contract::{Loss, LossCost, LossRows, LossValue, Needs, Outputs, StepContext};
use dinolab_core::nn::Linear;
use dinolab_core::params::{ParamRole, Params};
use dinolab_core::registry::LossContext;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Loss, "online_linear", OnlineLinear, OnlineLinearLoss::build);

/// Cross-entropy of a linear classifier on the student's class tokens of the global crops. The tokens are held fixed, so
/// that nothing but the classifier learns from labels.
///
/// The log has its accuracy on the crops of the step, `loss/<name>/accuracy`, before the step's update. Images without a label
/// count with a loss and an accuracy of zero.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OnlineLinear {
    /// Classes of the data.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub classes: usize,
}

#[derive(Debug)]
struct OnlineLinearLoss {
    classifier: Linear,
}

impl OnlineLinearLoss {
    fn build(config: OnlineLinear, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let (dim, classes) = (context.dim, config.classes);
        let classifier = context
            .params
            .role(ParamRole::Output, |p| p.scope("classifier", |p| Linear::declare(p, dim, classes, true)));
        Ok(Box::new(Self { classifier }))
    }

    /// The share of rows whose own class has the greatest logit. `own` is one-hot, or zero in a row without a label.
    fn accuracy(&self, logits: &Tensor, own: &Tensor) -> Result<Tensor> {
        // By how much the other logits are above the row's own.
        let of_own = logits.mul(own)?.sum_axis(1)?.reshape(&[logits.dim(0), 1])?;
        let above = logits.sub(&of_own.matmul(&Tensor::full(&[1, logits.dim(1)], logits.dtype(), 1.0)?)?)?.relu()?;
        let beaten = above.sum_axis(1)?.scale(1e6)?;
        let right = beaten.neg()?.shift(1.0)?.relu()?.mul(&own.sum_axis(1)?)?;
        right.mean()
    }
}

impl Loss for OnlineLinearLoss {
    fn needs(&self) -> Needs {
        Needs { teacher: false, classes: Some(self.classifier.to), min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let logits = self.classifier.forward(params, &out.student.cls.detach())?.cast(context.dtype)?;
        let n = self.classifier.to;
        // Row `n` is that of an image without a label.
        let one_hot: Vec<f64> = (0..(n + 1) * n).map(|i| f64::from(u8::from(i / n == i % n))).collect();
        let own = Tensor::from_f64(&one_hot, &[n + 1, n], context.dtype)?;
        let own = own.gather_rows(out.labels.expect("`needs` asks for labels"))?;
        let own = Tensor::cat(&vec![&own; out.globals])?;
        let rows: Vec<u32> = (0..logits.dim(0) as u32).collect();
        let rows = Tensor::from_slice(&rows, &[rows.len()])?;
        let weights = Tensor::full(&[logits.dim(0)], context.dtype, 1.0 / logits.dim(0) as f64)?;
        let loss = logits.soft_cross_entropy(&own, &rows, &rows, &weights, 1.0)?;
        let accuracy = self.accuracy(&logits.detach(), &own)?;
        Ok(LossValue::of(loss).with_parts(vec![("accuracy", accuracy)]))
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let outputs = rows.globals * self.classifier.to as f64;
        let forward_flops = 2.0 * rows.globals * self.classifier.parameters();
        LossCost { forward_flops, activations: 2.0 * outputs, outputs, ..LossCost::default() }
    }
}
