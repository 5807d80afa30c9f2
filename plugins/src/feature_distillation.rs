//! Feature distillation: the student's features, through a linear layer each for CLS and patches, point where a teacher's do.

use dinolab_core::contract::{
    Loss, LossContext, LossCost, LossRows, LossValue, ModelOutputs, Needs, Outputs, StepContext, TargetSpec,
};
use dinolab_core::nn::Linear;
use dinolab_core::params::{ParamRole, Params};
use dinolab_core::{plugin, Error, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Loss, "feature_distillation", FeatureDistillation, FeatureDistillationLoss::build);

/// One minus the cosine between a teacher's features and what linear layers make of the student's, for CLS and for every patch
/// of the global crops.
///
/// With the student's CLS s_i and patches s_ip, the teacher's t_i and t_ip, and linear layers A and B:
///
/// ```text
/// loss = cls_weight * mean_i [1 - cos(A s_i, t_i)] + patch_weight * mean_ip [1 - cos(B s_ip, t_ip)]
/// ```
///
/// (the cosine terms of AM-RADIO: Ranzinger et al., arXiv:2312.06709, section 3.3). Neither heads nor prototypes are asked of the
/// teacher, so published weights can teach: `[teacher] plugin = "frozen"` with a folder that `dinolab import` wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FeatureDistillation {
    /// Weight of the CLS term.
    #[schemars(range(min = 0, max = 1e6))]
    pub cls_weight: f64,
    /// Weight of the patch term.
    #[schemars(range(min = 0, max = 1e6))]
    pub patch_weight: f64,
    /// Width D of the teacher's features; by default the student's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub teacher_dim: Option<usize>,
}

impl Default for FeatureDistillation {
    fn default() -> Self {
        Self { cls_weight: 1.0, patch_weight: 1.0, teacher_dim: None }
    }
}

#[derive(Debug)]
struct FeatureDistillationLoss {
    config: FeatureDistillation,
    teacher_dim: usize,
    of_cls: Linear,
    of_patches: Linear,
}

impl FeatureDistillationLoss {
    fn build(config: FeatureDistillation, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        if config.cls_weight == 0.0 && config.patch_weight == 0.0 {
            let problem = "cls_weight and patch_weight are both 0: nothing is compared";
            return Err(Error::user(problem, "let one of them be above 0, or disable the loss"));
        }
        let (dim, teacher_dim) = (context.dim, config.teacher_dim.unwrap_or(context.dim));
        let [of_cls, of_patches] = ["cls", "patches"].map(|scope| {
            let layer = |p: &mut _| Linear::declare(p, dim, teacher_dim, true);
            context.params.role(ParamRole::Output, |p| p.scope(scope, layer))
        });
        Ok(Box::new(Self { config, teacher_dim, of_cls, of_patches }))
    }
}

/// The mean of one minus the cosine between rows.
fn one_minus_cosine(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let rows = a.dim(0) as f64;
    let cosines = a.l2_normalize(EPS)?.mul(&b.l2_normalize(EPS)?)?.sum()?;
    cosines.scale(-1.0 / rows)?.shift(1.0)
}

/// The least length that features are divided by.
const EPS: f64 = 1e-12;

impl Loss for FeatureDistillationLoss {
    fn needs(&self) -> Needs {
        let targets = TargetSpec { width: self.teacher_dim, distribution: false, features: true };
        Needs { locals: false, targets: Some(targets), teacher: false, min_batch: 1, ..Needs::default() }
    }

    /// CLS `[G*B, D]`, then patches `[G*B*P, D]`, as they are.
    fn project(&self, _: &Params<'_>, outputs: &ModelOutputs<'_>) -> Result<Tensor> {
        let patches = outputs.patches;
        let rows = patches.reshape(&[patches.dim(0) * patches.dim(1), patches.dim(2)])?;
        Tensor::cat(&[outputs.cls, &rows])
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let targets = out.targets.expect("`needs` asks for targets").cast(context.dtype)?;
        let (cls, patches) = (out.student.cls, out.student.patches);
        let (images, count) = (cls.dim(0), patches.dim(0) * patches.dim(1));
        let rows = patches.reshape(&[count, patches.dim(2)])?;
        let predicted = |layer: &Linear, x: &Tensor| layer.forward(params, x)?.cast(context.dtype);
        let of_cls = one_minus_cosine(&predicted(&self.of_cls, cls)?, &targets.narrow(0, images)?)?;
        let of_patches = one_minus_cosine(&predicted(&self.of_patches, &rows)?, &targets.narrow(images, count)?)?;
        let loss = of_cls.scale(self.config.cls_weight)?.add(&of_patches.scale(self.config.patch_weight)?)?;
        Ok(LossValue::of(loss).with_parts(vec![("cls", of_cls), ("patches", of_patches)]))
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let (from, to) = (self.of_cls.from as f64, self.of_cls.to as f64);
        let rows = rows.globals + rows.patches;
        let outputs = rows * to;
        LossCost {
            forward_flops: 2.0 * rows * self.of_cls.parameters(),
            activations: rows * from + 3.0 * outputs,
            outputs,
            targets: 2.0 * outputs,
            ..LossCost::default()
        }
    }
}
