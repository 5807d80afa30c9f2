//! The patch-level loss of iBOT: the student predicts, for the patches hidden from it, what the teacher sees there.

use dinolab_core::contract::{
    HeadInput, Loss, LossValue, Needs, Outputs, Schedule, StateSpec, StepContext, TeacherBatch,
};
use dinolab_core::head::HeadConfig;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::teacher_targets::{Centering, Targets};

plugin!(Loss, "ibot", Ibot);

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

impl Ibot {
    fn targets(&self) -> Targets<'_> {
        Targets {
            centering: self.centering,
            iterations: self.sinkhorn_iterations,
            center_momentum: self.center_momentum,
            temperature: &self.teacher_temp,
        }
    }
}

impl Loss for Ibot {
    fn needs(&self) -> Needs {
        let head = Some((HeadInput::MaskedPatches, self.head.clone()));
        Needs { head, masks: true, teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn state(&self) -> Vec<StateSpec> {
        self.targets().state(self.head.prototypes)
    }

    fn targets(&self, teacher: &TeacherBatch<'_>, context: &StepContext<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        self.targets().compute(teacher, context)
    }

    fn compute(&self, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let logits = out.student_logits.expect("`needs` asks for a head");
        let targets = out.targets.expect("`needs` asks for a head");
        let rows: Vec<u32> = (0..logits.dim(0) as u32).collect();
        let rows = Tensor::from_slice(&rows, &[rows.len()])?;
        let weights = out.mask_weights.cast(context.dtype)?.scale(1.0 / (out.globals * out.images) as f64)?;
        logits.soft_cross_entropy(targets, &rows, &rows, &weights, self.student_temp).map(LossValue::of)
    }
}
