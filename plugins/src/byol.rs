//! BYOL: the student predicts the teacher's projection of the other crop, without negative pairs.

use dinolab_core::contract::{
    Loss, LossContext, LossCost, LossRows, LossValue, ModelOutputs, Needs, Outputs, StepContext, TargetSpec,
};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::projector::{Projector, ProjectorConfig};

plugin!(Loss, "byol", Byol, ByolLoss::build);

/// Squared distance between the student's prediction from one global crop and the teacher's projection of the other, both
/// of length 1.
///
/// With the student's projection z, the predictor q and the teacher's projection t of images i:
///
/// ```text
/// loss = sum over the crops c of  mean_i |q(z_ci) / |q(z_ci)| - t_di / |t_di||^2,  d the other crop
/// ```
///
/// (Grill et al., arXiv:2006.07733, equation 2, symmetrised). The statistics of batch norm are those of both crops of a
/// micro-batch together; the teacher's are its own batch's too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Byol {
    /// The projector, which the teacher has too.
    pub projector: ProjectorConfig,
    /// Width of the predictor's hidden layer.
    #[schemars(range(min = 1, max = 10_000_000), extend("x-width" = true))]
    pub predictor_hidden: usize,
}

impl Default for Byol {
    fn default() -> Self {
        Self { projector: ProjectorConfig::default(), predictor_hidden: 2048 }
    }
}

#[derive(Debug)]
struct ByolLoss {
    config: Byol,
    projector: Projector,
    predictor: Projector,
}

impl Byol {
    fn predictor(&self) -> ProjectorConfig {
        ProjectorConfig { hidden: self.predictor_hidden, output: self.projector.output, layers: 2 }
    }
}

impl ByolLoss {
    fn build(config: Byol, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let (params, dim) = (&mut *context.params, context.dim);
        let projector = Projector::declare(params, "projector", dim, &config.projector);
        let predictor = Projector::declare(params, "predictor", config.projector.output, &config.predictor());
        Ok(Box::new(Self { config, projector, predictor }))
    }
}

impl Loss for ByolLoss {
    fn needs(&self) -> Needs {
        let targets = Some(TargetSpec { width: self.config.projector.output, distribution: false, features: false });
        Needs { locals: false, targets, teacher: false, whole_batch: true, min_batch: 2, ..Needs::default() }
    }

    fn project(&self, params: &Params<'_>, outputs: &ModelOutputs<'_>) -> Result<Tensor> {
        self.projector.forward(params, outputs.cls)
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let (b, targets) = (out.images, out.targets.expect("`needs` asks for targets"));
        let predicted = self.predictor.forward(params, &self.project(params, &out.student)?)?;
        let (predicted, targets) = (predicted.cast(context.dtype)?, targets.cast(context.dtype)?);
        let other = Tensor::cat(&[&targets.narrow(b, b)?, &targets.narrow(0, b)?])?;
        let distance = predicted.l2_normalize(1e-12)?.sub(&other.l2_normalize(1e-12)?)?.square()?;
        distance.sum()?.scale(1.0 / b as f64).map(LossValue::of)
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let of_projector = self.projector.cost(rows.globals, rows.globals);
        let of_predictor = self.predictor.cost(rows.globals, 0.0);
        LossCost {
            forward_flops: of_projector.forward_flops + of_predictor.forward_flops,
            activations: of_projector.activations + of_predictor.activations,
            ..of_projector
        }
    }
}
