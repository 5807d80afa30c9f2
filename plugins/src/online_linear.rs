//! A linear classifier trained beside the rest on features that it does not change: how well they separate classes, in the
//! log.

use dinolab_core::contract::{Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext};
use dinolab_core::nn::Linear;
use dinolab_core::params::{ParamRole, Params};
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::classify::{classify, of_labels};

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
}

impl Loss for OnlineLinearLoss {
    fn needs(&self) -> Needs {
        Needs { locals: false, teacher: false, classes: Some(self.classifier.to), min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let logits = self.classifier.forward(params, &out.student.cls.detach())?.cast(context.dtype)?;
        let own = of_labels(out.labels.expect("`needs` asks for labels"), self.classifier.to, context.dtype)?;
        let own = Tensor::cat(&vec![&own; out.globals])?;
        classify(&logits, &own)
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let outputs = rows.globals * self.classifier.to as f64;
        let forward_flops = 2.0 * rows.globals * self.classifier.parameters();
        LossCost { forward_flops, activations: 2.0 * outputs, outputs, ..LossCost::default() }
    }
}
