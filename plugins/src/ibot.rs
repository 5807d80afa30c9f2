//! The patch-level loss of iBOT: the student predicts, for the patches hidden from it, what the teacher sees there.

use dinolab_core::contract::{
    Loss, LossContext, LossCost, LossRows, LossValue, ModelOutputs, Needs, Outputs, Schedule, StateSpec, StepContext,
    TargetSpec, Targets,
};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::projection_head::{Head, HeadConfig};
use crate::teacher_targets::{Centered, Centering};

plugin!(Loss, "ibot", Ibot, IbotLoss::build);

/// Cross-entropy between the student's and the teacher's assignments of masked patches to prototypes.
///
/// With masked patches i of global crops c, n_c masked patches in crop c, and C global crops in the batch (those without
/// a mask too), the loss is `-1/C sum_c 1/n_c sum_(i in c) sum_k q_ik log p_ik` (Zhou et al., arXiv:2111.07832).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ibot {
    /// The projection head `ibot_head`.
    pub head: HeadConfig,
    /// Temperature of the student's softmax.
    #[schemars(range(min = 0.001, max = 100))]
    pub student_temp: f64,
    /// Temperature of the teacher's targets.
    #[schemars(extend("minimum" = 0.001, "maximum" = 100))]
    pub teacher_temp: Schedule,
    /// How teacher logits become targets.
    pub centering: Centering,
    /// Sinkhorn-Knopp iterations.
    #[schemars(range(min = 1, max = 1000), extend("x-with" = { "centering": "sinkhorn_knopp" }))]
    pub sinkhorn_iterations: usize,
    /// Momentum of the centre (softmax centring).
    #[schemars(range(min = 0, max = 1), extend("x-with" = { "centering": "softmax" }))]
    pub center_momentum: f64,
}

impl Default for Ibot {
    fn default() -> Self {
        Self {
            head: HeadConfig::default(),
            student_temp: 0.1,
            teacher_temp: Schedule::constant(0.07),
            centering: Centering::default(),
            sinkhorn_iterations: 3,
            center_momentum: 0.9,
        }
    }
}

/// The loss, with its head.
#[derive(Debug)]
struct IbotLoss {
    config: Ibot,
    head: Head,
}

impl IbotLoss {
    fn build(config: Ibot, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let head = Head::declare(context.params, context.dim, &config.head);
        Ok(Box::new(Self { config, head }))
    }

    fn centered(&self) -> Centered<'_> {
        Centered {
            centering: self.config.centering,
            iterations: self.config.sinkhorn_iterations,
            center_momentum: self.config.center_momentum,
            temperature: &self.config.teacher_temp,
        }
    }
}

impl Loss for IbotLoss {
    fn needs(&self) -> Needs {
        let targets = Some(TargetSpec { width: self.config.head.prototypes, distribution: true, features: false });
        Needs { locals: false, targets, masks: true, teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn state(&self) -> Vec<StateSpec> {
        self.centered().state(self.config.head.prototypes)
    }

    fn project(&self, params: &Params<'_>, outputs: &ModelOutputs<'_>) -> Result<Tensor> {
        self.head.forward(params, &outputs.masked_patches()?)
    }

    fn targets(&self, logits: &Tensor, context: &StepContext<'_>) -> Result<Targets> {
        self.centered().compute(logits, context)
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let logits = self.project(params, &out.student)?;
        let targets = out.targets.expect("`needs` asks for targets");
        let rows: Vec<u32> = (0..logits.dim(0) as u32).collect();
        let rows = Tensor::from_slice(&rows, &[rows.len()])?;
        let weights = out.mask_weights.cast(context.dtype)?.scale(1.0 / (out.globals * out.images) as f64)?;
        logits.soft_cross_entropy(targets, &rows, &rows, &weights, self.config.student_temp).map(LossValue::of)
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        self.head.cost(rows.masked, rows.masked)
    }
}
